"""The reference policy of a KL term: what the policy was at the start, frozen."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedModel

from .config import LearnerConfig
from .layout import is_sharded, shard
from .lora import adapter_off
from .metrics import Metric

Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True, slots=True)
class ReferenceStates:
    """What the reference says of a batch's targets; no gradients."""

    logprobs: Tensor
    """[N] nats, fp32, of the targets"""
    hidden: Tensor
    """[N, H] the states that predict them"""
    head: Tensor | None
    """[V, H]; None: the policy's own, which an adapter leaves as it is"""


@dataclass(frozen=True, kw_only=True, slots=True)
class SparseStates:
    """What a teacher says of a batch's targets where its whole distribution is not there; no gradients."""

    logprobs: Tensor
    """[N] nats, fp32, of the targets"""
    support_ids: Tensor
    """[N, K] int64; each id that is `known` once at a position"""
    support_logprobs: Tensor
    """[N, K] nats, fp32, over all ids that may be drawn and not over the K"""
    known: Tensor
    """[N, K] bool: false where an entry only fills the row"""
    metrics: Mapping[str, Metric]
    """How much of the distribution is outside of the support, and why."""


class AdapterOff:
    """The reference of a policy that trains an adapter: the same model without it. Costs no memory."""

    def __init__(self, model: PreTrainedModel, policy: Callable[..., object]) -> None:
        self.model = model
        self.policy = policy

    def run(self, compute: Callable[[PreTrainedModel], Result]) -> Result:
        """Returns `compute(model)` with the adapter off, without gradients."""
        with torch.no_grad(), adapter_off(self.model):
            return self.policy(compute)  # pyright: ignore[reportReturnType]


class FrozenCopy:
    """The reference of a policy that trains its own weights: a second model, sharded as the policy is."""

    def __init__(self, policy: nn.Module, *, config: LearnerConfig, accelerator: Accelerator, dtype: torch.dtype) -> None:
        self.accelerator = accelerator
        self.head: Tensor | None = None
        """[V, H] whole, once it was gathered: a frozen one never changes, and one for each micro-batch would not fit"""
        self.policy = policy.requires_grad_(False).eval()
        if is_sharded(config.layout):
            shard(self.policy, accelerator, dtype)
        else:
            self.policy.to(accelerator.device, dtype)

    def run(self, compute: Callable[[PreTrainedModel], Result]) -> Result:
        """Returns `compute(model)`, without gradients."""
        with torch.no_grad(), self.accelerator.autocast():
            return self.policy(compute)
