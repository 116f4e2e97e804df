"""One component at work: a built-in function, a service or a plug-in, each behind the same call on groups.

Whatever a function does ends here as a verdict: this is the boundary at which an exception becomes `Unavailable`.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeAlias

from ..model.records import Example, Group, Rollout, VlpostError
from .async_runner import AsyncRunner
from .built_in import BuiltInReward, RowJudge
from .cache import VerdictCache, verdict_key
from .config import ComponentConfig, RewardConfigError, RewardsConfig
from .plugin import Answered, Plugin, as_reason, as_verdict
from .plugin_worker import DEFAULT_MEMORY_MIB, PluginPool, PluginProcess, ProcessFaultError
from .result import RewardResult, Unavailable
from .worker import WorkerError, WorkerPool, WorkerRequest

if TYPE_CHECKING:
    from .registry import ResolvedReward

MAX_WEIGHTED_VALUE = 1e100
"""A larger weight x value is no judgement; below it no sum can overflow."""
BLOCKED_GRACE_S = 1.0
"""How much longer than its deadline an async function may keep the event loop from turning, seconds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What a component says of one rollout."""

    verdict: Answered
    """None: a function with trl's signature does not judge this row."""
    seconds: float | None
    """Of work; None when the verdict was looked up in the cache."""


Judge: TypeAlias = Callable[[Sequence[Group]], list[list[Answer]]]
"""Returns an answer a rollout; never raises on account of a row."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OpenComponent:
    """A component that is ready to judge."""

    judge: Judge
    in_caller: bool = False
    """True: runs in the thread that calls `score`, like all code that the user wants in the trainer's process."""
    line: str = ""
    """What a service says of itself for the log"""
    is_unsafe: bool = False
    """True for a service whose programs could reach the trainer"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Component:
    """A resolved component; settings that could not take effect are a `RewardConfigError`."""

    name: str
    config: ComponentConfig
    reward: ResolvedReward

    def __post_init__(self) -> None:
        built_in, config = self.reward.built_in, self.config
        is_plain = built_in is not None and built_in.function is not None and built_in.self_check is None
        refused = (
            ("isolate", config.isolate is not None and (built_in is not None or self.reward.is_async), "is for plug-ins that are no async"),
            ("max_memory_mib", config.max_memory_mib is not None and not self.is_isolated, "is for plug-ins in a process of their own"),
            ("completions", config.completions is not None and self.reward.kind != "trl", "is for functions with trl's signature"),
            ("timeout_s", config.timeout_s is not None and is_plain, "is for what may take long; this built-in always ends soon"),
            ("timeout_s", config.timeout_s is not None and config.isolate is False, "cannot end a function in the trainer's process"),
        )
        for key, is_refused, reason in refused:
            if is_refused:
                raise RewardConfigError(f"{key} = {getattr(config, key)!r} {reason}: leave it out ({self.reward.use})")
        if self.reward.traits.cacheable and self.reward.kind in ("group", "batch"):
            raise RewardConfigError(
                f"{self.reward.use} is cacheable and judges whole groups: what depends on other rollouts cannot be looked up"
            )

    @property
    def is_isolated(self) -> bool:
        """True for a plug-in in a process of its own."""
        return self.reward.kind is not None and not self.reward.is_async and self.config.isolate is not False

    @property
    def is_cacheable(self) -> bool:
        """True when verdicts may be looked up by content."""
        built_in = self.reward.built_in
        return built_in.cacheable if built_in else self.reward.traits.cacheable

    @property
    def full_value(self) -> float:
        """Value of the best response that the function says there is; 1.0 where it says nothing."""
        built_in = self.reward.built_in
        value_range = built_in.value_range if built_in else self.reward.traits.value_range
        return value_range[1] if value_range else 1.0

    def timeout_s(self, settings: RewardsConfig) -> float:
        """Returns the seconds of work that one judgement may take."""
        return self.config.timeout_s or settings.timeout_s

    def describe(self) -> str:
        """Returns one line: name, weight, function, routing, options, and what is unusual about how it runs."""
        config = self.config
        routing = [
            f"{key} {', '.join(names)}" for key, names in (("tasks", config.tasks), ("sources", config.sources)) if names is not None
        ]
        options = f"options {dict(config.options) or 'default'}"
        line = f"{self.name}: {config.weight:g} x {self.reward}, {', '.join(routing) or 'all tasks'}, {options}"
        if config.isolate is False:
            line += ", in the trainer's process without a deadline"
        return line

    def opened(
        self,
        settings: RewardsConfig,
        resources: ExitStack,
        *,
        pools: WorkerPools,
        recipe_folder: Path | None,
        cache: VerdictCache | None,
    ) -> OpenComponent:
        """Returns the component ready to judge; what has to be closed is left to `resources`."""
        timeout_s = self.timeout_s(settings)
        built_in = self.reward.built_in
        if built_in is None:
            opened = self._opened_plugin(settings, resources, timeout_s=timeout_s)
        elif built_in.service is not None:
            service = resources.enter_context(built_in.service(self.reward.service_options, settings, recipe_folder))
            judge = partial(_judge_by_rows, partial(_judge_by_service, service))
            opened = OpenComponent(judge=judge, line=service.describe(), is_unsafe=service.is_unsafe)
        else:
            if built_in.self_check is not None:
                pools.start(self.reward.use, timeout_s=timeout_s)
            ask_workers = partial(pools.judge, timeout_s=timeout_s)
            judge = partial(_judge_by_function, built_in, self.reward.options, ask_workers)
            opened = OpenComponent(judge=partial(_judge_by_rows, judge))
        if cache is None or not self.is_cacheable:
            return opened
        return replace(opened, judge=partial(_judge_with_cache, opened.judge, cache, self._described_judge(settings)))

    def _opened_plugin(self, settings: RewardsConfig, resources: ExitStack, *, timeout_s: float) -> OpenComponent:
        reward, config = self.reward, self.config
        assert reward.kind is not None
        assert reward.function is not None
        assert reward.source is not None, "a plug-in has a kind, a function and a source"
        plugin = Plugin(
            function=reward.function,
            kind=reward.kind,
            options=reward.options,
            completions=config.completions or "conversational",
            value_range=reward.traits.value_range,
        )
        if reward.is_async:
            run = partial(_run_async, plugin, resources.enter_context(AsyncRunner()), timeout_s)
        elif self.is_isolated:
            memory = config.max_memory_mib or DEFAULT_MEMORY_MIB
            pool = PluginPool(reward.source, num_workers=settings.num_workers, max_memory_mib=memory)
            run = partial(_run_isolated, resources.enter_context(pool), timeout_s)
        else:
            run = partial(_run_here, plugin)
        return OpenComponent(judge=partial(_judge_by_plugin, plugin.kind, run), in_caller=not (reward.is_async or self.is_isolated))

    def _described_judge(self, settings: RewardsConfig) -> dict[str, Any]:
        """Returns what a cached verdict depends on beside the row."""
        built_in = self.reward.built_in
        described: dict[str, Any] = {"use": self.reward.use, "options": self.config.options}
        if built_in is None:
            return {**described, "sha256": self.reward.sha256, "version": self.reward.traits.version, "form": self.config.completions}
        if built_in.service is not None:
            # A service may read every reward setting that is not about the other components.
            described["settings"] = settings.model_dump(mode="json", exclude={"components", "on_unavailable", "max_unavailable_frac"})
        return {**described, "version": built_in.version}


def bounded(answer: Answer, *, weight: float) -> Answer:
    """Returns the answer, or unavailable when weight x value is too large to be summed."""
    verdict = answer.verdict
    if not isinstance(verdict, RewardResult) or abs(weight * verdict.value) <= MAX_WEIGHTED_VALUE:
        return answer
    reason = f"weight x value = {weight:g} x {verdict.value:g}; at most {MAX_WEIGHTED_VALUE:g} can be summed"
    return replace(answer, verdict=Unavailable(reason=reason))


# ------------------------------------------------------------------ built-in functions and services

_Row: TypeAlias = tuple[Example, Rollout]


def _judge_by_rows(judge: Callable[[Sequence[_Row]], list[Answer]], groups: Sequence[Group]) -> list[list[Answer]]:
    answers = iter(judge([(group.example, rollout) for group in groups for rollout in group.rollouts]))
    return [[next(answers) for _rollout in group.rollouts] for group in groups]


class WorkerPools:
    """The worker pools of all components, by judge and deadline; each is started when it is first needed; a context manager."""

    def __init__(self, *, num_workers: int) -> None:
        self._num_workers = num_workers
        self._resources = ExitStack()
        self._pools: dict[tuple[str, float], WorkerPool] = {}
        self._lock = threading.Lock()
        self._is_open = False

    def __enter__(self) -> WorkerPools:
        self._is_open = True
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._resources.close()

    def start(self, function: str, *, timeout_s: float) -> WorkerPool:
        """Returns the pool of a judge; a `WorkerError` when it cannot be started."""
        assert self._is_open, "a RewardManager whose rewards need workers is used inside its `with` block"
        with self._lock:
            if (function, timeout_s) not in self._pools:
                pool = WorkerPool(function, num_workers=self._num_workers, timeout_s=timeout_s)
                self._pools[function, timeout_s] = self._resources.enter_context(pool)
            return self._pools[function, timeout_s]

    def judge(self, requests: Sequence[WorkerRequest], *, timeout_s: float) -> list[Answer]:
        """Returns an answer a request, in order."""
        answers: dict[int, Answer] = {}
        for function in dict.fromkeys(request.function for request in requests):
            numbers = [number for number, request in enumerate(requests) if request.function == function]
            try:
                verdicts = self.start(function, timeout_s=timeout_s).judge([requests[number] for number in numbers])
            except WorkerError as error:
                verdicts = [(Unavailable(reason=str(error)), 0.0)] * len(numbers)
            answers |= {number: Answer(verdict=verdict, seconds=took) for number, (verdict, took) in zip(numbers, verdicts, strict=True)}
        return [answers[number] for number in range(len(requests))]


AskWorkers: TypeAlias = Callable[[Sequence[WorkerRequest]], list[Answer]]


def _judge_by_function(built_in: BuiltInReward, options: Mapping[str, Any], ask_workers: AskWorkers, rows: Sequence[_Row]) -> list[Answer]:
    answers: dict[int, Answer] = {}
    requests: dict[int, WorkerRequest] = {}
    assert built_in.function is not None
    for number, row in enumerate(rows):
        started = time.monotonic()
        try:
            returned = built_in.function(*row, **options)
        except Exception as error:  # a verifier is total: this would be a fault of ours, and is no fault of the response
            returned = Unavailable(reason=as_reason(error))
        if isinstance(returned, WorkerRequest):
            requests[number] = returned
        else:
            answers[number] = Answer(verdict=as_verdict(returned), seconds=time.monotonic() - started)
    if requests:
        answers |= dict(zip(requests, ask_workers(list(requests.values())), strict=True))
    return [answers[number] for number in range(len(rows))]


def _judge_by_service(service: RowJudge, rows: Sequence[_Row]) -> list[Answer]:
    try:
        verdicts = service.judge(rows)
        if len(verdicts) != len(rows):
            raise RuntimeError(f"{len(verdicts)} verdicts for {len(rows)} rows")
    except VlpostError:
        raise  # the service's own word that the run has to stop, such as a spent budget
    except Exception as error:
        verdicts = [(Unavailable(reason=as_reason(error)), 0.0)] * len(rows)
    return [Answer(verdict=as_verdict(verdict), seconds=seconds) for verdict, seconds in verdicts]


# ------------------------------------------------------------------ plug-ins


@dataclass(frozen=True, kw_only=True, slots=True)
class _Call:
    """What came of one call: a verdict a rollout, or the reason why there is none for any of them."""

    verdicts: list[Answered] = field(default_factory=list)
    seconds: float = 0.0
    """Of the whole call."""
    failure: str = ""


_Run: TypeAlias = Callable[[Sequence[Sequence[Group]]], list[_Call]]
"""Makes calls, each on the groups of one unit, and returns what came of each."""


def _judge_by_plugin(kind: str, run: _Run, groups: Sequence[Group]) -> list[list[Answer]]:
    """Returns the answers of a plug-in.

    A call that fails costs all rollouts that it was about. Most functions with trl's signature look at one row at a time; so that a
    neighbour costs nobody anything, the rows of a failed call are judged again one by one, and the note says so.
    """
    if kind == "row":
        units = [(replace(group, rollouts=(rollout,)),) for group in groups for rollout in group.rollouts]
    elif kind == "batch":
        units = [tuple(groups)] if groups else []
    else:
        units = [(group,) for group in groups]
    calls = run(units)
    answers: list[Answer] = []
    for unit, call in zip(units, calls, strict=True):
        size = sum(len(group.rollouts) for group in unit)
        if not call.failure:
            answers += [Answer(verdict=verdict, seconds=call.seconds / size) for verdict in call.verdicts]
        elif kind == "trl" and size > 1:
            answers += _judge_alone(run, unit[0], failure=call.failure)
        else:
            answers += [Answer(verdict=Unavailable(reason=call.failure), seconds=call.seconds / size)] * size
    remaining = iter(answers)
    return [[next(remaining) for _rollout in group.rollouts] for group in groups]


def _judge_alone(run: _Run, group: Group, *, failure: str) -> list[Answer]:
    answers = []
    last_line = failure.splitlines()[-1] if failure else ""
    for call in run([(replace(group, rollouts=(rollout,)),) for rollout in group.rollouts]):
        if call.failure:
            answers.append(Answer(verdict=Unavailable(reason=call.failure), seconds=call.seconds))
            continue
        (verdict,) = call.verdicts
        if isinstance(verdict, RewardResult):
            note = f"judged alone, since the call on the whole group failed: {last_line}"
            verdict = replace(verdict, note="; ".join(filter(None, [verdict.note, note])))
        answers.append(Answer(verdict=verdict, seconds=call.seconds))
    return answers


def _limit_s(unit: Sequence[Group], timeout_s: float) -> float:
    return timeout_s * sum(len(group.rollouts) for group in unit)


def _run_isolated(pool: PluginPool, timeout_s: float, units: Sequence[Sequence[Group]]) -> list[_Call]:
    def work(process: PluginProcess, unit: Sequence[Group]) -> _Call:
        started = time.monotonic()
        try:
            verdicts, seconds = process.ask(unit, timeout_s=_limit_s(unit, timeout_s))
        except (ProcessFaultError, WorkerError, ValueError) as error:
            return _Call(failure=str(error) or repr(error), seconds=time.monotonic() - started)
        return _Call(verdicts=verdicts, seconds=seconds)

    return pool.map(work, units)


def _run_here(plugin: Plugin, units: Sequence[Sequence[Group]]) -> list[_Call]:
    calls = []
    for unit in units:
        started = time.monotonic()
        try:
            returned, finish = plugin.call(unit)
            verdicts = finish(returned)
        # The code is the user's: nothing can be named beforehand. Ending the process is not its business either.
        except (Exception, SystemExit, asyncio.CancelledError) as error:
            calls.append(_Call(failure=as_reason(error), seconds=time.monotonic() - started))
        else:
            calls.append(_Call(verdicts=verdicts, seconds=time.monotonic() - started))
    return calls


def _run_async(plugin: Plugin, runner: AsyncRunner, timeout_s: float, units: Sequence[Sequence[Group]]) -> list[_Call]:
    def call_of(unit: Sequence[Group]) -> Callable[[], Awaitable[_Call]]:
        async def call() -> _Call:
            limit_s = _limit_s(unit, timeout_s)
            started = time.monotonic()
            try:
                async with asyncio.timeout(limit_s) as limit:
                    returned, finish = plugin.call(unit)
                    verdicts = finish(await returned)
            except TimeoutError as error:
                reason = f"no verdict in {limit_s:g} s" if limit.expired() else as_reason(error)
                return _Call(failure=reason, seconds=time.monotonic() - started)
            # The same boundary as above; the task itself is nobody's to cancel but the plug-in's.
            except (Exception, SystemExit, asyncio.CancelledError) as error:
                return _Call(failure=as_reason(error), seconds=time.monotonic() - started)
            return _Call(verdicts=verdicts, seconds=time.monotonic() - started)

        return call

    longest_s = max((_limit_s(unit, timeout_s) for unit in units), default=0.0) + BLOCKED_GRACE_S

    def blocked(number: int) -> _Call:
        reason = f"no verdict in {longest_s:g} s: the async function waits without `await`, which blocks all others; write a plain `def`"
        return _Call(failure=reason, seconds=longest_s)

    return runner.run([call_of(unit) for unit in units], blocked_after_s=longest_s, when_blocked=blocked)


# ------------------------------------------------------------------ cache


def _judge_with_cache(judge: Judge, cache: VerdictCache, described: Mapping[str, Any], groups: Sequence[Group]) -> list[list[Answer]]:
    """Returns the answers, those that are in the cache from there; verdicts are kept, `Unavailable` never is."""
    keys = [[verdict_key(group.example, rollout, judge=described) for rollout in group.rollouts] for group in groups]
    found = {key: verdict for of_group in keys for key in of_group if (verdict := _from_cache(cache.get(key))) is not None}
    missing = [
        replace(group, rollouts=tuple(rollout for key, rollout in zip(of_group, group.rollouts, strict=True) if key not in found))
        for group, of_group in zip(groups, keys, strict=True)
    ]
    asked = [group for group in missing if group.rollouts]
    judged = iter([answer for answers in (judge(asked) if asked else []) for answer in answers])
    outcomes: list[list[Answer]] = []
    for of_group in keys:
        outcomes.append([])
        for key in of_group:
            if key in found:
                outcomes[-1].append(Answer(verdict=found[key], seconds=None))
                continue
            answer = next(judged)
            outcomes[-1].append(answer)
            if isinstance(answer.verdict, RewardResult):
                verdict = answer.verdict
                cache.put(key, {"value": float(verdict.value), "note": verdict.note, "metrics": dict(verdict.metrics)})
    return outcomes


def _from_cache(kept: Mapping[str, Any] | None) -> RewardResult | None:
    """Returns the verdict, or None when there is none or another program wrote something else there."""
    if kept is None or set(kept) != {"value", "note", "metrics"} or not isinstance(kept["note"], str):
        return None
    try:
        return RewardResult(value=kept["value"], note=kept["note"], metrics=dict(kept["metrics"]))
    except (TypeError, ValueError):
        return None
