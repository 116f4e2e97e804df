"""Rows of `vlpost curate` to and from parquet: the shards between steps, and the data set at the end.

A shard has two columns: `row`, one JSON text a row without pixels, and `media`, its images and frames as PNG files. The pixels of a
row are named by digest in its text, so that the hash of the texts is the hash of all that the rows hold.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image as PILImage

from ..model.durable import sync_to_disk
from ..model.records import DataError, Example, ImagePart, MediaPart, Message, Part, TextPart, ToolAnswer, ToolCall, Turn, VideoPart
from ..rl.tool import describe_tools
from ..rl.tool_calls import parse_turn
from .curate_query import as_query
from .curate_step import Candidate, CuratedRow, RowKey

_SCHEMA = pa.schema([("row", pa.string()), ("media", pa.list_(pa.binary()))])
_PNG_LEVEL = 1
"""Images are written once and read at every step: speed counts more than bytes."""

Pixels = dict[str, tuple[bytes, ...]]
"""Digest of an image or video -> its PNG files."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """The rows of a shard, and their images as they lay in the file, so that nobody encodes them again."""

    rows: tuple[CuratedRow, ...]
    pixels: Pixels


def row_text(row: CuratedRow) -> str:
    """Returns the row as canonical JSON, its pixels by digest: equal rows, equal text. Raises `DataError` for what is not plain JSON."""
    example = row.example
    described = {
        "id": example.id,
        "messages": [_described_message(message) for message in example.messages],
        **{field.name: getattr(example, field.name) for field in fields(example) if field.name not in ("id", "messages")},
        "candidates": [_described_candidate(candidate) for candidate in row.candidates],
        "notes": row.notes,
    }
    try:
        text = json.dumps(described, ensure_ascii=False, sort_keys=True, allow_nan=False)
        text.encode()
    except (TypeError, ValueError) as error:
        raise DataError(
            f"row {example.id!r} holds what is not plain JSON ({error}); metadata and notes are texts, finite numbers, lists and objects"
        ) from error
    return text


def _described_candidate(candidate: Candidate) -> dict[str, Any]:
    return {
        **{field.name: getattr(candidate, field.name) for field in fields(candidate)},
        "turns": [asdict(turn) for turn in candidate.turns],
        "media": [_described_part(part) for part in candidate.media],
    }


def _described_message(message: Message) -> dict[str, Any]:
    return {
        "role": message.role,
        "parts": [_described_part(part) for part in message.parts],
        "tool_calls": [{"name": call.name, "arguments": call.arguments} for call in message.tool_calls],
        "tools": list(message.tools),
    }


def _described_part(part: Part) -> dict[str, Any]:
    if isinstance(part, TextPart):
        return {"text": part.text}
    if isinstance(part, ImagePart):
        return {"image": part.digest}
    return {"video": part.digest, "fps": part.fps, "frame_indices": list(part.frame_indices), "time_format": part.time_format}


def rows_hash(rows: Iterable[CuratedRow]) -> str:
    """Returns the SHA-256 of all that the rows hold, in order."""
    hasher = hashlib.sha256()
    for row in rows:
        hasher.update(row_text(row).encode())
        hasher.update(b"\n")
    return hasher.hexdigest()


def write_shard(path: Path, rows: Sequence[CuratedRow], *, pixels: Mapping[str, tuple[bytes, ...]]) -> None:
    """Writes the rows under a name that is there whole or not at all; `pixels` are images that are encoded already."""
    columns = {
        "row": [row_text(row) for row in rows],
        "media": [[file for part in _media(row) for file in pixels.get(part.digest) or png_files(part)] for row in rows],
    }
    write_table(path, pa.table(columns, schema=_SCHEMA))


def _media(row: CuratedRow) -> tuple[MediaPart, ...]:
    return (*row.example.media, *(part for candidate in row.candidates for part in candidate.media))


def write_table(path: Path, table: pa.Table) -> None:
    """Writes a parquet file under a name that is there whole or not at all, on the disk when this returns."""
    partial = path.with_name(f".partial-{path.name}")
    pq.write_table(table, partial, compression="zstd")
    put_in_place(partial, path)


def write_text(path: Path, text: str) -> None:
    """Writes a text file under a name that is there whole or not at all, on the disk when this returns."""
    partial = path.with_name(f".partial-{path.name}")
    partial.write_text(text, encoding="utf-8")
    put_in_place(partial, path)


def put_in_place(partial: Path, path: Path) -> None:
    """Renames a finished file to its name once its bytes are on the disk."""
    sync_to_disk(partial)
    partial.rename(path)
    sync_to_disk(path.parent)


def png_files(part: MediaPart) -> tuple[bytes, ...]:
    """Returns an image, or the frames of a video, as PNG files."""
    images = (part.image,) if isinstance(part, ImagePart) else part.frames
    return tuple(_png(image) for image in images)


def _png(image: PILImage.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=_PNG_LEVEL)
    return buffer.getvalue()


def read_shard(path: Path, *, decode: bool) -> Shard:
    """Returns a shard that `write_shard` wrote; without `decode` an image's pixels are decoded when somebody looks at them.

    Its bytes are trusted: who reads a shard compares its SHA-256 with the manifest first.
    """
    table = pq.read_table(path, schema=_SCHEMA)
    pixels: Pixels = {}
    rows = tuple(
        _read_row(text, files or [], pixels, decode=decode)
        for text, files in zip(table["row"].to_pylist(), table["media"].to_pylist(), strict=True)
    )
    return Shard(rows=rows, pixels=pixels)


def read_keys(path: Path) -> Iterator[RowKey]:
    """Yields the keys of a shard's rows, without reading its images."""
    for text in pq.read_table(path, columns=["row"])["row"].to_pylist():
        described = json.loads(text)
        parts = [part for message in described["messages"] for part in message["parts"]]
        yield RowKey(
            id=described["id"],
            source=described["source"],
            task=described["task"],
            digests=tuple(part.get("image") or part["video"] for part in parts if "text" not in part),
        )


def _read_row(text: str, files: Sequence[bytes], pixels: Pixels, *, decode: bool) -> CuratedRow:
    described = json.loads(text)
    waiting = iter(files)
    messages = tuple(
        Message(
            role=message["role"],
            parts=tuple(_read_part(part, waiting, pixels, decode=decode) for part in message["parts"]),
            tool_calls=tuple(ToolCall(**call) for call in message["tool_calls"]),
            tools=tuple(message["tools"]),
        )
        for message in described.pop("messages")
    )
    candidates = tuple(_read_candidate(candidate, waiting, pixels, decode=decode) for candidate in described.pop("candidates"))
    notes = described.pop("notes")
    return CuratedRow(example=Example(messages=messages, **described), candidates=candidates, notes=notes)


def _read_candidate(described: Mapping[str, Any], files: Iterator[bytes], pixels: Pixels, *, decode: bool) -> Candidate:
    media = [_read_part(part, files, pixels, decode=decode) for part in described["media"]]
    turns = [
        Turn(
            **{
                **turn,
                "calls": tuple(ToolCall(**call) for call in turn["calls"]),
                "answers": tuple(ToolAnswer(**answer) for answer in turn["answers"]),
            }
        )
        for turn in described["turns"]
    ]
    shown = tuple(part for part in media if not isinstance(part, TextPart))
    return Candidate(**{**described, "turns": tuple(turns), "media": shown, "tools": tuple(described["tools"])})


def _read_part(part: Mapping[str, Any], files: Iterator[bytes], pixels: Pixels, *, decode: bool) -> Part:
    if "text" in part:
        return TextPart(text=part["text"])
    if "image" in part:
        pixels[part["image"]] = (content := next(files),)
        return ImagePart(image=_opened(content, decode=decode), digest=part["image"])
    encoded = tuple(next(files) for _ in part["frame_indices"])
    pixels[part["video"]] = encoded
    return VideoPart(
        frames=tuple(_opened(content, decode=decode) for content in encoded),
        fps=part["fps"],
        frame_indices=tuple(part["frame_indices"]),
        digest=part["video"],
        time_format=part["time_format"],
    )


def _opened(content: bytes, *, decode: bool) -> PILImage.Image:
    image = PILImage.open(io.BytesIO(content), formats=("PNG",))
    if decode:  # two threads that look at one image at the same time must not both decode it
        image.load()
    return image


def as_conversations(row: CuratedRow, *, max_per_query: int | None) -> list[CuratedRow]:
    """Returns the row's query answered by each of its first candidates, as rows that SFT can learn from.

    The assistant's turn is what the template opened plus what the model wrote, so that a think block is whole; ids are `id#number`.
    A conversation with tools is written with its calls and results. One that was cut off before it answered has nothing to be learned from
    and is passed over, as is one with a broken call or with text behind a call, which no template writes.
    """
    query = as_query(row.example)
    return [
        CuratedRow(
            example=replace(
                query,
                id=f"{query.id}#{number}",
                messages=(
                    *(describe_tools(query.messages, candidate.tools) if candidate.tools else query.messages),
                    *_steps(candidate),
                    Message(role="assistant", parts=(TextPart(text=candidate.prompt_suffix + candidate.text),)),
                ),
            ),
            notes={
                **row.notes,
                "candidate": {"model": candidate.model, "seed": candidate.seed, "value": candidate.value, "notes": candidate.notes},
            },
        )
        for number, candidate in enumerate(writable_candidates(row)[:max_per_query])
    ]


def writable_candidates(row: CuratedRow) -> tuple[Candidate, ...]:
    """Returns the candidates that a conversation can be made of."""
    return tuple(candidate for candidate in row.candidates if _is_whole(candidate))


def _is_whole(candidate: Candidate) -> bool:
    if candidate.ending in ("turns", "context", "unavailable"):
        return False
    parsed = [parse_turn(turn.text, prompt_suffix=turn.prompt_suffix) for turn in candidate.turns]
    # A turn that was cut off inside a call, or has a call and yet is the last, is no answer either.
    return not any(turn.faults or turn.text_after for turn in parsed) and not any(turn.calls for turn in parsed[-1:])


def _steps(candidate: Candidate) -> Iterator[Message]:
    """Yields the turns before the last, each with what it was answered."""
    media = iter(candidate.media)
    for turn in candidate.turns[:-1]:
        words = turn.prompt_suffix + turn.words
        yield Message(role="assistant", parts=(TextPart(text=words),) if words else (), tool_calls=turn.calls)
        for answer in turn.answers:
            text = (TextPart(text=answer.text),) if answer.text else ()
            yield Message(role="tool", parts=(*text, *(next(media) for _ in range(answer.num_images))))
