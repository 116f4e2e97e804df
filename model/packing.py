"""TrainSequences -> packed batches that share prefixes, each trained token with its weight.

A *family* is a list of sequences that may share a prefix: the rollouts of one example, or one SFT row alone. A family becomes a
tree of segments in which every distinct (prefix, token) stands once, whatever the number of sequences that hold it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Generic, Literal, Protocol, TypeVar

import torch
from torch import Tensor

from .attention_plan import AttentionPlan, Segment, plan_attention
from .chat import ProcessedMedia
from .records import DataError, ImagePart, MediaPart, TrainSequence

Targets = TypeVar("Targets")
TokenWeighting = Literal["token", "sqrt", "sequence"]


class MediaSource(Protocol):
    """What packing needs from `Chat`."""

    image_token_id: int
    video_token_id: int

    def processed(self, part: MediaPart) -> ProcessedMedia:
        """Returns the vision input of a part."""
        ...

    def positions(self, token_ids: Sequence[int], media: Sequence[MediaPart]) -> Tensor:
        """Returns the 3-D positions [3, T]."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Weighted(Generic[Targets]):
    """A sequence and the weight of each of its trained tokens in the optimizer step's loss."""

    sequence: TrainSequence[Targets]
    token_weight: float


def weigh(
    families: Sequence[Sequence[TrainSequence[Targets]]],
    weighting: TokenWeighting,
    *,
    unit: Literal["sequence", "family"] = "sequence",
    over_ranks: Callable[[float], float] = float,
) -> list[list[Weighted[Targets]]]:
    """Returns the sequences of one optimizer step with token weights that sum to one over all trained tokens of all ranks.

    With x trained tokens in a unit, a token's weight is proportional to 1 (`token`), 1 / sqrt(x) (`sqrt`; InternVL2.5's square
    averaging, arXiv:2412.05271) or 1 / x (`sequence`: mean over tokens, then over units). The unit is each sequence, or the whole family
    where a family is one row of data. `over_ranks` adds up a number over ranks.
    """
    exponent = {"token": 0.0, "sqrt": 0.5, "sequence": 1.0}[weighting]
    lengths = [[s.num_trained_tokens for s in family] for family in families]
    if unit == "family":
        lengths = [[sum(of_family)] * len(of_family) for of_family in lengths]
    counted = [length for of_family in lengths for length in (of_family if unit == "sequence" else of_family[:1])]
    total = over_ranks(sum(length ** (1.0 - exponent) for length in counted if length))
    if not total:
        raise ValueError("no sequence of the step has a trained token: its loss has no value; drop such rows")
    return [
        [Weighted(sequence=s, token_weight=max(length, 1) ** -exponent / total) for s, length in zip(family, of_family, strict=True)]
        for family, of_family in zip(families, lengths, strict=True)
    ]


@dataclass(frozen=True, kw_only=True, slots=True)
class VisionInputs:
    """The distinct images and videos of a batch, and where their features go."""

    pixel_values: Tensor
    """[patches, dim], one entry's patches after another's"""
    grid_thw: Tensor
    """[distinct, 3] int64"""
    image_order: tuple[int, ...]
    """For each image placeholder run of the batch, in token order, the entry whose features fill it."""
    video_order: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch(Generic[Targets]):
    """A packed micro-batch: T unique tokens, N trained targets.

    Example: prompt (7, 8) with responses (3, 2) and (3, 4), all trained: token_ids = (7, 8, 3, 2, 4); segments = prompt+3 [0, 3), 2
    [3, 4) and 4 [4, 5); token_copies = (2, 2, 2, 1, 1); target_ids = (3, 2, 3, 4); hidden_index = (1, 2, 1, 2).
    """

    token_ids: Tensor
    """[T] int64"""
    token_copies: Tensor
    """[T] int64, how many sequences hold the token"""
    positions: Tensor
    """[3, T] int64, t / h / w"""
    plan: AttentionPlan
    segments: tuple[Segment, ...]
    vision: VisionInputs | None
    target_ids: Tensor
    """[N] int64"""
    hidden_index: Tensor
    """[N] int64, the token whose hidden state predicts the target"""
    token_weights: Tensor
    """[N] fp32"""
    sequence_ids: Tensor
    """[N] int64, 0 .. number of sequences - 1 in this batch"""
    sequences: tuple[TrainSequence[Targets], ...]
    num_recomputed_tokens: int
    """Tokens of this batch that another part of a split family holds too."""

    def per_token(self, values: Callable[[TrainSequence[Targets]], Sequence[float]]) -> Tensor:
        """Returns [N] fp32: the per-token values of every sequence, in target order."""
        joined: list[float] = []
        for sequence in self.sequences:
            joined += values(sequence)
        result = torch.tensor(joined, dtype=torch.float32)
        assert len(result) == len(self.target_ids), f"{len(result)} values for {len(self.target_ids)} targets"
        return result

    def to(self, device: torch.device) -> Batch[Targets]:
        """Returns the batch with its tensors on `device`."""
        vision = self.vision and VisionInputs(
            pixel_values=self.vision.pixel_values.to(device),
            grid_thw=self.vision.grid_thw.to(device),
            image_order=self.vision.image_order,
            video_order=self.vision.video_order,
        )
        return Batch(
            token_ids=self.token_ids.to(device),
            token_copies=self.token_copies.to(device),
            positions=self.positions.to(device),
            plan=self.plan.to(device),
            segments=self.segments,
            vision=vision,
            target_ids=self.target_ids.to(device),
            hidden_index=self.hidden_index.to(device),
            token_weights=self.token_weights.to(device),
            sequence_ids=self.sequence_ids.to(device),
            sequences=self.sequences,
            num_recomputed_tokens=self.num_recomputed_tokens,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Node:
    """Tokens [start, end) of `owner`'s sequence; `parent` is an index into the tree's nodes."""

    owner: int
    start: int
    end: int
    parent: int
    members: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Tree(Generic[Targets]):
    members: tuple[Weighted[Targets], ...]
    nodes: tuple[_Node, ...]
    recomputed: int

    @property
    def num_tokens(self) -> int:
        return sum(node.end - node.start for node in self.nodes)


def pack(families: Iterable[Sequence[Weighted[Targets]]], *, media: MediaSource, token_budget: int) -> list[Batch[Targets]]:
    """Returns micro-batches of at most `token_budget` unique tokens, filled by best fit, largest family first.

    A family over the budget is split; each part computes the shared prefix again (`num_recomputed_tokens`), the gradient is the
    same. A single sequence over the budget is a `DataError`: it cannot be trained whole, and it is never cut.
    """
    trees = [tree for family in families if family for tree in _split_family(family, media, token_budget)]
    bins: list[list[_Tree[Targets]]] = []
    loads: list[int] = []
    for tree in sorted(trees, key=lambda tree: -tree.num_tokens):
        fitting = [index for index, load in enumerate(loads) if load + tree.num_tokens <= token_budget]
        if fitting:
            best = max(fitting, key=lambda index: loads[index])
        else:
            bins.append([])
            loads.append(0)
            best = len(bins) - 1
        bins[best].append(tree)
        loads[best] += tree.num_tokens
    return [_assemble(trees, media) for trees in bins]


def _split_family(family: Sequence[Weighted[Targets]], media: MediaSource, token_budget: int) -> list[_Tree[Targets]]:
    keys = [_token_keys(weighted.sequence, media) for weighted in family]
    parts: list[_Tree[Targets]] = []
    start = 0
    while start < len(family):
        end = len(family)
        nodes = _prefix_tree(keys[start:end])
        while _size(nodes) > token_budget and end > start + 1:
            end = start + max(1, min((end - start) * token_budget // _size(nodes), end - start - 1))
            nodes = _prefix_tree(keys[start:end])
        if _size(nodes) > token_budget:
            raise DataError(
                f"a sequence of {_size(nodes)} tokens exceeds the token budget of {token_budget}: "
                "raise learner.token_budget or drop longer rows"
            )
        # What the part adds to the tree of the family so far is new; the rest an earlier part holds too.
        recomputed = _size(nodes) - (_size(_prefix_tree(keys[:end])) - _size(_prefix_tree(keys[:start]))) if start else 0
        parts.append(_Tree(members=tuple(family[start:end]), nodes=tuple(nodes), recomputed=recomputed))
        start = end
    return parts


def _size(nodes: Sequence[_Node]) -> int:
    return sum(node.end - node.start for node in nodes)


def _token_keys(sequence: TrainSequence[Targets], media: MediaSource) -> list[tuple[int, str] | int]:
    """Returns what must agree for a token to be shared: the id, and for a placeholder the image's digest as well."""
    keys: list[tuple[int, str] | int] = list(sequence.token_ids)
    for part, indices in zip(sequence.media, _placeholder_runs(sequence, media), strict=True):
        for index in indices:
            keys[index] = (sequence.token_ids[index], part.digest)
    return keys


def _placeholder_runs(sequence: TrainSequence[Targets], media: MediaSource) -> list[list[int]]:
    """Returns, for each image or video in order, the indices of its placeholder tokens."""
    pads = iter([i for i, token in enumerate(sequence.token_ids) if token in (media.image_token_id, media.video_token_id)])
    runs = []
    for part in sequence.media:
        count = sum(token in (media.image_token_id, media.video_token_id) for token in media.processed(part).placeholder_ids)
        run = [index for _, index in zip(range(count), pads, strict=False)]
        if len(run) != count:
            raise ValueError(f"a sequence holds fewer placeholders than its {len(sequence.media)} images and videos need")
        runs.append(run)
    if next(pads, None) is not None:
        raise ValueError(f"a sequence holds more placeholders than its {len(sequence.media)} images and videos need")
    return runs


def _prefix_tree(keys: Sequence[Sequence[tuple[int, str] | int]]) -> list[_Node]:
    """Returns the radix tree of the sequences, parents before children, depth first."""
    nodes: list[_Node] = []

    def grow(members: tuple[int, ...], start: int, parent: int) -> None:
        first = keys[members[0]]
        end = min(len(keys[m]) for m in members)
        for member in members[1:]:
            other = keys[member]
            shared = start
            while shared < end and other[shared] == first[shared]:
                shared += 1
            end = shared
        if end > start:
            nodes.append(_Node(owner=members[0], start=start, end=end, parent=parent, members=members))
            parent = len(nodes) - 1
        branches: dict[tuple[int, str] | int, list[int]] = {}
        for member in members:
            if len(keys[member]) > end:
                branches.setdefault(keys[member][end], []).append(member)
        for branch in branches.values():
            grow(tuple(branch), end, parent)

    roots: dict[tuple[int, str] | int, list[int]] = {}
    for member, sequence_keys in enumerate(keys):
        roots.setdefault(sequence_keys[0], []).append(member)
    for root in roots.values():
        grow(tuple(root), 0, -1)
    return nodes


class _Assembly(Generic[Targets]):
    """The growing lists of one batch."""

    def __init__(self, media: MediaSource) -> None:
        self.media = media
        self.token_ids: list[int] = []
        self.token_copies: list[int] = []
        self.positions: list[Tensor] = []
        self.segments: list[Segment] = []
        self.entries: dict[str, int] = {}
        self.processed: list[ProcessedMedia] = []
        self.image_order: list[int] = []
        self.video_order: list[int] = []

    def add_tree(self, tree: _Tree[Targets]) -> list[list[int]]:
        """Adds the tree's unique tokens; returns, for each member, where each of its tokens stands."""
        place: list[list[int]] = [[] for _ in tree.members]
        base = len(self.segments)
        for node in tree.nodes:
            sequence = tree.members[node.owner].sequence
            token_ids = sequence.token_ids[node.start : node.end]
            start = len(self.token_ids)
            self.token_ids += token_ids
            self.token_copies += [len(node.members)] * len(token_ids)
            has_media = self.media.image_token_id in token_ids or self.media.video_token_id in token_ids
            if has_media or node.parent < 0:
                self.positions.append(self.media.positions(sequence.token_ids, sequence.media)[:, node.start : node.end])
            else:  # text counts on from the largest position before it, which its parent holds
                after = int(self.positions[base + node.parent].max()) + 1
                self.positions.append(torch.arange(after, after + len(token_ids)).expand(3, -1))
            self.segments.append(Segment(start=start, end=len(self.token_ids), parent=base + node.parent if node.parent >= 0 else -1))
            for member in node.members:
                place[member] += range(start, len(self.token_ids))
            if has_media:
                self._add_media(sequence, node)
        return place

    def _add_media(self, sequence: TrainSequence[Targets], node: _Node) -> None:
        for part, run in zip(sequence.media, _placeholder_runs(sequence, self.media), strict=True):
            if not node.start <= run[0] < node.end:
                continue
            assert run[-1] < node.end, "a placeholder run is one image: it cannot be cut by a branch"
            if part.digest not in self.entries:
                self.entries[part.digest] = len(self.processed)
                self.processed.append(self.media.processed(part))
            (self.image_order if isinstance(part, ImagePart) else self.video_order).append(self.entries[part.digest])

    def vision(self) -> VisionInputs | None:
        """Returns the distinct vision inputs, None for text only."""
        if not self.processed:
            return None
        return VisionInputs(
            pixel_values=torch.cat([entry.pixel_values for entry in self.processed]),
            grid_thw=torch.tensor([entry.grid for entry in self.processed]),
            image_order=tuple(self.image_order),
            video_order=tuple(self.video_order),
        )


def _assemble(trees: Sequence[_Tree[Targets]], media: MediaSource) -> Batch[Targets]:
    assembly: _Assembly[Targets] = _Assembly(media)
    target_ids: list[int] = []
    hidden_index: list[int] = []
    weights: list[float] = []
    counts: list[int] = []
    sequences: list[TrainSequence[Targets]] = []
    for tree in trees:
        for weighted, place in zip(tree.members, assembly.add_tree(tree), strict=True):
            trained = [index for index, is_target in enumerate(weighted.sequence.trained) if is_target]
            target_ids += [weighted.sequence.token_ids[index] for index in trained]
            hidden_index += [place[index - 1] for index in trained]
            weights += [weighted.token_weight] * len(trained)
            counts.append(len(trained))
            sequences.append(weighted.sequence)
    segments = tuple(assembly.segments)
    return Batch(
        token_ids=torch.tensor(assembly.token_ids),
        token_copies=torch.tensor(assembly.token_copies),
        positions=torch.cat(assembly.positions, dim=1),
        plan=plan_attention(segments),
        segments=segments,
        vision=assembly.vision(),
        target_ids=torch.tensor(target_ids, dtype=torch.int64),
        hidden_index=torch.tensor(hidden_index, dtype=torch.int64),
        token_weights=torch.tensor(weights, dtype=torch.float32),
        sequence_ids=torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts)),
        sequences=tuple(sequences),
        num_recomputed_tokens=sum(tree.recomputed for tree in trees),
    )


def empty_batch() -> Batch[Any]:
    """Returns a batch of one token and no target: what a rank computes while others still have batches. Its gradient is zero."""
    nothing = torch.empty(0, dtype=torch.int64)
    segments = (Segment(start=0, end=1, parent=-1),)
    return Batch(
        token_ids=torch.zeros(1, dtype=torch.int64),
        token_copies=torch.zeros(1, dtype=torch.int64),
        positions=torch.zeros(3, 1, dtype=torch.int64),
        plan=plan_attention(segments),
        segments=segments,
        vision=None,
        target_ids=nothing,
        hidden_index=nothing,
        token_weights=torch.empty(0),
        sequence_ids=nothing,
        sequences=(),
        num_recomputed_tokens=0,
    )


def split_by_sequence(batch: Batch[Targets], values: Tensor) -> list[Tensor]:
    """Returns [N] values cut into one tensor a sequence of the batch."""
    counts = [sequence.num_trained_tokens for sequence in batch.sequences]
    ends = list(accumulate(counts))
    return [values[end - count : end] for end, count in zip(ends, counts, strict=True)]
