"""One step of on-policy distillation: the student draws, the teacher scores the same ids, the student follows.

The algorithm (GKD, arXiv:2306.13649, algorithm 1 with a student share of 1) is `OnPolicyDistillStage.step`, top to bottom.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from ..model.chat import Chat
from ..model.divergence import token_forward_kl, token_jsd, token_kl
from ..model.learner import Distribution, Learner, TokenDivergence, TokenLogprobs
from ..model.metrics import Metric, maximum, mean, total
from ..model.packing import Batch, pack, weigh
from ..model.records import DataError, Example, Group
from ..model.reference import ReferenceStates
from ..model.rollouts import StepClock, draw_groups, length_metrics, speeds, train_sequence
from ..model.sampler import Sampler, request_seed
from ..model.weight_sync import publish
from ..rl.policy_loss import engine_mismatch, truncated_importance_weights
from ..rl.step_loss import policy_loss
from .config import ExactConfig, OnPolicyDistillConfig, SampledTokenConfig
from .teacher import Teacher, check_text_only


@dataclass(frozen=True, kw_only=True, slots=True)
class DrawnTargets:
    """What the losses need for one response beside the teacher's states."""

    sampler_logprobs: tuple[float, ...]
    """[trained tokens] nats, by the engine when drawn"""


@dataclass(frozen=True, kw_only=True, slots=True)
class DistillStepResult:
    """What a step leaves behind for the log."""

    metrics: dict[str, float]
    groups: tuple[Group, ...]


class OnPolicyDistillStage:
    """On-policy distillation; each step depends only on the weights and its own number."""

    def __init__(
        self,
        config: OnPolicyDistillConfig,
        *,
        learner: Learner,
        sampler: Sampler,
        teachers: Sequence[Teacher],
        chat: Chat,
        distribution: Distribution,
        seed: int,
        phase: Callable[[str], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        """Each of `teachers` says which tasks it teaches. `phase` is entered for rollout, teacher, update and publish of every step: a
        watchdog's deadlines.
        """
        self.config = config
        self.learner = learner
        self.sampler = sampler
        self.teachers = teachers
        self.chat = chat
        self.distribution = distribution
        self.seed = seed
        self.phase = phase

    def step(self, step: int, examples: Sequence[Example], check_interrupt: Callable[[], None]) -> DistillStepResult:
        """Draws responses, has them scored by their teachers, updates the student in mini-batches and publishes the new weights.

        `examples` are this rank's, as many as every other rank's. `check_interrupt` is called once the rollouts are there; what it raises
        drops them, and no weight has changed.
        """
        if self.config.prompts == "text":
            check_text_only([(example.id, bool(example.media)) for example in examples])
        clock = StepClock(self.phase)
        with clock.phase("rollout"):
            groups = draw_groups(
                examples,
                sampler=self.sampler,
                chat=self.chat,
                num_rollouts=self.config.group_size,
                temperature=self.distribution.temperature,
                seed_of=lambda example: request_seed(self.seed, "rollout", step, example.id),
            )
        check_interrupt()
        self.sampler.release_memory()
        with clock.phase("teacher"):
            mini_batches = [self._batches(part) for part in self._mini_batches(groups)]
            scored = [[(batch, teacher.states(batch, self.distribution)) for batch, teacher in batches] for batches in mini_batches]
        with clock.phase("update"):
            losses = [
                [DistillLoss(self.config, batch, states, self._old_logprobs(batch) if index else None) for batch, states in batches]
                for index, batches in enumerate(scored)
            ]
            updates = [self._update(batches, of_batch) for batches, of_batch in zip(scored, losses, strict=True)]
        with clock.phase("publish"):
            publish(self.learner, self.sampler)
        seen = [loss.metrics for of_batch in losses for loss in of_batch]
        measured = self.learner.ranks.merge(
            [*updates, *seen, length_metrics([rollout for group in groups for rollout in group.rollouts]), clock.metrics(groups)]
        )
        return DistillStepResult(metrics={**measured, **speeds(measured)}, groups=tuple(groups))

    def _mini_batches(self, groups: Sequence[Group]) -> list[Sequence[Group]]:
        size = len(groups) // self.config.num_mini_batches
        return [groups[start : start + size] for start in range(0, len(groups), size)]

    def _batches(self, groups: Sequence[Group]) -> list[tuple[Batch[DrawnTargets], Teacher]]:
        """Returns the packed micro-batches of one update, each of rows with one teacher; weights are over all of them."""
        families = weigh(
            [
                [
                    train_sequence(group.example.id, number, rollout, DrawnTargets(sampler_logprobs=rollout.drawn_logprobs))
                    for number, rollout in enumerate(group.rollouts)
                ]
                for group in groups
            ],
            self.config.weighting,
            over_ranks=self.learner.ranks.total,
        )
        budget = self.learner.config.token_budget
        found = []
        for teacher in self.teachers:  # of every rank, also where it has no row: ranks compute together
            own = [family for group, family in zip(groups, families, strict=True) if self._teacher_of(group.example) is teacher]
            found += [(batch, teacher) for batch in self.learner.fill(pack(own, media=self.chat, token_budget=budget))]
        return found

    def _teacher_of(self, example: Example) -> Teacher:
        return teacher_of(example, self.teachers)

    def _old_logprobs(self, batch: Batch[DrawnTargets]) -> Tensor:
        return self.learner.logprobs(batch, self.distribution).logprobs

    def _update(self, batches: Sequence[tuple[Batch[DrawnTargets], ReferenceStates]], losses: Sequence[DistillLoss]) -> dict[str, Metric]:
        is_exact = isinstance(self.config.support, ExactConfig)
        return self.learner.update(
            [batch for batch, _ in batches],
            self.distribution,
            losses,
            [states for _, states in batches] if is_exact else None,
            divergence=divergence_of(self.config.support),
        )


def teacher_of(example: Example, teachers: Sequence[Teacher]) -> Teacher:
    """Returns the first teacher that names the example's task, else the first that names none; raises `DataError` where there is none."""
    named = [teacher for teacher in teachers if example.task in teacher.tasks] or [teacher for teacher in teachers if not teacher.tasks]
    if not named:
        tasks = sorted({task for teacher in teachers for task in teacher.tasks})
        raise DataError(f"example {example.id}: no teacher teaches task {example.task!r}; those of the recipe teach {', '.join(tasks)}")
    return named[0]


def divergence_of(support: ExactConfig | SampledTokenConfig) -> TokenDivergence:
    """Returns the divergence over the whole vocabulary that the recipe names; `token_kl` where only drawn tokens count."""
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
        self, config: OnPolicyDistillConfig, batch: Batch[DrawnTargets], teacher: ReferenceStates, old_logprobs: Tensor | None
    ) -> None:
        """`old_logprobs` None means that the current student drew the responses."""
        self.config = config
        self.batch = batch
        self.teacher = teacher
        self.old_logprobs = old_logprobs
        self.metrics: dict[str, Metric] = {}

    def __call__(self, outputs: TokenLogprobs) -> Tensor:
        """Returns the loss [N] of each drawn token."""
        device = outputs.logprobs.device
        sampler_logprobs = self.batch.per_token(lambda sequence: sequence.targets.sampler_logprobs).to(device)
        old_logprobs = outputs.logprobs.detach() if self.old_logprobs is None else self.old_logprobs
        advantages = log_ratio_advantages(self.teacher.logprobs, old_logprobs)
        self._note(outputs, advantages, old_logprobs, sampler_logprobs)
        support = self.config.support
        if isinstance(support, ExactConfig):
            # Of the position and not of the drawn token: no ratio corrects it.
            assert outputs.divergence is not None, "the teacher's states were handed to the update"
            return outputs.divergence
        per_token = policy_loss(
            support.policy_loss,
            outputs.logprobs,
            old_logprobs,
            advantages=advantages,
            sequence_ids=self.batch.sequence_ids.to(device),
        )
        return per_token * truncated_importance_weights(old_logprobs, sampler_logprobs, cap=support.importance_cap)

    def _note(self, outputs: TokenLogprobs, advantages: Tensor, old_logprobs: Tensor, sampler_logprobs: Tensor) -> None:
        count = len(outputs.logprobs)
        counts = {
            "trained_tokens": total(count),
            "unique_tokens": total(len(self.batch.token_ids)),
            "recomputed_tokens": total(self.batch.num_recomputed_tokens),
        }
        if not count:
            self.metrics = counts
            return
        mismatch = engine_mismatch(old_logprobs.cpu(), sampler_logprobs.cpu())
        self.metrics = {
            **counts,
            "teacher_kl_k1": mean(-advantages.mean(), count),
            "teacher_logprob": mean(self.teacher.logprobs.mean(), count),
            "entropy": mean(outputs.entropy.mean(), count),
            **{name: maximum(value) if "_max_" in name else mean(value, count) for name, value in mismatch.items()},
        }
        if outputs.divergence is not None:
            divergence = outputs.divergence.detach()
            self.metrics["teacher_divergence"] = mean(divergence.mean(), count)
            self.metrics["teacher_divergence_max"] = maximum(divergence.max())
