"""The rows that `vlpost curate` starts from, and those of evaluation sets: finite, in a fixed order, bad ones with their reason."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from ..model.records import DataError, Example
from .curate_config import CurateRecipe
from .data_config import DataConfig, HubData, JsonlData, MixData, ParquetData
from .example_stream import RowStream, open_stream
from .row_files import read_all
from .row_media import RowError

CHUNK_ROWS = 256
"""Rows that a stream is asked for at a time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BadRow:
    """A row that cannot be used and that its data set's `bad_rows: drop` leaves out."""

    id: str
    """Where it stands: a bad row may have no id."""
    reason: str


def source_rows(recipe: CurateRecipe, *, start: int) -> Iterator[Example | BadRow]:
    """Yields the rows of all data sets of the recipe, one set after another, from row number `start` on, bad ones counted."""
    to_skip = start
    for name, config in recipe.data.items():
        for row in rows_of(config, conversations=recipe.rows == "conversations", seed=recipe.seed, place=f"data.{name}"):
            if to_skip:
                to_skip -= 1
            elif len(recipe.data) > 1:
                yield replace(row, id=f"{name}/{row.id}")
            else:
                yield row


def finite_examples(config: DataConfig, *, conversations: bool, seed: int, place: str) -> Iterator[Example]:
    """Yields every usable row of a data set once; raises what `rows_of` raises."""
    for row in rows_of(config, conversations=conversations, seed=seed, place=place):
        if isinstance(row, Example):
            yield row


def rows_of(config: DataConfig, *, conversations: bool, seed: int, place: str) -> Iterator[Example | BadRow]:
    """Yields every row of a data set once; files and hub sets in their order, without holding them.

    Raises `DataError` for a data set without an end, for a mix, and for a bad row under `bad_rows: refuse`.
    """
    if isinstance(config, MixData):
        raise DataError(f"{place}: use = 'mix' repeats rows; name its parts as data sets of their own and put a step with use: mix behind")
    if isinstance(config, JsonlData | ParquetData | HubData):
        for raw, found in read_all(config, with_solution=conversations):
            if not isinstance(found, RowError):
                yield found[0]
            elif config.bad_rows == "refuse":
                raise found
            else:
                yield BadRow(id=raw.place, reason=f"bad row, {found.kind}: {found}")
        return
    stream = open_stream(config, seed=seed, with_solution=conversations)
    if isinstance(stream, RowStream):
        yield from stream.rows
        return
    if stream.num_rows is None:
        raise DataError(f"{place}: use = {config.use!r} has no last row as it stands; give num_examples")
    for begin in range(0, stream.num_rows, CHUNK_ROWS):
        yield from stream.examples(begin, min(CHUNK_ROWS, stream.num_rows - begin))
