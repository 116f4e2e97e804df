"""The reward manager: rollouts in, scored groups out, with every way in which a reward function can fail in one place.

For each rollout: `reward = sum over components of weight x value`, over the components that judge the example's task and source. A
component that raises, hangs, or returns what is not a finite number leaves the rollout without a score. Components work at the
same time; judgements do not depend on the order of the rollouts or on their neighbours.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import TracebackType

from ..model.records import DataError, Example, Group, Rollout, VlpostError
from .cache import VerdictCache
from .component import Answer, Component, OpenComponent, WorkerPools, bounded
from .config import RewardConfigError, RewardsConfig
from .plugin import required_columns, trl_columns
from .result import JudgedRollout, RewardResult, RolloutScore, ScoredGroup, Unavailable, UnjudgedRollout

CACHE_FILE = "reward_cache.sqlite"


class RewardUnavailableError(VlpostError):
    """Too many rollouts could not be judged, or one under `on_unavailable: stop`; names the components and their reasons."""


class RewardManager:
    """Judges groups with the components of a recipe; a context manager, since workers, services and event loops may run for it.

    Example: `with RewardManager(config, recipe_folder=folder, allow_code=False) as rewards: scored = rewards.score(groups)`.
    The constructor resolves every function and checks its options (`RewardConfigError`); entering starts processes and services
    (`WorkerError`). With `cache_folder`, verdicts of cacheable rewards are kept in a file there (`rewards.cache: false` turns it off).
    """

    def __init__(self, config: RewardsConfig, *, recipe_folder: Path | None, allow_code: bool, cache_folder: Path | None = None) -> None:
        # Here and not above: the verifiers take a moment to load, and who only writes or tests a plug-in needs none of them.
        from .registry import resolve

        self._config = config
        self._recipe_folder = recipe_folder
        self._cache_folder = cache_folder if config.cache else None
        self._components: list[Component] = []
        for name, component in config.components.items():
            try:
                reward = resolve(
                    component.use,
                    component.options,
                    recipe_folder=recipe_folder,
                    allow_code=allow_code,
                    completions=component.completions or "conversational",
                )
                self._components.append(Component(name=name, config=component, reward=reward))
            except RewardConfigError as error:
                joint = "." if str(error).startswith("options.") else ": "
                raise RewardConfigError(f"rewards.components.{name}{joint}{error}") from error
        self._resources = ExitStack()
        self._open: dict[str, OpenComponent] = {}
        self._threads: ThreadPoolExecutor | None = None
        self._pools = WorkerPools(num_workers=config.num_workers)

    def __enter__(self) -> RewardManager:
        with ExitStack() as started:
            cache = None
            if self._cache_folder is not None and any(component.is_cacheable for component in self._components):
                cache = started.enter_context(VerdictCache(self._cache_folder / CACHE_FILE))
            # Closed after the components, whose end is what frees threads that still wait.
            threads = ThreadPoolExecutor(max_workers=len(self._components), thread_name_prefix="reward")
            started.callback(threads.shutdown, wait=True, cancel_futures=True)
            self._pools = started.enter_context(WorkerPools(num_workers=self._config.num_workers))
            for component in self._components:
                self._open[component.name] = component.opened(
                    self._config, started, pools=self._pools, recipe_folder=self._recipe_folder, cache=cache
                )
            self._threads = threads
            self._resources = started.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._open, self._threads = {}, None
        self._resources.close()

    @property
    def config(self) -> RewardsConfig:
        """The settings that the manager was made of."""
        return self._config

    @property
    def components(self) -> tuple[Component, ...]:
        """The components in the order of the recipe."""
        return tuple(self._components)

    @property
    def full_values(self) -> dict[str, float]:
        """The best value of each component, for `summarise`."""
        return {component.name: component.full_value for component in self._components}

    @property
    def is_unsafe(self) -> bool:
        """True when a component that is open runs model-written programs without a jail."""
        return any(component.is_unsafe for component in self._open.values())

    def describe_services(self) -> list[str]:
        """Returns one line a service that is open: which jail, which judge."""
        return [f"{name}: {component.line}" for name, component in self._open.items() if component.line]

    def describe(self) -> list[str]:
        """Returns one line a component: name, weight, routing, function, options, and for a plug-in the file, SHA-256 and where it runs."""
        return [component.describe() for component in self._components]

    def check_examples(self, examples: Iterable[Example]) -> int:
        """Returns the number of examples checked; a `DataError` names the first whose answer no response could match.

        Each example must have a component for its task and source, and an answer of the kind that the component compares with. A verifier
        that runs in a worker must also find the example's own answer right: about a millisecond each. Outside the `with` block the
        workers are started for it and ended; no service is.
        """
        checked = list(examples)
        for example in checked:
            for component in self._components_for(example):
                component.reward.check_answer(example)
                _check_columns(component, example)
        with ExitStack() as temporary:
            pools = self._pools if self._open else temporary.enter_context(WorkerPools(num_workers=self._config.num_workers))
            for component in self._components:
                rows = [example for example in checked if component.config.judges(example)]
                self._check_with_workers(component, rows, pools)
        return len(checked)

    def _check_with_workers(self, component: Component, rows: Sequence[Example], pools: WorkerPools) -> None:
        built_in = component.reward.built_in
        if built_in is None or built_in.self_check is None or not rows:
            return
        timeout_s = component.timeout_s(self._config)
        pools.start(component.reward.use, timeout_s=timeout_s)
        requests = [built_in.self_check(example) for example in rows]
        for example, answer in zip(rows, pools.judge(requests, timeout_s=timeout_s), strict=True):
            if not isinstance(answer.verdict, RewardResult) or answer.verdict.value != built_in.gold_value:
                raise DataError(
                    f"example {example.id!r}: component {component.name!r} ({component.reward.use}) does not find its own answer "
                    f"{example.answer!r} right ({_why(answer)}); mend the row or judge its task with another component"
                )

    def score(self, groups: Sequence[Group]) -> list[ScoredGroup]:
        """Returns the groups in order, every rollout judged or with the reasons why not.

        Raises `RewardUnavailableError` when more than `max_unavailable_frac` of all rollouts could not be judged, or any under
        `on_unavailable: stop`; `DataError` for an example whose task and source no component judges; a service's own error when it
        has to stop the run.
        """
        for group in groups:
            self._components_for(group.example)
        # A conversation that a broken tool ended says nothing about the policy: nobody is asked about it.
        whole = [replace(group, rollouts=tuple(one for one in group.rollouts if one.ending != "unavailable")) for group in groups]
        judged_here = self._judge_all(whole)
        answers = [_in_places(group, of_group) for group, of_group in zip(groups, judged_here, strict=True)]
        outcomes = [
            [
                self._outcome(rollout, {name: of_group[number] for name, of_group in by_component.items() if number in of_group})
                for number, rollout in enumerate(group.rollouts)
            ]
            for group, by_component in zip(groups, answers, strict=True)
        ]
        self._refuse_too_many_unavailable([outcome for of_group in outcomes for outcome in of_group])
        return [self._scored_group(group.example, of_group) for group, of_group in zip(groups, outcomes, strict=True)]

    def _judge_all(self, groups: Sequence[Group]) -> list[dict[str, list[Answer]]]:
        """Returns for each group the answers of each component that judges it; the components work side by side."""
        places = {
            component.name: [place for place, group in enumerate(groups) if group.rollouts and component.config.judges(group.example)]
            for component in self._components
        }
        busy = [component for component in self._components if places[component.name]]

        def judge(component: Component) -> list[list[Answer]]:
            return self._opened(component).judge([groups[place] for place in places[component.name]])

        apart = {
            component.name: self._threads.submit(judge, component)
            for component in busy
            if self._threads is not None and not self._opened(component).in_caller
        }
        # In the meantime what has to run in this thread.
        here = {component.name: judge(component) for component in busy if component.name not in apart}
        answers: list[dict[str, list[Answer]]] = [{} for _ in groups]
        for component in busy:
            judged = here[component.name] if component.name in here else apart[component.name].result()
            for place, of_group in zip(places[component.name], judged, strict=True):
                answers[place][component.name] = [bounded(answer, weight=component.config.weight) for answer in of_group]
        return answers

    def _opened(self, component: Component) -> OpenComponent:
        if component.name in self._open:
            return self._open[component.name]
        built_in = component.reward.built_in
        is_plain = built_in is not None and built_in.function is not None and built_in.self_check is None
        assert is_plain, "a RewardManager whose rewards need processes, services or an event loop is used inside its `with` block"
        return component.opened(self._config, self._resources, pools=self._pools, recipe_folder=self._recipe_folder, cache=None)

    def _components_for(self, example: Example) -> list[Component]:
        components = [component for component in self._components if component.config.judges(example)]
        if components:
            return components
        tasks = sorted({task for component in self._components for task in component.config.tasks or ()})
        sources = sorted({source for component in self._components for source in component.config.sources or ()})
        close = difflib.get_close_matches(example.task, tasks, n=1)
        judged = [f"judged are {', '.join(tasks)}"] if tasks else []
        judged += [f"judged sources are {', '.join(sources)}"] if sources else []
        meant = f" (did you mean {close[0]!r}?)" if close else ""
        raise DataError(
            f"example {example.id!r}: no reward component judges its task {example.task!r}{meant}"
            f"{f' of source {example.source!r}' if sources else ''}; {', '.join(judged)}: "
            "add the task to `tasks` of a component (and the source to its `sources`), or leave `tasks` out to judge all"
        )

    def _outcome(self, rollout: Rollout, answers: Mapping[str, Answer]) -> JudgedRollout | UnjudgedRollout:
        if rollout.ending == "unavailable":
            return UnjudgedRollout(rollout=rollout, reasons={"agent": rollout.reason})
        verdicts = {name: answer.verdict for name, answer in answers.items()}
        results = {name: verdict for name, verdict in verdicts.items() if isinstance(verdict, RewardResult)}
        reasons = {name: verdict.reason for name, verdict in verdicts.items() if isinstance(verdict, Unavailable)}
        if not results and not reasons:
            reasons = dict.fromkeys(verdicts, "the reward function returned None: it does not judge this row, and no other component does")
        if reasons:
            return UnjudgedRollout(rollout=rollout, reasons=reasons)
        results = {name: self._under_condition(name, results) for name in results}
        reward = sum(self._config.components[name].weight * result.value for name, result in results.items())
        judging_s = {name: answers[name].seconds or 0.0 for name in results if answers[name].seconds is not None}
        return JudgedRollout(rollout=rollout, score=RolloutScore(reward=float(reward), results=results, judging_s=judging_s))

    def _under_condition(self, name: str, results: Mapping[str, RewardResult]) -> RewardResult:
        """Returns the component's result, its value 0 where the one that it depends on says so."""
        result, when = results[name], self._config.components[name].when
        # A function with trl's signature may pass a row over: what it has not found right is not right.
        if when is None or (when in results and results[when].value > 0.0):
            return result
        return replace(result, value=0.0, note=f"counts only where {when} is above 0; by itself {result.value:g}")

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


def _in_places(group: Group, answers: Mapping[str, list[Answer]]) -> dict[str, dict[int, Answer]]:
    """Returns each component's answers by the number of the rollout, of which those that could not be asked about have none."""
    places = [place for place, rollout in enumerate(group.rollouts) if rollout.ending != "unavailable"]
    return {name: dict(zip(places, of_component, strict=True)) for name, of_component in answers.items()}


def _why(answer: Answer) -> str:
    if isinstance(answer.verdict, RewardResult):
        return answer.verdict.note or "judged wrong"
    return answer.verdict.reason if answer.verdict else "not judged"


def _check_columns(component: Component, example: Example) -> None:
    """Raises a `DataError` when a function with trl's signature asks for a column that the example does not have."""
    if component.reward.kind != "trl" or component.reward.function is None:
        return
    missing = [name for name in required_columns(component.reward.function) if name not in trl_columns(example)]
    if missing:
        raise DataError(
            f"example {example.id!r}: component {component.name!r} ({component.reward.use}) asks for a column {missing[0]!r}; "
            "give the row `metadata` with that key, or give the argument a default"
        )
