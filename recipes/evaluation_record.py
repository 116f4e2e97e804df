"""What an evaluation measured, as records and files: every response to every example, and the figures with their intervals. No torch."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..model.records import VlpostError
from .confidence import Estimate, estimate_mean, mean_of_estimates, pass_at

EVALUATION_FILE = "evaluation.json"
OUTCOMES_FILE = "evaluation.jsonl"


@dataclass(frozen=True, kw_only=True, slots=True)
class JudgedResponse:
    """One response: `JudgedResponse(text="12", reward=1.0, components={"answer": 1.0}, tokens=3, is_truncated=False, unavailable={})`."""

    text: str
    """As the reward saw it; of a conversation with tools, its last turn."""
    reward: float | None
    """None: it could not be judged."""
    components: Mapping[str, float]
    """Value by component of the reward."""
    tokens: int
    is_truncated: bool
    unavailable: Mapping[str, str]
    """Why it could not be judged, by component."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """All responses to one example in one way of sampling."""

    id: str
    task: str
    way: str
    """`@4/0.7`: four responses at temperature 0.7; or `greedy`."""
    responses: tuple[JudgedResponse, ...]

    @property
    def rewards(self) -> tuple[float, ...]:
        """Those of the responses that could be judged."""
        return tuple(response.reward for response in self.responses if response.reward is not None)


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """An evaluation as its folder holds it."""

    folder: Path
    model: str
    data: str
    """Fingerprint of the examples: equal where they are."""
    settings: Mapping[str, Any]
    """What decides what is measured: sampling, rewards, tools."""
    figures: Mapping[str, Estimate]
    outcomes: tuple[Outcome, ...]


def figures_of(outcomes: Sequence[Outcome], *, pass_ks: Sequence[int]) -> dict[str, Estimate]:
    """Returns the figures of one way of sampling with their intervals, of no use for what could not be judged.

    `avg@k/t` and `pass@k/t`, or `greedy`. Where there are several tasks: of each below `task/<task>/`, and `macro/`, the mean of the tasks;
    where the reward has several components, the mean value of each, over the responses that it judges, below `reward/<component>/`.
    """
    judged = [outcome for outcome in outcomes if outcome.rewards]
    if not judged:
        return {}
    names = _names(judged[0].way, pass_ks)
    tasks = sorted({outcome.task for outcome in judged})
    figures = {name: figure(judged) for name, figure in names.items()}
    if len(tasks) > 1:
        by_task = {task: [outcome for outcome in judged if outcome.task == task] for task in tasks}
        for name, figure in names.items():
            of_tasks = {task: figure(of_task) for task, of_task in by_task.items()}
            figures |= {f"task/{task}/{name}": estimate for task, estimate in of_tasks.items()}
            figures[f"macro/{name}"] = mean_of_estimates(list(of_tasks.values()))
    components = sorted({name for outcome in judged for response in outcome.responses for name in response.components})
    for component in components if len(components) > 1 else ():
        figures[f"reward/{component}/{next(iter(names))}"] = _of_component(judged, component)
    return figures


def _names(way: str, pass_ks: Sequence[int]) -> dict[str, Callable[[Sequence[Outcome]], Estimate]]:
    """Returns the figures of a way of sampling by name, the mean reward first."""
    if way == "greedy":
        return {way: _mean_reward}
    temperature = way.partition("/")[2]
    return {f"avg{way}": _mean_reward, **{f"pass@{k}/{temperature}": _pass_function(k) for k in pass_ks}}


def _mean_reward(outcomes: Sequence[Outcome]) -> Estimate:
    return _estimate([outcome.rewards for outcome in outcomes])


def _of_component(outcomes: Sequence[Outcome], component: str) -> Estimate:
    values = [[one.components[component] for one in outcome.responses if component in one.components] for outcome in outcomes]
    return _estimate([of_example for of_example in values if of_example])


def _estimate(values: Sequence[Sequence[float]]) -> Estimate:
    is_share = all(0.0 <= value <= 1.0 for of_example in values for value in of_example)
    counts = [len(of_example) for of_example in values]
    return estimate_mean([math.fsum(of_example) for of_example in values], counts, max_trials=sum(counts) if is_share else None)


def _pass_function(k: int) -> Callable[[Sequence[Outcome]], Estimate]:
    def pass_rate(outcomes: Sequence[Outcome]) -> Estimate:
        chances = [pass_at(sum(reward > 0 for reward in one.rewards), len(one.rewards), k=k) for one in outcomes]
        # k responses are one trial.
        max_trials = math.fsum(len(one.rewards) / min(k, len(one.rewards)) for one in outcomes)
        return estimate_mean(chances, [1] * len(chances), max_trials=max_trials)

    return pass_rate


def write_evaluation(
    folder: Path, *, described: Mapping[str, Any], settings: Mapping[str, Any], figures: Mapping[str, Estimate], outcomes: Sequence[Outcome]
) -> None:
    """Writes `evaluation.jsonl`, a line an example and way of sampling, and then `evaluation.json`; equal evaluations give equal bytes."""
    lines = [json.dumps(asdict(outcome), ensure_ascii=False) + "\n" for outcome in outcomes]
    _write_whole(folder / OUTCOMES_FILE, "".join(lines))
    intervals = {name: _plain(estimate) for name, estimate in figures.items()}
    whole = {**described, "intervals": intervals, "settings": settings}
    _write_whole(folder / EVALUATION_FILE, json.dumps(whole, ensure_ascii=False, indent=2) + "\n")


def read_evaluation(folder: Path) -> Evaluation:
    """Returns the evaluation in a stage's folder; a `VlpostError` where there is none, or one that an older version wrote."""
    path = folder / EVALUATION_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        figures = {name: _estimate_of(one) for name, one in values["intervals"].items()}
        outcomes = tuple(_read_outcomes(folder / OUTCOMES_FILE))
        return Evaluation(
            folder=folder, model=values["model"], data=values["data"], settings=values["settings"], figures=figures, outcomes=outcomes
        )
    except OSError as error:
        raise VlpostError(
            f"{error.filename}: cannot be read ({error.strerror}); give the folder of a finished stage of method evaluate"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise VlpostError(f"{path}: no evaluation of this version ({error!r}); measure again with `vlpost evaluate`") from error


def _read_outcomes(path: Path) -> Iterator[Outcome]:
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            values = json.loads(line)
            values["responses"] = tuple(JudgedResponse(**response) for response in values["responses"])
            yield Outcome(**values)


def _plain(estimate: Estimate) -> dict[str, float | None]:
    """Returns an estimate as JSON, whose infinite ends are null."""
    return {name: value if math.isfinite(value) else None for name, value in asdict(estimate).items()}


def _estimate_of(values: Mapping[str, Any]) -> Estimate:
    low, high = values["low"], values["high"]
    return Estimate(
        mean=values["mean"],
        low=-math.inf if low is None else low,
        high=math.inf if high is None else high,
        num_examples=values["num_examples"],
    )


def _write_whole(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
