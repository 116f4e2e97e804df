"""Curves of a run, drawn from its log."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..model.records import VlpostError
from .run_log import METRICS_FILE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D

_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#444444")
"""By phase, in order of appearance; Okabe and Ito's palette, which colour-blind readers can tell apart."""
_SMOOTHED_FROM = 40
"""Points from which on a curve is drawn as its running mean, with the values behind it in pale."""
_MARKED_TO = 15
"""Points up to which each is marked: a single one would not be seen at all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Panel:
    """One metric, drawn for every phase that logged it."""

    metric: str
    title: str
    unit: str


PANELS = (
    Panel(metric="loss", title="Training loss", unit="nats per token"),
    Panel(metric="validation/accuracy", title="Validation accuracy", unit="mean reward, held out"),
    Panel(metric="reward", title="Reward", unit="mean over responses"),
    Panel(metric="entropy", title="Entropy", unit="nats per token"),
    Panel(metric="engine_kl_k3", title="KL of engine and trainer", unit="nats per token"),
    Panel(metric="response_tokens", title="Response length", unit="tokens"),
)
"""In drawing order; a panel without a value is left out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """The values of one metric in one phase; `values[i]` is of step `steps[i]`, nan where the log has null."""

    metric: str
    phase: str
    steps: tuple[int, ...]
    values: tuple[float, ...]


def draw_curves(folder: Path) -> Path | None:
    """Writes `curves.png` from the run folder's `metrics.jsonl` and returns its path, or None when no panel has a value yet."""
    from matplotlib.figure import Figure  # a Figure of its own draws without a display and leaves pyplot's state alone

    curves = read_curves(folder / METRICS_FILE, [panel.metric for panel in PANELS])
    if not curves:
        return None
    drawn = [panel for panel in PANELS if any(curve.metric == panel.metric for curve in curves)]
    phases = list(dict.fromkeys(curve.phase for curve in curves))
    color_of = {phase: _COLORS[index % len(_COLORS)] for index, phase in enumerate(phases)}
    num_columns = min(len(drawn), 2 if len(drawn) == 4 else 3)
    num_rows = math.ceil(len(drawn) / num_columns)
    figure = Figure(figsize=(4.4 * num_columns, 3.0 * num_rows + 0.6), layout="constrained")
    for index, panel in enumerate(drawn):
        axes = figure.add_subplot(num_rows, num_columns, index + 1)
        _draw_panel(axes, panel, [curve for curve in curves if curve.metric == panel.metric], color_of)
    handles = [_legend_line(phase, color_of[phase]) for phase in phases]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(phases), 6), frameon=False)
    figure.suptitle(folder.resolve().name, fontsize=12, fontweight="bold")
    path = folder / "curves.png"
    figure.savefig(path, dpi=130)
    return path


def read_curves(path: Path, metrics: Sequence[str]) -> list[Curve]:
    """Returns the curves of these metrics, in order of first appearance in the log; those without a finite value are left out."""
    points: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for number, line in enumerate(_whole_lines(path), start=1):
        try:
            record = json.loads(line)
            values, phase, step = record["values"], record["phase"], record["step"]
        except (ValueError, KeyError, TypeError) as error:
            raise VlpostError(f"{path}, line {number}: no line of metrics ({error!r}); remove it") from error
        for metric in metrics:
            if metric in values:
                points.setdefault((phase, metric), []).append((step, math.nan if values[metric] is None else values[metric]))
    return [
        Curve(metric=metric, phase=phase, steps=tuple(step for step, _ in pairs), values=tuple(value for _, value in pairs))
        for (phase, metric), pairs in points.items()
        if any(math.isfinite(value) for _, value in pairs)
    ]


def running_mean(values: Sequence[float], *, reach: int) -> list[float]:
    """Returns at each place the mean of the finite values at most `reach` places before or after it; nan where there is none."""
    means = []
    for place in range(len(values)):
        finite = [value for value in values[max(0, place - reach) : place + reach + 1] if math.isfinite(value)]
        means.append(math.fsum(finite) / len(finite) if finite else math.nan)
    return means


def _whole_lines(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise VlpostError(f"{path}: the run's log cannot be read ({error.strerror}); give the folder of a run") from error
    return text.split("\n")[:-1]  # what follows the last line end is still being written


def _draw_panel(axes: Axes, panel: Panel, curves: Sequence[Curve], color_of: dict[str, str]) -> None:
    from matplotlib.ticker import MaxNLocator

    for curve in curves:
        color = color_of[curve.phase]
        if len(curve.values) < _SMOOTHED_FROM:
            axes.plot(
                curve.steps, curve.values, color=color, linewidth=1.6, marker="o", markersize=3.0 if len(curve.steps) <= _MARKED_TO else 0.0
            )
            continue
        axes.plot(curve.steps, curve.values, color=color, linewidth=0.8, alpha=0.3)
        axes.plot(curve.steps, running_mean(curve.values, reach=len(curve.values) // 40), color=color, linewidth=1.8)
    axes.set_title(panel.title, fontsize=11, loc="left")
    axes.set_ylabel(panel.unit, fontsize=9)
    axes.set_xlabel("step", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    axes.grid(visible=True, color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if max(value for curve in curves for value in curve.values if math.isfinite(value)) < 0.01:
        axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))


def _legend_line(phase: str, color: str) -> Line2D:
    from matplotlib.lines import Line2D

    return Line2D([], [], color=color, linewidth=2.0, label=phase)
