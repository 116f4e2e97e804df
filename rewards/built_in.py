"""What the library knows about each reward function of its own: the entry that a verifier's module gives to the registry.

A verifier's module ends with `REWARDS: Mapping[str, BuiltInReward]`, one entry a name that recipes may use. There are three kinds:
a plain function that always ends soon, a function whose verdict is reached in a killable worker, and a service that judges many
rows at once with resources of its own (a sandbox, a judge model).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from ..model.config import Settings
from ..model.records import Example, Rollout
from .config import RewardsConfig
from .result import RewardResult, Unavailable
from .worker import WorkerRequest

Row: TypeAlias = tuple[Example, Rollout]
Verdict: TypeAlias = RewardResult | Unavailable
TimedVerdict: TypeAlias = tuple[Verdict, float]
"""A verdict and the seconds of work that it took, waiting left out."""


class RowJudge(Protocol):
    """A service at work."""

    @property
    def is_unsafe(self) -> bool:
        """True when what it runs could reach the trainer: logs and checkpoints of the run are then marked."""
        ...

    def describe(self) -> str:
        """Returns one line for the log: what was found on this machine or behind a URL, and which version of it."""
        ...

    def judge(self, rows: Sequence[Row]) -> list[TimedVerdict]:
        """Returns a verdict for each row, in order; never raises on account of a row."""
        ...


Service: TypeAlias = Callable[[Any, RewardsConfig, Path | None], AbstractContextManager[RowJudge]]
"""Opens a judge with resources of its own, from the component's options, all reward settings and the recipe's folder."""


def any_answer(example: Example) -> None:
    """The check of a reward that does not read `example.answer`."""


def answer_as_response(example: Example) -> str:
    """Returns the example's answer: the response that a verifier must find right."""
    return example.answer


@dataclass(frozen=True, kw_only=True, slots=True)
class BuiltInReward:
    """One reward function of the library; exactly one of `function` and `service` is given."""

    summary: str
    """What it measures, one line for `vlpost rewards list`."""
    value_range: tuple[float, float]
    """Smallest and largest value; (0.0, 1.0) for a verifier."""
    check_answer: Callable[[Example], None] = any_answer
    """Raises a `DataError` that names the example when its answer (or metadata) is not what the function compares with."""
    gold_response: Callable[[Example], str] | None = answer_as_response
    """A response that gets `gold_value`; none where the example's answer does not tell (an open question for a judge)."""
    gold_value: float = 1.0
    """Value of the gold response: the largest for a verifier, 0.0 for a penalty."""
    cacheable: bool = False
    """True where a verdict costs more than looking it up on disk and depends on nothing but the row, options and version."""
    version: int = 1
    """Counts changes of what the function says; part of the cache's key."""
    function: Callable[..., RewardResult | Unavailable | WorkerRequest] | None = None
    """`function(example, rollout, *, options)`: total and fast, or it returns a `WorkerRequest`."""
    self_check: Callable[[Example], WorkerRequest] | None = None
    """Given: the function's verdict is reached in a killable worker, and this asks it to find the example's own answer right."""
    service: Service | None = None
    options: type[Settings] | None = None
    """Options of a service; a function's are its keyword-only arguments."""

    def __post_init__(self) -> None:
        assert (self.function is None) != (self.service is None), "a built-in reward is a function or a service"
        assert (self.service is None) == (self.options is None), "a service's options are a settings class"
