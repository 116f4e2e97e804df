"""How several processes share the learner: DDP or FSDP2 through Accelerate, and the few things that ranks tell each other."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from .config import DType, Layout
from .metrics import Metric, combine, merge
from .records import VlpostError

Item = TypeVar("Item")

FSDP_UNITS = ("Qwen3VLTextDecoderLayer", "Qwen3VLVisionBlock", "Qwen3VLMoeTextDecoderLayer", "Qwen3VLMoeVisionBlock")
"""Modules that are gathered and freed one at a time; embeddings, mergers, last norm and head are the root's, which one forward covers."""


def machine_dtype(dtype: DType) -> torch.dtype:
    """Returns the dtype that a recipe names, `auto` being bfloat16 on a GPU that has it and float32 elsewhere."""
    if dtype == "auto":
        return torch.bfloat16 if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else torch.float32
    return getattr(torch, dtype)


def build_accelerator(layout: Layout, dtype: torch.dtype) -> Accelerator:
    """Returns an Accelerator of this process, which joins the others if a launcher started several.

    Raises `VlpostError` if the launcher asks for a wrapper of its own: the recipe's `learner.layout` decides.
    """
    wrappers = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_MEGATRON_LM")
    asked = [name for name in wrappers if os.environ.get(name) == "true"]
    if asked:
        raise VlpostError(
            f"the launcher sets {asked[0]}: launch without it (accelerate launch --num_processes N); learner.layout says how to wrap"
        )
    # Accelerate keeps the first stage's precision for the whole process; a chain may have several.
    AcceleratorState._reset_state()
    autocasts = dtype == torch.bfloat16 and not is_sharded(layout)
    return Accelerator(cpu=not torch.cuda.is_available(), mixed_precision="bf16" if autocasts else "no")


def is_sharded(layout: Layout) -> bool:
    """Returns whether this process, launched beside others or alone, holds shards."""
    return layout == "fsdp2" and int(os.environ.get("WORLD_SIZE", "1")) > 1


def shard(policy: nn.Module, accelerator: Accelerator, dtype: torch.dtype) -> None:
    """Shards a module over all ranks in place (FSDP2): weights stay in their dtype and are gathered, unit by unit, in `dtype`.

    Not through Accelerate, which has FSDP on GPUs only and puts the head into a unit of its own: the head is read without a forward of
    its own, and its gradient would not be reduced over ranks.
    """
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    policy.to(accelerator.device)
    precision = MixedPrecisionPolicy(param_dtype=None if dtype == torch.float32 else dtype, reduce_dtype=torch.float32)
    for module in policy.modules():
        if type(module).__name__ in FSDP_UNITS:
            fully_shard(module, mesh=mesh, mp_policy=precision)
    fully_shard(policy, mesh=mesh, mp_policy=precision, reshard_after_forward=False)


def reshard(policy: nn.Module) -> None:
    """Frees gathered weights, so that its parameters are shards again; after a forward without backward the root's are not."""
    for module in policy.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def full_tensor(tensor: Tensor) -> Tensor:
    """Returns the whole of a tensor that may be sharded over ranks; a collective if it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """Returns this rank's shard of a whole tensor, laid out as `parameter`; the tensor itself where nothing is sharded."""
    if not isinstance(parameter, DTensor):
        return tensor
    return distribute_tensor(tensor.to(parameter.device), parameter.device_mesh, parameter.placements)


class Ranks:
    """The processes of a run; alone, everything here is the identity. The first to ask for it joins this process to the others."""

    def __init__(self) -> None:
        state = PartialState(cpu=not torch.cuda.is_available())
        self.rank: int = state.process_index
        self.size: int = state.num_processes

    @property
    def is_first(self) -> bool:
        """True on the rank that writes."""
        return self.rank == 0

    def gather(self, value: Item) -> list[Item]:
        """Returns every rank's value, in rank order, on every rank. Values are pickled between the run's own processes."""
        return [value] if self.size == 1 else gather_object([value])

    def wait(self) -> None:
        """Returns when every rank has come here."""
        self.gather(None)

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """Returns this rank's part of a list that all ranks have: every n-th item."""
        return items[self.rank :: self.size]

    def total(self, value: float) -> float:
        """Returns the sum over ranks; in rank order, so that all ranks get the same bits."""
        return sum(self.gather(value))

    def merge(self, parts: Iterable[Mapping[str, Metric]]) -> dict[str, float]:
        """Returns the metrics of all parts of all ranks, merged as each says."""
        return merge(self.gather(combine(parts)))
