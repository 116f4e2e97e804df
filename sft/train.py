"""One step of supervised fine-tuning: fit rows to their length, encode, weigh, pack, update."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from ..model.chat import Chat, check_fits
from ..model.learner import FULL_DISTRIBUTION, Learner, TokenDivergence, TokenLogprobs, TokenLoss
from ..model.metrics import Metric, maximum, mean, total
from ..model.packing import Batch, pack, weigh
from ..model.records import DataError, Example, Message, TextPart, TrainSequence
from ..model.reference import SparseStates
from .config import SftConfig
from .rows import RowNote, split_at_turns, with_thinking_as_configured

_EMPTY_BLOCK = re.compile(r"(<think>)?\s*</think>\s*")
_MAX_BLOCK_TOKENS = 32
"""No tokenizer needs more for an empty think block: with its tags and line ends it has 19 bytes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NoTargets:
    """Supervised losses need nothing beside the tokens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FittedRow:
    """What is trained of a row: its families, one unless it was split or dropped, and what happened to it."""

    families: tuple[list[TrainSequence[NoTargets]], ...]
    notes: tuple[RowNote, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class SoftTargets:
    """What a teacher would have written at each trained token, beside what stands there."""

    states_of: Callable[[Batch[NoTargets]], SparseStates]
    """What it says of a batch's targets"""
    divergence: TokenDivergence
    """Between the teacher and the model, over the ids that it names"""
    weight: float
    """Share of the divergence in the loss, 0 to 1; the rest is the cross entropy of the tokens"""


class SftStage:
    """Supervised fine-tuning; each step depends only on the weights and its examples.

    `heed` is told of every row that is split or dropped; with `soft` a teacher's distribution is learned too. Raises `DataError` for
    settings that do not go with the model's template.
    """

    def __init__(
        self,
        config: SftConfig,
        *,
        learner: Learner,
        chat: Chat,
        heed: Callable[[RowNote], None] = lambda note: None,
        soft: SoftTargets | None = None,
    ) -> None:
        self.config = config
        self.learner = learner
        self.soft = soft
        self.chat = chat
        self.rows = RowFitter(config, chat=chat, token_budget=learner.config.token_budget)
        self.heed = heed

    def step(self, examples: Sequence[Example]) -> dict[str, float]:
        """Does one optimizer update on the examples of all ranks and returns the step's metrics; `examples` are this rank's.

        Without any row left on any rank there is no update, and the metrics are those of the rows alone.
        """
        start = time.perf_counter()
        fitted = [self.rows.fit(example) for example in examples]
        families = [family for row in fitted for family in row.families]
        measured = [_row_metrics(fitted)]
        for row in fitted:
            for note in row.notes:
                self.heed(note)
        if self.learner.ranks.total(len(families)):
            weighted = weigh(families, self.config.weighting, unit="family", over_ranks=self.learner.ranks.total)
            packed = pack(weighted, media=self.chat, token_budget=self.learner.config.token_budget)
            batches = self.learner.fill(packed)
            measured += self._update(batches)
            for batch in packed:
                measured.append({"trained_tokens": total(len(batch.target_ids)), "unique_tokens": total(len(batch.token_ids))})
        merged = self.learner.ranks.merge([*measured, {"time/step_s": maximum(time.perf_counter() - start)}])
        if "unique_tokens" not in merged:
            return merged
        return {**merged, "time/tokens_per_s": merged["unique_tokens"] / merged["time/step_s"]}

    def _update(self, batches: Sequence[Batch[NoTargets]]) -> list[dict[str, Metric]]:
        if self.soft is None:
            return [self.learner.update(batches, FULL_DISTRIBUTION, [negative_logprobs] * len(batches))]
        soft = self.soft
        seen: list[dict[str, Metric]] = []

        def loss(outputs: TokenLogprobs) -> Tensor:
            """Returns weight * divergence + (1 - weight) * cross entropy [N]."""
            assert outputs.divergence is not None, "the teacher's states were handed to the update"
            count = len(outputs.logprobs)
            if count:
                seen.append({"teacher_divergence": mean(outputs.divergence.detach().mean(), count)})
            return soft.weight * outputs.divergence - (1.0 - soft.weight) * outputs.logprobs

        losses: list[TokenLoss] = [loss] * len(batches)
        states = [soft.states_of(batch) for batch in batches]
        return [self.learner.update(batches, FULL_DISTRIBUTION, losses, states, divergence=soft.divergence), *seen]


class RowFitter:
    """Rows -> sequences to train, with thinking as configured and none longer than the limit."""

    def __init__(self, config: SftConfig, *, chat: Chat, token_budget: int) -> None:
        self.config = config
        self.chat = chat
        self.max_length = token_budget if config.max_length is None else config.max_length
        self._limit_key = "learner.token_budget" if config.max_length is None else "sft.max_length"
        self.opens_think_block = opens_think_block(chat)
        if config.empty_think != "train" and not self.opens_think_block and config.think_blocks != "keep":
            raise DataError(
                f"sft.empty_think = {config.empty_think!r}: the chat template of this model opens no think block, so that no turn would be "
                "concerned; leave it out, or start from a Thinking model"
            )

    def fit(self, example: Example) -> FittedRow:
        """Returns what is trained of the row. Raises `PromptTooLongError` where `too_long` is `refuse`, `DataError` for a bad row."""
        example = with_thinking_as_configured(example, self.config, opens_think_block=self.opens_think_block)
        family = self._encode(example)
        length = longest(family)
        if length <= self.max_length:
            return FittedRow(families=(family,), notes=())
        if self.config.too_long == "refuse":
            check_fits(length, limit=self.max_length, place=f"example {example.id}, {self._limit_key}")
        reason = f"too long: {length} tokens with images expanded, at most {self.max_length}"
        if self.config.too_long == "drop":
            return FittedRow(families=(), notes=(RowNote(example_id=example.id, outcome="dropped", reason=reason),))
        parts, notes = split_at_turns(example, lambda part: longest(self._encode(part)), limit=self.max_length)
        outcome, made = ("split", f"{len(parts)} rows from its turns") if parts else ("dropped", "none of its exchanges fits")
        notes = [RowNote(example_id=example.id, outcome=outcome, reason=f"{reason}; {made}"), *notes]
        return FittedRow(families=tuple(self._encode(part) for part in parts), notes=tuple(notes))

    def _encode(self, example: Example) -> list[TrainSequence[NoTargets]]:
        family = supervised_sequences(example, self.chat)
        if self.config.empty_think == "train":
            return family
        return [self._without_empty_blocks(sequence) for sequence in family]

    def _without_empty_blocks(self, sequence: TrainSequence[NoTargets]) -> TrainSequence[NoTargets]:
        """Returns the sequence with the tokens of empty think blocks untrained, or raises where they are to be refused."""
        trained = list(sequence.trained)
        for start, end in responses_of(sequence.trained):
            length = self._empty_block_tokens(sequence.token_ids[start:end])
            if length and self.config.empty_think == "refuse":
                raise DataError(
                    f"example {sequence.place}: a turn without thinking, which the model's template answers by closing its think block at "
                    "once; add the thinking, drop the row, or set sft.empty_think to mask or train"
                )
            trained[start : start + length] = [False] * length
        return replace(sequence, trained=tuple(trained))

    def _empty_block_tokens(self, response: Sequence[int]) -> int:
        """Returns how many tokens at the start of a response are an empty think block and nothing else."""
        for count in range(min(_MAX_BLOCK_TOKENS, len(response)), 0, -1):
            if _EMPTY_BLOCK.fullmatch(self.chat.tokenizer.decode(list(response[:count]), skip_special_tokens=False)):
                return count
        return 0


def negative_logprobs(outputs: TokenLogprobs) -> Tensor:
    """Returns the cross entropy [N] of each target in nats."""
    return -outputs.logprobs


def supervised_sequences(example: Example, chat: Chat) -> list[TrainSequence[NoTargets]]:
    """Returns the row as sequences whose targets are what the assistant wrote, end-of-turn tokens included.

    One sequence, or several where the template drops earlier thinking: see `Chat.encode_conversation`.
    """
    try:
        branches = chat.encode_conversation(example.messages)
    except DataError as error:
        raise DataError(f"example {example.id}: {error}") from error
    return [
        TrainSequence(place=example.id, token_ids=branch.token_ids, trained=branch.trained, media=branch.media, targets=NoTargets())
        for branch in branches
    ]


def opens_think_block(chat: Chat) -> bool:
    """Returns whether the model's chat template ends a prompt inside an open think block, as that of the Thinking variant does."""
    return "<think>" in chat.encode_prompt((Message(role="user", parts=(TextPart(text="?"),)),)).suffix


def longest(family: Sequence[TrainSequence[NoTargets]]) -> int:
    """Returns the tokens of the longest sequence of a row, images and videos expanded: the context that it needs."""
    return max(len(sequence.token_ids) for sequence in family)


def responses_of(trained: Sequence[bool]) -> Iterator[tuple[int, int]]:
    """Yields (start, end) of each run of trained tokens: each is one response, since a prompt stands between any two."""
    start = None
    for index, is_trained in enumerate([*trained, False]):
        if is_trained and start is None:
            start = index
        elif not is_trained and start is not None:
            yield start, index
            start = None


def _row_metrics(fitted: Sequence[FittedRow]) -> dict[str, Metric]:
    outcomes = [note.outcome for row in fitted for note in row.notes]
    families = [family for row in fitted for family in row.families]
    is_text = [not any(sequence.media for sequence in family) for family in families]
    return {
        "rows": total(len(families)),
        "rows_dropped": total(outcomes.count("dropped")),
        "rows_split": total(outcomes.count("split")),
        "exchanges_dropped": total(outcomes.count("exchange dropped")),
        "text_only_frac": mean(sum(is_text) / max(1, len(is_text)), len(is_text)),
    }
