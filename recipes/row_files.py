"""Where rows come from: JSON-lines and parquet files, folders of them, hub sets; and what becomes of bad rows."""

from __future__ import annotations

import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..model.records import DataError, Example
from .data_config import HubData, JsonlData, ParquetData
from .row_formats import to_messages
from .row_media import MediaReader, RowError, VideoSampling
from .row_messages import ends_as_used, read_example, read_id

RowData = JsonlData | ParquetData | HubData


@dataclass(frozen=True, kw_only=True, slots=True)
class RawRow:
    """A row as its file holds it."""

    place: str
    """File and line, or data set and number, for messages."""
    number: int
    """1 for the first row, or line, of its file."""
    stem: str
    """What ids of rows without one begin with."""
    folder: Path | None
    """Paths of media are relative to it; None where there are none."""
    content: object


@dataclass(frozen=True, kw_only=True, slots=True)
class RowNote:
    """What happened to a row that is not trained as it stands in its file."""

    place: str
    outcome: Literal["dropped", "repaired"]
    kind: str
    """Name of the fault or of the repair; rows are counted by it."""
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class RowSet:
    """The rows of a data set and what happened on the way."""

    examples: tuple[Example, ...]
    notes: tuple[RowNote, ...]


def load_rows(config: RowData, *, with_solution: bool | None) -> RowSet:
    """Returns all rows of a data set, and a note for each that was dropped or repaired; `with_solution` None: however they end.

    Raises `RowError` at the first bad row under `bad_rows: refuse`; `DataError` when a file cannot be read, or when no row is left.
    """
    examples: dict[str, tuple[str, Example]] = {}
    notes: list[RowNote] = []
    for row, found in read_all(config, with_solution=with_solution):
        if isinstance(found, RowError):
            notes.append(_dropped(config, row.place, found))
            continue
        example, repairs = found
        if example.id in examples:
            said = f"{row.place}: id {example.id!r} is taken by {examples[example.id][0]}; ids seed the sampling and must differ"
            notes.append(_dropped(config, row.place, RowError("id given twice", said)))
            continue
        examples[example.id] = (row.place, example)
        notes += [RowNote(place=row.place, outcome="repaired", kind=repair, reason=repair) for repair in repairs]
    if not examples:
        dropped = f" ({len(notes)} rows were dropped: {counted(notes)})" if notes else ""
        raise DataError(f"{config.path}: the data set is empty{dropped}; give at least one row")
    return RowSet(examples=tuple(example for _, example in examples.values()), notes=tuple(notes))


def read_all(config: RowData, *, with_solution: bool | None) -> Iterator[tuple[RawRow, tuple[Example, list[str]] | RowError]]:
    """Yields each row of a data set with its example and its repairs, or with its fault."""
    if config.clock_times_share and with_solution is False:
        raise DataError(
            f"{config.path}: clock_times_share = {config.clock_times_share}: the engine writes video times as seconds, so rows that it "
            "answers cannot have others; take the key out here"
        )
    for row in _raw_rows(config):
        try:
            yield row, read_raw(row, config, with_solution=with_solution)
        except RowError as error:
            yield row, error


def counted(notes: Sequence[RowNote]) -> str:
    """Returns the kinds of the notes with their numbers, the most frequent first: `image missing 3, empty turn 1`."""
    return ", ".join(f"{kind} {count}" for kind, count in Counter(note.kind for note in notes).most_common())


def _dropped(config: RowData, place: str, error: RowError) -> RowNote:
    if config.bad_rows == "refuse":
        raise error
    return RowNote(place=place, outcome="dropped", kind=error.kind, reason=str(error))


def read_raw(row: RawRow, config: RowData, *, with_solution: bool | None) -> tuple[Example, list[str]]:
    """Returns the example of a row as its data set's settings want it, and the names of what was mended. Raises `RowError`."""
    content = row.content
    if isinstance(content, RowError):
        raise content
    row_id = read_id(content, row.place, f"{row.stem}/{row.number}")
    if isinstance(content, dict):
        content = to_messages(content, config.format, row.place)
    reader = MediaReader(
        place=row.place,
        folder=row.folder,
        video=VideoSampling(
            fps=config.video_fps,
            max_frames=config.max_video_frames,
            time_format="clock" if has_clock_times(row_id, config.clock_times_share) else "seconds",
        ),
    )
    example = read_example(
        content,
        reader=reader,
        row_id=row_id,
        source=config.source or _name(config),
        extra_keys_to_metadata=config.extra_keys == "metadata",
    )
    if with_solution is not None:
        ends_as_used(example, with_solution=with_solution, place=row.place)
    return example, reader.repairs


def has_clock_times(row_id: str, share: float) -> bool:
    """Returns whether the row is one of the share whose video times are written h:mm:ss: a function of its id alone."""
    drawn = int.from_bytes(hashlib.sha256(f"clock/{row_id}".encode()).digest()[:8]) / 2**64
    return drawn < share


def _name(config: RowData) -> str:
    return config.path if isinstance(config, HubData) else config.path.stem


def _raw_rows(config: RowData) -> Iterator[RawRow]:
    if isinstance(config, HubData):
        yield from _hub_rows(config)
        return
    files, suffix = [config.path], f".{config.use}"
    if config.path.is_dir():
        files = sorted(path for path in config.path.rglob(f"*{suffix}") if path.is_file())
        if not files:
            raise DataError(f"{config.path}: the folder holds no {suffix} file; give another folder, or `use` of another kind")
    for path in files:
        # Two files of a folder may have one name: their ids begin with the path below it.
        stem = path.relative_to(config.path).with_suffix("").as_posix() if path != config.path else path.stem
        yield from (jsonl_rows(path, stem) if config.use == "jsonl" else _parquet_rows(path, stem))


def jsonl_rows(path: Path, stem: str) -> Iterator[RawRow]:
    """Yields the rows of a JSON-lines file; the content of a line that is no JSON is a `RowError`."""
    try:
        # Not splitlines: JSON text may hold U+2028 and other characters that it takes for line ends. A mark at the start is no text.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: the data file cannot be read ({error})") from error
    for number, line in enumerate(lines, start=1):
        if line.strip():
            place = f"{path}, line {number}"
            yield RawRow(place=place, number=number, stem=stem, folder=path.parent, content=_parsed(line, place))


def _parsed(line: str, place: str) -> object:
    try:
        row = json.loads(line, object_pairs_hook=_without_duplicates)
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        return RowError("half a character", f"{place}: text with half of a surrogate pair ({error}); write the whole character")
    except (ValueError, RecursionError) as error:
        return RowError("not JSON", f"{place}: not JSON: {error}")
    return row


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key {next(name for name in names if names.count(name) > 1)!r} is given twice")
    return found


def _parquet_rows(path: Path, stem: str) -> Iterator[RawRow]:
    import pyarrow
    import pyarrow.parquet

    try:
        # Opened here: pyarrow would take a name such as `s3:` for a remote file system.
        with io.FileIO(path) as file:
            table = pyarrow.parquet.ParquetFile(file)
            for column, count in Counter(table.schema_arrow.names).items():
                if count > 1:
                    raise DataError(f"{path}: column {column!r} is there twice; which is meant? Keep one")
            number = 0
            for batch in table.iter_batches(batch_size=64):
                for row in batch.to_pylist(maps_as_pydicts="strict"):
                    number += 1
                    yield RawRow(place=f"{path}, row {number}", number=number, stem=stem, folder=path.parent, content=_without_nulls(row))
    except (OSError, UnicodeDecodeError, KeyError, pyarrow.ArrowException) as error:  # KeyError: a map that holds a key twice
        raise DataError(f"{path}: the data file cannot be read ({error}); give a whole parquet file") from error


def _hub_rows(config: HubData) -> Iterator[RawRow]:
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        rows: Any = datasets.load_dataset(
            config.path, config.subset, split=config.split, revision=config.revision, streaming=config.streaming
        )
    except (OSError, ValueError, DatasetsError) as error:
        raise DataError(
            f"{config.path}: the hub set cannot be opened ({error}); check name, subset, split, revision and network"
        ) from error
    for column, feature in (rows.features or {}).items():
        rows = _undecoded(rows, column, feature)
    for number, row in enumerate(rows, start=1):
        yield RawRow(
            place=f"{config.path}, {config.split} row {number}", number=number, stem=config.path, folder=None, content=_without_nulls(row)
        )


def _undecoded(rows: Any, column: str, feature: object) -> Any:  # noqa: ANN401 (datasets' classes share no base)
    """Returns the set with images of a column left as bytes: we decode them ourselves, bounded, and name what is wrong."""
    import datasets

    if isinstance(feature, datasets.Image):
        return rows.cast_column(column, datasets.Image(decode=False))
    if isinstance(feature, datasets.List) and isinstance(feature.feature, datasets.Image):
        return rows.cast_column(column, datasets.List(datasets.Image(decode=False)))
    return rows


def _without_nulls(value: Any) -> Any:  # noqa: ANN401 (any value of a row)
    """Returns a row, or a value in it, without the keys that it leaves empty, at any depth.

    A table has one schema: what one row has, all rows have, as nulls. Left in, a tool call would be trained with all the others' arguments.
    """
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def read_given_row(content: object, path: Path, number: int, source: str) -> Example:
    """Returns the example of a row that was read from a line of a file, as `JsonlData` reads it by default; its end is not checked."""
    place = f"{path}, line {number}"
    defaults = JsonlData(use="jsonl", path=path)
    reader = MediaReader(place=place, folder=path.parent, video=VideoSampling(fps=defaults.video_fps, max_frames=defaults.max_video_frames))
    row_id = read_id(content, place, f"{path.stem}/{number}")
    return read_example(content, reader=reader, row_id=row_id, source=source, extra_keys_to_metadata=False)
