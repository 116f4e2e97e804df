"""What a scored batch looked like, component by component: for the run log and for alarms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from .result import RolloutScore, ScoredGroup


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
            numbers[f"reward/{name}/unavailable"] = float(component.num_unavailable)
            numbers[f"time/reward/{name}_s"] = component.seconds
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


def summarise(outcomes: Sequence[GroupOutcomes]) -> ScoreSummary:
    """Returns the summary of a scored batch."""
    scores = [score for group in outcomes for score in group.scores]
    unjudged = [reasons for group in outcomes for reasons in group.unjudged_reasons]
    names = dict.fromkeys(name for score in scores for name in score.results)
    names |= dict.fromkeys(name for reasons in unjudged for name in reasons)
    components = {}
    for name in names:
        results = [score.results[name] for score in scores if name in score.results]
        metric_names = dict.fromkeys(metric for result in results for metric in result.metrics)
        components[name] = ComponentSummary(
            num_judged=len(results),
            num_unavailable=sum(name in reasons for reasons in unjudged),
            mean=fmean(result.value for result in results) if results else None,
            seconds=sum(score.judging_s.get(name, 0.0) for score in scores),
            metrics={metric: fmean(result.metrics[metric] for result in results if metric in result.metrics) for metric in metric_names},
        )
    num_dropped = sum(not reasons for reasons in unjudged)
    return ScoreSummary(
        num_rollouts=len(scores) + len(unjudged),
        num_unavailable=len(unjudged) - num_dropped,
        num_dropped=num_dropped,
        reward_mean=fmean(score.reward for score in scores) if scores else None,
        components=components,
    )
