"""Measuring a model on held-out examples: accuracy of sampled and greedy responses, pass@k."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..model.chat import Chat
from ..model.layout import Ranks
from ..model.records import Example, Group
from ..model.sampler import Sampler, SampleRequest, request_seed
from ..rewards.manager import RewardManager
from .schema import EvaluateConfig


def evaluate(
    examples: Sequence[Example], config: EvaluateConfig, *, sampler: Sampler, rewards: RewardManager, chat: Chat, ranks: Ranks, seed: int
) -> dict[str, float]:
    """Returns, for k = `num_samples` and each temperature t: `avg@k/t` (mean reward), `pass@k/t` (share of examples with a response
    that earned a reward above 0); `greedy` (mean reward at temperature 0); `truncated_frac` and `unavailable_frac` over all of them.

    Seeds depend on `seed`, the temperature and the example alone, so that two models are asked alike. A response that could not be
    judged counts in `unavailable_frac` and `truncated_frac` and in nothing else. Each rank asks its share of the examples.
    """
    measured: dict[str, float] = {}
    counts: list[tuple[int, int, int]] = []
    here = ranks.share(examples)
    plans = [(f"/{temperature:g}", temperature, config.num_samples) for temperature in config.temperatures]
    if config.greedy:
        plans.append(("greedy", 0.0, 1))
    for name, temperature, num_samples in plans:
        requests = [
            SampleRequest(
                place=example.id,
                prompt=chat.encode_prompt(example.messages),
                num_rollouts=num_samples,
                seed=request_seed(seed, "evaluate", name, example.id),
                temperature=temperature,
            )
            for example in here
        ]
        groups = [Group(example=e, rollouts=r) for e, r in zip(here, sampler.sample(requests), strict=True)]
        scored = rewards.score(groups)
        judged_here = [[judged.score.reward for judged in group.judged] for group in scored if group.judged]
        by_example = [rewards_of for rank in ranks.gather(judged_here) for rewards_of in rank]
        num_truncated = sum(rollout.finish_reason == "length" for group in groups for rollout in group.rollouts)
        counts += ranks.gather((len(groups) * num_samples, sum(len(group.unjudged) for group in scored), num_truncated))
        if not by_example:
            continue
        values = [value for example in by_example for value in example]
        if temperature == 0.0:
            measured["greedy"] = math.fsum(values) / len(values)
        else:
            measured[f"avg@{num_samples}{name}"] = math.fsum(values) / len(values)
            measured[f"pass@{num_samples}{name}"] = sum(max(example) > 0 for example in by_example) / len(by_example)
    drawn, unjudged, truncated = (sum(column) for column in zip(*counts, strict=True))
    measured["truncated_frac"] = truncated / drawn
    measured["unavailable_frac"] = unjudged / drawn
    return measured
