"""Which examples a step sees: a function of the step's number, so a resumed run sees what the uninterrupted one would."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import random
from array import array
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

from ..model.records import DataError, Example, Message, TextPart
from .data_config import CuratedData, DataConfig, HandwritingData, HubData, JsonlData, MixData
from .row_files import RowData, counted, load_rows, read_all, read_given_row
from .row_media import RowError

ROW_LOG = logging.getLogger("vlpost.rows")
"""What was dropped or repaired: a warning for each data set, and at INFO a line for each row with the `RowNote` as `row_note`."""


class ExampleStream(Protocol):
    """An endless list of examples."""

    num_rows: int | None
    """Distinct examples; None when they never repeat."""

    def examples(self, start: int, count: int) -> list[Example]:
        """Returns examples number `start` to `start + count - 1`; the same numbers give the same examples in every process."""
        ...


class HandwritingStream:
    """The bundled track. With `num_examples` the same rows come back, shuffled anew every epoch."""

    def __init__(self, config: HandwritingData, *, seed: int, with_solution: bool) -> None:
        self.config = config
        self.seed = seed
        self.with_solution = with_solution
        self.num_rows = config.num_examples
        self.examples(0, 1)  # wrong tasks or shares are an error now, not in the middle of a run

    def examples(self, start: int, count: int) -> list[Example]:
        """Returns examples number `start` to `start + count - 1`."""
        from .handwriting import handwriting_example

        numbers = range(start, start + count)
        total = self.config.num_examples
        if total is not None:
            numbers = [_shuffled(number, total, self.seed) for number in numbers]
        return [
            handwriting_example(
                self.config.split,
                number,
                tasks={**self.config.tasks},
                languages=self.config.languages,
                seed=self.config.seed,
                with_solution=self.with_solution,
                solution_faults={**self.config.solution_faults},
                page_pixels=self.config.page_pixels,
            )
            for number in numbers
        ]


class RowStream:
    """Rows in memory, shuffled anew every epoch."""

    def __init__(self, rows: Sequence[Example], *, seed: int) -> None:
        self.rows = rows
        self.num_rows: int | None = len(rows)
        self.seed = seed

    def examples(self, start: int, count: int) -> list[Example]:
        """Returns examples number `start` to `start + count - 1`."""
        return [self.rows[_shuffled(number, len(self.rows), self.seed)] for number in range(start, start + count)]


class HubStream:
    """Rows of a hub set as they come, from the start again after the last. Never more than one row is held.

    Going back to an earlier example starts the set anew, so examples are asked for in order; a resumed run reads past those it has seen.
    """

    num_rows: int | None = None

    def __init__(self, config: HubData, *, with_solution: bool) -> None:
        self.config = config
        self.with_solution = with_solution
        self._next = 0
        self._rows = self._endless()

    def examples(self, start: int, count: int) -> list[Example]:
        """Returns examples number `start` to `start + count - 1`."""
        if start < self._next:
            self._next, self._rows = 0, self._endless()
        for _ in range(start - self._next):
            next(self._rows)
        found = [next(self._rows) for _ in range(count)]
        self._next = start + count
        return found

    def _endless(self) -> Iterator[Example]:
        for epoch in itertools.count():
            kept = 0
            for row, found in read_all(self.config, with_solution=self.with_solution):
                if not isinstance(found, RowError):
                    kept += 1
                    yield found[0]
                elif self.config.bad_rows == "refuse":
                    raise found
                elif epoch == 0:
                    ROW_LOG.warning("%s dropped: %s", row.place, found)
            if not kept:
                raise DataError(f"{self.config.path}: the data set is empty; give at least one row")


def _shuffled(number: int, total: int, seed: int) -> int:
    epoch, place = divmod(number, total)
    return _epoch_order(total, seed, epoch)[place]


@lru_cache(maxsize=64)  # a mix of many parts draws from all of them at every step: none may put another's order out
def _epoch_order(total: int, seed: int, epoch: int) -> Sequence[int]:
    order = array("L", range(total))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return order


def open_stream(config: DataConfig, *, seed: int, with_solution: bool) -> ExampleStream:
    """Returns the stream that a recipe's `data` names; `with_solution` asks for rows that end with an assistant turn."""
    if isinstance(config, MixData):
        from .example_mix import mix

        streams = {name: open_stream(part.data, seed=seed, with_solution=with_solution) for name, part in config.parts.items()}
        return mix(config, streams, seed=seed)
    if isinstance(config, HandwritingData):
        return HandwritingStream(config, seed=seed, with_solution=with_solution)
    if isinstance(config, CuratedData):
        from .curate_reader import read_data_set

        rows = read_data_set(config.path, split=config.split, with_solution=with_solution)
        if config.curriculum is not None:
            from .curriculum import by_pass_rate

            return by_pass_rate(rows, config, seed=seed)
        return RowStream(rows, seed=seed)
    if isinstance(config, HubData) and config.streaming:
        return HubStream(config, with_solution=with_solution)
    return RowStream(read_rows(config, with_solution=with_solution), seed=seed)


def read_rows(config: RowData, *, with_solution: bool | None) -> tuple[Example, ...]:
    """Returns the rows of a data set after checking that they end as their use demands: with the assistant's turn, or before it.

    Bad rows are an error, or are left out as `bad_rows` says, with a warning that counts them and a line for each in the log "vlpost.rows".
    """
    found = load_rows(config, with_solution=with_solution)
    for outcome in ("dropped", "repaired"):
        notes = [note for note in found.notes if note.outcome == outcome]
        if notes:
            total = len(found.examples) + sum(note.outcome == "dropped" for note in found.notes)
            ROW_LOG.warning("%s: %s in %d of %d rows: %s", config.path, outcome, len({note.place for note in notes}), total, counted(notes))
    for note in found.notes:
        ROW_LOG.info("%s %s: %s", note.place, note.outcome, note.reason, extra={"row_note": note})
    return found.examples


def read_jsonl(path: Path, *, source: str) -> tuple[Example, ...]:
    """Returns the rows of a JSON-lines file however they end; media are decoded here, so that a bad one is named before training.

    Raises `DataError` with file, line and what to do. What a row may hold is in docs/data.md.
    """
    return read_rows(JsonlData(use="jsonl", path=path, source=source), with_solution=None)


def parse_row(row: object, path: Path, number: int, source: str) -> Example:
    """Returns the example of a row that has been read from a line; see `read_jsonl`. Raises `DataError` with file, line and what to do."""
    return read_given_row(row, path, number, source)


def fingerprint(examples: Sequence[Example]) -> str:
    """Returns a short hash of all that the examples hold, pixels too: equal data, equal hash."""
    hasher = hashlib.sha256()
    for example in examples:
        described: Mapping[str, Any] = {
            "id": example.id,
            "messages": [_described(message) for message in example.messages],
            "answer": example.answer,
            "task": example.task,
            "source": example.source,
            "metadata": example.metadata,
        }
        hasher.update(json.dumps(described, ensure_ascii=False, sort_keys=True).encode())
    return hasher.hexdigest()[:16]


def _described(message: Message) -> list[object]:
    parts = [["text", part.text] if isinstance(part, TextPart) else ["media", part.digest] for part in message.parts]
    calls = [["call", call.name, call.arguments] for call in message.tool_calls]
    tools = [["tool", tool] for tool in message.tools]
    return [message.role, [*parts, *calls, *tools]]
