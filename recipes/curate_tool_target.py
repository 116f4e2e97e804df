"""The step `tool_target` of `vlpost curate`: how many tool calls a row needs, estimated from tries that `verify` found right.

Qwen3-VL's reward for the number of calls compares with a target that a model sets offline (arXiv:2511.21631, 4.5); the report does not say
how. Ours is measured, not guessed: of a model's k tries with tools, the fewest calls with which the row was solved. Calls that came to
nothing do not count, as in the reward `tool_calls`. Fewer than `min_solved` right tries tell nothing, and the row is dropped. The fewest of
few tries may be luck, where an answer can be guessed: `quantile` above 0 takes a more cautious one of the right tries.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace

from ..model.records import DataError
from ..rewards.tool_calls import TARGET_KEY
from .curate_config import ToolTargetConfig
from .curate_step import Candidate, CuratedRow, StepContext, StepResult


class ToolTargetStep:
    """Opens `tool_target`, which needs nothing."""

    def __init__(self, config: ToolTargetConfig) -> None:
        self._config = config

    def open(self, context: StepContext) -> nullcontext[OpenToolTarget]:
        """Returns the step."""
        return nullcontext(OpenToolTarget(self._config))


class OpenToolTarget:
    """Writes the target into the metadata of each row."""

    def __init__(self, config: ToolTargetConfig) -> None:
        self._config = config

    def run(self, rows: Sequence[CuratedRow], *, shard: int) -> StepResult:
        """Returns the rows with `metadata.target_calls`, and in their notes how many tries were right.

        Raises `DataError` where a candidate has no value: `verify` comes first.
        """
        kept, dropped = [], []
        histogram: Counter[str] = Counter()
        for row in rows:
            tries = [candidate for candidate in row.candidates if candidate.model == self._config.model and candidate.turns]
            if not tries:
                dropped.append((row.example.id, f"no conversation of {self._config.model}: its number of calls is unknown"))
                continue
            calls = sorted(num_calls(candidate) for candidate in tries if self._is_solved(candidate, row))
            if len(calls) < self._config.min_solved:
                reason = f"{len(calls)} of {len(tries)} conversations are right, at least {self._config.min_solved} must be"
                dropped.append((row.example.id, f"number of calls unknown: {reason}"))
                continue
            target = calls[max(0, math.ceil(self._config.quantile * len(calls)) - 1)]
            histogram[str(target)] += 1
            example = replace(row.example, metadata={**row.example.metadata, TARGET_KEY: target})
            kept.append(
                replace(row, example=example, notes={**row.notes, "tool_target/solved": len(calls), "tool_target/tries": len(tries)})
            )
        bars = dict(sorted(histogram.items(), key=lambda bar: int(bar[0])))
        return StepResult(rows=tuple(kept), dropped=tuple(dropped), histogram={"target of tool calls": bars})

    def _is_solved(self, candidate: Candidate, row: CuratedRow) -> bool:
        if candidate.value is None:
            raise DataError(
                f"row {row.example.id!r}: a candidate of {candidate.model} has no value; put a step with use: verify before tool_target"
            )
        return candidate.ending == "answered" and candidate.value >= self._config.solved_reward


def num_calls(candidate: Candidate) -> int:
    """Returns how many calls of a conversation a tool answered with a result."""
    return sum(not answer.is_error for turn in candidate.turns for answer in turn.answers)
