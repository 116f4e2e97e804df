"""A fingerprint of weights that is the same on every device and with any number of threads."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

_CHUNK = 2**22
"""Elements that are hashed at a time: their hash takes eight bytes each."""
_ODD = -7046029254386353131
"""2^64 / golden ratio as a signed integer, odd: multiplying by it loses nothing."""
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Fingerprint:
    """Collects tensors; two collections have one `hexdigest` when names, order, shapes, dtypes and all bits are equal.

    A tensor counts by sum over i of mix(bits_i + i) modulo 2^64: integers, whose sum does not depend on the order.
    """

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def add(self, name: str, tensor: Tensor) -> None:
        """Adds a tensor under a name."""
        flat = tensor.detach().contiguous().view(-1)
        total = 0
        if flat.dtype == torch.bool:
            flat = flat.to(torch.int8)
        bits = flat.view(_INTEGERS[flat.element_size()])
        for start in range(0, len(bits), _CHUNK):
            part = bits[start : start + _CHUNK].to(torch.int64)
            place = torch.arange(start, start + len(part), device=part.device) * _ODD
            mixed = (part ^ place) * _ODD
            total += int((mixed ^ (mixed >> 29)).sum())
        self._digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {total % 2**64}\n".encode())

    def hexdigest(self) -> str:
        """Returns the fingerprint of all tensors so far."""
        return self._digest.hexdigest()
