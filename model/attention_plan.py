"""Which queries of a packed batch attend to which keys: its segments, and the kernel calls that compute every visible pair once.

A segment attends to itself causally, and the descendants of a segment, which lie one after another behind it, attend to it in one call
without a mask. Queries and keys of a causal call are the same tokens: how a kernel aligns its causal mask when they differ in
number never matters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

GROUP_TOKENS = 64
"""Short segments in a row share one masked call of at most this many tokens on the CPU, where a call costs as much as 16 tokens."""
PIECE_TOKENS = 256
"""Longer causal calls are cut on the CPU: its flash kernel computes most of the half that the mask hides."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """Tokens [start, end) of a packed batch; `parent` is the index of the segment they continue, -1 for none."""

    start: int
    end: int
    parent: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """Queries [start, end) over keys [key_start, key_end): all of them, or causally, or by a mask."""

    start: int
    end: int
    key_start: int
    key_end: int
    is_causal: bool
    mask: Tensor | None
    """[queries, keys] bool, true where the query sees the key; only where `is_causal` is false"""


@dataclass(frozen=True, kw_only=True, slots=True)
class VarlenPass:
    """Calls whose queries are disjoint, as one variable-length kernel call."""

    query_index: Tensor | None
    """[queries] int64 tokens, None for all in order"""
    key_index: Tensor | None
    query_ends: Tensor
    """[calls + 1] int32, cumulative numbers of queries"""
    key_ends: Tensor
    max_queries: int
    max_keys: int
    is_causal: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionPlan:
    """How to attend over one packed batch; made once, read by every layer."""

    segments: tuple[Segment, ...]
    own: tuple[Call, ...]
    """Tokens over themselves; every token is a query of exactly one."""
    ancestors: tuple[Call, ...]
    """Each adds the keys of one ancestor to the queries of its descendants."""
    passes: tuple[VarlenPass, ...]
    """The same for CUDA's kernel, the own tokens first; empty elsewhere."""

    def to(self, device: torch.device) -> AttentionPlan:
        """Returns the plan for kernels of `device`."""
        passes = plan_passes(self.segments, device) if device.type == "cuda" else ()
        return AttentionPlan(segments=self.segments, own=self.own, ancestors=self.ancestors, passes=passes)


def plan_attention(segments: Sequence[Segment], *, group_tokens: int = GROUP_TOKENS, piece_tokens: int = PIECE_TOKENS) -> AttentionPlan:
    """Returns the plan for segments that lie one after another, parents before children, depth first.

    Segments in a row with at most `group_tokens` tokens together become one masked call; a segment longer than `piece_tokens` is cut
    into pieces, each the parent of the next.
    """
    pieces = _cut(segments, piece_tokens)
    ends = _subtree_ends(pieces)
    own: list[Call] = []
    ancestors: list[Call] = []
    for first, last in _runs(pieces, group_tokens):
        start, end = pieces[first].start, pieces[last].end
        mask = None if first == last else _mask(pieces, first, last)
        own.append(Call(start=start, end=end, key_start=start, key_end=end, is_causal=first == last, mask=mask))
        ancestors += [
            Call(start=end, end=ends[index], key_start=pieces[index].start, key_end=pieces[index].end, is_causal=False, mask=None)
            for index in range(first, last + 1)
            if ends[index] > end
        ]
    return AttentionPlan(segments=tuple(segments), own=tuple(own), ancestors=tuple(ancestors), passes=())


def plan_passes(segments: Sequence[Segment], device: torch.device) -> tuple[VarlenPass, ...]:
    """Returns one causal pass over all segments and, for each depth of the trees, one pass of descendants over their ancestor there."""
    depths: list[int] = []
    for segment in segments:
        depths.append(depths[segment.parent] + 1 if segment.parent >= 0 else 0)
    ends = _subtree_ends(segments)
    passes = [_varlen_pass([(range(s.start, s.end), range(s.start, s.end)) for s in segments], is_causal=True, device=device)]
    inner = sorted((depths[i], i) for i in range(len(segments)) if ends[i] > segments[i].end)
    for _, level in groupby(inner, key=lambda item: item[0]):
        pairs = [(range(segments[i].end, ends[i]), range(segments[i].start, segments[i].end)) for _, i in level]
        passes.append(_varlen_pass(pairs, is_causal=False, device=device))
    return tuple(passes)


def _varlen_pass(pairs: Sequence[tuple[range, range]], *, is_causal: bool, device: torch.device) -> VarlenPass:
    def cumulative(ranges: Sequence[range]) -> Tensor:
        return torch.tensor([0, *(len(r) for r in ranges)]).cumsum(0).to(torch.int32).to(device)

    def index(ranges: Sequence[range]) -> Tensor:
        return torch.cat([torch.arange(r.start, r.stop) for r in ranges]).to(device)

    queries, keys = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    return VarlenPass(
        query_index=None if is_causal else index(queries),
        key_index=None if is_causal else index(keys),
        query_ends=cumulative(queries),
        key_ends=cumulative(keys),
        max_queries=max(map(len, queries)),
        max_keys=max(map(len, keys)),
        is_causal=is_causal,
    )


def _cut(segments: Sequence[Segment], piece_tokens: int) -> list[Segment]:
    pieces: list[Segment] = []
    last_piece: list[int] = []
    for segment in segments:
        parent = last_piece[segment.parent] if segment.parent >= 0 else -1
        for start in range(segment.start, segment.end, piece_tokens):
            pieces.append(Segment(start=start, end=min(start + piece_tokens, segment.end), parent=parent))
            parent = len(pieces) - 1
        last_piece.append(parent)
    return pieces


def _subtree_ends(segments: Sequence[Segment]) -> list[int]:
    """Returns, for each segment, where the last of its descendants ends (its own end without any)."""
    ends = [segment.end for segment in segments]
    for index in range(len(segments) - 1, -1, -1):
        parent = segments[index].parent
        if parent >= 0:
            ends[parent] = max(ends[parent], ends[index])
    return ends


def _runs(segments: Sequence[Segment], group_tokens: int) -> list[tuple[int, int]]:
    """Returns (first, last) of runs of segments with at most `group_tokens` tokens; a longer segment is a run alone."""
    runs: list[tuple[int, int]] = []
    for index, segment in enumerate(segments):
        if runs and segment.end - segments[runs[-1][0]].start <= group_tokens:
            runs[-1] = (runs[-1][0], index)
        else:
            runs.append((index, index))
    return runs


def _mask(segments: Sequence[Segment], first: int, last: int) -> Tensor:
    start, end = segments[first].start, segments[last].end
    mask = torch.zeros(end - start, end - start, dtype=torch.bool)
    for index in range(first, last + 1):
        rows = slice(segments[index].start - start, segments[index].end - start)
        ancestor = index
        while ancestor >= first:
            mask[rows, segments[ancestor].start - start : segments[ancestor].end - start] = True
            ancestor = segments[ancestor].parent
    return mask.tril()
