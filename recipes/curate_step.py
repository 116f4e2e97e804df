"""What the steps of `vlpost curate` take and return. No torch: a step that needs an engine imports it when it is opened."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ..model.records import Ending, Example, MediaPart, Turn


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """One response to the query of a row.

    Example: `Candidate(text="12", prompt_suffix="", finish_reason="stop", num_tokens=3, model="instruct", seed=7)`.
    """

    text: str
    """As sampled, without `prompt_suffix`."""
    prompt_suffix: str
    """What the chat template opened for the model, e.g. an opening think tag; empty for an Instruct model."""
    finish_reason: str
    """`stop` or `length`."""
    num_tokens: int
    """Sampled tokens."""
    model: str
    """Name of the model in the recipe."""
    seed: int
    with_image: bool = True
    """False: the model was shown the text alone."""
    value: float | None = None
    """The reward manager's value; None before `verify`, or where no judgement could be had."""
    notes: Mapping[str, Any] = field(default_factory=dict)
    """Plain JSON values, e.g. a judge's axes."""
    turns: tuple[Turn, ...] = ()
    """Of a conversation with tools; `text` is then its last turn."""
    ending: Ending = "one_turn"
    media: tuple[MediaPart, ...] = ()
    """What tools showed, in order."""
    tools: tuple[str, ...] = ()
    """Descriptions of the tools in the system turn, where the model was shown any."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CuratedRow:
    """A row on its way through the steps: `CuratedRow(example=example, notes={"complexity": 3})`."""

    example: Example
    """A query, which ends before the assistant's turn, or a whole conversation."""
    candidates: tuple[Candidate, ...] = ()
    notes: Mapping[str, Any] = field(default_factory=dict)
    """Plain JSON values, e.g. `{"pass_rate/instruct": 0.875}`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """What a step made of one shard."""

    rows: tuple[CuratedRow, ...]
    """Kept, in order."""
    dropped: tuple[tuple[str, str], ...] = ()
    """(row id, reason): a short sentence that a person understands; its head, before the first colon, is what is counted."""
    changed: tuple[tuple[str, str], ...] = ()
    """(row id, what was repaired or taken out); counted by the head too."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Counts by name, summed over the shards."""
    histogram: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """Title -> label of a bar -> count, summed over the shards, the bars in the order in which a step first names them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepContext:
    """Where a step runs: `StepContext(recipe_folder=Path("recipes"), output=Path("outputs/x"), seed=0)`."""

    recipe_folder: Path
    """What relative paths of rubrics and reward plug-ins are relative to."""
    output: Path
    """The run folder."""
    seed: int
    allow_code: bool = False
    """Whether reward plug-ins may come from files outside the recipe's folder (`--allow-code`)."""


class OpenStep(Protocol):
    """A step with what it needs: an engine, a judge, a sandbox, an index of what it has seen."""

    def run(self, rows: Sequence[CuratedRow], *, shard: int) -> StepResult:
        """Returns what becomes of the rows of a shard: a pure function of rows, seed and configuration."""
        ...


class Step(Protocol):
    """A step of a recipe."""

    def open(self, context: StepContext) -> AbstractContextManager[OpenStep]:
        """Returns the step ready to run; what it starts ends with the context."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class RowKey:
    """What can be known of a row without its pixels and candidates."""

    id: str
    source: str
    task: str
    digests: tuple[str, ...]
    """Of its images and videos, in order."""


class OrderedStep(OpenStep, Protocol):
    """A step whose verdict on a row depends on the rows that stood before it; it sees the shards in order."""

    def observe(self, kept: Sequence[CuratedRow]) -> None:
        """Takes in what was kept of a shard that an earlier process finished, so that a resumed run knows what the first would know."""
        ...


class WholeStep(OpenStep, Protocol):
    """A step whose verdict on a row depends on the whole data set."""

    def survey(self, keys: Sequence[RowKey]) -> None:
        """Takes in the keys of all rows, in order, before the first shard is run."""
        ...
