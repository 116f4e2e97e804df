"""Measuring a model on held-out examples: accuracy of sampled and greedy responses, pass@k."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from ..model.chat import Chat
from ..model.layout import Ranks
from ..model.records import Example, Rollout
from ..model.rollouts import Drawing, conversation_metrics, draw_groups
from ..model.sampler import Sampler, request_seed
from ..rewards.manager import RewardManager
from ..rewards.result import ScoredGroup
from .schema import EvaluateConfig


def evaluate(
    examples: Sequence[Example],
    config: EvaluateConfig,
    *,
    sampler: Sampler,
    rewards: RewardManager,
    chat: Chat,
    ranks: Ranks,
    seed: int,
    draw: Drawing | None = None,
) -> dict[str, float]:
    """Returns, for k = `num_samples` and each temperature t: `avg@k/t` (mean reward), `pass@k/t` (share of examples with a response
    that earned a reward above 0); `greedy` (mean reward at temperature 0); `truncated_frac` and `unavailable_frac` over all of them.

    Seeds depend on `seed`, the temperature and the example alone, so that two models are asked alike. A response that could not be
    judged counts in `unavailable_frac` and `truncated_frac` and in nothing else. Where examples are of several tasks, the figures of each
    stand below `task/<task>/`; where the reward has several components, the mean value of each, over the responses that it judges, below
    `reward/<component>/`. Each rank asks its share of the examples. `draw` draws conversations with tools, whose turns and calls are
    measured too; absent: one response to each prompt.
    """
    measured: dict[str, float] = {}
    counts: list[tuple[int, int, int]] = []
    here = ranks.share(examples)
    draw = draw or partial(draw_groups, sampler=sampler, chat=chat)
    rollouts: list[Rollout] = []
    plans = [(f"/{temperature:g}", temperature, config.num_samples) for temperature in config.temperatures]
    if config.greedy:
        plans.append(("greedy", 0.0, 1))
    for name, temperature, num_samples in plans:
        seed_of = partial(_seed, seed, name)
        groups = draw(here, num_rollouts=num_samples, temperature=temperature, seed_of=seed_of)
        rollouts += [rollout for group in groups for rollout in group.rollouts]
        scored = rewards.score(groups)
        judged_here = [_Judged.of(group) for group in scored if group.judged]
        judged = [one for rank in ranks.gather(judged_here) for one in rank]
        num_truncated = sum(rollout.finish_reason == "length" for group in groups for rollout in group.rollouts)
        counts += ranks.gather((len(groups) * num_samples, sum(len(group.unjudged) for group in scored), num_truncated))
        measured |= _accuracy(judged, "greedy" if temperature == 0.0 else f"@{num_samples}{name}")
    drawn, unjudged, truncated = (sum(column) for column in zip(*counts, strict=True))
    measured["truncated_frac"] = truncated / drawn
    measured["unavailable_frac"] = unjudged / drawn
    return measured | ranks.merge([conversation_metrics(rollouts)])


@dataclass(frozen=True, kw_only=True, slots=True)
class _Judged:
    """The judged responses to one example."""

    task: str
    rewards: tuple[float, ...]
    components: tuple[Mapping[str, float], ...]
    """Value by component, of each response"""

    @classmethod
    def of(cls, group: ScoredGroup) -> _Judged:
        """Returns what is left of a group for the figures."""
        return cls(
            task=group.example.task,
            rewards=tuple(judged.score.reward for judged in group.judged),
            components=tuple({name: result.value for name, result in judged.score.results.items()} for judged in group.judged),
        )


def _accuracy(judged: Sequence[_Judged], label: str) -> dict[str, float]:
    """Returns the figures of one way of sampling; of tasks and components too, where there are several."""
    if not judged:
        return {}
    measured = _means(judged, label)
    tasks = sorted({one.task for one in judged})
    for task in tasks if len(tasks) > 1 else ():
        of_task = _means([one for one in judged if one.task == task], label)
        measured |= {f"task/{task}/{name}": value for name, value in of_task.items()}
    values: dict[str, list[float]] = {}
    for one in judged:
        for response in one.components:
            for name, value in response.items():
                values.setdefault(name, []).append(value)
    mean_name = label if label == "greedy" else f"avg{label}"
    for name in sorted(values) if len(values) > 1 else ():
        measured[f"reward/{name}/{mean_name}"] = math.fsum(values[name]) / len(values[name])
    return measured


def _means(judged: Sequence[_Judged], label: str) -> dict[str, float]:
    values = [reward for one in judged for reward in one.rewards]
    mean = math.fsum(values) / len(values)
    if label == "greedy":
        return {label: mean}
    return {f"avg{label}": mean, f"pass{label}": sum(max(one.rewards) > 0 for one in judged) / len(judged)}


def _seed(seed: int, name: str, example: Example) -> int:
    return request_seed(seed, "evaluate", name, example.id)
