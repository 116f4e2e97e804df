"""The loss of one micro-batch of a policy update, and what the losses of a step saw, as metrics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..model.learner import TokenLogprobs
from ..model.metrics import Metric, mean
from ..model.packing import Batch
from ..model.reference import ReferenceStates
from .config import PolicyLossConfig, RlConfig, SapoConfig
from .kl import k1, k2, k3
from .policy_loss import engine_mismatch, grpo, gspo, ratio_statistics, reinforce, sapo, truncated_importance_weights


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyTargets:
    """What the policy-gradient losses need for one response."""

    advantage: float
    """(reward - mean of the group) / std of the group; one value for all tokens of the response"""
    sampler_logprobs: tuple[float, ...]
    """[trained tokens] nats, by the engine when drawn"""


PolicyBatch = Batch[PolicyTargets]


def reference_metrics(logprobs: Tensor, reference_logprobs: Tensor) -> dict[str, Metric]:
    """Returns the mean over drawn tokens of two estimates of KL(policy || reference): k1, unbiased, and k3, never negative."""
    count = len(logprobs)
    if not count:
        return {}
    never_negative = k3(logprobs, reference_logprobs, old_logprobs=logprobs)
    return {
        "reference_kl_k1": mean(k1(logprobs, reference_logprobs).mean(), count),
        "reference_kl_k3": mean(never_negative.mean(), count),
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class SeenLogprobs:
    """The log-probs of one micro-batch as its loss saw them, detached: [N] each."""

    logprobs: Tensor
    old_logprobs: Tensor
    sampler_logprobs: Tensor
    advantages: Tensor
    entropy: Tensor
    num_unique_tokens: int
    num_recomputed_tokens: int


class MicroBatchLoss:
    """The per-token loss of one micro-batch; keeps what it saw for the step's metrics."""

    def __init__(self, config: RlConfig, batch: PolicyBatch, old_logprobs: Tensor | None, reference: ReferenceStates | None = None) -> None:
        self.config = config
        self.batch = batch
        self.old_logprobs = old_logprobs
        self.reference = reference
        self.seen: list[SeenLogprobs] = []
        self.reference_metrics: dict[str, Metric] = {}

    def __call__(self, outputs: TokenLogprobs) -> Tensor:
        """Returns the loss [N] of each target: the policy loss, corrected for the engine's arithmetic, and a KL term if there is one."""
        device = outputs.logprobs.device
        advantages = self.batch.per_token(lambda s: (s.targets.advantage,) * s.num_trained_tokens).to(device)
        sampler_logprobs = self.batch.per_token(lambda s: s.targets.sampler_logprobs).to(device)
        old_logprobs = outputs.logprobs.detach() if self.old_logprobs is None else self.old_logprobs
        self.seen.append(
            SeenLogprobs(
                logprobs=outputs.logprobs.detach().cpu(),
                old_logprobs=old_logprobs.cpu(),
                sampler_logprobs=sampler_logprobs.cpu(),
                advantages=advantages.cpu(),
                entropy=outputs.entropy.cpu(),
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
        weights = truncated_importance_weights(old_logprobs, sampler_logprobs, cap=self.config.importance_cap)
        if self.config.kl is None or self.reference is None:
            return per_token * weights
        self.reference_metrics = reference_metrics(outputs.logprobs.detach(), self.reference.logprobs)
        match self.config.kl.estimator:
            case "exact":
                # Of the position and not of the drawn token: no ratio corrects it.
                assert outputs.divergence is not None, "the reference was handed to the update"
                return per_token * weights + self.config.kl.coef * outputs.divergence
            case "k2":
                term = k2(outputs.logprobs, self.reference.logprobs, old_logprobs=old_logprobs)
            case "k3":
                term = k3(outputs.logprobs, self.reference.logprobs, old_logprobs=old_logprobs)
            case "k1":
                raise AssertionError("k1 acts in the reward")
        return (per_token + self.config.kl.coef * term) * weights


def token_metrics(seen: Sequence[SeenLogprobs], config: PolicyLossConfig) -> dict[str, float]:
    """Returns what the updates saw, over all trained tokens of the step at once: quantiles do not average over micro-batches."""
    if not any(len(part.logprobs) for part in seen):
        return {}
    logprobs, old_logprobs = torch.cat([part.logprobs for part in seen]), torch.cat([part.old_logprobs for part in seen])
    gate = config if isinstance(config, SapoConfig) else SapoConfig()  # other losses have no gate: what SAPO's would let through
    statistics = ratio_statistics(
        logprobs, old_logprobs, advantages=torch.cat([part.advantages for part in seen]), tau_pos=gate.tau_pos, tau_neg=gate.tau_neg
    )
    mismatch = engine_mismatch(old_logprobs, torch.cat([part.sampler_logprobs for part in seen]))
    return {
        **statistics,
        **mismatch,
        "entropy": torch.cat([part.entropy for part in seen]).mean().item(),
        "trained_tokens": float(len(logprobs)),
        "unique_tokens": float(sum(part.num_unique_tokens for part in seen)),
        "recomputed_tokens": float(sum(part.num_recomputed_tokens for part in seen)),
    }


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
