"""What the steps that ask a model share: the query in a conversation, its text with marks for images, the error when nobody answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from ..model.records import Example, Message, Part, TextPart
from ..rewards.answers import strip_thinking
from ..rewards.judge_prompt import turns
from ..rewards.manager import RewardUnavailableError

IMAGE_MARK = "[image]"
"""What stands for an image or video in the text that a judge reads, as `judge_prompt.turns` writes it."""


def query_messages(example: Example) -> tuple[Message, ...]:
    """Returns the messages up to the last that is not the assistant's: what a model is asked."""
    end = len(example.messages)
    while end and example.messages[end - 1].role == "assistant":
        end -= 1
    return example.messages[:end]


def as_query(example: Example) -> Example:
    """Returns the example without the assistant turns at its end."""
    messages = query_messages(example)
    return example if len(messages) == len(example.messages) else replace(example, messages=messages)


def given_answer(example: Example) -> str:
    """Returns the example's answer, else what is visible of the assistant turn at its end, else the empty text."""
    if example.answer.strip():
        return example.answer
    last = example.messages[-1]
    return (strip_thinking(last.text, prompt_suffix="") or "") if last.role == "assistant" else ""


def query_text(example: Example) -> str:
    """Returns the last user turn of the query, with a mark where an image or video stands."""
    return turns([last_user(example)[1]])[0]["text"]


def last_user(example: Example) -> tuple[int, Message]:
    """Returns the index and the message of the last user turn; of the last turn where no user speaks."""
    for index in range(len(example.messages) - 1, -1, -1):
        if example.messages[index].role == "user":
            return index, example.messages[index]
    return len(example.messages) - 1, example.messages[-1]


def with_query_text(example: Example, text: str) -> Example:
    """Returns the example with another last user turn; the marks in the text stand for the turn's own images, in order."""
    index, message = last_user(example)
    pieces = text.split(IMAGE_MARK)
    assert len(pieces) == len(message.media) + 1, "`rewrite_problem` counts the marks"
    parts: list[Part] = [TextPart(text=pieces[0])] if pieces[0] else []
    for media, piece in zip(message.media, pieces[1:], strict=True):
        parts.append(media)
        if piece:
            parts.append(TextPart(text=piece))
    messages = (*example.messages[:index], replace(message, parts=tuple(parts)), *example.messages[index + 1 :])
    return replace(example, messages=messages)


def unavailable(place: str, missing: Sequence[tuple[str, str]], *, num_asked: int) -> RewardUnavailableError:
    """Returns the error of a step that could not judge some rows: (row id, why) each. It ends the shard, so that an outage drops no row."""
    causes = Counter(reason for _, reason in missing)
    listed = "\n".join(f"  row {row_id}: {reason}" for row_id, reason in missing[:5])
    return RewardUnavailableError(
        f"{place}: {len(missing)} of {num_asked} could not be judged, by {len(causes)} causes; no row is dropped for that: mend them, "
        f"then resume, and the shard is done again:\n{listed}"
    )
