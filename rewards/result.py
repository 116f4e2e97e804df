"""What a judgement can come out as: a value, 0.0 on purpose, or unavailable.

A wrong or malformed answer is a value, 0.0, with a note that says why. A judgement that could not be made (the verifier
crashed, the judge did not reply) is `Unavailable` and never becomes a number: nothing downstream can average over it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Real

from ..model.records import Example, Rollout


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardResult:
    """One component's judgement of one response: `RewardResult(value=0.0, note="no final answer")`.

    A value or metric that is no finite number is a `ValueError`.
    """

    value: float
    """In the range that the reward function states; the built-in verifiers give 0.0 or 1.0."""
    note: str = ""
    """Why the value is what it is, for a person who reads the rollout."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Further numbers to log; they never enter the reward."""

    def __post_init__(self) -> None:
        for name, number in {"value": self.value, **self.metrics}.items():
            if isinstance(number, bool) or not isinstance(number, Real) or not math.isfinite(number):
                raise ValueError(
                    f"RewardResult {name} = {number!r}: must be a finite number; return Unavailable(reason=...) when there is none"
                )


@dataclass(frozen=True, kw_only=True, slots=True)
class Unavailable:
    """The judgement could not be made, through no fault of the response: `Unavailable(reason="judge: no reply in 30 s")`."""

    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutScore:
    """The reward of one rollout and where it came from.

    Example: components `answer` (weight 1.0, value 1.0) and `format` (weight 0.2, value 0.5) give `reward=1.1`.
    """

    reward: float
    """Sum over components of weight x value."""
    results: Mapping[str, RewardResult]
    """By component name; only the components that judge this example's task."""
    judging_s: Mapping[str, float] = field(default_factory=dict, compare=False)
    """Seconds that each component took; left out of comparisons, so that equal judgements are equal records."""


@dataclass(frozen=True, kw_only=True, slots=True)
class JudgedRollout:
    """A rollout with its score."""

    rollout: Rollout
    score: RolloutScore


@dataclass(frozen=True, kw_only=True, slots=True)
class UnjudgedRollout:
    """A rollout without a score: `UnjudgedRollout(rollout=rollout, reasons={"answer": "the verifier cannot start"})`."""

    rollout: Rollout
    reasons: Mapping[str, str]
    """By component name; empty when this rollout could be judged and was dropped with the rest of its group (`drop_group`)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoredGroup:
    """A group after judging; every rollout of the group is in exactly one of the two, in the group's order."""

    example: Example
    judged: tuple[JudgedRollout, ...]
    unjudged: tuple[UnjudgedRollout, ...]

    @property
    def rollouts(self) -> tuple[Rollout, ...]:
        """All of them, the judged first."""
        return tuple(one.rollout for one in (*self.judged, *self.unjudged))
