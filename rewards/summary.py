"""What a scored batch looked like, component by component: for the run log and for alarms."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean

from .result import RolloutScore, ScoredGroup

# By words that the reasons of the manager and its workers begin with or hold; the first that fits counts.
_KINDS = (
    ("timeout", ("no verdict in", "timed out", "TimeoutError", "deadline")),
    ("memory", ("its memory grew", "MemoryError")),
    ("died", ("the process died", "process died", "is gone", "did not start", "could not be replaced", "can be started")),
    ("garbage", ("its reply is garbage",)),
    ("returned", ("the reward function returned", "weight x value", "must be a finite number")),
    ("raised", ("Traceback (most recent call last)",)),
)


def reason_kind(reason: str) -> str:
    """Returns what sort of fault a reason tells of: timeout, memory, died, garbage, returned, raised or other."""
    return next((kind for kind, words in _KINDS if any(word in reason for word in words)), "other")


@dataclass(frozen=True, kw_only=True, slots=True)
class ComponentSummary:
    """One component over the batch; judged rollouts only, except for `num_unavailable`."""

    num_judged: int
    num_unavailable: int
    mean: float | None
    """Mean value, unweighted by the component's weight; None when nothing was judged."""
    seconds: float
    """Sum over rollouts of the time that judging took; with several workers more than the clock shows."""
    metrics: Mapping[str, float]
    """Mean of each further metric over the rollouts that reported it."""
    num_cached: int = 0
    """Of the judged, those that were looked up."""
    full_frac: float | None = None
    """Share of the judged with the component's full value; None when nothing was judged."""
    seconds_p50: float = 0.0
    """Median over the rollouts that were really judged; 0 when none was."""
    seconds_p95: float = 0.0
    seconds_max: float = 0.0
    unavailable_kinds: Mapping[str, int] = field(default_factory=dict)
    """Number of rollouts by `reason_kind`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreSummary:
    """A batch after judging."""

    num_rollouts: int
    num_unavailable: int
    """Rollouts that could not be judged; those dropped with their group are not among them."""
    num_dropped: int
    """Rollouts that could be judged and were dropped with their group."""
    reward_mean: float | None
    """Over the judged rollouts that were kept; None when there is none."""
    components: Mapping[str, ComponentSummary]

    def metrics(self) -> dict[str, float]:
        """Returns flat numbers for a log: `reward`, `reward/<component>`, `unavailable_frac` and so on; seconds under `time/`."""
        numbers: dict[str, float] = {
            "unavailable_frac": self.num_unavailable / self.num_rollouts if self.num_rollouts else 0.0,
            "dropped_frac": self.num_dropped / self.num_rollouts if self.num_rollouts else 0.0,
        }
        if self.reward_mean is not None:
            numbers["reward"] = self.reward_mean
        for name, component in self.components.items():
            if component.mean is not None:
                numbers[f"reward/{name}"] = component.mean
            if component.full_frac is not None:
                numbers[f"reward/{name}/full_frac"] = component.full_frac
            numbers[f"reward/{name}/judged"] = float(component.num_judged)
            numbers[f"reward/{name}/unavailable"] = float(component.num_unavailable)
            numbers |= {f"reward/{name}/unavailable/{kind}": float(count) for kind, count in component.unavailable_kinds.items()}
            numbers[f"time/reward/{name}_s"] = component.seconds
            numbers[f"time/reward/{name}_p50_s"] = component.seconds_p50
            numbers[f"time/reward/{name}_p95_s"] = component.seconds_p95
            numbers[f"time/reward/{name}_max_s"] = component.seconds_max
            # Beside the times, which alone may differ between a run and the same run resumed.
            numbers[f"time/reward/{name}_cached"] = float(component.num_cached)
            numbers |= {f"reward/{name}/metrics/{metric}": mean for metric, mean in component.metrics.items()}
        return numbers


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupOutcomes:
    """What judging said of one group, without the rollouts: light enough to pass between processes."""

    scores: tuple[RolloutScore, ...]
    unjudged_reasons: tuple[Mapping[str, str], ...]
    """Of each rollout without a score, by component; empty for one that was dropped with its group"""


def group_outcomes(scored_groups: Sequence[ScoredGroup]) -> list[GroupOutcomes]:
    """Returns the outcomes of each group."""
    return [
        GroupOutcomes(
            scores=tuple(judged.score for judged in group.judged), unjudged_reasons=tuple(rollout.reasons for rollout in group.unjudged)
        )
        for group in scored_groups
    ]


def summarise(outcomes: Sequence[GroupOutcomes], *, full_values: Mapping[str, float] | None = None) -> ScoreSummary:
    """Returns the summary of a scored batch.

    `full_values` gives the best value of each component (`RewardManager.full_values`); 1.0, a verifier's, where it says nothing.
    """
    scores = [score for group in outcomes for score in group.scores]
    unjudged = [reasons for group in outcomes for reasons in group.unjudged_reasons]
    names = dict.fromkeys(name for score in scores for name in score.results)
    names |= dict.fromkeys(name for reasons in unjudged for name in reasons)
    num_dropped = sum(not reasons for reasons in unjudged)
    return ScoreSummary(
        num_rollouts=len(scores) + len(unjudged),
        num_unavailable=len(unjudged) - num_dropped,
        num_dropped=num_dropped,
        reward_mean=fmean(score.reward for score in scores) if scores else None,
        components={name: _component(name, scores, unjudged, full_value=(full_values or {}).get(name, 1.0)) for name in names},
    )


def _component(name: str, scores: Sequence[RolloutScore], unjudged: Sequence[Mapping[str, str]], *, full_value: float) -> ComponentSummary:
    judged = [score for score in scores if name in score.results]
    results = [score.results[name] for score in judged]
    seconds = sorted(score.judging_s[name] for score in judged if name in score.judging_s)
    metric_names = dict.fromkeys(metric for result in results for metric in result.metrics)
    return ComponentSummary(
        num_judged=len(results),
        # A verdict that was looked up took no time, and none is noted down for it.
        num_cached=len(results) - len(seconds),
        num_unavailable=sum(name in reasons for reasons in unjudged),
        unavailable_kinds=dict(sorted(Counter(reason_kind(reasons[name]) for reasons in unjudged if name in reasons).items())),
        mean=fmean(result.value for result in results) if results else None,
        full_frac=sum(result.value >= full_value for result in results) / len(results) if results else None,
        seconds=sum(seconds),
        seconds_p50=_quantile(seconds, 0.5),
        seconds_p95=_quantile(seconds, 0.95),
        seconds_max=_quantile(seconds, 1.0),
        metrics={metric: fmean(result.metrics[metric] for result in results if metric in result.metrics) for metric in metric_names},
    )


def _quantile(ordered: Sequence[float], share: float) -> float:
    """Returns the smallest value that is not below `share` of all values; 0.0 without values."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else 0.0
