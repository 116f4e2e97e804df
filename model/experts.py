"""Mixtures of experts: how their weights lie on the hub, what their routers chose, and the loss that keeps the experts evenly used.

The published checkpoints and vLLM hold the experts of Qwen3-VL as [experts, in, out], transformers 5.19 as [experts, out, in]: it
transposes when it loads and, unlike for other models, not when it saves.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeTextModel, Qwen3VLMoeTextTopKRouter

from .checkpoint import Saveable
from .records import DataError

_EXPERT_WEIGHTS = (".mlp.experts.gate_up_proj", ".mlp.experts.down_proj")


def to_hub_layout(weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Yields the (name, tensor) pairs with expert weights transposed from transformers' layout to the hub's; others pass as they are.

    gate_up_proj [E, 2I, H] becomes [E, H, 2I] and down_proj [E, H, I] becomes [E, I, H], as views: nothing is copied. Twice is back again.
    """
    for name, tensor in weights:
        yield name, tensor.transpose(1, 2) if name.endswith(_EXPERT_WEIGHTS) else tensor


def save_model(model: Saveable, folder: Path) -> None:
    """Writes configuration and weights (or an adapter) as a Hugging Face folder whose experts lie as the hub's do."""
    if not isinstance(model, PreTrainedModel) or not has_experts(model):
        model.save_pretrained(str(folder))
        return
    # `save_original_format` would bring the hub's layout back into transformers' own, which vLLM cannot load.
    model.save_pretrained(folder, state_dict=dict(to_hub_layout(model.state_dict().items())), save_original_format=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class GatheredModel:
    """Writes a model's configuration with weights that were gathered from its shards."""

    model: Saveable
    weights: Mapping[str, Tensor]

    def save_pretrained(self, save_directory: str) -> None:
        """Writes a Hugging Face folder."""
        assert isinstance(self.model, PreTrainedModel), "only a transformers model takes weights from outside"
        self.model.save_pretrained(save_directory, state_dict=dict(self.weights), save_original_format=False)


def has_experts(model: PreTrainedModel) -> bool:
    """Returns whether the model is a mixture of experts."""
    return model.config.model_type == "qwen3_vl_moe"


def check_expert_layout(place: str, model: PreTrainedModel) -> None:
    """Raises `DataError` for a mixture of experts that transformers 5.19 loads or computes otherwise than it was trained, silently.

    With hidden_size = moe_intermediate_size or twice it, a weight and its transpose have one shape, and transformers, which
    transposes by shape, loads the hub's layout as it lies. Without norm_topk_prob the published model does not renormalise the router's
    weights; transformers always does.
    """
    if not has_experts(model):
        return
    config: Any = model.config.get_text_config()
    hidden, inner = config.hidden_size, config.moe_intermediate_size
    if hidden in (inner, 2 * inner):
        raise DataError(
            f"{place}: hidden_size = {hidden} and moe_intermediate_size = {inner}: transformers cannot tell an expert's weight from its "
            "transpose and would load it as it lies; one must not be the other or twice it"
        )
    if config.to_dict().get("norm_topk_prob") is not True:
        raise DataError(
            f"{place}: text_config.norm_topk_prob is {config.to_dict().get('norm_topk_prob')!r}, must be true: transformers renormalises "
            "the router's weights in every case; write norm_topk_prob: true into config.json if the model was trained that way"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Routing:
    """What the routers of the L layers with experts said of the T tokens of one forward."""

    logits: Tensor
    """[L, T, E], before the softmax; with gradient if the forward had one"""
    expert_ids: Tensor
    """[L, T, k] int64, the experts of each token, most probable first"""

    @property
    def margins(self) -> Tensor:
        """[L, T] fp32: how far the last chosen expert's logit lies above the best one left out; near 0, rounding decides."""
        chosen = torch.zeros_like(self.logits, dtype=torch.bool).scatter_(-1, self.expert_ids, True)
        logits = self.logits.detach().float()
        return logits.masked_fill(~chosen, torch.inf).amin(-1) - logits.masked_fill(chosen, -torch.inf).amax(-1)


@contextmanager
def record_routing(model: nn.Module) -> Iterator[list[Routing]]:
    """Yields a list that gets the routing of every forward of `model` (wrapped or not) until the context ends.

    What gradient checkpointing computes again in the backward pass is not a forward and is not recorded; the logits carry the
    gradient in any case.
    """
    routers, body = _routers(model), _text_model(model)
    recorded: list[Routing] = []
    running: list[tuple[Tensor, Tensor]] | None = None

    def begin(*_: object) -> None:
        nonlocal running
        running = []

    def add(_module: nn.Module, _args: object, output: tuple[Tensor, Tensor, Tensor]) -> None:
        if running is not None:
            running.append((output[0], output[2]))

    def end(*_: object) -> None:
        nonlocal running
        assert running is not None
        assert len(running) == len(routers), f"{len(running)} routers ran in one forward, the model has {len(routers)}"
        recorded.append(Routing(logits=torch.stack([logits for logits, _ in running]), expert_ids=torch.stack([ids for _, ids in running])))
        running = None

    handles = [body.register_forward_pre_hook(begin), *(router.register_forward_hook(add) for router in routers)]
    handles.append(body.register_forward_hook(end))
    try:
        yield recorded
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def replay_routing(model: nn.Module, expert_ids: Tensor) -> Iterator[None]:
    """Makes every router choose the given experts [L, T, k] until the context ends; their weights are the current router's.

    A weight is the expert's probability divided by the sum over the token's k experts (norm_topk_prob), with its gradient. Under
    gradient checkpointing keep the context open until the backward pass is done: it runs the routers again. A forward with another
    number of tokens is a ValueError.
    """
    routers = _routers(model)
    if len(expert_ids) != len(routers):
        raise ValueError(f"expert_ids has {len(expert_ids)} layers, the model has {len(routers)} with experts: record them on this model")

    def replace(router: nn.Module, _args: object, output: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        logits, weights, _ = output
        ids = expert_ids[routers.index(router)].to(logits.device)
        if len(ids) != len(logits):
            raise ValueError(f"expert_ids are of {len(ids)} tokens, the forward has {len(logits)}: replay a batch with its own routing")
        chosen = logits.softmax(dim=-1, dtype=torch.float32).gather(1, ids)
        return logits, (chosen / chosen.sum(dim=-1, keepdim=True)).to(weights.dtype), ids

    handles = [router.register_forward_hook(replace) for router in routers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def count_routed(expert_ids: Tensor, token_copies: Tensor, *, num_experts: int) -> Tensor:
    """Returns [L, E] int64: how many tokens were sent to each expert, a token counted once for every sequence that holds it.

    `expert_ids` is [L, T, k]; `token_copies` [T] int64 is the number of sequences that share the packed token. Sum the results of all
    micro-batches and all ranks: together they are what `router_balance_loss` needs of an optimizer step.
    """
    slots = expert_ids.flatten(1)
    copies = token_copies.repeat_interleave(expert_ids.shape[-1]).expand_as(slots)
    return torch.zeros(len(slots), num_experts, dtype=torch.int64, device=slots.device).scatter_add_(1, slots, copies)


def router_balance_loss(router_logits: Tensor, token_copies: Tensor, *, routed: Tensor, experts_per_token: int) -> Tensor:
    """Returns one micro-batch's share of the optimizer step's load-balancing loss: a scalar, fp32; the shares add up to the loss.

    Per layer E * sum_e f_e * P_e, then the mean over the layers (Switch Transformer, arXiv:2101.03961 eq. 4 to 6; several experts a token
    as in GShard, arXiv:2006.16668): f_e is the share of the step's slots that went to expert e, without gradient, and P_e the mean
    probability of e over the step's tokens. 1 when the experts are used evenly, E when one gets everything.

    `router_logits` [L, T, E] and `token_copies` [T] are the micro-batch's; `routed` [L, E] is `count_routed` summed over all
    micro-batches and ranks of the step. transformers' `load_balancing_loss_func` counts f as tokens, not slots, so its value is
    `experts_per_token` times this one, and it multiplies means over all layers instead of averaging the layers' products: a published
    router_aux_loss_coef stands for a `experts_per_token` times larger coefficient here.
    """
    routed = routed.to(router_logits.device, torch.float32)
    slots = routed.sum(dim=-1, keepdim=True)
    probabilities = (router_logits.softmax(dim=-1, dtype=torch.float32) * token_copies[:, None]).sum(dim=1) * (experts_per_token / slots)
    return routed.shape[-1] * (routed / slots * probabilities).sum(dim=-1).mean()


def _routers(model: nn.Module) -> list[nn.Module]:
    """Returns the routers from the first layer to the last."""
    routers: list[nn.Module] = [module for module in model.modules() if isinstance(module, Qwen3VLMoeTextTopKRouter)]
    if not routers:
        raise ValueError(f"{type(model).__name__} has no router: only a mixture of experts (qwen3_vl_moe) routes")
    return routers


def _text_model(model: nn.Module) -> nn.Module:
    return next(module for module in model.modules() if isinstance(module, Qwen3VLMoeTextModel))
