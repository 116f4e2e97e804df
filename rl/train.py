"""One step of reinforcement learning: draw, judge, compare, update, publish.

The algorithm (arXiv:2511.20347, algorithm of section 3) is `RlStage.step`, top to bottom.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor

from ..model.chat import Chat
from ..model.learner import Distribution, Learner
from ..model.metrics import Metric, combine, mean, total
from ..model.packing import Weighted, pack
from ..model.records import Example
from ..model.reference import ReferenceStates
from ..model.rollouts import Drawing, StepClock, conversation_metrics, draw_groups, length_metrics, speeds, train_sequence
from ..model.sampler import Sampler, request_seed
from ..model.weight_sync import publish
from ..rewards.manager import RewardManager
from ..rewards.result import ScoredGroup
from ..rewards.summary import group_outcomes, summarise
from .advantages import group_advantages, has_signal
from .ahead import AheadDrawing
from .config import RlConfig
from .dynamic_sampling import ExampleSource, Refilled, refill
from .kl import kl_in_reward
from .overlong import has_signal_left, with_less_reward, with_overlong_rule
from .step_loss import MicroBatchLoss, PolicyBatch, PolicyTargets, SeenLogprobs, reference_metrics, token_metrics


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
        phase: Callable[[str], AbstractContextManager[Any]] = nullcontext,
        draw: Drawing | None = None,
    ) -> None:
        """`phase` is entered for rollout, reward, update and publish of every step: a watchdog's deadlines. `draw` draws the groups, e.g.
        conversations with tools, or one step ahead; absent: one response to each prompt."""
        self.config = config
        self.learner = learner
        self.sampler = sampler
        self.rewards = rewards
        self.chat = chat
        self.distribution = distribution
        self.seed = seed
        self.phase = phase
        self.draw: Drawing = draw or partial(draw_groups, sampler=sampler, chat=chat)
        self.ahead = draw if isinstance(draw, AheadDrawing) else None

    def step(
        self,
        step: int,
        examples: Sequence[Example],
        check_interrupt: Callable[[], None],
        next_examples: ExampleSource | None = None,
        upcoming: Sequence[Example] = (),
    ) -> RlStepResult:
        """Draws a group for each example, updates the policy in mini-batches and publishes the new weights.

        `examples` are this rank's, as many as every other rank's; `next_examples` are further ones, for dynamic sampling, and `upcoming`
        those of the next step, which an `AheadDrawing` draws meanwhile.
        `check_interrupt` is called whenever rollouts are there; what it raises drops them, and no weight has changed.
        """
        clock = StepClock(self.phase)
        draw = partial(self._draw_and_judge, step, clock=clock, check_interrupt=check_interrupt, upcoming=upcoming)
        version = self.learner.policy_version
        scored = draw(examples)
        refilled = self._refill(scored, draw, next_examples)
        self.sampler.release_memory()
        with clock.phase("update"):
            ruled, overlong = with_overlong_rule(refilled.groups, self.config.overlong)
            penalised, penalties = self._with_kl_penalties(ruled)
            mini_batches = self._mini_batches(penalised)
            # Before the first update pi_old is the policy itself, so only later mini-batches need their old log-probs ahead of it.
            old = [[self._old_logprobs(batch) for batch in batches] if index else None for index, batches in enumerate(mini_batches)]
            seen: list[SeenLogprobs] = []
            updates = [self._update(batches, logprobs, seen) for batches, logprobs in zip(mini_batches, old, strict=True)]
        if self.ahead is not None:
            with clock.phase("rollout"):
                self.ahead.wait()
        with clock.phase("publish"):
            publish(self.learner, self.sampler)
        ranks, scored = self.learner.ranks, [*scored, *refilled.further]
        rollouts = [rollout for group in scored for rollout in group.rollouts]
        measured = ranks.merge([*updates, *penalties, overlong, refilled.metrics, _rollout_metrics(scored), clock.metrics(rollouts)])
        if self.ahead is not None:
            measured["rollout_lag"] = float(version - min(ranks.gather(min(rollout.policy_version for rollout in rollouts))))
        measured["skipped_updates"] = float(sum(not batches for batches in mini_batches))
        measured |= token_metrics([part for rank in ranks.gather(seen) for part in rank], self.config.policy_loss)
        outcomes = [group for rank in ranks.gather(group_outcomes(scored)) for group in rank]
        summary = summarise(outcomes, full_values=self.rewards.full_values)
        return RlStepResult(metrics={**measured, **summary.metrics(), **speeds(measured)}, scored_groups=tuple(scored))

    def _draw_and_judge(
        self, step: int, examples: Sequence[Example], *, clock: StepClock, check_interrupt: Callable[[], None], upcoming: Sequence[Example]
    ) -> list[ScoredGroup]:
        """Returns a judged group for each example."""
        with clock.phase("rollout"):
            groups = self.draw(examples, **self._how_to_draw(step))
        check_interrupt()
        if self.ahead is not None:
            self.ahead.start(upcoming, **self._how_to_draw(step + 1))
        if self.config.dynamic_sampling is None:  # else the engine may have to draw again
            self.sampler.release_memory()
        with clock.phase("reward"):
            return self.rewards.score(groups)

    def _how_to_draw(self, step: int) -> dict[str, Any]:
        return {
            "num_rollouts": self.config.group_size,
            "temperature": self.distribution.temperature,
            "seed_of": lambda example: request_seed(self.seed, "rollout", step, example.id),
        }

    def _refill(
        self, scored: list[ScoredGroup], draw: Callable[[Sequence[Example]], list[ScoredGroup]], next_examples: ExampleSource | None
    ) -> Refilled:
        """Returns the groups to learn from: without dynamic sampling those that were drawn."""
        if self.config.dynamic_sampling is None:
            return Refilled(groups=scored, further=[], metrics={})
        assert next_examples is not None, "dynamic sampling needs further examples"
        return refill(
            scored,
            max_rounds=self.config.dynamic_sampling.max_rounds,
            next_examples=next_examples,
            draw=draw,
            is_learned=lambda group: has_signal_left(group, self.config.overlong),
            over_ranks=self.learner.ranks.total,
        )

    def _mini_batches(self, scored: Sequence[ScoredGroup]) -> list[list[PolicyBatch]]:
        """Returns the packed micro-batches of each optimizer update; groups without signal have weight 0 and are left out."""
        size = len(scored) // self.config.num_mini_batches
        parts = [scored[start : start + size] for start in range(0, len(scored), size)]
        ranks, budget = self.learner.ranks, self.learner.config.token_budget
        families = [policy_families(part, self.config, over_ranks=ranks.total) for part in parts]
        return [self.learner.fill(pack(family, media=self.chat, token_budget=budget)) for family in families]

    def _old_logprobs(self, batch: PolicyBatch) -> Tensor:
        return self.learner.logprobs(batch, self.distribution).logprobs

    def _update(self, batches: Sequence[PolicyBatch], old_logprobs: Sequence[Tensor] | None, seen: list[SeenLogprobs]) -> dict[str, Metric]:
        """Does one optimizer update; `old_logprobs` None means that the current policy is pi_old. Adds what its losses saw to `seen`."""
        if not batches:  # every group of this mini-batch was without signal: momentum alone must not move the weights
            return {}
        references: list[ReferenceStates | None] = [None] * len(batches)
        if self.config.kl is not None and self.config.kl.in_ == "loss":
            references = [self.learner.reference_states(batch, self.distribution) for batch in batches]
        losses = [
            MicroBatchLoss(self.config, batch, old_logprobs[index] if old_logprobs else None, reference)
            for index, (batch, reference) in enumerate(zip(batches, references, strict=True))
        ]
        update = self.learner.update(batches, self.distribution, losses, references)
        seen += [part for loss in losses for part in loss.seen]
        return combine([update, *(loss.reference_metrics for loss in losses)])

    def _with_kl_penalties(self, scored: Sequence[ScoredGroup]) -> tuple[Sequence[ScoredGroup], list[dict[str, Metric]]]:
        """Returns the groups with `kl: {in: reward}` taken from each judged response's reward, and what was taken."""
        if self.config.kl is None or self.config.kl.in_ != "reward":
            return scored, []
        families = [
            [
                Weighted(sequence=train_sequence(group.example.id, number, judged.rollout, (g, number)), token_weight=0.0)
                for number, judged in enumerate(group.judged)
            ]
            for g, group in enumerate(scored)
        ]
        penalties: dict[tuple[int, int], float] = {}
        measured = []
        for batch in self.learner.fill(pack(families, media=self.chat, token_budget=self.learner.config.token_budget)):
            old_logprobs = self.learner.logprobs(batch, self.distribution).logprobs
            reference_logprobs = self.learner.reference_states(batch, self.distribution).logprobs
            found = kl_in_reward(
                old_logprobs,
                reference_logprobs,
                sequence_ids=batch.sequence_ids.to(old_logprobs.device),
                num_responses=len(batch.sequences),
                coef=self.config.kl.coef,
            )
            penalties |= {sequence.targets: value for sequence, value in zip(batch.sequences, found.tolist(), strict=True)}
            measured.append(reference_metrics(old_logprobs, reference_logprobs) | {"kl_penalty": mean(found.mean(), len(found))})
        penalised = [
            replace(group, judged=tuple(with_less_reward(judged, penalties[g, number]) for number, judged in enumerate(group.judged)))
            for g, group in enumerate(scored)
        ]
        return penalised, measured


def policy_families(
    scored: Sequence[ScoredGroup], config: RlConfig, *, over_ranks: Callable[[float], float] = float
) -> list[list[Weighted[PolicyTargets]]]:
    """Returns one family a group with signal, each trained token weighing 1 / (responses in the mean * tokens of its response).

    The denominator, over all ranks, is the planned number of responses (`normalize_by: planned`) or the number in groups with signal;
    `over_ranks` adds up a number over ranks. After an unavailable reward the group's advantages are taken over the responses that were
    judged; fewer than two drop the group.
    """
    with_signal = [group for group in scored if len(group.judged) >= 2 and has_signal([r.score.reward for r in group.judged])]
    planned = config.group_size * len(scored)
    num_responses = over_ranks(planned if config.normalize_by == "planned" else sum(len(group.judged) for group in with_signal))
    families = []
    for group in with_signal:
        advantages = group_advantages([judged.score.reward for judged in group.judged], scale=config.scale_advantages)
        families.append(
            [
                Weighted(
                    sequence=train_sequence(
                        group.example.id,
                        number,
                        judged.rollout,
                        PolicyTargets(
                            advantage=advantage,
                            sampler_logprobs=judged.rollout.drawn_logprobs,
                        ),
                    ),
                    token_weight=1.0 / (num_responses * judged.rollout.num_sampled_tokens),
                )
                for number, (judged, advantage) in enumerate(zip(group.judged, advantages, strict=True))
            ]
        )
    return families


def _rollout_metrics(scored: Sequence[ScoredGroup]) -> dict[str, Metric]:
    """Returns lengths and solved shares of the rollouts; a response counts as solved when its reward is above 0."""
    measured: dict[str, Metric] = {"groups_without_signal": total(0), "dropped_groups": total(0)}
    measured |= length_metrics([judged.rollout for group in scored for judged in group.judged])
    measured |= conversation_metrics([rollout for group in scored for rollout in group.rollouts])
    judged_groups = [[judged.score.reward for judged in group.judged] for group in scored if len(group.judged) >= 2]
    measured["dropped_groups"] = total(len(scored) - len(judged_groups))
    measured["groups_without_signal"] = total(sum(not has_signal(group) for group in judged_groups))
    if judged_groups:
        count = len(judged_groups)
        measured["solved_all_frac"] = mean(sum(min(group) > 0 for group in judged_groups) / count, count)
        measured["solved_none_frac"] = mean(sum(max(group) <= 0 for group in judged_groups) / count, count)
    return measured
