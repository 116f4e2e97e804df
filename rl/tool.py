"""What a tool is, what it answers, and how a call that a turn made comes to its answer. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from ..model.records import DataError, ImagePart, Message, VlpostError
from ..rewards.json_answer import Json
from ..rewards.plugin_source import nearest
from .tool_calls import CallFault, ParsedCall

ERROR = "Error: "
"""What a result begins with when a call came to nothing, for the policy to read."""
MAX_QUOTED_CHARS = 80


class ToolConfigError(VlpostError, ValueError):
    """A tool that cannot be used; the message names it, the value, what is allowed and what to do."""


class ToolUnavailableError(VlpostError):
    """A tool broke, through no fault of the policy: what it would have answered is unknown, so the rollout says nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ToolResult:
    """What a tool answers: `ToolResult(text="7\\n")`, or the cut-out of a zoom."""

    text: str = ""
    images: tuple[ImagePart, ...] = ()
    """They stand after the text, and count on in `img_idx`."""
    is_error: bool = False
    """True when the text says why there is no result."""


class Tool(Protocol):
    """A function that the policy may call."""

    @property
    def name(self) -> str:
        """The name in calls."""
        ...

    @property
    def description(self) -> str:
        """The OpenAI description of the tool as JSON text, as it stands in the system turn."""
        ...

    def run(self, arguments: Mapping[str, Json], *, images: Sequence[ImagePart]) -> ToolResult:
        """Returns the answer to a call; `images` are all of the conversation so far, in order.

        Whatever the arguments are, what is wrong with them is said in the text. Raises `ToolUnavailableError` when the tool itself broke.
        """
        ...


def describe(name: str, words: str, *, properties: Mapping[str, Any], required: Sequence[str]) -> str:
    """Returns the OpenAI description of a tool as JSON text."""
    parameters = {"type": "object", "properties": properties, "required": list(required)}
    function = {"name": name, "description": words, "parameters": parameters}
    return json.dumps({"type": "function", "function": function}, ensure_ascii=False)


def failed(reason: str) -> ToolResult:
    """Returns the answer to a call that came to nothing."""
    return ToolResult(text=ERROR + reason, is_error=True)


def quoted(value: object) -> str:
    """Returns a value of a call for the words of an error, cut short."""
    written = json.dumps(value, ensure_ascii=False)
    return written if len(written) <= MAX_QUOTED_CHARS else written[:MAX_QUOTED_CHARS] + "..."


def argument_faults(arguments: Mapping[str, Json], *, known: Sequence[str], required: Sequence[str]) -> str | None:
    """Returns words for an argument that is unknown or missing, or None."""
    for name in arguments:
        if name not in known:
            return f"unknown argument {quoted(name)}{nearest(name, known)}; the arguments are {', '.join(known) or 'none'}"
    missing = [name for name in required if name not in arguments]
    return f"argument {missing[0]} is missing; {', '.join(required)} must be given" if missing else None


def answer_call(call: ParsedCall | CallFault, tools: Mapping[str, Tool], *, images: Sequence[ImagePart]) -> ToolResult:
    """Returns what a tool answers to a call, or words about a block that is no call or names no tool."""
    if isinstance(call, CallFault):
        return failed(call.reason)
    tool = tools.get(call.name)
    if tool is None:
        return failed(f"there is no tool {call.name!r}{nearest(call.name, tools)}; the tools are {', '.join(tools)}")
    return tool.run(call.arguments, images=images)


def describe_tools(messages: Sequence[Message], descriptions: tuple[str, ...]) -> tuple[Message, ...]:
    """Returns the messages with the tools' descriptions in the system turn, which is made where there is none."""
    first = messages[0]
    if first.role != "system":
        return (Message(role="system", parts=(), tools=descriptions), *messages)
    if first.tools:
        raise DataError(
            f"the messages describe {len(first.tools)} tools of their own, and the recipe {len(descriptions)}: "
            "drop them from the row, or set describe_tools: false where both are the same"
        )
    return (replace(first, tools=descriptions), *messages[1:])


def shorten(text: str, max_chars: int) -> str:
    """Returns the text, or its first and last characters with words in between about what was left out."""
    if len(text) <= max_chars:
        return text
    head = (max_chars + 1) // 2
    tail = max_chars - head
    return f"{text[:head]}\n... {len(text) - max_chars} characters left out ...\n{text[len(text) - tail :]}"
