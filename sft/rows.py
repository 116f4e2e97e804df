"""What becomes of a row before it is encoded: think blocks and mode flags, and cuts at turn boundaries. Text and messages only."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from ..model.records import DataError, Example, Message, TextPart
from .config import ModeFusionConfig, SftConfig

THINK_FLAG = "/think"
NO_THINK_FLAG = "/no_think"
EMPTY_THINK_BLOCK = "<think>\n\n</think>\n\n"
_OPEN, _CLOSE = "<think>", "</think>"


@dataclass(frozen=True, kw_only=True, slots=True)
class RowNote:
    """What happened to a row that is not trained as it stands.

    Example: `RowNote(example_id="a-17", outcome="dropped", reason="too long: 90 tokens with images expanded, at most 64")`.
    """

    example_id: str
    outcome: str
    """`dropped`, `split`, or `exchange dropped` for one that is too long alone in a row that is split"""
    reason: str


def thought_of(text: str) -> str | None:
    """Returns what stands inside the think block of an assistant's text, None where there is no block.

    The block may lack its opening tag, which a Thinking template writes itself. A block that is opened and not closed is a `DataError`.
    """
    before, closed, _ = text.partition(_CLOSE)
    if not closed:
        if _OPEN in text:
            raise DataError(f"an assistant turn opens a think block and never closes it: {text[:80]!r}; close it with {_CLOSE}")
        return None
    return before.rpartition(_OPEN)[2].strip()


def answer_of(text: str) -> str:
    """Returns an assistant's text without its think block; what follows the block is the answer, whole."""
    _, closed, after = text.partition(_CLOSE)
    return after.lstrip("\n") if closed else text


def with_thinking_as_configured(example: Example, config: SftConfig, *, opens_think_block: bool) -> Example:
    """Returns the row with think blocks kept, stripped or added and with mode flags, as the settings say; a row may be returned as it is.

    `opens_think_block`: whether the chat template ends a prompt inside an open think block, as Thinking's does. Raises `DataError` that
    names the row where its blocks do not go with the template or the flags.
    """
    try:
        for message in example.messages:
            if message.role == "assistant":
                thought_of(message.text)
        if config.mode_fusion is not None:
            return replace(example, messages=_fused(example, config.mode_fusion, opens_think_block=opens_think_block))
        if config.think_blocks == "strip":
            return replace(example, messages=tuple(_stripped(message, index) for index, message in enumerate(example.messages)))
        if config.think_blocks == "template" and not opens_think_block:
            _refuse_blocks(example.messages)
    except DataError as error:
        raise DataError(f"example {example.id}: {error}") from error
    return example


def _stripped(message: Message, index: int) -> Message:
    if message.role != "assistant" or thought_of(message.text) is None:
        return message
    answer = answer_of(message.text)
    if not answer.strip() and not message.tool_calls:
        raise DataError(f"message {index}: nothing is left of the assistant's turn without its think block; drop the row")
    return replace(message, parts=(TextPart(text=answer),) if answer.strip() else ())


def _refuse_blocks(messages: Sequence[Message]) -> None:
    for index, message in enumerate(messages):
        if message.role == "assistant" and thought_of(message.text) is not None:
            raise DataError(
                f"message {index}: holds a think block, and the chat template of this model opens none: it would learn to write the tags "
                "as text; start from a Thinking model, or set sft.think_blocks to strip (the answers alone) or keep (as written)"
            )


def _fused(example: Example, config: ModeFusionConfig, *, opens_think_block: bool) -> tuple[Message, ...]:
    """Returns the messages with a flag at each user turn that was answered, and a block in each answer where the template writes none."""
    messages = list(example.messages)
    for start, end in _exchanges(messages):
        answers = [index for index in range(start, end) if messages[index].role == "assistant"]
        queries = [index for index in range(start, answers[0] if answers else start) if _is_query(messages[index])]
        if not queries:
            continue
        query = queries[-1]
        has_thinking = any(thought_of(messages[index].text) for index in answers)
        is_flagged = not has_thinking or _share_of(f"{example.id}/{query}") < config.think_flag_share
        wanted = THINK_FLAG if has_thinking else NO_THINK_FLAG
        messages[query] = _flagged(messages[query], wanted, is_flagged=is_flagged, place=query)
        if not opens_think_block:  # a template that opens the block also writes it where there is none
            for index in answers:
                if thought_of(messages[index].text) is None:
                    messages[index] = replace(messages[index], parts=(TextPart(text=EMPTY_THINK_BLOCK), *messages[index].parts))
    return tuple(messages)


def _flagged(message: Message, flag: str, *, is_flagged: bool, place: int) -> Message:
    """Returns the user turn with the flag behind its last part; a flag that the row itself has stays, and must be the same."""
    found = next((known for known in (NO_THINK_FLAG, THINK_FLAG) if message.text.rstrip().endswith(known)), None)
    if found is not None:
        if found != flag:
            has = "has a think block" if flag == THINK_FLAG else "has no thinking"
            raise DataError(f"message {place}: the user asks for {found} and the answer {has}; mend the row or drop it")
        return message
    if not is_flagged:
        return message
    last = message.parts[-1] if message.parts else None
    if isinstance(last, TextPart):
        return replace(message, parts=(*message.parts[:-1], TextPart(text=f"{last.text} {flag}")))
    return replace(message, parts=(*message.parts, TextPart(text=f" {flag}")))


def _share_of(key: str) -> float:
    """Returns a number in [0, 1) that depends on the key alone."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:7]) / 2**56


def _exchanges(messages: Sequence[Message]) -> Iterator[tuple[int, int]]:
    """Yields (start, end) of each exchange: from a user's query to the last assistant turn before the next one.

    Tool calls and their results belong to the exchange whose query they serve; the first exchange may begin without a query.
    """
    first = 1 if messages and messages[0].role == "system" else 0
    follows = range(first + 1, len(messages))
    starts = [first, *(index for index in follows if _is_query(messages[index]) and messages[index - 1].role == "assistant")]
    yield from zip(starts, [*starts[1:], len(messages)], strict=True)


def _is_query(message: Message) -> bool:
    """Returns whether a user asks; the templates take a user's message that wraps a tool result by hand for that result."""
    text = message.text.strip()
    return message.role == "user" and not (text.startswith("<tool_response>") and text.endswith("</tool_response>"))


def split_at_turns(example: Example, num_tokens: Callable[[Example], int], *, limit: int) -> tuple[list[Example], list[RowNote]]:
    """Returns rows of at most `limit` tokens that hold the turns of a longer one in order, and notes of what was done.

    Each is as long as fits, begins with the row's system message and with a user's turn, and ends with what was answered; each is a row of
    its own (`<id>, part 2`), without the turns before it. An exchange that is too long alone is left out. `num_tokens` counts with images
    and videos expanded and must not fall as turns are added.
    """
    exchanges = list(_exchanges(example.messages))
    system = example.messages[: exchanges[0][0]]

    def part(first: int, end: int) -> Example:
        turns = example.messages[exchanges[first][0] : exchanges[end - 1][1]]
        return replace(example, id=f"{example.id}, part {len(parts) + 1}", messages=(*system, *turns))

    parts: list[Example] = []
    notes: list[RowNote] = []
    first = 0
    while first < len(exchanges):
        fits, beyond = first, len(exchanges) + 1
        while beyond - fits > 1:  # the largest end that fits: rows may have hundreds of turns
            middle = (fits + beyond) // 2
            if num_tokens(part(first, middle)) <= limit:
                fits = middle
            else:
                beyond = middle
        if fits == first:
            length = num_tokens(part(first, first + 1))
            place = f"messages {exchanges[first][0]} to {exchanges[first][1] - 1}"
            notes.append(
                RowNote(
                    example_id=example.id,
                    outcome="exchange dropped",
                    reason=f"{place} alone are too long: {length} tokens, at most {limit}",
                )
            )
            first += 1
        else:
            parts.append(part(first, fits))
            first = fits
    return parts, notes
