"""One step of reinforcement learning: draw, judge, compare, update, publish.

The algorithm (arXiv:2511.20347, algorithm of section 3) is `RlStage.step`, top to bottom.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from ..model.chat import Chat
from ..model.learner import Distribution, Learner, TokenLogprobs
from ..model.metrics import Metric, maximum, mean, merge, total
from ..model.packing import Batch, Weighted, pack
from ..model.records import Example, Group, TrainSequence
from ..model.sampler import Sampler, SampleRequest, request_seed
from ..model.weight_sync import publish
from ..rewards.manager import RewardManager
from ..rewards.result import ScoredGroup
from ..rewards.summary import summarise
from .advantages import group_advantages, has_signal
from .config import PolicyLossConfig, RlConfig, SapoConfig
from .policy_loss import engine_mismatch, grpo, gspo, ratio_statistics, reinforce, sapo, truncated_importance_weights


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyTargets:
    """What the policy-gradient losses need for one response."""

    advantage: float
    """(reward - mean of the group) / std of the group; one value for all tokens of the response"""
    sampler_logprobs: tuple[float, ...]
    """[trained tokens] nats, by the engine when drawn"""


PolicyBatch = Batch[PolicyTargets]


@dataclass(frozen=True, kw_only=True, slots=True)
class RlStepResult:
    """What a step leaves behind for the log."""

    metrics: dict[str, float]
    scored_groups: tuple[ScoredGroup, ...]


class RlStage:
    """Reinforcement learning with any loss of `rl.policy_loss`; each step depends only on the weights and its own number."""

    def __init__(
        self,
        config: RlConfig,
        *,
        learner: Learner,
        sampler: Sampler,
        rewards: RewardManager,
        chat: Chat,
        distribution: Distribution,
        seed: int,
    ) -> None:
        self.config = config
        self.learner = learner
        self.sampler = sampler
        self.rewards = rewards
        self.chat = chat
        self.distribution = distribution
        self.seed = seed

    def step(self, step: int, examples: Sequence[Example], check_interrupt: Callable[[], None]) -> RlStepResult:
        """Draws a group for each example, updates the policy in mini-batches and publishes the new weights.

        `check_interrupt` is called once the rollouts are there; what it raises drops them, and no weight has changed.
        """
        clock = _Clock()
        with clock.phase("rollout"):
            groups = self._draw(step, examples)
        check_interrupt()
        with clock.phase("reward"):
            scored = self.rewards.score(groups)
        with clock.phase("update"):
            mini_batches = self._mini_batches(scored)
            # Before the first update pi_old is the policy itself, so only later mini-batches need their old log-probs ahead of it.
            old = [[self._old_logprobs(batch) for batch in batches] if index else None for index, batches in enumerate(mini_batches)]
            seen: list[_Seen] = []
            updates = [self._update(batches, logprobs, seen) for batches, logprobs in zip(mini_batches, old, strict=True)]
        with clock.phase("publish"):
            publish(self.learner, self.sampler)
        measured = merge([*updates, _token_metrics(seen, self.config.policy_loss), _rollout_metrics(scored)])
        num_sampled = sum(rollout.num_sampled_tokens for group in groups for rollout in group.rollouts)
        speeds = clock.metrics(num_sampled=num_sampled, num_unique=sum(part.num_unique_tokens for part in seen))
        return RlStepResult(metrics={**measured, **summarise(scored).metrics(), **speeds}, scored_groups=tuple(scored))

    def _draw(self, step: int, examples: Sequence[Example]) -> list[Group]:
        requests = [
            SampleRequest(
                place=example.id,
                prompt=self.chat.encode_prompt(example.messages),
                num_rollouts=self.config.group_size,
                seed=request_seed(self.seed, "rollout", step, example.id),
                temperature=self.distribution.temperature,
            )
            for example in examples
        ]
        return [
            Group(example=example, rollouts=rollouts) for example, rollouts in zip(examples, self.sampler.sample(requests), strict=True)
        ]

    def _mini_batches(self, scored: Sequence[ScoredGroup]) -> list[list[PolicyBatch]]:
        """Returns the packed micro-batches of each optimizer update; groups without signal have weight 0 and are left out."""
        size = len(scored) // self.config.num_mini_batches
        parts = [scored[start : start + size] for start in range(0, len(scored), size)]
        return [pack(policy_families(part, self.config), media=self.chat, token_budget=self.learner.config.token_budget) for part in parts]

    def _old_logprobs(self, batch: PolicyBatch) -> Tensor:
        return self.learner.logprobs(batch, self.distribution).logprobs

    def _update(self, batches: Sequence[PolicyBatch], old_logprobs: Sequence[Tensor] | None, seen: list[_Seen]) -> dict[str, Metric]:
        """Does one optimizer update; `old_logprobs` None means that the current policy is pi_old. Adds what its losses saw to `seen`."""
        if not batches:  # every group of this mini-batch was without signal: momentum alone must not move the weights
            return {"skipped_updates": total(1)}
        for index, batch in enumerate(batches):
            loss = _PolicyLoss(self.config, batch, old_logprobs[index] if old_logprobs else None)
            self.learner.forward_backward(batch, self.distribution, loss)
            seen += loss.seen
        return {**{name: mean(value) for name, value in self.learner.optim_step().items()}, "skipped_updates": total(0)}


def policy_families(scored: Sequence[ScoredGroup], config: RlConfig) -> list[list[Weighted[PolicyTargets]]]:
    """Returns one family a group with signal, each trained token weighing 1 / (responses in the mean * tokens of its response).

    The denominator is the planned number of responses (`normalize_by: planned`) or the number in groups with signal. After an
    unavailable reward the group's advantages are taken over the responses that were judged; fewer than two drop the group.
    """
    with_signal = [group for group in scored if len(group.judged) >= 2 and has_signal([r.score.reward for r in group.judged])]
    num_responses = config.group_size * len(scored) if config.normalize_by == "planned" else sum(len(group.judged) for group in with_signal)
    families = []
    for group in with_signal:
        advantages = group_advantages([judged.score.reward for judged in group.judged], scale=config.scale_advantages)
        families.append(
            [
                Weighted(
                    sequence=TrainSequence(
                        place=f"{group.example.id}, rollout {number}",
                        token_ids=judged.rollout.token_ids,
                        trained=judged.rollout.sampled,
                        media=judged.rollout.media,
                        targets=PolicyTargets(
                            advantage=advantage,
                            sampler_logprobs=tuple(
                                logprob
                                for logprob, sampled in zip(judged.rollout.sampler_logprobs, judged.rollout.sampled, strict=True)
                                if sampled
                            ),
                        ),
                    ),
                    token_weight=1.0 / (num_responses * judged.rollout.num_sampled_tokens),
                )
                for number, (judged, advantage) in enumerate(zip(group.judged, advantages, strict=True))
            ]
        )
    return families


@dataclass(frozen=True, kw_only=True, slots=True)
class _Seen:
    """The log-probs of one micro-batch as its loss saw them, detached: [N] each."""

    logprobs: Tensor
    old_logprobs: Tensor
    sampler_logprobs: Tensor
    advantages: Tensor
    entropy: Tensor
    num_unique_tokens: int
    num_recomputed_tokens: int


class _PolicyLoss:
    """The per-token loss of one micro-batch; keeps what it saw for the step's metrics."""

    def __init__(self, config: RlConfig, batch: PolicyBatch, old_logprobs: Tensor | None) -> None:
        self.config = config
        self.batch = batch
        self.old_logprobs = old_logprobs
        self.seen: list[_Seen] = []

    def __call__(self, outputs: TokenLogprobs) -> Tensor:
        device = outputs.logprobs.device
        advantages = self.batch.per_token(lambda s: (s.targets.advantage,) * s.num_trained_tokens).to(device)
        sampler_logprobs = self.batch.per_token(lambda s: s.targets.sampler_logprobs).to(device)
        old_logprobs = outputs.logprobs.detach() if self.old_logprobs is None else self.old_logprobs
        self.seen.append(
            _Seen(
                logprobs=outputs.logprobs.detach(),
                old_logprobs=old_logprobs,
                sampler_logprobs=sampler_logprobs,
                advantages=advantages,
                entropy=outputs.entropy,
                num_unique_tokens=len(self.batch.token_ids),
                num_recomputed_tokens=self.batch.num_recomputed_tokens,
            )
        )
        per_token = policy_loss(
            self.config.policy_loss,
            outputs.logprobs,
            old_logprobs,
            advantages=advantages,
            sequence_ids=self.batch.sequence_ids.to(device),
        )
        return per_token * truncated_importance_weights(old_logprobs, sampler_logprobs, cap=self.config.importance_cap)


def _token_metrics(seen: Sequence[_Seen], config: PolicyLossConfig) -> dict[str, Metric]:
    """Returns what the updates saw, over all trained tokens of the step at once: quantiles do not average over micro-batches."""
    if not seen:
        return {}
    logprobs, old_logprobs = torch.cat([part.logprobs for part in seen]), torch.cat([part.old_logprobs for part in seen])
    gate = config if isinstance(config, SapoConfig) else SapoConfig()  # other losses have no gate: what SAPO's would let through
    statistics = ratio_statistics(
        logprobs, old_logprobs, advantages=torch.cat([part.advantages for part in seen]), tau_pos=gate.tau_pos, tau_neg=gate.tau_neg
    )
    mismatch = engine_mismatch(old_logprobs, torch.cat([part.sampler_logprobs for part in seen]))
    measured = {name: mean(value) for name, value in {**statistics, **mismatch}.items()}
    measured["entropy"] = mean(torch.cat([part.entropy for part in seen]).mean().item())
    measured["trained_tokens"] = total(len(logprobs))
    measured["unique_tokens"] = total(sum(part.num_unique_tokens for part in seen))
    measured["recomputed_tokens"] = total(sum(part.num_recomputed_tokens for part in seen))
    return measured


def policy_loss(config: PolicyLossConfig, logprobs: Tensor, old_logprobs: Tensor, *, advantages: Tensor, sequence_ids: Tensor) -> Tensor:
    """Returns the per-token loss [N] of the method that the recipe names."""
    match config.name:
        case "sapo":
            return sapo(logprobs, old_logprobs, advantages=advantages, tau_pos=config.tau_pos, tau_neg=config.tau_neg)
        case "grpo":
            return grpo(logprobs, old_logprobs, advantages=advantages, clip_low=config.clip_low, clip_high=config.clip_high)
        case "gspo":
            return gspo(
                logprobs,
                old_logprobs,
                advantages=advantages,
                sequence_ids=sequence_ids,
                clip_low=config.clip_low,
                clip_high=config.clip_high,
            )
        case "reinforce":
            return reinforce(logprobs, advantages=advantages)


def _rollout_metrics(scored: Sequence[ScoredGroup]) -> dict[str, Metric]:
    """Returns lengths and solved shares of the rollouts; a response counts as solved when its reward is above 0."""
    measured: dict[str, Metric] = {"groups_without_signal": total(0), "dropped_groups": total(0)}
    rollouts = [judged.rollout for group in scored for judged in group.judged]
    if rollouts:
        measured["truncated_frac"] = mean(sum(r.finish_reason == "length" for r in rollouts) / len(rollouts))
        measured["response_tokens"] = mean(sum(r.num_sampled_tokens for r in rollouts) / len(rollouts))
        measured["response_tokens_max"] = maximum(max(r.num_sampled_tokens for r in rollouts))
    judged_groups = [[judged.score.reward for judged in group.judged] for group in scored if len(group.judged) >= 2]
    measured["dropped_groups"] = total(len(scored) - len(judged_groups))
    measured["groups_without_signal"] = total(sum(not has_signal(group) for group in judged_groups))
    if judged_groups:
        measured["solved_all_frac"] = mean(sum(min(group) > 0 for group in judged_groups) / len(judged_groups))
        measured["solved_none_frac"] = mean(sum(max(group) <= 0 for group in judged_groups) / len(judged_groups))
    return measured


class _Clock:
    """Seconds by phase of one step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start

    def metrics(self, *, num_sampled: int, num_unique: int) -> dict[str, float]:
        measured = {f"time/{name}_s": seconds for name, seconds in self.seconds.items()}
        measured["time/sampled_tokens_per_s"] = num_sampled / self.seconds["rollout"]
        measured["time/updated_tokens_per_s"] = num_unique / self.seconds["update"]
        return measured
