"""Which checkpoint a stage may go back to after a collapse, and which ones the retention must therefore spare. No torch.

Only checkpoints of the schedule count, not those of a Ctrl-C: a run that was interrupted then goes back to where the uninterrupted one
would.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(kw_only=True)
class RollBacks:
    """The roll-backs of a stage so far; part of its checkpoints."""

    every: int
    """Steps between the checkpoints of the schedule."""
    spans: list[tuple[int, int]] = field(default_factory=list)
    """(first, last) step of the work that each roll-back threw away: checkpoints of these steps are never gone back to."""

    def target(self, saved_steps: Collection[int], *, first_step: int) -> int | None:
        """Returns the newest saved step to go back to when metrics are out of bounds since `first_step`, None when there is none.

        The metrics of a step are measured on the weights of the step before it, so those count as collapsed too.
        """
        newest = max(0, first_step - 2)
        return max((step for step in saved_steps if step <= newest and self._may_be_target(step)), default=None)

    def protected(self, saved_steps: Collection[int], *, step: int, first_steps: Sequence[int]) -> set[int]:
        """Returns the saved steps that a roll-back may want: for each fault that has begun, and for one that begins in the next step."""
        wanted = [self.target(saved_steps, first_step=first) for first in (*first_steps, step + 1, step + 2)]
        return {step for step in wanted if step is not None}

    def add(self, *, first_step: int, step: int) -> None:
        """Takes note of a roll-back after `step` of what has been out of bounds since `first_step`."""
        self.spans.append((max(1, first_step - 1), step - 1))

    def _may_be_target(self, step: int) -> bool:
        return step % self.every == 0 and not any(first <= step <= last for first, last in self.spans)

    def state(self) -> list[list[int]]:
        """Returns the spans as plain JSON."""
        return [list(span) for span in self.spans]

    def load(self, state: Sequence[Sequence[Any]]) -> None:
        """Takes what `state` returned."""
        self.spans = [(int(first), int(last)) for first, last in state]
