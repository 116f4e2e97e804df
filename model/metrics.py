"""Metrics that say how they are reduced, so that micro-batches and ranks merge into what one large batch would have measured."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, SupportsFloat

Reduction = Literal["sum", "mean", "max", "min"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Metric:
    """A number with the way it merges with others of its name.

    Example: a loss of 2.0 over 10 tokens and one of 5.0 over 20, `mean(2.0, 10)` and `mean(5.0, 20)`, merge into 4.0.
    """

    value: float
    """May be nan or infinite, and then its merged value is too: a broken measurement stays visible."""
    reduction: Reduction
    weight: float = 1.0
    """What a mean counts it as, e.g. its number of tokens; at least 0, and 1.0 for every other reduction."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.weight) and self.weight >= 0):
            raise ValueError(f"metric weight = {self.weight}: must be a finite number of at least 0, e.g. a number of tokens")
        if self.reduction != "mean" and self.weight != 1.0:
            raise ValueError(
                f"metric weight = {self.weight} with reduction {self.reduction!r}: only a mean is weighted; leave the weight out"
            )


def mean(value: SupportsFloat, weight: SupportsFloat = 1.0) -> Metric:
    """Returns a metric that merges as sum(weight x value) / sum(weight); with weight 0 its value does not matter and may be nan."""
    return Metric(value=float(value), reduction="mean", weight=float(weight))


def total(value: SupportsFloat) -> Metric:
    """Returns a metric that merges by adding up."""
    return Metric(value=float(value), reduction="sum")


def maximum(value: SupportsFloat) -> Metric:
    """Returns a metric that merges to the largest value."""
    return Metric(value=float(value), reduction="max")


def minimum(value: SupportsFloat) -> Metric:
    """Returns a metric that merges to the smallest value."""
    return Metric(value=float(value), reduction="min")


def merge(parts: Iterable[Mapping[str, Metric]]) -> dict[str, float]:
    """Returns the merged values by name, in order of first appearance; a mean over total weight 0 has no value and is left out.

    A name that is missing in some parts is merged over the others. One name with two reductions is a `ValueError`.
    """
    return {name: metric.value for name, metric in combine(parts).items() if metric.weight > 0}


def combine(parts: Iterable[Mapping[str, Metric]]) -> dict[str, Metric]:
    """Returns the parts as one part that merges with others as they would: micro-batches first, then ranks.

    The order of the parts does not change a bit of the result; cutting them into other subtotals changes a sum or mean by rounding only.
    """
    by_name: dict[str, list[Metric]] = {}
    for part in parts:
        for name, metric in part.items():
            known = by_name.setdefault(name, [])
            if known and known[0].reduction != metric.reduction:
                raise ValueError(
                    f"metric {name!r} is declared as {known[0].reduction} in one part and as {metric.reduction} in another: "
                    "one name has one reduction; rename one of them"
                )
            known.append(metric)
    return {name: _combine_one(metrics) for name, metrics in by_name.items()}


def _combine_one(metrics: Sequence[Metric]) -> Metric:
    reduction = metrics[0].reduction
    if reduction == "mean":
        weighted = [metric for metric in metrics if metric.weight > 0]  # 0 x nan is nan, and an empty micro-batch may measure nan
        weight = _sum([metric.weight for metric in weighted])
        value = _sum([metric.weight * metric.value for metric in weighted]) / weight if weighted else 0.0
        return Metric(value=value, reduction=reduction, weight=weight)
    values = [metric.value for metric in metrics]
    if any(math.isnan(value) for value in values):  # max and min of a list with nan depend on its order
        return Metric(value=math.nan, reduction=reduction)
    reduced = _sum(values) if reduction == "sum" else max(values) if reduction == "max" else min(values)
    return Metric(value=reduced, reduction=reduction)


def _sum(values: Sequence[float]) -> float:
    """Returns the correctly rounded sum, which no order of the values changes; `fsum` itself refuses what overflows."""
    if not all(math.isfinite(value) for value in values):
        return sum(values)
    try:
        return math.fsum(values)
    except OverflowError:
        return sum(values)
