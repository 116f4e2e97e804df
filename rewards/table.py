"""Verifier of tables in HTML or Markdown: structure and content together.

A table becomes a grid in which a cell that spans rows or columns fills every place it covers. With s(a, b) the similarity of two places,
1 - normalised edit distance of their texts, halved unless both are the same part of equally large cells,

    value = best sum of s over aligned rows, and over aligned columns within each pair of rows / (max(rows) x max(columns))

where alignments keep the order (dynamic programming, no gap cost). It is symmetric, 1.0 exactly for tables that are equal after
normalisation, and added rows or columns enlarge the denominator, so junk lowers it. Texts are compared in half width with single
spaces; header cells (`th`) and data cells are one kind; markup inside a cell is dropped. Tables so large that all distances would cost
more than `MAX_WORK` are compared by equality of their places, and so are texts beyond `MAX_COMPARED_CHARS`: equality never gives more
than distance does, so nothing is to be gained by it, and the cost is bounded whatever a policy writes.
Only the parser of the standard library reads HTML: nothing is fetched, no entity is declared.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from html.parser import HTMLParser
from typing import TypeAlias, TypeVar

from ..model.records import DataError, Example, Rollout
from .answers import final_answer
from .built_in import BuiltInReward
from .ocr import similarity, transcription
from .result import RewardResult, Unavailable

MAX_RESPONSE_CHARS = 200_000
"""Longest response that is searched for an answer, characters."""
MAX_TABLE_CHARS = 40_000
"""Longest table with its markup, characters."""
MAX_CELLS = 1000
"""Most places of a grid."""
MAX_WORK = 400_000
"""Most characters that edit distances may loop over: pairs of places in rows that differ x their length."""
MAX_COMPARED_CHARS = 500
"""Longer texts of a place are equal or have nothing in common."""

Cell: TypeAlias = tuple[str, int, int, int, int]
"""Text; rows and columns of the whole cell; which of its rows and columns this place is."""
Grid: TypeAlias = tuple[tuple[Cell, ...], ...]

Item = TypeVar("Item")

_EMPTY: Cell = ("", 1, 1, 0, 0)
_RULE = re.compile(r":?-{1,200}:?")
_FENCE_LINE = re.compile(r"```[a-z]{0,12}")


class TableError(ValueError):
    """A text that is not one table, or beyond the bounds; the message says why."""


class _Reader(HTMLParser):
    """Collects the cells of the rows of one table as (text, rows, columns)."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.rows: list[list[tuple[str, int, int]]] = []
        self._words: list[str] | None = None
        self._span: tuple[int, int] = (1, 1)
        self.num_tables = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "table":
            self.num_tables += 1
        elif tag == "tr":
            self._close_cell()
            self.rows.append([])
        elif tag in ("td", "th"):
            self._close_cell()
            given = dict(attrs)
            self._span = (_span(given.get("rowspan")), _span(given.get("colspan")))
            self._words = []
        elif tag == "br" and self._words is not None:
            self._words.append(" ")

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th", "tr", "table"):
            self._close_cell()

    def handle_data(self, data: str) -> None:
        if self._words is not None:
            self._words.append(data)

    def _close_cell(self) -> None:
        if self._words is None:
            return
        if not self.rows:
            raise TableError("a cell outside any row")
        self.rows[-1].append((transcription("".join(self._words)), self._span[0], self._span[1]))
        self._words = None


def _span(written: str | None) -> int:
    if written is None:
        return 1
    if not re.fullmatch(r"[1-9][0-9]{0,3}", written):
        raise TableError("a span that is no number from 1 to 9999")
    return int(written)


def read_table(text: str) -> Grid:
    """Returns the grid of the one table that a text is; a `TableError` when it is none, or too large."""
    if len(text) > MAX_TABLE_CHARS:
        raise TableError(f"{len(text)} characters; at most {MAX_TABLE_CHARS} are read")
    lowered = text.lower()
    start, end = lowered.find("<table"), lowered.rfind("</table>")
    rows = _markdown_rows(text) if start < 0 else _html_rows(text[start : end + len("</table>")] if end > start else text[start:])
    grid = _fill(rows)
    if not grid or not grid[0]:
        raise TableError("a table without cells")
    return grid


def _html_rows(text: str) -> list[list[tuple[str, int, int]]]:
    reader = _Reader()
    try:
        reader.feed(text)
        reader.close()
    except AssertionError as error:  # what html.parser says of some broken declarations
        raise TableError(f"broken HTML: {error}") from None
    if reader.num_tables != 1:
        raise TableError(f"{reader.num_tables} tables; one is read")
    return reader.rows


def _markdown_rows(text: str) -> list[list[tuple[str, int, int]]]:
    lines = [line.strip() for line in text.strip().splitlines() if line.strip() and not _FENCE_LINE.fullmatch(line.strip())]
    # Prose before and after the table is left out, prose inside it is not: it would join two tables.
    held = [number for number, line in enumerate(lines) if "|" in line]
    if not held or held[-1] - held[0] + 1 != len(held):
        raise TableError("no table, or more than one")
    rows = [[transcription(cell.replace("\\|", "|")) for cell in _split_row(lines[number])] for number in held]
    rules = [number for number, row in enumerate(rows) if row and all(_RULE.fullmatch(cell) for cell in row)]
    if rules != [1]:
        raise TableError("a Markdown table has one line of dashes, under its first row")
    return [[(cell, 1, 1) for cell in row] for row in (rows[0], *rows[2:])]


def _split_row(line: str) -> list[str]:
    inner = line.removeprefix("|")
    inner = inner[:-1] if inner.endswith("|") and not inner.endswith("\\|") else inner
    return re.split(r"(?<!\\)\|", inner)


def _fill(rows: Sequence[Sequence[tuple[str, int, int]]]) -> Grid:
    places: dict[tuple[int, int], Cell] = {}
    for row_number, row in enumerate(rows):
        column = 0
        for text, num_rows, num_columns in row:
            while (row_number, column) in places:
                column += 1
            # As browsers do: a cell ends with the table's last row.
            height = min(num_rows, len(rows) - row_number)
            if len(places) + height * num_columns > MAX_CELLS:
                raise TableError(f"more than {MAX_CELLS} cells")
            for down in range(height):
                for right in range(num_columns):
                    places[row_number + down, column + right] = (text, height, num_columns, down, right)
            column += num_columns
    width = max((column + 1 for _, column in places), default=0)
    if len(rows) * width > MAX_CELLS:
        raise TableError(f"more than {MAX_CELLS} cells")
    return tuple(tuple(places.get((row, column), _EMPTY) for column in range(width)) for row in range(len(rows)))


def table_similarity(first: Grid, second: Grid) -> float:
    """Returns the formula of this module in [0, 1]; symmetric; 1.0 exactly for equal grids."""
    if first == second:
        return 1.0
    # Equal ends are matched with each other in a best alignment, as no place can give more than 1; so in rows below.
    num_equal, rows, others = _trim(first, second)
    place = _place_by_equality if _work(rows, others) > MAX_WORK else _place_by_distance()

    @cache
    def row_value(one: tuple[Cell, ...], other: tuple[Cell, ...]) -> float:
        equal, one, other = _trim(one, other)
        return equal + _aligned([[place(a, b) for b in other] for a in one])

    best = num_equal * len(first[0]) + _aligned([[row_value(row, other) for other in others] for row in rows])
    return min(1.0, best / (max(len(first), len(second)) * max(len(first[0]), len(second[0]))))


def _work(first: Grid, second: Grid) -> int:
    """Returns a bound on the characters that all edit distances together loop over."""
    chars, places = (
        [sum(1 + len(cell[0]) for row in grid for cell in row) for grid in (first, second)],
        [sum(map(len, grid)) for grid in (first, second)],
    )
    return min(chars[0] * places[1], chars[1] * places[0])


def _place_by_equality(one: Cell, other: Cell) -> float:
    return 0.0 if one[0] != other[0] else 1.0 if one == other else 0.5


def _place_by_distance() -> Callable[[Cell, Cell], float]:
    @cache
    def alike(one: str, other: str) -> float:
        is_hopeless = max(len(one), len(other)) > MAX_COMPARED_CHARS or set(one).isdisjoint(other)
        return 0.0 if one != other and is_hopeless else similarity(one, other)

    return lambda one, other: alike(one[0], other[0]) * (1.0 if one[1:] == other[1:] else 0.5)


def _trim(first: tuple[Item, ...], second: tuple[Item, ...]) -> tuple[int, tuple[Item, ...], tuple[Item, ...]]:
    """Returns how many items are equal at the start and at the end, and what is left between them."""
    start, end, shortest = 0, 0, min(len(first), len(second))
    while start < shortest and first[start] == second[start]:
        start += 1
    while end < shortest - start and first[-1 - end] == second[-1 - end]:
        end += 1
    return start + end, first[start : len(first) - end], second[start : len(second) - end]


def _aligned(scores: Sequence[Sequence[float]]) -> float:
    """Returns the largest sum over pairs (i, j) that increase in both; `scores[i][j]` is not negative."""
    if not scores:
        return 0.0
    above = [0.0] * (len(scores[0]) + 1)
    for row in scores:
        left, here = 0.0, [0.0]
        for column, score in enumerate(row):
            left = max(left, above[column + 1], above[column] + score)
            here.append(left)
        above = here
    return above[-1]


def check_table_answer(example: Example) -> None:
    """Raises a `DataError` unless the example's answer is one table."""
    try:
        read_table(example.answer)
    except TableError as error:
        raise DataError(
            f"example {example.id!r}: answer {example.answer[:80]!r}: {error}; write one HTML table or one Markdown table with a rule"
        ) from None


def table(example: Example, rollout: Rollout) -> RewardResult | Unavailable:
    """Returns the similarity of the response's table with the example's, in [0, 1] (formula: top of this module)."""
    try:
        answer = read_table(example.answer)
    except TableError as error:
        return Unavailable(reason=f"example {example.id!r}: its answer is no table: {error}")
    if len(rollout.text) > MAX_RESPONSE_CHARS:
        return RewardResult(value=0.0, note=f"a response of {len(rollout.text)} characters; at most {MAX_RESPONSE_CHARS} are read")
    prediction = final_answer(rollout.text, prompt_suffix=rollout.prompt_suffix)
    if prediction is None:
        return RewardResult(value=0.0, note="no final answer, or several that differ")
    try:
        grid = read_table(prediction)
    except TableError as error:
        return RewardResult(value=0.0, note=f"the final answer is no table: {error}")
    return RewardResult(value=table_similarity(grid, answer), note=f"{len(grid)} x {len(grid[0])} for {len(answer)} x {len(answer[0])}")


REWARDS: Mapping[str, BuiltInReward] = {
    "table": BuiltInReward(
        summary="similarity of structure and content with the example's HTML or Markdown table",
        value_range=(0.0, 1.0),
        check_answer=check_table_answer,
        function=table,
    ),
}
