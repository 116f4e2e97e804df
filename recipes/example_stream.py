"""Which examples a step sees: a function of the step's number, so a resumed run sees what the uninterrupted one would."""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

from ..model.records import ROLES, DataError, Example, ImagePart, Message, Part, TextPart
from .schema import HandwritingData, JsonlData


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


def _shuffled(number: int, total: int, seed: int) -> int:
    epoch, place = divmod(number, total)
    return _epoch_order(total, seed, epoch)[place]


@lru_cache(maxsize=4)
def _epoch_order(total: int, seed: int, epoch: int) -> list[int]:
    order = list(range(total))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return order


def open_stream(config: HandwritingData | JsonlData, *, seed: int, with_solution: bool) -> ExampleStream:
    """Returns the stream that a recipe's `data` names; `with_solution` asks for rows that end with an assistant turn."""
    if isinstance(config, HandwritingData):
        return HandwritingStream(config, seed=seed, with_solution=with_solution)
    return RowStream(read_rows(config, with_solution=with_solution), seed=seed)


def read_rows(config: JsonlData, *, with_solution: bool) -> list[Example]:
    """Returns the rows of a data file after checking that they end as their use demands: with the assistant's turn, or before it."""
    rows = read_jsonl(config.path, source=config.source or config.path.stem)
    for row in rows:
        ends_with_assistant = row.messages[-1].role == "assistant"
        if with_solution and not ends_with_assistant:
            raise DataError(
                f"{config.path}: row {row.id!r} does not end with an assistant message: there is nothing to learn from it by SFT"
            )
        if not with_solution and ends_with_assistant:
            raise DataError(f"{config.path}: row {row.id!r} ends with an assistant message: remove it, the policy writes the response")
    return rows


def read_jsonl(path: Path, *, source: str) -> list[Example]:
    """Returns the rows of a JSON-lines file; images are opened and decoded here, so that a bad one is named before training.

    A row is `{"id", "messages": [{"role", "content"}], "answer", "task", "metadata"}`; content is text or a list of
    `{"type": "text", "text"}` and `{"type": "image", "image": path or data URL}`. `answer`, `task` and `metadata` may be absent.
    Raises `DataError` with file, line and what to do.
    """
    try:
        # Not splitlines: JSON text may hold U+2028 and other characters that it takes for line ends.
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: the data file cannot be read ({error})") from error
    rows = [_read_row(line, path, number, source) for number, line in enumerate(lines, start=1) if line.strip()]
    if not rows:
        raise DataError(f"{path}: the data set is empty; give at least one row")
    seen: dict[str, int] = {}
    for number, row in enumerate(rows, start=1):
        if row.id in seen:
            raise DataError(f"{path}: rows {seen[row.id]} and {number} both have id {row.id!r}; ids seed the sampling and must differ")
        seen[row.id] = number
    return rows


_ROW_KEYS = ("id", "messages", "answer", "task", "metadata")


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key {next(name for name in names if names.count(name) > 1)!r} is given twice")
    return found


def _read_row(line: str, path: Path, number: int, source: str) -> Example:
    place = f"{path}, line {number}"
    try:
        row = json.loads(line, object_pairs_hook=_without_duplicates)
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{place}: text with half of a surrogate pair ({error}); write the whole character") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: not JSON: {error}") from error
    return parse_row(row, path, number, source)


def parse_row(row: object, path: Path, number: int, source: str) -> Example:
    """Returns the example of a row that has been read from a line; see `read_jsonl`. Raises `DataError` with file, line and what to do."""
    place = f"{path}, line {number}"
    if not isinstance(row, dict):
        raise DataError(f"{place}: a row is an object with {', '.join(_ROW_KEYS)}, this is {type(row).__name__}")
    unknown = sorted(set(row) - set(_ROW_KEYS))
    if unknown:
        raise DataError(f"{place}: unknown key {unknown[0]!r}; a row has {', '.join(_ROW_KEYS)}; put the rest under metadata")
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{place}: messages must be a list with at least one message")
    if isinstance(row.get("id", ""), bool) or not isinstance(row.get("id", ""), str | int):
        raise DataError(f"{place}: id = {row['id']!r} is {type(row['id']).__name__}, must be str or int")
    for key, allowed in (("answer", str), ("task", str), ("metadata", dict)):
        if key in row and not isinstance(row[key], allowed):
            raise DataError(f"{place}: {key} = {row[key]!r} is {type(row[key]).__name__}, must be {allowed.__name__}")
    return Example(
        id=str(row.get("id", f"{path.stem}/{number}")),
        messages=tuple(_read_message(message, place, path.parent) for message in messages),
        answer=row.get("answer", ""),
        task=row.get("task", source),
        source=source,
        metadata=row.get("metadata", {}),
    )


def _read_message(message: object, place: str, folder: Path) -> Message:
    if not isinstance(message, dict) or set(message) != {"role", "content"}:
        raise DataError(f"{place}: a message is an object with role and content, this is {message!r}")
    if message["role"] not in ROLES:
        raise DataError(f"{place}: unknown role {message['role']!r}; a message is from one of {', '.join(ROLES)}")
    content = message["content"]
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list):
        raise DataError(f"{place}: content must be text or a list of parts, this is {type(content).__name__}")
    return Message(role=message["role"], parts=tuple(_read_part(part, place, folder) for part in parts))


def _read_part(part: object, place: str, folder: Path) -> Part:
    match part:
        case {"type": "text", "text": str(text)}:
            return TextPart(text=text)
        case {"type": "image", "image": str(image)}:
            return _read_image(image, place, folder)
    raise DataError(
        f'{place}: a part is {{"type": "text", "text": ...}} or {{"type": "image", "image": path or data URL}}, this is {part!r}'
    )


def _read_image(image: str, place: str, folder: Path) -> ImagePart:
    if image.startswith("data:"):
        _, _, encoded = image.partition(";base64,")
        try:
            content = base64.b64decode(encoded.encode(), validate=True)
        except binascii.Error as error:
            raise DataError(f"{place}: the data URL is not base64 ({error})") from error
        return ImagePart.from_bytes(content, f"{place}, data URL")
    if Path(image).is_absolute() or ".." in Path(image).parts:
        raise DataError(f"{place}: image {image!r} lies outside the data file's folder; give a path below it, or a data URL")
    try:
        return ImagePart.from_file(folder / image)
    except DataError as error:
        raise DataError(f"{place}: {error}") from error


def fingerprint(examples: Sequence[Example]) -> str:
    """Returns a short hash of all that the examples hold, pixels too: equal data, equal hash."""
    hasher = hashlib.sha256()
    for example in examples:
        described: Mapping[str, Any] = {
            "id": example.id,
            "messages": [
                [m.role, [["text", part.text] if isinstance(part, TextPart) else ["media", part.digest] for part in m.parts]]
                for m in example.messages
            ],
            "answer": example.answer,
            "task": example.task,
            "source": example.source,
            "metadata": example.metadata,
        }
        hasher.update(json.dumps(described, ensure_ascii=False, sort_keys=True).encode())
    return hasher.hexdigest()[:16]
