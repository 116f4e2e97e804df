"""A data set that `vlpost curate` wrote, as the rows of a training stage."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image as PILImage

from ..model.records import DataError, Example, ImagePart, Message, Part, TextPart, ToolCall, VideoPart
from .curate_output import MANIFEST_FILE


def read_data_set(folder: Path, *, split: str, with_solution: bool) -> list[Example]:
    """Returns the rows of a split, in order, after comparing its files with the manifest.

    `with_solution` asks for rows that end with the assistant's turn, else they must end before it. Raises `DataError` with what to do.
    """
    try:
        files = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{folder}: no whole data set of `vlpost curate` ({error}); run its recipe to the end") from error
    wanted = [name for name, file in files.items() if file["split"] == split]
    if not wanted:
        listed = ", ".join(sorted({file["split"] for file in files.values()})) or "none, no row is left"
        raise DataError(f"{folder}: there is no split {split!r}; there are {listed}")
    rows = [row for name in wanted for row in _read_file(folder / name, files[name]["sha256"])]
    for row in rows:
        if (row.messages[-1].role == "assistant") != with_solution:
            problem = (
                "does not end with an assistant message: write: conversations makes such rows"
                if with_solution
                else ("ends with an assistant message: rows: queries and write: rows make rows without")
            )
            raise DataError(f"{folder}: row {row.id!r} {problem}")
    return rows


def candidate_models(folder: Path, *, split: str) -> dict[str, str]:
    """Returns, for each row's id, the name of the model that wrote its last turn; of a data set with `write: conversations`."""
    return {row_id: notes["candidate"]["model"] for row_id, notes in read_notes(folder, split=split).items()}


def read_notes(folder: Path, *, split: str) -> dict[str, dict[str, Any]]:
    """Returns, for each row's id, what the steps noted of it."""
    files = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))["files"]
    tables = [pq.read_table(folder / name, columns=["id", "notes"]).to_pylist() for name, file in files.items() if file["split"] == split]
    return {row["id"]: json.loads(row["notes"]) for table in tables for row in table}


def _read_file(path: Path, sha256: str) -> list[Example]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); run the recipe again, it writes what is missing") from error
    if hashlib.sha256(content).hexdigest() != sha256:
        raise DataError(f"{path}: is not what manifest.json says it is (SHA-256); remove data/ and run the recipe again")
    return [_read_row(row, path) for row in pq.read_table(pa.BufferReader(content)).to_pylist()]


def _read_row(row: Mapping[str, Any], path: Path) -> Example:
    place = f"{path}, row {row['id']!r}"
    return Example(
        id=row["id"],
        messages=tuple(
            Message(
                role=message["role"],
                parts=tuple(_read_part(part, place) for part in message["content"]),
                tool_calls=tuple(ToolCall(**call["function"]) for call in message["tool_calls"]),
                tools=tuple(message["tools"]),
            )
            for message in row["messages"]
        ),
        answer=row["answer"],
        task=row["task"],
        source=row["source"],
        metadata=json.loads(row["metadata"]),
    )


def _read_part(part: Mapping[str, Any], place: str) -> Part:
    if part["type"] == "text":
        return TextPart(text=part["text"])
    if part["type"] == "image":
        return ImagePart.from_bytes(part["image"]["bytes"], place)
    video = part["video"]
    frames = [PILImage.open(io.BytesIO(content), formats=("PNG",)) for content in video["frames"]]
    return VideoPart.from_frames(frames, fps=video["fps"], frame_indices=video["frame_indices"], time_format=video["time_format"])
