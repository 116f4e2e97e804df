"""Evaluations as tables of plain text, at most 80 columns wide. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from .compare import Comparison
from .confidence import Difference, Estimate

WIDTH = 80
"""Columns that a table takes at most, whatever it is printed to."""
_MAX_NAME = 24


def figure_lines(figures: Mapping[str, Estimate], metrics: Mapping[str, float]) -> list[str]:
    """Returns the table of one evaluation: rows are tasks, columns the figures of each way of sampling, in percent where they are shares.

    Cells hold mean and interval. Below it the values by component of the reward, and the shares that were truncated or unavailable.
    """
    over_all = [name for name in figures if not name.startswith(("task/", "macro/", "reward/"))]
    first = f"/{over_all[0]}" if over_all else ""
    tasks = [name.removeprefix("task/").removesuffix(first) for name in figures if name.startswith("task/") and name.endswith(first)]
    rows = {"all": "", "macro": "macro/", **{task: f"task/{task}/" for task in tasks}} if tasks else {"all": ""}
    sizes = {name: str(figures[f"{prefix}{over_all[0]}"].num_examples) for name, prefix in rows.items()} if over_all else {}
    cells = [
        [shorten(name), sizes[name], *(estimate_text(figures.get(f"{prefix}{figure}")) for figure in over_all)]
        for name, prefix in rows.items()
        if over_all
    ]
    lines = table_lines(["task", "examples", *over_all], cells, num_fixed=2) if over_all else ["nothing could be judged"]
    lines += [f"{name}: {estimate_text(figures[name])}" for name in figures if name.startswith("reward/")]
    shares = ", ".join(f"{name.removesuffix('_frac')} {100 * metrics[name]:.1f}%" for name in ("truncated_frac", "unavailable_frac"))
    return [*lines, f"of all responses: {shares}"]


def comparison_lines(comparison: Comparison) -> list[str]:
    """Returns the table of two evaluations side by side, one below the other for each way of sampling."""
    lines = [f"A: {comparison.first}", f"B: {comparison.second}", ""]
    for way, rows in comparison.by_way.items():
        cells = [
            [
                shorten(name),
                str(row.difference.num_examples),
                number_text(row.first),
                number_text(row.second),
                difference_text(row.difference),
                f"{row.difference.num_better}/{row.difference.num_worse}",
                p_value_text(row.difference.p_value),
            ]
            for name, row in rows.items()
        ]
        lines += table_lines([way, "examples", "A", "B", "B - A", "up/down", "p"], cells, num_fixed=2)
        lines += [f"left out, not judged in both: {comparison.num_left_out[way]} examples"] if comparison.num_left_out[way] else []
        lines.append("")
    return [*lines, "Percent; intervals of 95% over paired examples; p by sign flips, each row alone."]


def table_lines(header: Sequence[str], rows: Sequence[Sequence[str]], *, num_fixed: int) -> list[str]:
    """Returns aligned lines of at most 80 columns; where the columns do not fit side by side, blocks of them that repeat the first ones.

    The first column is aligned left, the others right. One column beside the fixed ones always stands, however wide.
    """
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    lines: list[str] = []
    column = num_fixed
    while column < len(header):
        taken = list(range(num_fixed))
        while column < len(header) and (len(taken) == num_fixed or sum(widths[one] for one in [*taken, column]) + 2 * len(taken) <= WIDTH):
            taken.append(column)
            column += 1
        if lines:
            lines.append("")
        for row in (header, *rows):
            aligned = [row[one].rjust(widths[one]) for one in taken[1:]]
            lines.append("  ".join([row[0].ljust(widths[0]), *aligned]).rstrip())
    return lines


def shorten(name: str) -> str:
    """Returns a name of at most 24 characters, its middle left out where it is longer."""
    return name if len(name) <= _MAX_NAME else f"{name[: _MAX_NAME - 9]}..{name[-7:]}"


def estimate_text(estimate: Estimate | None) -> str:
    """Returns mean and interval in percent, `83.3 [75.2, 89.1]`; `-` where there is none."""
    if estimate is None:
        return "-"
    if not math.isfinite(estimate.low):
        return f"{number_text(estimate.mean)} [?]"
    return f"{number_text(estimate.mean)} [{number_text(estimate.low)}, {number_text(estimate.high)}]"


def difference_text(difference: Difference) -> str:
    """Returns mean and interval of a difference in percent, with signs: `+4.0 [+1.5, +6.5]`."""
    mean = f"{100 * difference.mean:+.1f}"
    if not math.isfinite(difference.low):
        return f"{mean} [?]"
    return f"{mean} [{100 * difference.low:+.1f}, {100 * difference.high:+.1f}]"


def number_text(value: float) -> str:
    """Returns a mean in percent of a reward of 1."""
    return f"{100 * value:.1f}"


def p_value_text(p_value: float) -> str:
    """Returns a p value to three places."""
    return "<.001" if p_value < 0.001 else f"{p_value:.3f}"
