"""Verifier of puzzles whose answer is a grid or a sequence. It gives 1.0 or 0.0.

`metadata["puzzle"]` says which kind; without it the answer is compared as a grid.

* `{"kind": "grid"}`: every cell equals the example's.
* `{"kind": "sudoku", "clues": [[5, 3, 0, ...], ...], "block": [3, 3]}`: any grid that keeps the clues (0 is an open cell) and holds the
  numbers 1 to n once in each row, column and block (`block`: rows and columns of one block; their product is n).
* `{"kind": "permutation"}`: the sequence equals the example's, and so holds each of its parts as often.
* `{"kind": "sorted", "items": {"a": 3, "b": 1}, "descending": false}`: all names once, in the order of their numbers; equal
  numbers in either order.

A grid is JSON (a list of lists) or one line a row with cells apart by spaces, commas or `|`, or one character a cell. A sequence is a
JSON list or parts joined by `,`, `、`, `->` or `→` (`<` and `>` would say which way the order runs). Full-width forms are read as
ASCII; case counts.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from ..model.records import DataError, Example, Rollout
from .answers import bare, final_answer, half_width, normalise_spaces
from .built_in import BuiltInReward
from .json_answer import JsonError, read_json
from .result import RewardResult, Unavailable

MAX_RESPONSE_CHARS = 200_000
"""Longest response that is searched for an answer, characters."""
MAX_ANSWER_CHARS = 10_000
MAX_SIDE = 64
"""Most rows, and most cells a row, of a grid."""
MAX_SUDOKU_SIDE = 36
MAX_PARTS = 1000
KINDS = ("grid", "sudoku", "permutation", "sorted")

Grid: TypeAlias = tuple[tuple[str, ...], ...]

_CELLS = re.compile(r"[ ,|\t]+")
_PARTS = re.compile(r" ?(?:->|→|[,、]) ?")
_FENCE = re.compile(r"```[a-z]{0,12}\n(.*)\n```", re.DOTALL)


class PuzzleError(ValueError):
    """A text that is no grid or sequence; the message says why."""


def _cell(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise PuzzleError("a cell that is neither a text nor a whole number")
    return normalise_spaces(str(value))


def _list_of(text: str) -> list[Any] | None:
    if len(text) > MAX_ANSWER_CHARS:
        raise PuzzleError(f"{len(text)} characters; at most {MAX_ANSWER_CHARS} are read")
    try:
        value = read_json(text)
    except JsonError:
        return None
    return value if isinstance(value, list) else None


def _lines(text: str) -> str:
    stripped = text.strip()
    fenced = _FENCE.fullmatch(stripped)
    return half_width(fenced.group(1) if fenced else stripped)


def read_grid(text: str) -> Grid:
    """Returns the cells of the grid that a text is, row by row; a `PuzzleError` when it is none or its rows differ in length."""
    rows = _list_of(text)
    if rows is None:
        lines = [line.strip(" |\t") for line in _lines(text).splitlines() if line.strip(" |\t")]
        grid = tuple(tuple(_CELLS.split(line)) if _CELLS.search(line) else tuple(line) for line in lines)
    elif all(isinstance(row, list) for row in rows):
        grid = tuple(tuple(map(_cell, row)) for row in rows)
    else:
        grid = tuple(tuple(row) if isinstance(row, str) else (_cell(row),) for row in rows)
    if not grid or not grid[0] or len({len(row) for row in grid}) != 1 or max(len(grid), len(grid[0])) > MAX_SIDE:
        raise PuzzleError(f"no grid of equal rows, at most {MAX_SIDE} x {MAX_SIDE}")
    return grid


def read_sequence(text: str) -> tuple[str, ...]:
    """Returns the parts of the sequence that a text is; a `PuzzleError` when there are none, an empty one or too many."""
    found = _list_of(text)
    parts = _PARTS.split(bare(_lines(text).replace("\n", ","))) if found is None else [_cell(part) for part in found]
    parts = [part.strip() for part in parts]
    if not 1 <= len(parts) <= MAX_PARTS or not all(parts):
        raise PuzzleError(f"no sequence of 1 to {MAX_PARTS} parts")
    return tuple(parts)


def is_sudoku_solution(grid: Grid, clues: Sequence[Sequence[int]], *, block: tuple[int, int]) -> bool:
    """Returns whether the grid keeps the clues (0: open) and holds 1 to n once in each row, column and block of `block` rows x columns."""
    side = len(clues)
    wanted = {str(number) for number in range(1, side + 1)}
    if len(grid) != side or any(len(row) != side for row in grid):
        return False
    if any(clue and str(clue) != cell for clue_row, row in zip(clues, grid, strict=True) for clue, cell in zip(clue_row, row, strict=True)):
        return False
    height, width = block
    blocks = (
        [grid[top + down][left + right] for down in range(height) for right in range(width)]
        for top in range(0, side, height)
        for left in range(0, side, width)
    )
    return all(set(cells) == wanted for cells in (*grid, *zip(*grid, strict=True), *blocks))


def is_sorted(parts: Sequence[str], items: Mapping[str, float], *, descending: bool) -> bool:
    """Returns whether the parts are the names of `items`, each once, in the order of their numbers."""
    if len(parts) != len(items) or set(parts) != set(items):
        return False
    numbers = [items[part] for part in parts]
    return numbers == sorted(numbers, reverse=descending)


def _puzzle_of(example: Example) -> Mapping[str, Any]:
    puzzle = example.metadata.get("puzzle", {"kind": "grid"})
    kind = puzzle.get("kind") if isinstance(puzzle, Mapping) else None
    fault = "" if kind in KINDS else f"its kind must be one of {', '.join(KINDS)}"
    if kind == "sudoku" and not _is_readable_sudoku(puzzle):
        fault = f"clues must be n rows of n numbers from 0 to n (n at most {MAX_SUDOKU_SIDE}) and block [rows, columns] with product n"
    if kind == "sorted" and not _are_readable_items(puzzle):
        fault = "items must map names to finite numbers, and descending be true or false"
    if fault:
        raise DataError(f"example {example.id!r}: metadata puzzle {str(puzzle)[:80]}: {fault}")
    return puzzle


def _is_readable_sudoku(puzzle: Mapping[str, Any]) -> bool:
    clues, block = puzzle.get("clues"), puzzle.get("block", [3, 3])
    if not isinstance(clues, (list, tuple)) or not isinstance(block, (list, tuple)) or not 1 <= len(clues) <= MAX_SUDOKU_SIDE:
        return False
    side = len(clues)
    if len(block) != 2 or not all(isinstance(length, int) and length > 0 for length in block) or block[0] * block[1] != side:
        return False
    return all(
        isinstance(row, (list, tuple)) and len(row) == side and all(isinstance(clue, int) and 0 <= clue <= side for clue in row)
        for row in clues
    )


def _are_readable_items(puzzle: Mapping[str, Any]) -> bool:
    items = puzzle.get("items")
    return (
        isinstance(items, Mapping)
        and 1 <= len(items) <= MAX_PARTS
        and isinstance(puzzle.get("descending", False), bool)
        and all(
            isinstance(name, str) and isinstance(number, (int, float)) and (isinstance(number, int) or math.isfinite(number))
            for name, number in items.items()
        )
    )


def _is_solved(example: Example, puzzle: Mapping[str, Any], text: str) -> bool:
    match puzzle["kind"]:
        case "sudoku":
            return is_sudoku_solution(read_grid(text), puzzle["clues"], block=tuple(puzzle.get("block", (3, 3))))
        case "sorted":
            return is_sorted(read_sequence(text), puzzle["items"], descending=puzzle.get("descending", False))
        case "permutation":
            return read_sequence(text) == read_sequence(example.answer)
        case _:
            return read_grid(text) == read_grid(example.answer)


def check_puzzle_answer(example: Example) -> None:
    """Raises a `DataError` unless the metadata can be read and the example's answer solves its own puzzle."""
    puzzle = _puzzle_of(example)
    try:
        is_solved = _is_solved(example, puzzle, example.answer)
    except PuzzleError as error:
        raise DataError(f"example {example.id!r}: answer {example.answer[:80]!r}: {error}") from None
    if not is_solved:
        raise DataError(f"example {example.id!r}: answer {example.answer[:80]!r} does not solve its own puzzle ({puzzle['kind']})")


def puzzle(example: Example, rollout: Rollout) -> RewardResult | Unavailable:
    """Returns 1.0 when the final answer solves the example's puzzle, else 0.0 (kinds: top of this module)."""
    try:
        check_puzzle_answer(example)
    except DataError as error:
        return Unavailable(reason=str(error))
    if len(rollout.text) > MAX_RESPONSE_CHARS:
        return RewardResult(value=0.0, note=f"a response of {len(rollout.text)} characters; at most {MAX_RESPONSE_CHARS} are read")
    prediction = final_answer(rollout.text, prompt_suffix=rollout.prompt_suffix)
    if prediction is None:
        return RewardResult(value=0.0, note="no final answer, or several that differ")
    try:
        return RewardResult(value=float(_is_solved(example, _puzzle_of(example), prediction)))
    except PuzzleError as error:
        return RewardResult(value=0.0, note=f"the final answer cannot be read: {error}")


REWARDS: Mapping[str, BuiltInReward] = {
    "puzzle": BuiltInReward(
        summary="the final answer solves the example's grid, sudoku, permutation or sorting puzzle",
        value_range=(0.0, 1.0),
        check_answer=check_puzzle_answer,
        function=puzzle,
    ),
}
