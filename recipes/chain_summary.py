"""What a chain's evaluations say together: accuracy by task after each stage, as a table and as a picture. No torch."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .compare import compare, why_not_comparable
from .confidence import LEVEL, Estimate
from .evaluation_record import Evaluation, read_evaluation
from .evaluation_table import number_text, shorten, table_lines
from .schema import EvaluateRecipe, StageRecipe

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TABLE_FILE = "summary.txt"
PICTURE_FILE = "summary.png"
_MARK = "!"
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#444444")
"""By task; Okabe and Ito's palette, which colour-blind readers can tell apart."""
_MARKERS = "os^Dvp*"


@dataclass(frozen=True, kw_only=True, slots=True)
class SummaryRow:
    """The accuracy after one stage."""

    after: str
    """The stage whose export was measured; the evaluate stage's own name where it measured another model, or one measured twice."""
    figures: Mapping[str, Estimate]
    """By task; `macro` too where there are several, `all` where there is one."""
    regressions: frozenset[str]
    """Columns that are below the row they are compared with by more than chance: the interval of the paired difference is below 0."""
    compared_with: str | None
    """The row before that asked the same examples in the same way; None: there is none."""


def write_summary(folder: Path, stages: Sequence[tuple[str, StageRecipe]]) -> list[str]:
    """Writes `summary.txt` and `summary.png` into a chain's folder and returns the table's lines; nothing without evaluate stages."""
    rows = summary_rows([(name, stage) for name, stage in stages if isinstance(stage, EvaluateRecipe)])
    if not rows:
        return []
    lines = summary_lines(rows)
    draw_summary(folder / PICTURE_FILE, rows, title=folder.resolve().name)
    # Last and whole: where the table is, a chain is finished.
    partial = (folder / TABLE_FILE).with_suffix(".partial")
    partial.write_text("\n".join(lines) + "\n", encoding="utf-8")
    os.replace(partial, folder / TABLE_FILE)
    return lines


def summary_rows(stages: Sequence[tuple[str, EvaluateRecipe]]) -> list[SummaryRow]:
    """Returns a row for each finished evaluate stage in which something could be judged, in the order of the chain."""
    measured_stages = [stage.model.stage for _, stage in stages]
    rows: list[SummaryRow] = []
    before: list[tuple[str, Evaluation]] = []
    for name, stage in stages:
        evaluation = read_evaluation(stage.output)
        figure = _figure_name(stage)
        source = stage.model.stage
        after = source if source is not None and measured_stages.count(source) == 1 else name
        figures = _by_column(evaluation.figures, figure)
        if not figures:
            continue
        other = next(((after, one) for after, one in reversed(before) if why_not_comparable(one, evaluation) is None), None)
        rows.append(
            SummaryRow(
                after=after,
                figures=figures,
                regressions=_regressions(other[1], evaluation, figure) if other else frozenset(),
                compared_with=other[0] if other else None,
            )
        )
        before.append((after, evaluation))
    return rows


def _figure_name(stage: EvaluateRecipe) -> str:
    """Returns the figure that is the stage's accuracy: that at its first temperature, or else greedy."""
    temperatures = stage.evaluate.temperatures
    return f"avg@{stage.evaluate.num_samples}/{temperatures[0]:g}" if temperatures else "greedy"


def _by_column(figures: Mapping[str, Estimate], figure: str) -> dict[str, Estimate]:
    of_tasks = {
        name.removeprefix("task/").removesuffix(f"/{figure}"): estimate
        for name, estimate in figures.items()
        if name.startswith("task/") and name.endswith(f"/{figure}")
    }
    if of_tasks:
        return {"macro": figures[f"macro/{figure}"], **of_tasks}
    return {"all": figures[figure]} if figure in figures else {}


def _regressions(before: Evaluation, evaluation: Evaluation, figure: str) -> frozenset[str]:
    compared = compare(before, evaluation).by_way[figure.removeprefix("avg")]
    return frozenset(name.removeprefix("task/") for name, one in compared.items() if one.difference.high < 0)


def summary_lines(rows: Sequence[SummaryRow]) -> list[str]:
    """Returns the table: a row for each stage, a column for each task, accuracy in percent with the larger half of its interval."""
    columns = list(dict.fromkeys(column for row in rows for column in row.figures))
    cells = [[shorten(row.after), *(_cell(row, column) for column in columns)] for row in rows]
    lines = table_lines(["after", *map(shorten, columns)], cells, num_fixed=1)
    lines += ["", f"Accuracy in percent with its {LEVEL:.0%} interval; macro: the mean of the tasks."]
    if any(row.regressions for row in rows):
        lines.append(f"{_MARK} lower than in the row before that asked the same, beyond the interval of the paired difference.")
    alone = [row.after for row in rows[1:] if row.compared_with is None]
    if alone:
        lines.append(f"Not compared, asked otherwise than all rows before: {', '.join(alone)}.")
    return lines


def _cell(row: SummaryRow, column: str) -> str:
    estimate = row.figures.get(column)
    if estimate is None:
        return "- "
    reach = number_text(estimate.half_width) if estimate.half_width < float("inf") else "?"
    return f"{number_text(estimate.mean)} ±{reach}{_MARK if column in row.regressions else ' '}"


def draw_summary(path: Path, rows: Sequence[SummaryRow], *, title: str) -> None:
    """Draws accuracy by task after each stage, with intervals; a regression has a ring in red."""
    from matplotlib.figure import Figure  # a Figure of its own draws without a display and leaves pyplot's state alone

    columns = list(dict.fromkeys(column for row in rows for column in row.figures))
    figure = Figure(figsize=(max(6.0, 1.1 * len(rows) + 3.0), 4.8), layout="constrained")
    axes = figure.add_subplot()
    for number, column in enumerate(columns):
        _draw_task(axes, rows, column, number, len(columns))
    axes.set_xticks(range(len(rows)), [shorten(row.after) for row in rows], rotation=35, ha="right", fontsize=8)
    axes.set_ylabel("accuracy (mean reward, held out)", fontsize=9)
    axes.tick_params(axis="y", labelsize=8)
    axes.grid(visible=True, axis="y", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(f"{title}: accuracy by task after each stage", fontsize=11, loc="left")
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)


def _draw_task(axes: Axes, rows: Sequence[SummaryRow], column: str, number: int, num_columns: int) -> None:
    there = [(place, row, row.figures[column]) for place, row in enumerate(rows) if column in row.figures]
    # Side by side, or the intervals of tasks that are alike would lie on one another.
    offset = 0.4 * ((number + 0.5) / num_columns - 0.5)
    places = [place + offset for place, _, _ in there]
    means = [one.mean for _, _, one in there]
    is_summary = column in ("macro", "all")
    color = "black" if is_summary else _COLORS[number % len(_COLORS)]
    marker = "o" if is_summary else _MARKERS[number % len(_MARKERS)]
    # An interval without ends is drawn as none.
    below = [one.mean - one.low if one.half_width < float("inf") else 0.0 for _, _, one in there]
    above = [one.high - one.mean if one.half_width < float("inf") else 0.0 for _, _, one in there]
    axes.errorbar(
        places, means, yerr=[below, above], color=color, marker=marker, markersize=4, linewidth=2.2 if is_summary else 1.2,
        elinewidth=0.8, capsize=2, label=column,
    )  # fmt: skip
    fallen = [(place + offset, one.mean) for place, row, one in there if column in row.regressions]
    if fallen:
        axes.plot(
            *zip(*fallen, strict=True), linestyle="none", marker="o", markersize=11, markerfacecolor="none", markeredgecolor="#c00000"
        )
