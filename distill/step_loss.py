"""The loss of one micro-batch of on-policy distillation, and what it saw, as metrics."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..model.divergence import token_forward_kl, token_jsd, token_kl
from ..model.learner import TokenDivergence, TokenLogprobs
from ..model.metrics import Metric, maximum, mean, total
from ..model.packing import Batch
from ..model.reference import ReferenceStates, SparseStates
from ..rl.config import PolicyLossConfig
from ..rl.policy_loss import engine_mismatch, truncated_importance_weights
from ..rl.step_loss import policy_loss
from .bucketed import bucketed_divergence
from .config import OnPolicyDistillConfig, SampledTokenConfig, SupportConfig, TopKConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class DrawnTargets:
    """What the losses need for one response beside the teacher's states."""

    sampler_logprobs: tuple[float, ...]
    """[trained tokens] nats, by the engine when drawn; NaN for a conversation that nobody drew"""
    advantage: float = 0.0
    """By the task's rewards; 0 without them, and for a response that could not be judged"""


def divergence_of(support: SupportConfig) -> TokenDivergence:
    """Returns the divergence that the recipe names, over the whole vocabulary or over the top ids and their tail; `token_kl` where only
    drawn tokens count.
    """
    if isinstance(support, TopKConfig):
        return partial(bucketed_divergence, divergence=support.divergence, beta=support.beta)
    if isinstance(support, SampledTokenConfig) or support.divergence == "reverse":
        return token_kl
    if support.divergence == "forward":
        return token_forward_kl
    assert support.beta is not None, "the settings check it"
    return partial(token_jsd, beta=support.beta)


def log_ratio_advantages(teacher_logprobs: Tensor, logprobs: Tensor) -> Tensor:
    """Returns the advantage of each drawn token, [N] nats, detached: log teacher - log student.

    Its mean over the student's own draws is -KL(student, teacher) of the position; the policy gradient with it descends that KL
    (arXiv:2306.08543 equation 4 without the long-range term; discount 0).
    """
    return (teacher_logprobs - logprobs).detach()


class DistillLoss:
    """The per-token loss of one micro-batch; keeps what it saw for the step's metrics."""

    def __init__(
        self,
        config: OnPolicyDistillConfig,
        batch: Batch[DrawnTargets],
        teacher: ReferenceStates | SparseStates,
        old_logprobs: Tensor | None,
    ) -> None:
        """`old_logprobs` None means that the current student drew the responses."""
        self.config = config
        self.batch = batch
        self.teacher = teacher
        self.old_logprobs = old_logprobs
        self.metrics: dict[str, Metric] = {}

    def __call__(self, outputs: TokenLogprobs) -> Tensor:
        """Returns the loss [N] of each trained token: the divergence from the teacher, and `task_rewards`' policy loss if there is one."""
        device = outputs.logprobs.device
        old_logprobs = outputs.logprobs.detach() if self.old_logprobs is None else self.old_logprobs
        drawn_logprobs = self.batch.per_token(lambda sequence: sequence.targets.sampler_logprobs).to(device)
        is_drawn = ~drawn_logprobs.isnan()
        sampler_logprobs = torch.where(is_drawn, drawn_logprobs, old_logprobs)
        log_ratios = log_ratio_advantages(self.teacher.logprobs.to(device), old_logprobs)
        self._note(outputs, log_ratios[is_drawn], old_logprobs[is_drawn], sampler_logprobs[is_drawn])

        def of_policy(config: PolicyLossConfig, advantages: Tensor, cap: float) -> Tensor:
            sequence_ids = self.batch.sequence_ids.to(device)
            per_token = policy_loss(config, outputs.logprobs, old_logprobs, advantages=advantages, sequence_ids=sequence_ids)
            return per_token * truncated_importance_weights(old_logprobs, sampler_logprobs, cap=cap)

        support, rewards = self.config.support, self.config.task_rewards
        if isinstance(support, SampledTokenConfig):
            loss = of_policy(support.policy_loss, log_ratios, support.importance_cap)
        else:
            # Of the position and not of the drawn token: no ratio corrects it.
            assert outputs.divergence is not None, "the teacher's states were handed to the update"
            loss = outputs.divergence
        if rewards is None:
            return loss
        advantages = self.batch.per_token(lambda sequence: (sequence.targets.advantage,) * sequence.num_trained_tokens).to(device)
        return loss + rewards.weight * of_policy(rewards.policy_loss, advantages, rewards.importance_cap)

    def _note(self, outputs: TokenLogprobs, log_ratios: Tensor, old_logprobs: Tensor, sampler_logprobs: Tensor) -> None:
        """Keeps the metrics; log-ratios and log-probs are those of drawn tokens, [M] with M <= N."""
        count, num_drawn = len(outputs.logprobs), len(log_ratios)
        counts = {
            "trained_tokens": total(count),
            "unique_tokens": total(len(self.batch.token_ids)),
            "recomputed_tokens": total(self.batch.num_recomputed_tokens),
        }
        if not count:
            self.metrics = counts
            return
        self.metrics = {
            **counts,
            "teacher_logprob": mean(self.teacher.logprobs.mean(), count),
            "entropy": mean(outputs.entropy.mean(), count),
        }
        if num_drawn:
            mismatch = engine_mismatch(old_logprobs.cpu(), sampler_logprobs.cpu())
            self.metrics["teacher_kl_k1"] = mean(-log_ratios.mean(), num_drawn)
            self.metrics |= {name: maximum(value) if "_max_" in name else mean(value, num_drawn) for name, value in mismatch.items()}
        if isinstance(self.teacher, SparseStates):
            self.metrics |= self.teacher.metrics
        if outputs.divergence is not None:
            divergence = outputs.divergence.detach()
            self.metrics["teacher_divergence"] = mean(divergence.mean(), count)
            self.metrics["teacher_divergence_max"] = maximum(divergence.max())
