"""What a run resumes from beside its weights, exactly: the optimizer's state as named tensors, the random generators' as JSON."""

from __future__ import annotations

import base64
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from .checkpoint import CheckpointError

_UNTOUCHED = "untouched"
"""Marks a parameter without optimizer state, so that a lost entry cannot pass for one."""


def optimizer_tensors(optimizer: Optimizer, names: Sequence[tuple[str, Parameter]]) -> dict[str, Tensor]:
    """Returns the optimizer's per-parameter state as `{"<parameter>/exp_avg": tensor, ...}`, ready for `save_checkpoint`.

    Every parameter of the optimizer needs a name; named ones that it does not hold (frozen) are left out. A parameter that has not
    been updated yet is marked by an empty `<parameter>/untouched`. State must be tensors, scalar or of the parameter's shape, as in
    AdamW; anything else is a `CheckpointError`. Options of the parameter groups (learning rate, betas) are the caller's.
    """
    flat: dict[str, Tensor] = {}
    for name, parameter, _ in _held(optimizer, names):
        entries = {key: value for key, value in optimizer.state.get(parameter, {}).items() if value is not None}
        for key, value in entries.items():
            if not isinstance(value, Tensor):
                raise CheckpointError(
                    f"optimizer state {name}/{key} is a {type(value).__name__}, not a tensor: this optimizer cannot be saved exactly"
                )
            _check_state_shape(f"{name}/{key}", value, parameter)
            flat[f"{name}/{key}"] = value
        if not entries:
            flat[f"{name}/{_UNTOUCHED}"] = torch.empty(0)
    return flat


def load_optimizer_tensors(optimizer: Optimizer, names: Sequence[tuple[str, Parameter]], tensors: Mapping[str, Tensor]) -> None:
    """Gives an optimizer the state that `optimizer_tensors` returned, bit for bit; checks all of it before it changes anything.

    Missing, extra and misshapen entries are a `CheckpointError` that names the parameter.
    """
    by_name: dict[str, dict[str, Tensor]] = {}
    for full, value in tensors.items():
        name, _, key = full.rpartition("/")
        by_name.setdefault(name, {})[key] = value
    held = _held(optimizer, names)
    extra = sorted(by_name.keys() - {name for name, _, _ in held})
    if extra:
        raise CheckpointError(
            f"optimizer state for {extra[0]!r} ({len(extra)} such): no trained parameter has this name; load it into the model it is of"
        )
    keys_of_group: dict[int, tuple[str, set[str]]] = {}
    for name, parameter, group_index in held:
        entries = by_name.get(name, {})
        if not entries:
            raise CheckpointError(
                f"optimizer state for parameter {name!r} is missing; load the state of a run that trains the same parameters"
            )
        if _UNTOUCHED in entries:
            continue
        first, keys = keys_of_group.setdefault(group_index, (name, set(entries)))
        if set(entries) != keys:
            raise CheckpointError(
                f"optimizer state of parameter {name!r} has {sorted(entries)}, that of {first!r} {sorted(keys)}: entries are missing"
            )
        for key, value in entries.items():
            _check_state_shape(f"{name}/{key}", value, parameter)
    for name, parameter, group_index in held:
        # Not `load_state_dict`: it casts the moments to the parameter's dtype.
        optimizer.state.pop(parameter, None)
        if _UNTOUCHED not in by_name[name]:
            group = optimizer.param_groups[group_index]
            on_device = bool(group.get("capturable") or group.get("fused"))
            optimizer.state[parameter] = {
                key: value.detach().to(parameter.device if on_device or value.ndim else "cpu", copy=True)
                for key, value in by_name[name].items()
            }


def _held(optimizer: Optimizer, names: Sequence[tuple[str, Parameter]]) -> list[tuple[str, Parameter, int]]:
    """Returns name, parameter and group index of every parameter of the optimizer."""
    name_of = {parameter: name for name, parameter in names}
    if len({name for name, _ in names}) != len(names):
        raise CheckpointError("two parameters have one name: the optimizer's state could not be told apart")
    held = []
    for index, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            if parameter not in name_of:
                raise CheckpointError(
                    f"a parameter of shape {tuple(parameter.shape)} in optimizer group {index} has no name; hand in all named parameters"
                )
            held.append((name_of[parameter], parameter, index))
    return held


def _check_state_shape(place: str, value: Tensor, parameter: Parameter) -> None:
    if value.ndim and value.shape != parameter.shape:
        raise CheckpointError(
            f"optimizer state {place} has shape {tuple(value.shape)}, its parameter {tuple(parameter.shape)}: the two must be equal"
        )


def rng_state() -> dict[str, Any]:
    """Returns the states of the global generators as plain JSON: Python's, NumPy's, torch's on the CPU and, once in use, on this GPU."""
    version, words, gauss = random.getstate()
    numpy_state: Any = np.random.get_state(legacy=False)
    numpy_state["state"] = {"key": numpy_state["state"]["key"].tolist(), "pos": int(numpy_state["state"]["pos"])}
    state = {"python": [version, list(words), gauss], "numpy": numpy_state, "torch": _to_text(torch.get_rng_state())}
    if torch.cuda.is_initialized():
        state["cuda"] = _to_text(torch.cuda.get_rng_state())
    return state


def load_rng_state(state: Mapping[str, Any]) -> None:
    """Puts the global generators into the states that `rng_state` returned."""
    missing = {"python", "numpy", "torch"} - state.keys()
    if missing:
        raise CheckpointError(f"random state without {', '.join(sorted(missing))}: give what `rng_state` returned")
    if "cuda" in state:
        if not torch.cuda.is_available():
            raise CheckpointError(
                "the random state has a GPU's generator and this machine has no GPU: resume on one, or drop the key 'cuda'"
            )
        torch.cuda.set_rng_state(_from_text(state["cuda"]))
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    inner = state["numpy"]["state"]
    np.random.set_state({**state["numpy"], "state": {"key": np.array(inner["key"], dtype=np.uint32), "pos": inner["pos"]}})
    torch.set_rng_state(_from_text(state["torch"]))


@contextmanager
def isolated_rng() -> Iterator[None]:
    """Restores the global generators on leaving: for code that reseeds or advances them, as vLLM does when it starts and samples."""
    before = rng_state()
    try:
        yield
    finally:
        load_rng_state(before)


def _to_text(state: Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode("ascii")


def _from_text(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
