r"""Tool calls as Qwen3-VL writes them, found in the text of a response; whatever the text is, nothing here raises.

A call is a JSON object between two tags, after the turn's text; several calls stand behind each other:

    I look closer.
    <tool_call>
    {"name": "image_zoom_in_tool", "arguments": {"bbox_2d": [100, 0, 300, 200], "label": "sign", "img_idx": 0}}
    </tool_call>

The rules are strict, because whatever is let through will be written: a block that is anything else than this object, with exactly these
two keys, is a fault, and its words go back to the policy. A block ends at the next closing tag, also where that tag stands inside a JSON
text, as in every parser of this format. Text after a call breaks the format and is handed out apart (`text_after`), for the caller to
judge; the calls count. Tags inside the thinking part are thoughts, no calls.

trl's parser (its response template for Qwen3) reads the same calls from well-formed turns; it takes NaN, an object with one key twice and
any nesting, and gives up the whole turn for one broken block.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from ..rewards.answers import THINK_CLOSE, THINK_OPEN
from ..rewards.json_answer import Json, JsonError, parse_json

CALL_OPEN = "<tool_call>"
CALL_CLOSE = "</tool_call>"
MAX_TURN_CHARS = 1_000_000
"""Longest turn that is searched for calls, characters."""
MAX_BLOCKS = 64
"""Most blocks of one turn that are read; those beyond are one fault."""
MAX_QUOTED_CHARS = 80
"""Of what the policy wrote, in the words of a fault."""

_TAG = re.compile("</?tool_call>")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,63}")
_KEYS = ("name", "arguments")


@dataclass(frozen=True, kw_only=True, slots=True)
class ParsedCall:
    """A call as it was written: `ParsedCall(place=0, name="python", arguments={"code": "print(7)"})`."""

    place: int
    """Which block of the turn it is, from 0."""
    name: str
    """Of a tool, which there may not be."""
    arguments: dict[str, Json]
    """Finite numbers, texts that can be encoded, at most `json_answer.MAX_DEPTH` deep."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CallFault:
    """A block that is no call: `CallFault(place=1, reason="the block is not closed")`."""

    place: int
    """Which block of the turn it is, from 0."""
    reason: str
    """For the policy and the log."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ParsedTurn:
    """What a turn says and what it calls; each block is a call or a fault, and `place` orders them together."""

    text: str
    """Before the first block, trimmed, its thinking part included."""
    calls: tuple[ParsedCall, ...]
    faults: tuple[CallFault, ...]
    text_after: str
    """Between and after the blocks, trimmed pieces joined by newlines; empty in a turn as the format has it."""

    @property
    def num_blocks(self) -> int:
        """Blocks that the policy opened: 0 for a turn that answers."""
        return len(self.calls) + len(self.faults)


def parse_turn(text: str, *, prompt_suffix: str) -> ParsedTurn:
    """Returns the calls and faults of one assistant turn, in linear time.

    `prompt_suffix` is what the chat template wrote after the assistant header: a thinking part that it opened, or that the turn begins
    with, ends at its first closing tag, and a turn whose thinking never ends calls nothing.
    """
    if len(text) > MAX_TURN_CHARS:
        fault = CallFault(place=0, reason=f"a turn of {len(text)} characters; at most {MAX_TURN_CHARS} are searched for calls")
        return ParsedTurn(text="", calls=(), faults=(fault,), text_after="")
    start = _end_of_thinking(text, prompt_suffix)
    calls: list[ParsedCall] = []
    faults: list[CallFault] = []
    outside: list[str] = []
    end = 0
    for place, (opened, closed, content) in enumerate(_blocks(text, start)):
        outside.append(text[end:opened].strip())
        end = closed
        if place == MAX_BLOCKS:
            faults.append(CallFault(place=place, reason=f"more than {MAX_BLOCKS} calls in one turn"))
            break
        found = CallFault(place=place, reason="the block is not closed") if content is None else _read_call(content, place)
        if isinstance(found, ParsedCall):
            calls.append(found)
        else:
            faults.append(found)
    outside.append(text[end:].strip())
    after = "\n".join(filter(None, outside[1:]))
    return ParsedTurn(text=outside[0], calls=tuple(calls), faults=tuple(faults), text_after=after)


def _end_of_thinking(text: str, prompt_suffix: str) -> int:
    """Returns where the visible part begins; the length of the text when there is none."""
    is_open = prompt_suffix.rfind(THINK_OPEN) > prompt_suffix.rfind(THINK_CLOSE) or text.lstrip().startswith(THINK_OPEN)
    closed = text.find(THINK_CLOSE)
    if closed >= 0:
        return closed + len(THINK_CLOSE)
    return len(text) if is_open else 0


def _blocks(text: str, start: int) -> Iterator[tuple[int, int, str | None]]:
    """Yields where each block begins and ends, and what stands in it: None where another one opens or the text ends first."""
    opened: int | None = None
    for match in _TAG.finditer(text, start):
        if match.group() == CALL_OPEN:
            if opened is not None:
                yield opened, match.start(), None
            opened = match.start()
        elif opened is not None:
            yield opened, match.end(), text[opened + len(CALL_OPEN) : match.start()]
            opened = None
    if opened is not None:
        yield opened, len(text), None


def _read_call(content: str, place: int) -> ParsedCall | CallFault:
    try:
        value = parse_json(content.strip())
        # The escape of half a character is JSON, and no text that could be encoded for a tool or a tokenizer.
        _check_encodable(value)
    except JsonError as error:
        return CallFault(place=place, reason=f"not the JSON of a call ({error})")
    except UnicodeEncodeError:
        return CallFault(place=place, reason="a text with half a character (a lone surrogate)")
    if not isinstance(value, dict) or set(value) != set(_KEYS):
        held = f"the keys {_quoted(', '.join(value))}" if isinstance(value, dict) else _quoted(value)
        return CallFault(place=place, reason=f'a call is an object with the keys "name" and "arguments" and no others, not {held}')
    name, arguments = value["name"], value["arguments"]
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        return CallFault(place=place, reason=f"{_quoted(name)} is no name of a tool")
    if not isinstance(arguments, dict):
        return CallFault(place=place, reason=f"the arguments are an object with a value by name, not {_quoted(arguments)}")
    return ParsedCall(place=place, name=name, arguments=arguments)


def _check_encodable(value: Json) -> None:
    if isinstance(value, str):
        value.encode()
    elif isinstance(value, list):
        for member in value:
            _check_encodable(member)
    elif isinstance(value, dict):
        for key, member in value.items():
            key.encode()
            _check_encodable(member)


def _quoted(value: object) -> str:
    """Returns the value as Python writes it, in ASCII and cut short."""
    written = ascii(value)
    return written if len(written) <= MAX_QUOTED_CHARS else written[:MAX_QUOTED_CHARS] + "..."
