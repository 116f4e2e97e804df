"""A fingerprint changes with every bit, name, shape and place, and with nothing else."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vlpost.model.fingerprint import _CHUNK, Fingerprint


def of(**tensors):
    made = Fingerprint()
    for name, tensor in tensors.items():
        made.add(name, tensor)
    return made.hexdigest()


@given(
    values=st.lists(st.floats(width=32, allow_nan=False), min_size=2, max_size=40),
    place=st.integers(0, 39),
    bit=st.integers(0, 31),
)
def test_one_flipped_bit_is_another_fingerprint(values, place, bit):
    tensor = torch.tensor(values)
    flipped = tensor.clone()
    flipped.view(torch.int32)[place % len(values)] ^= torch.tensor(-(2**31) if bit == 31 else 2**bit, dtype=torch.int32)
    assert of(w=tensor) == of(w=tensor.clone())
    assert of(w=tensor) != of(w=flipped)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int8, torch.bool])
def test_order_place_name_shape_and_dtype_count(dtype):
    tensor = torch.arange(12).remainder(5).to(dtype).view(3, 4)
    whole = of(a=tensor, b=tensor)
    assert whole != of(a=tensor)
    assert whole != of(b=tensor, a=tensor)
    assert of(a=tensor) != of(b=tensor)
    assert of(a=tensor) != of(a=tensor.view(4, 3))
    assert of(a=tensor) != of(a=tensor.flip(0))
    assert of(a=tensor.t()) == of(a=tensor.t().contiguous())
    if dtype.is_floating_point:
        assert of(a=tensor) != of(a=tensor.to(torch.float16))


def test_neither_threads_nor_chunks_count(monkeypatch):
    tensor = torch.randn(3 * 2**10 + 7, generator=torch.Generator().manual_seed(0))
    expected = of(w=tensor)
    monkeypatch.setattr("vlpost.model.fingerprint._CHUNK", 100)
    assert of(w=tensor) == expected
    assert _CHUNK > 100
