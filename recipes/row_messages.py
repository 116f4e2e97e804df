"""One row -> one `Example`: the checks of roles, turns, think tags, tool calls and text, each fault by name."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from ..model.records import ROLES, Example, MediaPart, Message, Part, TextPart, ToolCall
from .row_media import MediaReader, RowError

ROW_KEYS = ("id", "messages", "answer", "task", "metadata")
_MEDIA_KEYS = ("tools", "images", "videos")
_MESSAGE_KEYS = {"role", "content"}
_ASSISTANT_KEYS = {"role", "content", "tool_calls", "reasoning_content"}
_TOOL_KEYS = {"role", "content", "tool_call_id", "name"}
_CONTROL_TOKEN = re.compile(
    r"<\|(?:im_start|im_end|endoftext|image_pad|video_pad|vision_start|vision_end|vision_pad"
    r"|object_ref_start|object_ref_end|box_start|box_end|quad_start|quad_end)\|>"
)
_MEDIA_TAG = re.compile(r"<(?:image|video)>")
_UNSEEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f]")
"""Control characters that no text shows: NUL and its neighbours, less tab and line ends."""


def read_example(row: object, *, reader: MediaReader, row_id: str, source: str, extra_keys_to_metadata: bool) -> Example:
    """Returns the example of a row in the shape `messages`. Raises `RowError`, which names the fault, the place and what to do."""
    place = reader.place
    if not isinstance(row, dict):
        raise RowError("row shape", f"{place}: a row is an object with {', '.join(ROW_KEYS)}, this is {type(row).__name__}")
    extra = {key: row[key] for key in sorted(set(row) - {*ROW_KEYS, *_MEDIA_KEYS})}
    if extra and not extra_keys_to_metadata:
        raise RowError(
            "unknown key",
            f"{place}: unknown key {next(iter(extra))!r}; a row has {', '.join(ROW_KEYS)}; put the rest under metadata, "
            "or write extra_keys: metadata",
        )
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages:
        raise RowError("no messages", f"{place}: messages must be a list with at least one message")
    for key, allowed in (("answer", str), ("task", str), ("metadata", dict)):
        if key in row and not isinstance(row[key], allowed):
            raise RowError("value type", f"{place}: {key} = {row[key]!r} is {type(row[key]).__name__}, must be {allowed.__name__}")
    waiting = _Waiting(row, place)
    read = [_read_message(message, reader, waiting) for message in messages]
    waiting.check_empty()
    read = list(_with_tools(_without_empty_system(read, reader), row.get("tools"), place))
    check_turns(read, place)
    return Example(
        id=row_id,
        messages=tuple(read),
        answer=row.get("answer", ""),
        task=row.get("task", source),
        source=source,
        metadata=_joined(row.get("metadata", {}), extra, place),
    )


def read_id(row: object, place: str, otherwise: str) -> str:
    """Returns the row's id as text, or `otherwise` where it has none."""
    found = row.get("id", otherwise) if isinstance(row, dict) else otherwise
    if isinstance(found, bool) or not isinstance(found, str | int):
        raise RowError("value type", f"{place}: id = {found!r} is {type(found).__name__}, must be str or int")
    return str(found)


def _joined(metadata: Mapping[str, Any], extra: Mapping[str, Any], place: str) -> Mapping[str, Any]:
    for key in metadata.keys() & extra.keys():
        if metadata[key] != extra[key]:
            raise RowError(
                "key given twice", f"{place}: {key!r} = {extra[key]!r}, and metadata says {metadata[key]!r}: which is meant? Keep one"
            )
    try:
        json.dumps(extra)
    except (TypeError, ValueError) as error:
        raise RowError(
            "value type", f"{place}: one of {', '.join(extra)} is no plain JSON value ({error}); leave the column out"
        ) from error
    return {**metadata, **extra}


class _Waiting:
    """The row's `images` and `videos`, taken in order by parts that name no file of their own."""

    def __init__(self, row: Mapping[str, Any], place: str) -> None:
        self.place = place
        self.entries: dict[str, list[Any]] = {}
        for kind in ("image", "video"):
            entries = row.get(kind + "s") or []
            if not isinstance(entries, list | tuple):
                raise RowError("value type", f"{place}: {kind}s is {type(entries).__name__}, must be a list")
            self.entries[kind] = list(entries)

    def take(self, kind: str) -> object:
        if not self.entries[kind]:
            raise RowError(
                f"{kind} parts", f"{self.place}: more {kind} parts without a file than `{kind}s` has entries; give each its {kind}"
            )
        return self.entries[kind].pop(0)

    def check_empty(self) -> None:
        for kind, entries in self.entries.items():
            if entries:
                raise RowError(f"{kind} parts", f"{self.place}: {len(entries)} of `{kind}s` belong to no part; add parts or take them out")


def _read_message(message: object, reader: MediaReader, waiting: _Waiting) -> Message:
    place = reader.place
    if isinstance(message, dict):
        # Tables fill what a row leaves out with None.
        message = {key: value for key, value in message.items() if value is not None or key == "content"}
    role = message.get("role") if isinstance(message, dict) else None
    known = {"assistant": _ASSISTANT_KEYS, "tool": _TOOL_KEYS}.get(role, _MESSAGE_KEYS) if isinstance(role, str) else _MESSAGE_KEYS
    has_content = isinstance(message, dict) and ("content" in message or "tool_calls" in message)
    if not isinstance(message, dict) or not has_content or not set(message) <= known or "role" not in message:
        raise RowError("message shape", f"{place}: a message is an object with role and content, this is {message!r:.300}")
    if role not in ROLES:
        raise RowError("role", f"{place}: unknown role {role!r}; a message is from one of {', '.join(ROLES)}")
    calls = tuple(_read_call(call, place) for call in _listed(message.get("tool_calls", []), place))
    content = message.get("content")
    if content is None and calls:
        content = ""
    entries = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(entries, list):
        raise RowError("message shape", f"{place}: content must be text or a list of parts, this is {type(entries).__name__}")
    parts = [_read_part(entry, reader, waiting) for entry in entries]
    if role == "assistant":
        parts = list(_with_thinking(parts, message.get("reasoning_content"), reader, is_call=bool(calls)))
    if role in ("system", "assistant") and not all(isinstance(part, TextPart) for part in parts):
        raise RowError(f"media in {role} turn", f"{place}: a {role} message holds an image or video: only user and tool messages may")
    return Message(role=role, parts=tuple(part for part in parts if not isinstance(part, TextPart) or part.text), tool_calls=calls)


def _listed(calls: object, place: str) -> list[Any]:
    if not isinstance(calls, list):
        raise RowError("tool call", f"{place}: tool_calls must be a list, this is {type(calls).__name__}")
    return calls


def _read_call(call: object, place: str) -> ToolCall:
    function = call.get("function", call) if isinstance(call, dict) else call
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise RowError("tool call", f"{place}: a tool call has a function with a name and arguments, this is {call!r:.120}")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError) as error:
            raise RowError(
                "tool arguments", f"{place}: arguments of {function['name']!r} are not JSON ({error}); write an object"
            ) from error
    if not isinstance(arguments, dict):
        raise RowError("tool arguments", f"{place}: arguments of {function['name']!r} must be an object, this is {arguments!r:.120}")
    # One spelling whatever the row's: that of the template for arguments given as an object.
    written = json.dumps(arguments, ensure_ascii=False)
    _refuse_control_tokens(function["name"] + written, place)
    return ToolCall(name=function["name"], arguments=written)


def _read_part(part: object, reader: MediaReader, waiting: _Waiting) -> Part:
    given = {key: value for key, value in part.items() if value is not None} if isinstance(part, dict) else part
    match given:
        case {"type": "text", "text": str(text), **rest} if not rest:
            return TextPart(text=_clean(text, reader))
        case {"type": "image", **rest} if set(rest) <= {"image"}:
            return reader.image(rest["image"] if "image" in rest else waiting.take("image"))
        case {"type": "image_url", "image_url": reference, **rest} if not rest:
            return reader.image(reference.get("url") if isinstance(reference, dict) else reference)
        case {"type": "video", **rest} if set(rest) <= {"video", "fps", "sample_fps", "times"}:
            return _read_video(rest, reader, waiting)
    raise RowError(
        "part shape",
        f'{reader.place}: a part is {{"type": "text", "text": ...}} or {{"type": "image", "image": path or data URL}} or '
        f'{{"type": "video", "video": path or frames, "fps" or "times"}}, this is {part!r:.300}',
    )


def _read_video(given: Mapping[str, Any], reader: MediaReader, waiting: _Waiting) -> MediaPart:
    video = given["video"] if "video" in given else waiting.take("video")
    if isinstance(video, list | tuple):
        fps = given.get("fps", given.get("sample_fps"))
        if "sample_fps" in given and fps != given["sample_fps"]:
            said = f"fps = {fps!r} and sample_fps = {given['sample_fps']!r}"
            raise RowError("video times", f"{reader.place}: a video of frames with {said}: frames a second have one number; keep one")
        return reader.video_frames(video, fps=fps, times=given.get("times"))
    if not isinstance(video, str) or not video:
        raise RowError("video reference", f"{reader.place}: a video is a path or a list of frames, this is {video!r:.80}")
    for key in ("times", "sample_fps"):
        if key in given:
            raise RowError("video times", f"{reader.place}: {key} is for a list of frames, a film file has times of its own; take it out")
    return reader.video_file(video, fps=given.get("fps"))


def _clean(text: str, reader: MediaReader) -> str:
    """Returns text without characters that nobody sees; a tag or token that stands for something else is a fault."""
    _refuse_control_tokens(text, reader.place)
    if found := _MEDIA_TAG.search(text):
        raise RowError(
            "image tag as text",
            f"{reader.place}: the text holds {found.group()!r}, which would be trained as letters; give an image part there, "
            "or read the rows as format: sharegpt",
        )
    cleaned = _UNSEEN.sub("", text)
    if len(cleaned) < len(text):
        reader.repairs.append("control characters taken out")
        _refuse_control_tokens(cleaned, reader.place)  # taking one out may have joined the halves of a token
    return cleaned


def _refuse_control_tokens(text: str, place: str) -> None:
    if found := _CONTROL_TOKEN.search(text):
        raise RowError(
            "control token as text",
            f"{place}: the text contains the control token {found.group()}: remove it, images and turns are set by parts and roles",
        )


def _with_thinking(parts: list[Part], reasoning: object, reader: MediaReader, *, is_call: bool) -> Iterator[Part]:
    """Yields an assistant's parts after its think block was judged, and put in front where it was given apart."""
    place = reader.place
    text = "".join(part.text for part in parts if isinstance(part, TextPart))
    opened, closed = text.count("<think>"), text.count("</think>")
    if reasoning is not None:
        if not isinstance(reasoning, str) or opened or closed:
            raise RowError("think tags", f"{place}: reasoning_content must be text, and then the content holds no think tags; keep one")
        thought = _clean(reasoning, reader)
        if "<think>" in thought or "</think>" in thought:
            raise RowError("think tags", f"{place}: reasoning_content holds a think tag, which would end it early; take it out")
        if thought.strip():
            yield TextPart(text=f"<think>\n{thought.strip()}\n</think>\n\n")
            opened = closed = 1
    elif (opened, closed) == (0, 1):
        # The response of a Thinking model as its engine returns it: the template has written the opening tag.
        reader.repairs.append("opening think tag added")
        yield TextPart(text="<think>\n")
    elif (opened, closed) not in ((0, 0), (1, 1)) or text.find("<think>") > text.find("</think>"):
        raise RowError("think tags", f"{place}: {opened} <think> and {closed} </think> in one turn: one block, opened and closed, or none")
    elif opened and text.split("<think>")[0].strip():
        raise RowError("think tags", f"{place}: text before <think>: the template would drop it; the thinking comes first")
    answer = text.split("</think>")[-1] if closed else text
    if closed and not answer.strip() and not is_call:
        raise RowError("thinking without answer", f"{place}: nothing follows </think>: the model would learn to end there; add the answer")
    yield from parts


def _without_empty_system(messages: list[Message], reader: MediaReader) -> list[Message]:
    if messages[0].role == "system" and not messages[0].text.strip() and len(messages) > 1:
        reader.repairs.append("empty system message left out")
        return messages[1:]
    return messages


def _with_tools(messages: list[Message], tools: object, place: str) -> Iterator[Message]:
    if not tools:
        yield from messages
        return
    if not isinstance(tools, list) or not all(isinstance(tool, dict) and _has_name(tool) for tool in tools):
        raise RowError("tools", f"{place}: tools must be a list of objects with a function that has a name, this is {tools!r:.120}")
    described = tuple(json.dumps(tool, ensure_ascii=False) for tool in tools)
    _refuse_control_tokens("".join(described), place)
    has_system = messages[0].role == "system"
    yield Message(role="system", parts=messages[0].parts if has_system else (), tools=described)
    yield from messages[1:] if has_system else messages


def _has_name(tool: Mapping[str, Any]) -> bool:
    function = tool.get("function", tool)
    return isinstance(function, dict) and isinstance(function.get("name"), str) and bool(function["name"])


_MAY_FOLLOW = {
    "start": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}


def check_turns(messages: list[Message], place: str) -> None:
    """Raises `RowError` for empty turns and an order of roles that no conversation has."""
    before, num_calls, num_results = "start", 0, 0
    for index, message in enumerate(messages):
        if message.role == "system":
            if index:
                raise RowError("role order", f"{place}: message {index} is a system message: only the first may be one")
            continue
        if message.role not in _MAY_FOLLOW[before]:
            behind = "stands first" if before == "start" else f"follows one from {before}"
            raise RowError(
                "role order",
                f"{place}: message {index} from {message.role} {behind}, where {' or '.join(_MAY_FOLLOW[before])} is expected; "
                "join the turns or add the one that is missing",
            )
        if not message.media and not message.tool_calls and not message.text.strip() and message.role != "tool":
            raise RowError("empty turn", f"{place}: message {index} from {message.role} is empty; fill it or take it out")
        if message.role == "assistant":
            num_calls, num_results = len(message.tool_calls) + message.text.count("<tool_call>"), 0
        elif message.role == "tool":
            num_results += 1
            if num_results > num_calls:
                raise RowError(
                    "tool result without call",
                    f"{place}: message {index} is tool result {num_results} of {num_calls} calls; add the call or take the result out",
                )
        before = message.role
    if before == "start":
        raise RowError("no messages", f"{place}: the row has a system message only; add a question")


def ends_as_used(example: Example, *, with_solution: bool, place: str) -> None:
    """Raises `RowError` unless the row ends as its use demands: with the assistant's turn for SFT, before it where the policy answers."""
    ends_with_assistant = example.messages[-1].role == "assistant"
    if with_solution and not ends_with_assistant:
        raise RowError(
            "no response", f"{place}: row {example.id!r} does not end with an assistant message: there is nothing to learn from it by SFT"
        )
    if not with_solution and ends_with_assistant:
        raise RowError(
            "response given", f"{place}: row {example.id!r} ends with an assistant message: remove it, the policy writes the response"
        )
