"""The reward `coherence`: a judge model's verdict on the reasoning of a whole conversation with tools.

Qwen3-VL's second reward of thinking with images (arXiv:2511.21631, 4.5): is what the tools answered read correctly, and is the answer
reached by coherent reasoning? The judge is shown all turns, thinking included, as one record; that is the only difference to `llm_judge`,
which sees the visible part of the last turn. The report gives no prompt, no scale and no weight: the rubric is ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import Field

from ..model.config import Settings
from ..model.records import Example, Message, Rollout, ToolAnswer, Turn
from .answers import THINK_CLOSE, THINK_OPEN
from .built_in import BuiltInReward, Row, TimedVerdict
from .config import RewardsConfig
from .llm_judge import LlmJudge, LlmJudgeOptions, open_llm_judge

_NAMED_TAGS = {THINK_OPEN: "[thinking] ", THINK_CLOSE: " [end of thinking] "}


class CoherenceOptions(Settings):
    """Options of `coherence`."""

    rubric: str = "coherence"
    """`coherence`, or a YAML file of kind axes, its path relative to the recipe."""
    weights: dict[str, float] = Field(default_factory=dict)
    """Weights of axes in the value, in place of the rubric's."""
    images: bool = False
    """True: the prompt's images and those that tools showed are sent along as PNG, in order."""
    max_record_chars: int = Field(default=16_000, ge=200)
    """A longer record is shown by its beginning and end, characters; so is a longer turn of the prompt."""


def transcript(rollout: Rollout) -> str:
    """Returns all turns of a conversation as text, a line each for words, calls and results; of any other response its one turn.

    Think tags become words, since a judge's template knows them too; `[image]` stands for an image that a tool showed.
    """
    turns = rollout.turns or (
        Turn(text=rollout.text, prompt_suffix=rollout.prompt_suffix, words=rollout.text.strip(), calls=(), answers=()),
    )
    lines = []
    for number, turn in enumerate(turns, start=1):
        words = turn.prompt_suffix + (turn.words or ("" if turn.calls or turn.answers else turn.text))
        for tag, name in _NAMED_TAGS.items():
            words = words.replace(tag, name)
        if words.strip():
            lines.append(f"Turn {number}, the assistant writes: {words.strip()}")
        lines += [f"Turn {number}, call: {call.name} {call.arguments}" for call in turn.calls]
        lines += [_result_line(number, answer) for answer in turn.answers]
    if rollout.ending in ("turns", "context", "length"):
        lines.append("The conversation was cut off here, before an answer.")
    return "\n".join(lines)


def _result_line(number: int, answer: ToolAnswer) -> str:
    return f"Turn {number}, result{' (an error)' if answer.is_error else ''}: {answer.text}{'[image]' * answer.num_images}"


class Coherence:
    """Shows whole conversations to a judge."""

    def __init__(self, judge: LlmJudge, *, images: bool) -> None:
        self._judge = judge
        self._images = images

    @property
    def is_unsafe(self) -> bool:
        """False: a judge reads, it runs nothing."""
        return False

    def describe(self) -> str:
        """Returns which model judges by which rubric."""
        return self._judge.describe()

    def judge(self, rows: Sequence[Row]) -> list[TimedVerdict]:
        """Returns a verdict for each row, in order; raises what `LlmJudge.judge` raises, which ends the run."""
        return self._judge.judge([self._shown(example, rollout) for example, rollout in rows])

    def _shown(self, example: Example, rollout: Rollout) -> Row:
        if self._images:
            from_tools = rollout.media[len(example.media) :]
            example = replace(example, messages=(*example.messages, Message(role="tool", parts=from_tools))) if from_tools else example
        return example, replace(rollout, text=transcript(rollout), prompt_suffix="")


@contextmanager
def open_coherence(options: CoherenceOptions, config: RewardsConfig, recipe_folder: Path | None) -> Iterator[Coherence]:
    """Yields the judge of one component; components with equal `rewards.judge` share one server and client."""
    asked = LlmJudgeOptions(
        rubric=options.rubric, weights=options.weights, images=options.images, max_response_chars=options.max_record_chars
    )
    with open_llm_judge(asked, config, recipe_folder) as judge:
        yield Coherence(judge, images=options.images)


def _open(options: Any, config: RewardsConfig, recipe_folder: Path | None) -> Any:  # noqa: ANN401
    return open_coherence(options, config, recipe_folder)


REWARDS: Mapping[str, BuiltInReward] = {
    "coherence": BuiltInReward(
        summary="verdict of a judge model on a whole conversation with tools: are results read correctly, does the answer follow",
        value_range=(0.0, 1.0),
        gold_response=None,
        service=_open,
        options=CoherenceOptions,
    ),
}
