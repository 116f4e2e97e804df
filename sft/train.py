"""One step of supervised fine-tuning: encode, weigh, pack, update."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ..model.chat import Chat, check_fits
from ..model.learner import FULL_DISTRIBUTION, Learner, TokenLogprobs
from ..model.metrics import maximum, total
from ..model.packing import pack, weigh
from ..model.records import DataError, Example, TrainSequence
from .config import SftConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class NoTargets:
    """Supervised losses need nothing beside the tokens."""


class SftStage:
    """Supervised fine-tuning; each step depends only on the weights and its examples."""

    def __init__(self, config: SftConfig, *, learner: Learner, chat: Chat) -> None:
        self.config = config
        self.learner = learner
        self.chat = chat

    def step(self, examples: Sequence[Example]) -> dict[str, float]:
        """Does one optimizer update on the examples of all ranks and returns the step's metrics; `examples` are this rank's."""
        start = time.perf_counter()
        families = [self._family(example) for example in examples]
        weighted = weigh(families, self.config.weighting, unit="family", over_ranks=self.learner.ranks.total)
        batches = self.learner.fill(pack(weighted, media=self.chat, token_budget=self.learner.config.token_budget))
        update = self.learner.update(batches, FULL_DISTRIBUTION, [negative_logprobs] * len(batches))
        counts = [{"trained_tokens": total(len(batch.target_ids)), "unique_tokens": total(len(batch.token_ids))} for batch in batches]
        measured = self.learner.ranks.merge([update, *counts, {"time/step_s": maximum(time.perf_counter() - start)}])
        return {**measured, "time/tokens_per_s": measured["unique_tokens"] / measured["time/step_s"]}

    def _family(self, example: Example) -> list[TrainSequence[NoTargets]]:
        family = supervised_sequences(example, self.chat)
        for sequence in family:
            check_fits(len(sequence.token_ids), limit=self.learner.config.token_budget, place=f"example {example.id}, learner.token_budget")
        return family


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
