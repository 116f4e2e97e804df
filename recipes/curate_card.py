"""The card of a curated data set: what was done to it, with the numbers, the reasons and the histograms."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .curate_chance import describe_chance
from .curate_difficulty import in_order
from .curate_rows import write_text

CARD_FILE = "README.md"
PLOTS_FOLDER = "plots"
BAR_CHARS = 40
_COLOR = "#0072B2"


def write_card(output: Path, summary: Mapping[str, Any]) -> None:
    """Writes `README.md` with the plots that it shows; its head tells `datasets.load_dataset` which file is of which split."""
    plots = draw_histograms(output / PLOTS_FOLDER, summary["steps"])
    write_text(output / CARD_FILE, "\n".join(card_lines(summary, plots=plots)) + "\n")


def card_lines(summary: Mapping[str, Any], *, plots: Mapping[tuple[str, str], str]) -> list[str]:
    """Returns the lines of the card; `plots` are the files drawn, by step and title."""
    splits: dict[str, int] = {}
    for file in summary["files"].values():
        splits[file["split"]] = splits.get(file["split"], 0) + file["rows"]
    recipe, steps = summary["recipe"], summary["steps"]
    lines = ["---", "configs:", "- config_name: default", "  data_files:"]
    for split in splits:
        lines += [f"  - split: {split}", f"    path: data/{split}-*.parquet"]
    listed = ", ".join(f"{count} in `{split}`" for split, count in splits.items())
    lines += [
        "---",
        "",
        "# Curated data set",
        "",
        f"{sum(splits.values())} rows: {listed or 'none is left'}. Made by `vlpost curate` {summary['vlpost']}, seed {recipe['seed']}, "
        f"from {', '.join(f'`{name}` ({_origin(data)})' for name, data in recipe['data'].items())}.",
        *([f"{cut_off_words(summary['cut_off'])}."] if summary["cut_off"] else []),
        "Every dropped row stands with its reason in `dropped.jsonl`, the whole recipe in `manifest.json`.",
        "",
        "| step | what | rows in | rows out | dropped | changed | seconds |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for step in steps:
        lines.append(
            f"| {step['name']} | `{step['use']}` | {step['rows_in']} | {step['rows_out']} | {step['rows_in'] - step['rows_out']} | "
            f"{sum(found['count'] for found in step['changed'].values())} | {step['seconds']:.1f} |"
        )
    for step in steps if steps[0]["dropped"] else steps[1:]:
        lines += ["", f"## {step['name']}: `{step['use']}`", "", *_step_lines(step, plots)]
    return lines


def cut_off_words(count: int) -> str:
    """Returns what a person has to know of conversations whose last turn has no end of its own."""
    return f"{count} conversations end where the token budget cut them off, and would teach to end there; `response_filter` takes them out"


def _origin(data: Mapping[str, Any]) -> str:
    return ", ".join(str(data[key]) for key in ("use", "path") if data.get(key))


def _step_lines(step: Mapping[str, Any], plots: Mapping[tuple[str, str], str]) -> list[str]:
    settings = ", ".join(f"{key} = {value}" for key, value in step["settings"].items())
    lines = [f"Settings: {_cell(settings, longest=2000)}; all else at its default.", ""] if settings else []
    lines.append(f"{step['rows_in'] - step['rows_out']} of {step['rows_in']} rows dropped.")
    if step["use"] == "image_necessity":  # a share of rows solved blind says nothing without what guessing would have solved
        lines += ["", f"{describe_chance(step['metrics'])}."]
    for kind in ("dropped", "changed"):
        if step[kind]:
            lines += ["", f"| {kind} | rows | for example |", "|---|---:|---|"]
            lines += [f"| {_cell(head)} | {found['count']} | {_cell(_example(found['rows'][0]))} |" for head, found in step[kind].items()]
    if step["metrics"]:
        lines += ["", "| count | |", "|---|---:|", *(f"| {_cell(name)} | {value:g} |" for name, value in step["metrics"].items())]
    for title, bars in step["histogram"].items():
        lines += ["", f"{title[:1].upper()}{title[1:]}, right responses of all, rows that came in:", "", "```", *bar_lines(bars), "```"]
        if (step["name"], title) in plots:
            lines += ["", f"![{title}]({PLOTS_FOLDER}/{plots[step['name'], title]})"]
    return lines


def _example(row: Sequence[str]) -> str:
    row_id, reason = row
    return f"{row_id}: {reason}"


def _cell(text: str, *, longest: int = 200) -> str:
    """Returns the text as it may stand in a table: one line, no bars, no tags."""
    plain = " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
    return plain if len(plain) <= longest else f"{plain[: longest - 3]}..."


def bar_lines(bars: Mapping[str, int]) -> list[str]:
    """Returns a histogram as text: label, exact count, and a bar that is longest for the largest count."""
    ordered = in_order(bars)
    most, width = max(ordered.values(), default=0), max(map(len, ordered), default=0)
    return [f"{label:>{width}} {count:8d} {'#' * math.ceil(BAR_CHARS * count / most)}" for label, count in ordered.items()]


def draw_histograms(folder: Path, steps: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], str]:
    """Draws a PNG file for each histogram and returns their names by step and title."""
    wanted = [(step["name"], title, in_order(bars)) for step in steps for title, bars in step["histogram"].items() if bars]
    if not wanted:
        return {}
    from matplotlib.figure import Figure  # a Figure of its own draws without a display and leaves pyplot's state alone

    folder.mkdir(exist_ok=True)
    drawn: dict[tuple[str, str], str] = {}
    for name, title, bars in wanted:
        figure = Figure(figsize=(7, 3.2), layout="constrained")
        axes = figure.add_subplot()
        axes.bar(list(bars), list(bars.values()), color=_COLOR)
        axes.set(title=f"{name}: {title}", xlabel="right responses of all", ylabel="rows")
        axes.tick_params(axis="x", labelrotation=45 if len(bars) > 10 else 0)
        axes.spines[["top", "right"]].set_visible(False)
        drawn[name, title] = f"{name}-{len(drawn)}.png"
        figure.savefig(folder / drawn[name, title], dpi=110)
    return drawn


def printed_histograms(summary: Mapping[str, Any]) -> list[str]:
    """Returns the histograms of all steps as lines for the console."""
    return [
        line
        for step in summary["steps"]
        for title, bars in step["histogram"].items()
        for line in (f"{step['name']}: {title}", *(f"  {bar}" for bar in bar_lines(bars)))
    ]
