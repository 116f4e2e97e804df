"""Rows of other shapes -> the one shape that `example_stream.parse_row` reads; plain JSON in and out, no image is opened here.

- `messages`: OpenAI and Qwen rows, `{"messages": [{"role", "content"}]}` with parts, tool calls and tool results.
- `sharegpt`: `{"conversations": [{"from", "value"}]}`, LLaVA and LLaMA-Factory, `<image>` and `<video>` tags in the text.
- `alpaca`: `{"instruction", "input", "output", "history"}`, LLaMA-Factory, the same tags.

A tag takes the next entry of the row's `images` or `videos`; the text around it stays as it is. Tags and entries must be equal in number: a
row with one more or one less would be trained with the wrong picture or none.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from .data_config import RowFormat
from .row_media import RowError

Row = dict[str, Any]

_TAG = re.compile(r"<(image|video)>")
_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
    "system": "system",
}
_TRAINED_KEYS = ("weight", "loss", "train")
"""With these some sets say of a turn that it is not trained, or not as much as others."""
_CONVERSATION_KEYS = ("conversations", "system", "tools", "image", "images", "video", "videos", "fps")
_ALPACA_KEYS = ("instruction", "input", "output", "history", "system", "tools", "image", "images", "video", "videos", "fps")


def to_messages(row: Row, format: RowFormat, place: str) -> Row:
    """Returns a row with `messages`; keys that the format does not use are left as they are. Raises `RowError`."""
    return _CONVERTERS[format](row, place)


def _as_it_is(row: Row, place: str) -> Row:
    return row


def _from_sharegpt(row: Row, place: str) -> Row:
    turns = row.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise RowError("no messages", f"{place}: conversations must be a list of turns with `from` and `value`, this is {turns!r:.80}")
    messages = list(_system(row))
    for index, turn in enumerate(turns):
        if not isinstance(turn, dict) or not {"from", "value"} <= set(turn) or not isinstance(turn["value"], str):
            raise RowError("message shape", f"{place}: turn {index} needs `from` and a text `value`, this is {turn!r:.80}")
        role = _SHAREGPT_ROLES.get(turn["from"]) if isinstance(turn["from"], str) else None
        if role is None:
            raise RowError("role", f"{place}: turn {index}: unknown `from` {turn['from']!r}; one of {', '.join(_SHAREGPT_ROLES)}")
        for key in _TRAINED_KEYS:
            if turn.get(key) not in (None, 1):
                raise RowError(
                    "message shape",
                    f"{place}: turn {index} has {key!r} = {turn[key]!r}, and all that the assistant wrote is trained alike; "
                    "cut the row before that turn, or drop it",
                )
        if turn["from"] == "function_call":
            messages.append({"role": "assistant", "content": "", "tool_calls": _function_calls(turn["value"], f"{place}, turn {index}")})
        else:
            messages.append({"role": role, "content": turn["value"]})
    return _finish(row, messages, _CONVERSATION_KEYS, place)


def _function_calls(value: str, place: str) -> list[Row]:
    try:
        calls = json.loads(value)
    except (ValueError, RecursionError) as error:
        raise RowError("tool call", f"{place}: a function_call is JSON with name and arguments ({error})") from error
    return [{"type": "function", "function": call} for call in (calls if isinstance(calls, list) else [calls])]


def _from_alpaca(row: Row, place: str) -> Row:
    for key in ("instruction", "output"):
        if not isinstance(row.get(key), str):
            raise RowError("message shape", f"{place}: an alpaca row needs a text `{key}`, this is {row.get(key)!r:.80}")
    if not isinstance(row.get("input") or "", str):
        raise RowError("message shape", f"{place}: `input` must be text, this is {row['input']!r:.80}")
    messages = list(_system(row))
    for pair in row.get("history") or []:
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise RowError("message shape", f"{place}: history is a list of [question, response], this holds {pair!r:.80}")
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    asked = "\n".join(text for text in (row["instruction"], row.get("input")) if text)
    messages.append({"role": "user", "content": asked})
    if row["output"]:
        messages.append({"role": "assistant", "content": row["output"]})
    return _finish(row, messages, _ALPACA_KEYS, place)


def _system(row: Row) -> Iterator[Row]:
    if row.get("system"):
        yield {"role": "system", "content": row["system"]}


def _finish(row: Row, messages: list[Row], used: tuple[str, ...], place: str) -> Row:
    """Returns the row with tags replaced by the media they stand for, without the keys that the format used up."""
    waiting = {kind: list(_listed(row, kind, place)) for kind in ("image", "video")}
    given = {kind: len(entries) for kind, entries in waiting.items()}
    tags = {kind: sum(message["content"].count(f"<{kind}>") for message in messages) for kind in waiting}
    for kind, count in tags.items():
        if count != given[kind]:
            raise RowError(
                f"{kind} tags",
                f"{place}: {count} <{kind}> tags and {given[kind]} {kind}s: each tag stands for one {kind}, in order; "
                "write as many of one as of the other",
            )
    for message in messages:
        message["content"] = _parts(message["content"], waiting, row.get("fps"))
    tools = row.get("tools")
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError) as error:
            raise RowError("tools", f"{place}: tools is text that is not JSON ({error})") from error
    kept = {key: value for key, value in row.items() if key not in used}
    return kept | {"messages": messages} | ({"tools": tools} if tools else {})


def _listed(row: Row, kind: str, place: str) -> Iterator[Any]:
    for key in (kind, kind + "s"):
        entry = row.get(key)
        if isinstance(entry, list | tuple):
            yield from entry
        elif entry is not None:
            yield entry
    if row.get(kind) is not None and row.get(kind + "s") is not None:
        raise RowError(f"{kind} tags", f"{place}: both {kind!r} and '{kind}s' are given: which stands for which tag? Keep one")


def _parts(text: str, waiting: Mapping[str, list[Any]], fps: object) -> str | list[Row]:
    pieces = _TAG.split(text)
    if len(pieces) == 1:
        return text
    parts: list[Row] = []
    for index, piece in enumerate(pieces):
        if index % 2:
            entry = waiting[piece].pop(0)
            timed = {"fps": fps} if piece == "video" and fps is not None else {}
            parts.append({"type": piece, piece: entry} | timed)
        elif piece:
            parts.append({"type": "text", "text": piece})
    return parts


_CONVERTERS: dict[RowFormat, Callable[[Row, str], Row]] = {"messages": _as_it_is, "sharegpt": _from_sharegpt, "alpaca": _from_alpaca}
