"""What becomes of responses that are too long: left out of advantages and loss alike, or taken down in their reward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..model.metrics import Metric, mean
from ..rewards.result import JudgedRollout, ScoredGroup, UnjudgedRollout
from .advantages import has_signal
from .config import OverlongConfig, OverlongPenaltyConfig


def with_overlong_rule(scored: Sequence[ScoredGroup], config: OverlongConfig | None) -> tuple[list[ScoredGroup], dict[str, Metric]]:
    """Returns the groups by which advantages are taken and that are trained on, and what the rule did, as metrics.

    `mask` takes every response that was cut off (finish reason `length`; of a conversation also at its last allowed turn) out of its
    group: neither the other advantages nor the loss see it. `penalty` lowers the reward of each by `overlong_penalty`. Without a
    rule a response counts as it was judged.
    """
    judged = [one for group in scored for one in group.judged]
    if config is None or not judged:
        return list(scored), {}
    if isinstance(config, OverlongPenaltyConfig):
        penalties = [overlong_penalty(one, config) for one in judged]
        penalised = [
            replace(group, judged=tuple(with_less_reward(one, overlong_penalty(one, config)) for one in group.judged)) for group in scored
        ]
        return penalised, {"overlong_penalty": mean(sum(penalties) / len(judged), len(judged))}
    kept = [
        replace(
            group,
            judged=tuple(one for one in group.judged if not _is_cut_off(one)),
            unjudged=(*group.unjudged, *(UnjudgedRollout(rollout=one.rollout, reasons={}) for one in group.judged if _is_cut_off(one))),
        )
        for group in scored
    ]
    return kept, {"overlong_masked_frac": mean(sum(map(_is_cut_off, judged)) / len(judged), len(judged))}


def has_signal_left(group: ScoredGroup, config: OverlongConfig | None) -> bool:
    """Returns whether a group moves the policy under the rule: at least two responses are left and their rewards differ."""
    ((ruled,), _) = with_overlong_rule([group], config)
    return len(ruled.judged) >= 2 and has_signal([one.score.reward for one in ruled.judged])


def overlong_penalty(judged: JudgedRollout, config: OverlongPenaltyConfig) -> float:
    """Returns what is taken from a response's reward: weight * clamp((tokens - (max_tokens - buffer_tokens)) / buffer_tokens, 0, 1).

    `tokens` are those that the policy sampled, in all turns. DAPO's soft over-long punishment
    (arXiv:2503.14476).
    """
    over = judged.rollout.num_sampled_tokens - (config.max_tokens - config.buffer_tokens)
    return config.weight * min(1.0, max(0.0, over / config.buffer_tokens))


def _is_cut_off(judged: JudgedRollout) -> bool:
    return judged.rollout.finish_reason == "length"


def with_less_reward(judged: JudgedRollout, penalty: float) -> JudgedRollout:
    """Returns the response with its reward lowered."""
    return replace(judged, score=replace(judged.score, reward=judged.score.reward - penalty))
