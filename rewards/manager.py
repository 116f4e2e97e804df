"""The reward manager: rollouts in, scored groups out, with every way in which a reward function can fail in one place.

For each rollout: `reward = sum over components of weight x value`, over the components that judge the example's task. A component that
raises, hangs, or returns what is not a finite number leaves the rollout without a score. Judgements do not depend on the
order of the rollouts or on their neighbours.
"""

from __future__ import annotations

import asyncio
import difflib
import time
import traceback
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from types import TracebackType

from ..model.records import DataError, Example, Group, Rollout, VlpostError
from .async_runner import AsyncRunner
from .config import ComponentConfig, RewardConfigError, RewardsConfig
from .registry import ResolvedReward, resolve
from .result import JudgedRollout, RewardResult, RolloutScore, ScoredGroup, Unavailable, UnjudgedRollout
from .worker import WorkerPool, WorkerRequest

MAX_WEIGHTED_VALUE = 1e100
"""A larger weight x value is no judgement; below it no sum can overflow."""
MAX_REASON_CHARS = 1000

Row = tuple[Example, Rollout]
Verdict = RewardResult | Unavailable


class RewardUnavailableError(VlpostError):
    """Too many rollouts could not be judged, or one under `on_unavailable: stop`; names the components and their reasons."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Component:
    name: str
    config: ComponentConfig
    reward: ResolvedReward


class RewardManager:
    """Judges groups with the components of a recipe; a context manager, since workers and an event loop may run for it.

    Example: `with RewardManager(config, recipe_folder=folder, allow_code=False) as rewards: scored = rewards.score(groups)`.
    The constructor resolves every function and checks its options (`RewardConfigError`); entering starts the workers
    (`WorkerError`).
    """

    def __init__(self, config: RewardsConfig, *, recipe_folder: Path | None, allow_code: bool) -> None:
        self._config = config
        self._components: list[_Component] = []
        for name, component in config.components.items():
            try:
                reward = resolve(component.use, component.options, recipe_folder=recipe_folder, allow_code=allow_code)
            except RewardConfigError as error:
                raise RewardConfigError(f"rewards.components.{name}: {error}") from error
            self._components.append(_Component(name=name, config=component, reward=reward))
        self._resources = ExitStack()
        self._pools: dict[str, WorkerPool] = {}
        self._async_runner: AsyncRunner | None = None

    def __enter__(self) -> RewardManager:
        with ExitStack() as started:
            for component in self._components:
                if component.reward.self_check is not None and component.reward.use not in self._pools:
                    pool = WorkerPool(component.reward.use, num_workers=self._config.num_workers, timeout_s=self._config.timeout_s)
                    self._pools[component.reward.use] = started.enter_context(pool)
                if component.reward.is_async and self._async_runner is None:
                    self._async_runner = started.enter_context(AsyncRunner())
            self._resources = started.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._pools, self._async_runner = {}, None
        self._resources.close()

    def describe(self) -> list[str]:
        """Returns one line a component: name, weight, tasks, function, options, and for a plug-in the file and its SHA-256."""
        return [
            f"{component.name}: {component.config.weight:g} x {component.reward}, "
            f"{'all tasks' if component.config.tasks is None else 'tasks ' + ', '.join(component.config.tasks)}, "
            f"options {dict(component.reward.options) or 'default'}"
            for component in self._components
        ]

    def check_examples(self, examples: Iterable[Example]) -> int:
        """Returns the number of examples checked; a `DataError` names the first whose answer no response could match.

        Each example must have a component for its task and an answer of the kind that the component compares with. A verifier that
        runs in a worker must also find the example's own answer right: about a millisecond each.
        """
        checked = list(examples)
        for example in checked:
            for component in self._components_for(example):
                component.reward.check_answer(example)
        for component in self._components:
            if component.reward.self_check is None:
                continue
            rows = [example for example in checked if component.config.judges(example.task)]
            requests = [component.reward.self_check(example) for example in rows]
            for example, (verdict, _seconds) in zip(rows, self._pool(component).judge(requests), strict=True):
                if isinstance(verdict, Unavailable) or verdict.value != 1.0:
                    reason = verdict.reason if isinstance(verdict, Unavailable) else verdict.note or "judged wrong"
                    raise DataError(
                        f"example {example.id!r}: component {component.name!r} ({component.reward.use}) does not find its own answer "
                        f"{example.answer!r} right ({reason}); mend the row or judge its task with another component"
                    )
        return len(checked)

    def score(self, groups: Sequence[Group]) -> list[ScoredGroup]:
        """Returns the groups in order, every rollout judged or with the reasons why not.

        Raises `RewardUnavailableError` when more than `max_unavailable_frac` of all rollouts could not be judged, or any under
        `on_unavailable: stop`; `DataError` for an example whose task no component judges.
        """
        rows = [(group.example, rollout) for group in groups for rollout in group.rollouts]
        verdicts: list[dict[str, tuple[Verdict, float]]] = [{} for _ in rows]
        for group in groups:
            self._components_for(group.example)
        for component in self._components:
            indices = [index for index, (example, _rollout) in enumerate(rows) if component.config.judges(example.task)]
            for index, verdict in zip(indices, self._judge(component, [rows[index] for index in indices]), strict=True):
                verdicts[index][component.name] = verdict
        remaining = iter(zip(rows, verdicts, strict=True))
        outcomes = [[self._outcome(rollout, next(remaining)[1]) for rollout in group.rollouts] for group in groups]
        self._refuse_too_many_unavailable([outcome for of_group in outcomes for outcome in of_group])
        return [self._scored_group(group.example, of_group) for group, of_group in zip(groups, outcomes, strict=True)]

    def _components_for(self, example: Example) -> list[_Component]:
        components = [component for component in self._components if component.config.judges(example.task)]
        if not components:
            tasks = sorted({task for component in self._components for task in component.config.tasks or ()})
            close = difflib.get_close_matches(example.task, tasks, n=1)
            raise DataError(
                f"example {example.id!r}: no reward component judges its task {example.task!r}"
                f"{f' (did you mean {close[0]!r}?)' if close else ''}; judged are {', '.join(tasks)}: "
                "add the task to `tasks` of a component, or leave `tasks` out to judge all"
            )
        return components

    def _pool(self, component: _Component) -> WorkerPool:
        assert component.reward.use in self._pools, "a RewardManager whose rewards need workers is used inside its `with` block"
        return self._pools[component.reward.use]

    def _judge(self, component: _Component, rows: Sequence[Row]) -> list[tuple[Verdict, float]]:
        """Returns one component's verdicts with their seconds, in the order of the rows."""
        if component.reward.is_async:
            assert self._async_runner is not None, "a RewardManager with async rewards is used inside its `with` block"
            return self._async_runner.run([_async_call(component, row, timeout_s=self._config.timeout_s) for row in rows])
        verdicts: list[tuple[Verdict, float]] = []
        requests: dict[int, WorkerRequest] = {}
        for index, row in enumerate(rows):
            attempt = _Attempt()
            with attempt.guarded():
                returned = component.reward.function(*row, **component.reward.options)
                if isinstance(returned, WorkerRequest) and component.reward.self_check is not None:
                    requests[index] = returned
                else:
                    attempt.verdict = _as_verdict(returned, weight=component.config.weight)
            verdicts.append((attempt.verdict, attempt.seconds))
        if requests:
            for index, verdict in zip(requests, self._pool(component).judge(list(requests.values())), strict=True):
                verdicts[index] = verdict
        return verdicts

    def _outcome(self, rollout: Rollout, verdicts: dict[str, tuple[Verdict, float]]) -> JudgedRollout | UnjudgedRollout:
        results = {name: verdict for name, (verdict, _seconds) in verdicts.items() if isinstance(verdict, RewardResult)}
        reasons = {name: verdict.reason for name, (verdict, _seconds) in verdicts.items() if isinstance(verdict, Unavailable)}
        if reasons:
            return UnjudgedRollout(rollout=rollout, reasons=reasons)
        reward = sum(self._config.components[name].weight * result.value for name, result in results.items())
        judging_s = {name: seconds for name, (_verdict, seconds) in verdicts.items()}
        return JudgedRollout(rollout=rollout, score=RolloutScore(reward=float(reward), results=results, judging_s=judging_s))

    def _refuse_too_many_unavailable(self, outcomes: Sequence[JudgedRollout | UnjudgedRollout]) -> None:
        unavailable = [outcome for outcome in outcomes if isinstance(outcome, UnjudgedRollout)]
        limit = 0.0 if self._config.on_unavailable == "stop" else self._config.max_unavailable_frac
        if not unavailable or len(unavailable) <= limit * len(outcomes):
            return
        setting = "on_unavailable: stop" if self._config.on_unavailable == "stop" else f"max_unavailable_frac: {limit:g}"
        causes = Counter((name, reason) for outcome in unavailable for name, reason in outcome.reasons.items())
        listed = "\n".join(f"  {name}: {times} x {reason}" for (name, reason), times in causes.most_common(5))
        raise RewardUnavailableError(
            f"{len(unavailable)} of {len(outcomes)} rollouts could not be judged (rewards.{setting}); "
            f"mend the component, then resume:\n{listed}"
        )

    def _scored_group(self, example: Example, outcomes: Sequence[JudgedRollout | UnjudgedRollout]) -> ScoredGroup:
        judged = tuple(outcome for outcome in outcomes if isinstance(outcome, JudgedRollout))
        if self._config.on_unavailable == "drop_group" and len(judged) < len(outcomes):
            unjudged = [UnjudgedRollout(rollout=of.rollout, reasons={}) if isinstance(of, JudgedRollout) else of for of in outcomes]
            return ScoredGroup(example=example, judged=(), unjudged=tuple(unjudged))
        return ScoredGroup(
            example=example, judged=judged, unjudged=tuple(outcome for outcome in outcomes if isinstance(outcome, UnjudgedRollout))
        )


@dataclass(slots=True)
class _Attempt:
    """One call of a reward function: its verdict and its seconds."""

    verdict: Verdict = field(default_factory=lambda: Unavailable(reason="the reward function was not called"))
    seconds: float = 0.0

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Turns whatever the function raises into an `Unavailable` with the end of the traceback."""
        started = time.monotonic()
        try:
            yield
        # The one boundary where nothing can be named beforehand: the code is the user's. Ending the process or cancelling the
        # task that it runs in is not its business either.
        except (Exception, SystemExit, asyncio.CancelledError) as error:
            self.verdict = Unavailable(reason="".join(traceback.format_exception(error, limit=-3))[-MAX_REASON_CHARS:].strip())
        finally:
            self.seconds = time.monotonic() - started


def _async_call(component: _Component, row: Row, *, timeout_s: float) -> Callable[[], Awaitable[tuple[Verdict, float]]]:
    async def call() -> tuple[Verdict, float]:
        attempt = _Attempt()
        with attempt.guarded():
            try:
                async with asyncio.timeout(timeout_s) as limit:
                    returned = await component.reward.function(*row, **component.reward.options)
            except TimeoutError:
                if not limit.expired():
                    raise
                attempt.verdict = Unavailable(reason=f"no verdict in {timeout_s:g} s")
            else:
                attempt.verdict = _as_verdict(returned, weight=component.config.weight)
        return attempt.verdict, attempt.seconds

    return call


def _as_verdict(returned: object, *, weight: float) -> Verdict:
    """Returns what a reward function returned as a verdict; anything but a finite number of sane size is unavailable."""
    if isinstance(returned, Unavailable):
        return returned
    if not isinstance(returned, RewardResult):
        if isinstance(returned, bool) or not isinstance(returned, Real):
            kind = type(returned).__name__
            return Unavailable(reason=f"the reward function returned a {kind}; it must return float, RewardResult or Unavailable")
        returned = RewardResult(value=float(returned))
    if not abs(weight * returned.value) <= MAX_WEIGHTED_VALUE:
        return Unavailable(reason=f"weight x value = {weight:g} x {returned.value:g}; at most {MAX_WEIGHTED_VALUE:g} can be summed")
    return returned
