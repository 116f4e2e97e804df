"""Two evaluations of the same examples side by side, paired by example. No torch."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ..model.records import VlpostError
from .changed_setting import first_change
from .confidence import Difference, mean_of_differences, paired_difference
from .evaluation_record import Evaluation, Outcome


@dataclass(frozen=True, kw_only=True, slots=True)
class ComparedFigure:
    """Mean reward of two models on the same examples; `difference` is the second less the first."""

    first: float
    second: float
    difference: Difference


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Two evaluations, paired."""

    first: str
    """Folder of the first."""
    second: str
    by_way: Mapping[str, Mapping[str, ComparedFigure]]
    """Way of sampling (`@4/1`, `greedy`) -> row (`all`; with several tasks `macro` and each `task/<task>`) -> figures."""
    num_left_out: Mapping[str, int]
    """By way of sampling: examples of which one of the two has no response that could be judged."""


def compare(first: Evaluation, second: Evaluation) -> Comparison:
    """Returns both evaluations paired by example; each example counts once, with the mean reward of its responses.

    Raises `VlpostError` where data or settings differ: the difference would not be the models'.
    """
    obstacle = why_not_comparable(first, second)
    if obstacle:
        raise VlpostError(f"{first.folder} and {second.folder} cannot be compared: {obstacle}")
    by_way: dict[str, dict[str, ComparedFigure]] = {}
    num_left_out: dict[str, int] = {}
    for way in dict.fromkeys(outcome.way for outcome in (*first.outcomes, *second.outcomes)):
        pairs = list(_pairs(first, second, way))
        judged = [(one.task, _mean(one), _mean(other)) for one, other in pairs if one.rewards and other.rewards]
        num_left_out[way] = len(pairs) - len(judged)
        by_way[way] = _figures(judged) if judged else {}
    return Comparison(first=str(first.folder), second=str(second.folder), by_way=by_way, num_left_out=num_left_out)


def why_not_comparable(first: Evaluation, second: Evaluation) -> str | None:
    """Returns words for the first thing in which what two evaluations asked differs, None where they asked the same."""
    if first.data != second.data:
        return f"they asked other examples (fingerprints {first.data} and {second.data}); measure both on the same data, as many examples"
    changed = first_change(first.settings, second.settings)
    if changed is None:
        return None
    return f"{changed.key} is {changed.before!r} in the first and {changed.after!r} in the second; measure both with the same settings"


def _pairs(first: Evaluation, second: Evaluation, way: str) -> Iterator[tuple[Outcome, Outcome]]:
    ones, others = _by_example(first, way), _by_example(second, way)
    for folder, asked, there in ((second.folder, ones, others), (first.folder, others, ones)):
        missing = next((name for name in asked if name not in there), None)
        if missing is not None:
            raise VlpostError(f"{folder}: no responses to example {missing[0]!r} ({way}): the file was cut off; measure again")
    for name, outcome in ones.items():
        yield outcome, others[name]


def _by_example(evaluation: Evaluation, way: str) -> dict[tuple[str, int], Outcome]:
    """Returns the outcomes by id and, as two data sets may use one id, by how many before have the same."""
    seen: Counter[str] = Counter()
    found: dict[tuple[str, int], Outcome] = {}
    for outcome in evaluation.outcomes:
        if outcome.way == way:
            found[outcome.id, seen[outcome.id]] = outcome
            seen[outcome.id] += 1
    return found


def _mean(outcome: Outcome) -> float:
    return math.fsum(outcome.rewards) / len(outcome.rewards)


def _figures(judged: Sequence[tuple[str, float, float]]) -> dict[str, ComparedFigure]:
    by_task: dict[str, list[tuple[float, float]]] = {}
    for task, one, other in judged:
        by_task.setdefault(task, []).append((one, other))
    everything = [pair for pairs in by_task.values() for pair in pairs]
    figures = {"all": _figure(everything)}
    if len(by_task) > 1:
        of_tasks = {task: _figure(by_task[task]) for task in sorted(by_task)}
        figures["macro"] = ComparedFigure(
            first=math.fsum(one.first for one in of_tasks.values()) / len(of_tasks),
            second=math.fsum(one.second for one in of_tasks.values()) / len(of_tasks),
            difference=mean_of_differences([[other - one for one, other in by_task[task]] for task in sorted(by_task)]),
        )
        figures |= {f"task/{task}": figure for task, figure in of_tasks.items()}
    return figures


def _figure(pairs: Sequence[tuple[float, float]]) -> ComparedFigure:
    return ComparedFigure(
        first=math.fsum(one for one, _ in pairs) / len(pairs),
        second=math.fsum(other for _, other in pairs) / len(pairs),
        difference=paired_difference([other - one for one, other in pairs]),
    )
