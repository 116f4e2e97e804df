"""Alarms: a metric that leaves its bounds for some steps rings, and says since when. No torch."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from ..model.metrics import Metric, mean
from ..model.records import VlpostError
from ..rewards.result import ScoredGroup
from .schema import AlarmConfig


class AlarmError(VlpostError):
    """An alarm that ended the run, or one that can never ring; the message names the metric, its bounds and what to do."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ringing:
    """An alarm that has just rung: `entropy = 0.03, below 0.05, 3 times in a row (steps 12 to 14)`."""

    config: AlarmConfig
    value: float
    bound: str
    """Which bound was passed: `below 0.05`"""
    first_step: int
    """The first step in a row that was out of bounds; the first step of a stage is 1."""
    step: int

    def __str__(self) -> str:
        span = f"{self.config.steps} times in a row (steps {self.first_step} to {self.step})"
        return f"{self.config.metric} = {self.value:.4g}, {self.bound}, {span}"


@dataclass(kw_only=True)
class _Watched:
    """One alarm over time."""

    config: AlarmConfig
    num_out: int = 0
    """Reports in a row out of bounds."""
    first_step: int = 0
    baseline_sum: float = 0.0
    num_baseline: int = 0

    def update(self, step: int, value: float) -> Ringing | None:
        bound = self._passed_bound(value)
        if bound is None:
            self.num_out = 0
            return None
        self.num_out += 1
        if self.num_out == 1:
            self.first_step = step
        if self.num_out != self.config.steps:
            return None
        return Ringing(config=self.config, value=value, bound=bound, first_step=self.first_step, step=step)

    def _passed_bound(self, value: float) -> str | None:
        """Returns the bound that the value lies beyond; a value that goes into the baseline is within."""
        if not math.isfinite(value):
            return "not finite"
        factor, of_baseline = 1.0, ""
        if self.config.baseline_steps:
            if self.num_baseline < self.config.baseline_steps:
                if value > 0:
                    self.baseline_sum += value
                    self.num_baseline += 1
                return None
            factor = self.baseline_sum / self.num_baseline
            of_baseline = f" of its first {self.num_baseline} ({factor:.4g})"
        if self.config.below is not None and value < self.config.below * factor:
            return f"below {self.config.below:g}{f' x the mean{of_baseline}' if of_baseline else ''}"
        if self.config.above is not None and value > self.config.above * factor:
            return f"above {self.config.above:g}{f' x the mean{of_baseline}' if of_baseline else ''}"
        return None


class Alarms:
    """The alarms of one stage. What they have seen is part of a checkpoint, so a resumed run rings when the uninterrupted one would."""

    def __init__(self, configs: Sequence[AlarmConfig]) -> None:
        self._watched = [_Watched(config=config) for config in configs]
        self._reported: set[str] = set()

    def update(self, step: int, metrics: Mapping[str, float]) -> list[Ringing]:
        """Takes a step's metrics and returns the alarms that ring now; a metric that is missing from this step changes nothing."""
        self._reported |= metrics.keys()
        rung = [watched.update(step, metrics[watched.config.metric]) for watched in self._watched if watched.config.metric in metrics]
        return [ringing for ringing in rung if ringing is not None]

    def check_reported(self, prefix: str = "") -> None:
        """Raises `AlarmError` for an alarm whose metric nothing has reported.

        `prefix` "validation/" asks for the metrics of a validation, "" for all others, which a step reports once it has made an update.
        """
        if not prefix and "grad_norm" not in self._reported:  # no update yet, e.g. no group with signal: some metrics come later
            return
        for watched in self._watched:
            metric = watched.config.metric
            if metric not in self._reported and metric.startswith("validation/") == bool(prefix):
                close = difflib.get_close_matches(metric, sorted(self._reported), n=1)
                hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(sorted(self._reported))}"
                raise AlarmError(f"alarms: nothing reports the metric {metric!r}, so its alarm could never ring; {hint}")

    def first_steps_of_roll_backs(self) -> list[int]:
        """Returns since when the metrics of alarms that roll back have been out of bounds, for those that are."""
        return [watched.first_step for watched in self._watched if watched.config.action == "roll_back" and watched.num_out]

    def silence(self) -> None:
        """Starts counting anew; the baselines stay."""
        for watched in self._watched:
            watched.num_out = 0

    def state(self) -> list[dict[str, Any]]:
        """Returns what the alarms have seen as plain JSON."""
        return [
            {
                "alarm": watched.config.model_dump(mode="json"),
                "num_out": watched.num_out,
                "first_step": watched.first_step,
                "baseline_sum": watched.baseline_sum,
                "num_baseline": watched.num_baseline,
            }
            for watched in self._watched
        ]

    def load(self, state: Sequence[Mapping[str, Any]]) -> None:
        """Takes what `state` returned; an alarm that the recipe has had changed since starts anew."""
        for watched in self._watched:
            described = watched.config.model_dump(mode="json")
            for saved in state:
                if saved["alarm"] == described:
                    watched.num_out, watched.first_step = saved["num_out"], saved["first_step"]
                    watched.baseline_sum, watched.num_baseline = saved["baseline_sum"], saved["num_baseline"]


def reward_spread(scored: Sequence[ScoredGroup]) -> dict[str, Metric]:
    """Returns how far rewards differ within groups: `reward_std` (mean over groups of the unbiased std) and
    `groups_without_signal_frac` (share of groups whose judged rewards are all equal); over groups with at least two judged rollouts.
    """
    rewards = [[judged.score.reward for judged in group.judged] for group in scored if len(group.judged) >= 2]
    if not rewards:
        return {}
    return {
        "reward_std": mean(fmean(stdev(group) for group in rewards), len(rewards)),
        "groups_without_signal_frac": mean(sum(min(group) == max(group) for group in rewards) / len(rewards), len(rewards)),
    }
