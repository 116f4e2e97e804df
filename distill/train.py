"""One step of on-policy distillation: the student draws, the teacher scores the same ids, the student follows.

The algorithm (GKD, arXiv:2306.13649, algorithm 1 with a student share of 1) is `OnPolicyDistillStage.step`, top to bottom.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

from torch import Tensor

from ..model.chat import Chat
from ..model.learner import Distribution, Learner
from ..model.metrics import Metric
from ..model.packing import Batch, pack, weigh
from ..model.records import DataError, Example, Group, TrainSequence
from ..model.reference import ReferenceStates, SparseStates
from ..model.rollouts import StepClock, draw_groups, length_metrics, speeds, train_sequence
from ..model.sampler import Sampler, request_seed
from ..model.weight_sync import publish
from ..rewards.manager import RewardManager
from ..rewards.result import ScoredGroup, UnjudgedRollout
from ..rewards.summary import group_outcomes, summarise
from ..rl.advantages import group_advantages
from .config import OnPolicyDistillConfig, SampledTokenConfig, TopKConfig
from .served_teacher import asked_of
from .step_loss import DistillLoss, DrawnTargets, divergence_of
from .support import states_of_support
from .teacher import ScoringTeacher, check_text_only
from .teacher_client import TeacherPausedError


@dataclass(frozen=True, kw_only=True, slots=True)
class DistillStepResult:
    """What a step leaves behind for the log."""

    metrics: dict[str, float]
    scored_groups: tuple[ScoredGroup, ...]
    """Without `task_rewards` no rollout of them is judged"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """What is trained of one prompt's group, or of one conversation that is there: `Row(example=..., family=[...])`."""

    example: Example
    family: Sequence[TrainSequence[DrawnTargets]]


Scored: TypeAlias = tuple[Batch[DrawnTargets], ReferenceStates | SparseStates]
"""A micro-batch and what its teacher says of it."""


class OnPolicyDistillStage:
    """On-policy distillation; each step depends only on the weights and its own number."""

    def __init__(
        self,
        config: OnPolicyDistillConfig,
        *,
        learner: Learner,
        sampler: Sampler,
        teachers: Sequence[ScoringTeacher],
        rewards: RewardManager | None = None,
        chat: Chat,
        distribution: Distribution,
        seed: int,
        phase: Callable[[str], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        """Each of `teachers` says which tasks it teaches; `rewards` are there with `task_rewards`. `phase` is entered for rollout, reward,
        teacher, update and publish of every step: a watchdog's deadlines.
        """
        assert (rewards is not None) == (config.task_rewards is not None), "task_rewards need a reward manager, nothing else does"
        self.config = config
        self.learner = learner
        self.sampler = sampler
        self.teachers = teachers
        self.rewards = rewards
        self.chat = chat
        self.distribution = distribution
        self.seed = seed
        self.phase = phase

    def step(
        self, step: int, examples: Sequence[Example], check_interrupt: Callable[[], None], conversations: Sequence[Row] = ()
    ) -> DistillStepResult:
        """Draws responses, has them scored by their teachers, updates the student in mini-batches and publishes the new weights.

        `examples` are this rank's, as many as every other rank's, and so are `conversations`, which nobody drew: GKD's data that are not
        the student's. `check_interrupt` is called once the rollouts are there, and where a stop was asked for while a teacher's server was
        away; what it raises drops them, and no weight has changed.
        """
        if self.config.prompts == "text":
            check_text_only([(example.id, bool(example.media)) for example in (*examples, *(row.example for row in conversations))])
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
        with clock.phase("reward"):
            judged = _unjudged(groups) if self.rewards is None else self.rewards.score(groups)
        with clock.phase("teacher"):
            try:
                scored = self._score([self._batches(part) for part in self._mini_batches(_rows_of(judged), conversations)])
            except TeacherPausedError:
                check_interrupt()
                raise
        with clock.phase("update"):
            losses = [
                [DistillLoss(self.config, batch, states, self._old_logprobs(batch) if index else None) for batch, states in batches]
                for index, batches in enumerate(scored)
            ]
            updates = [self._update(batches, of_batch) for batches, of_batch in zip(scored, losses, strict=True)]
        with clock.phase("publish"):
            publish(self.learner, self.sampler)
        seen = [loss.metrics for of_batch in losses for loss in of_batch]
        ranks = self.learner.ranks
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        measured = ranks.merge([*updates, *seen, length_metrics(rollouts), clock.metrics(rollouts)])
        if self.rewards is not None:
            outcomes = [group for rank in ranks.gather(group_outcomes(judged)) for group in rank]
            measured |= summarise(outcomes, full_values=self.rewards.full_values).metrics()
        return DistillStepResult(metrics={**measured, **speeds(measured)}, scored_groups=tuple(judged))

    def _mini_batches(self, drawn: Sequence[Row], conversations: Sequence[Row]) -> list[list[Row]]:
        """Returns the rows of each optimizer update: an equal part of both kinds."""
        number = self.config.num_mini_batches
        parts = [(len(drawn) // number, drawn), (len(conversations) // number, conversations)]
        return [[row for size, rows in parts for row in rows[index * size : (index + 1) * size]] for index in range(number)]

    def _score(self, mini_batches: Sequence[Sequence[tuple[Batch[DrawnTargets], ScoringTeacher]]]) -> list[list[Scored]]:
        """Returns the batches of every update with what their teachers say; each teacher gets all of its batches at once."""
        places = [(update, batch, teacher) for update, batches in enumerate(mini_batches) for batch, teacher in batches]
        found: dict[int, ReferenceStates | SparseStates] = {}
        for teacher in self.teachers:
            own = [batch for _, batch, of_batch in places if of_batch is teacher]
            student_ids = self._student_ids(own)
            states_of_own = teacher.states_of(own, self.distribution, student_ids)
            for batch, states, ids in zip(own, states_of_own, student_ids or [None] * len(own), strict=True):
                found[id(batch)] = self._of_support(batch, states, ids)
        return [[(batch, found[id(batch)]) for batch, _ in batches] for batches in mini_batches]

    def _student_ids(self, batches: Sequence[Batch[DrawnTargets]]) -> list[Tensor] | None:
        """Returns the student's most likely ids of each batch, None where the support has none of them."""
        support = self.config.support
        num_ids = asked_of(support)[1] if isinstance(support, TopKConfig) else 0
        return [self.learner.top_ids(batch, self.distribution, k=num_ids) for batch in batches] if num_ids else None

    def _of_support(
        self, batch: Batch[DrawnTargets], states: ReferenceStates | SparseStates, student_ids: Tensor | None
    ) -> ReferenceStates | SparseStates:
        support = self.config.support
        if isinstance(support, TopKConfig) and isinstance(states, ReferenceStates):
            return states_of_support(states, batch, support, student_ids=student_ids, distribution=self.distribution)
        return states

    def _batches(self, rows: Sequence[Row]) -> list[tuple[Batch[DrawnTargets], ScoringTeacher]]:
        """Returns the packed micro-batches of one update, each of rows with one teacher; weights are over all of them."""
        families = weigh([row.family for row in rows], self.config.weighting, over_ranks=self.learner.ranks.total)
        budget = self.learner.config.token_budget
        found = []
        for teacher in self.teachers:  # of every rank, also where it has no row: ranks compute together
            own = [family for row, family in zip(rows, families, strict=True) if teacher_of(row.example, self.teachers) is teacher]
            found += [(batch, teacher) for batch in self.learner.fill(pack(own, media=self.chat, token_budget=budget))]
        return found

    def _old_logprobs(self, batch: Batch[DrawnTargets]) -> Tensor:
        return self.learner.logprobs(batch, self.distribution).logprobs

    def _update(self, batches: Sequence[Scored], losses: Sequence[DistillLoss]) -> dict[str, Metric]:
        has_divergence = not isinstance(self.config.support, SampledTokenConfig)
        return self.learner.update(
            [batch for batch, _ in batches],
            self.distribution,
            losses,
            [states for _, states in batches] if has_divergence else None,
            divergence=divergence_of(self.config.support),
        )


def _unjudged(groups: Sequence[Group]) -> list[ScoredGroup]:
    """Returns the groups for the log."""
    reasons = {"teacher": "on-policy distillation scores tokens, not responses"}
    return [
        ScoredGroup(
            example=group.example,
            judged=(),
            unjudged=tuple(UnjudgedRollout(rollout=rollout, reasons=reasons) for rollout in group.rollouts),
        )
        for group in groups
    ]


def _rows_of(scored: Sequence[ScoredGroup]) -> list[Row]:
    """Returns a row for each group, with every rollout of it: one that could not be judged still follows its teacher."""
    rows = []
    for group in scored:
        rewards = [judged.score.reward for judged in group.judged]
        advantages = group_advantages(rewards) if len(rewards) > 1 else (0.0,) * len(rewards)
        rollouts = [judged.rollout for judged in group.judged] + [unjudged.rollout for unjudged in group.unjudged]
        family = [
            train_sequence(group.example.id, number, rollout, DrawnTargets(sampler_logprobs=rollout.drawn_logprobs, advantage=advantage))
            for number, (rollout, advantage) in enumerate(zip(rollouts, [*advantages, *(0.0 for _ in group.unjudged)], strict=True))
        ]
        rows.append(Row(example=group.example, family=family))
    return rows


Taught = TypeVar("Taught", bound=ScoringTeacher)


def teacher_of(example: Example, teachers: Sequence[Taught]) -> Taught:
    """Returns the first teacher that names the example's task, else the first that names none; raises `DataError` where there is none."""
    named = [teacher for teacher in teachers if example.task in teacher.tasks] or [teacher for teacher in teachers if not teacher.tasks]
    if not named:
        tasks = sorted({task for teacher in teachers for task in teacher.tasks})
        raise DataError(f"example {example.id}: no teacher teaches task {example.task!r}; those of the recipe teach {', '.join(tasks)}")
    return named[0]
