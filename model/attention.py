"""Attention over packed segments that share prefixes: a token sees its own past and all of its segment's ancestors.

Registered with transformers' attention interface; the model code stays transformers'. This is the SDPA path: queries in
blocks, keys gathered for each block (ancestors first, then the block itself), never `is_causal` where queries and keys differ in
number (torch aligns that mask top left), no mask larger than block x keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

PACKED_ATTENTION = "vlpost_packed"
"""The name under which transformers finds it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """Tokens [start, end) of a packed batch; `parent` is the index of the segment they continue, -1 for none."""

    start: int
    end: int
    parent: int


@dataclass(frozen=True, kw_only=True, slots=True)
class QueryBlock:
    """Queries [start, end) and the token ranges that hold every key they see, in order; the last range ends at `end`."""

    start: int
    end: int
    key_ranges: tuple[tuple[int, int], ...]
    mask: Tensor
    """[end - start, keys] bool, true where the query sees the key."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionPlan:
    """How to attend over one packed batch; made once, read by every layer."""

    blocks: tuple[QueryBlock, ...]

    def to(self, device: torch.device) -> AttentionPlan:
        """Returns the plan with its masks on `device`."""
        blocks = tuple(
            QueryBlock(start=block.start, end=block.end, key_ranges=block.key_ranges, mask=block.mask.to(device)) for block in self.blocks
        )
        return AttentionPlan(blocks=blocks)


def plan_attention(segments: Sequence[Segment], *, block_tokens: int) -> AttentionPlan:
    """Returns the plan for segments that lie one after another, parents before children, each tree contiguous.

    A block never crosses from one tree to the next and holds at most `block_tokens` queries; small segments of one tree share a
    block, so that a group of short responses is one attention call.
    """
    blocks: list[QueryBlock] = []
    first = 0
    while first < len(segments):
        last = first + 1
        while last < len(segments) and segments[last].parent >= 0:
            last += 1
        blocks += _plan_tree(segments, range(first, last), block_tokens)
        first = last
    return AttentionPlan(blocks=tuple(blocks))


def _plan_tree(segments: Sequence[Segment], tree: range, block_tokens: int) -> list[QueryBlock]:
    ancestors: dict[int, frozenset[int]] = {}
    for index in tree:
        parent = segments[index].parent
        ancestors[index] = frozenset({index}) | (ancestors[parent] if parent >= 0 else frozenset())
    start, end = segments[tree[0]].start, segments[tree[-1]].end
    blocks = []
    for block_start in range(start, end, block_tokens):
        block_end = min(block_start + block_tokens, end)
        inside = [index for index in tree if segments[index].start < block_end and segments[index].end > block_start]
        seen = sorted(frozenset().union(*(ancestors[index] for index in inside)))
        ranges = _merge(
            [(segments[i].start, min(segments[i].end, block_start)) for i in seen if segments[i].start < block_start],
            block_start,
            block_end,
        )
        blocks.append(
            QueryBlock(
                start=block_start,
                end=block_end,
                key_ranges=ranges,
                mask=_block_mask(segments, inside, ancestors, block_start, block_end, ranges),
            )
        )
    return blocks


def _merge(before: list[tuple[int, int]], block_start: int, block_end: int) -> tuple[tuple[int, int], ...]:
    merged: list[tuple[int, int]] = []
    for start, end in [*before, (block_start, block_end)]:
        if merged and merged[-1][1] == start:
            merged[-1] = (merged[-1][0], end)
        else:
            merged.append((start, end))
    return tuple(merged)


def _block_mask(
    segments: Sequence[Segment],
    inside: Sequence[int],
    ancestors: dict[int, frozenset[int]],
    block_start: int,
    block_end: int,
    ranges: Sequence[tuple[int, int]],
) -> Tensor:
    keys = torch.cat([torch.arange(start, end) for start, end in ranges])
    mask = torch.zeros(block_end - block_start, len(keys), dtype=torch.bool)
    for index in inside:
        rows = slice(max(segments[index].start, block_start) - block_start, min(segments[index].end, block_end) - block_start)
        for ancestor in ancestors[index]:
            mask[rows] |= (keys >= segments[ancestor].start) & (keys < segments[ancestor].end)
    return mask & (keys <= torch.arange(block_start, block_end)[:, None])


class _BlockAttention(torch.autograd.Function):
    """SDPA block by block. Backward gathers each block's keys again instead of keeping them once for every block."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, plan: AttentionPlan, scale: float) -> Tensor:  # noqa: ANN401
        ctx.save_for_backward(query, key, value)
        ctx.plan, ctx.scale = plan, scale
        out = torch.empty_like(query)
        for block in plan.blocks:
            out[:, :, block.start : block.end] = _attend(
                query[:, :, block.start : block.end], _gather(key, block), _gather(value, block), block.mask, scale
            )
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # noqa: ANN401
        query, key, value = ctx.saved_tensors
        grad_out = grad_outputs[0]
        grad_query = torch.empty_like(query)
        grad_key, grad_value = torch.zeros_like(key), torch.zeros_like(value)
        for block in ctx.plan.blocks:
            rows = slice(block.start, block.end)
            with torch.enable_grad():
                inputs = [part.detach().requires_grad_() for part in (query[:, :, rows], _gather(key, block), _gather(value, block))]
                out = _attend(inputs[0], inputs[1], inputs[2], block.mask, ctx.scale)
            grads = torch.autograd.grad(out, inputs, grad_out[:, :, rows])
            grad_query[:, :, rows] = grads[0]
            offset = 0
            for start, end in block.key_ranges:
                grad_key[:, :, start:end] += grads[1][:, :, offset : offset + end - start]
                grad_value[:, :, start:end] += grads[2][:, :, offset : offset + end - start]
                offset += end - start
        return grad_query, grad_key, grad_value, None, None


def _gather(tensor: Tensor, block: QueryBlock) -> Tensor:
    pieces = [tensor[:, :, start:end] for start, end in block.key_ranges]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=2)


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    groups = query.shape[1] // key.shape[1]
    if groups > 1:  # SDPA's own enable_gqa leaves the fused CPU kernel for the one that holds all scores
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    attention_plan: AttentionPlan,
    **_: object,
) -> tuple[Tensor, None]:
    """Attends by the plan; the signature is transformers' (query [1, heads, T, D]; returns [1, T, heads, D] and no weights)."""
    assert attention_mask is None, "a packed batch carries its mask in the plan"
    out = _BlockAttention.apply(query, key, value, attention_plan, scaling)
    assert isinstance(out, Tensor)
    return out.transpose(1, 2).contiguous(), None


def _no_mask(**_: object) -> None:
    """The plan masks; transformers must not build a [T, T] mask."""


AttentionInterface.register(PACKED_ATTENTION, packed_attention)
AttentionMaskInterface.register(PACKED_ATTENTION, _no_mask)
