"""`vlpost show RECIPE --example N`: a training row as the model gets it, with what is trained, where images stand, and positions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console
from rich.text import Text
from torch import Tensor

from ..model.chat import Chat
from ..model.layout import Ranks
from ..model.records import Example, ImagePart, MediaPart, VlpostError
from ..sft.train import RowFitter
from .build import Workshop
from .example_stream import open_stream
from .load import LoadedRecipe
from .schema import EvaluateRecipe, ModelConfig, OffPolicyDistillRecipe, RolloutStageConfig, StageRecipe, TrainingRecipe
from .sft_phases import open_phases, plan_phases

_MARKS = {"trained": "+", "context": " ", "media": "#"}
_STYLES = {"trained": "bold green", "context": "default", "media": "cyan"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Stretch:
    """Neighbouring tokens of one kind.

    Example: an image of 2 x 3 tokens at the start of a row is `kind="media"`, `start=5`, `end=11`,
    `text="[image 1: 96 x 64 pixels, 6 tokens]"`, `positions="t 5, h 5..6, w 5..7"`.
    """

    kind: str
    """`trained`, `context` or `media`"""
    start: int
    end: int
    text: str
    positions: str
    """Range of each axis of the 3-D positions; one range where all axes agree."""


def print_example(loaded: LoadedRecipe, number: int, *, stage_name: str | None) -> None:
    """Prints training example `number` of the recipe: coloured on a terminal; elsewhere each line begins with `+`, `#` or a blank."""
    if number < 0:
        raise VlpostError(f"--example {number}: examples count from 0")
    name, stage = training_stage(loaded, stage_name)
    with TemporaryDirectory() as folder, Workshop(Path(folder), exports={}, ranks=Ranks()) as workshop:
        chat = workshop.load_chat(start_model(loaded, stage), seed=stage.seed)
    console = Console(highlight=False)
    for line in example_lines(stage, number, name=name, chat=chat):
        console.print(line, soft_wrap=True)


def training_stage(loaded: LoadedRecipe, name: str | None) -> tuple[str, TrainingRecipe | OffPolicyDistillRecipe]:
    """Returns the stage of that name, or the first that trains."""
    trains = {key: stage for key, stage in loaded.stages if not isinstance(stage, EvaluateRecipe)}
    wanted = name if name is not None else next(iter(trains), "")
    if wanted not in trains:
        raise VlpostError(f"{loaded.path}: --stage {wanted}: no training stage of that name, there are: {', '.join(trains) or 'none'}")
    return wanted, trains[wanted]


def start_model(loaded: LoadedRecipe, stage: StageRecipe) -> ModelConfig:
    """Returns where a stage's tokens come from: its model, or for the export of an earlier stage that stage's, which need not have run."""
    stages = dict(loaded.stages)
    model = stage.model
    while model.stage is not None:
        model = stages[model.stage].model
    return model


def example_lines(stage: TrainingRecipe | OffPolicyDistillRecipe, number: int, *, name: str, chat: Chat) -> Iterator[Text]:
    """Yields the lines about example `number` of the stage's training data, in the order in which the run sees it."""
    if isinstance(stage, RolloutStageConfig | OffPolicyDistillRecipe):
        (example,) = open_stream(stage.data, seed=stage.seed, with_solution=False).examples(number, 1)
        prompt = chat.encode_prompt(example.messages)
        yield _headline(example, f"{name}, number {number}", "a prompt: a model writes what is trained")
        yield from _token_lines(prompt.token_ids, (False,) * len(prompt.token_ids), prompt.media, chat)
        return
    plans = plan_phases(stage)
    (example,) = open_phases(plans, seed=stage.seed).examples(number, 1)
    plan = next(plan for plan in reversed(plans) if plan.first_example <= number)
    fitted = RowFitter(plan.config, chat=chat, token_budget=stage.learner.token_budget).fit(example)
    place = f"{name}, phase {plan.name}, number {number}" if plan.name else f"{name}, number {number}"
    num_sequences = sum(len(family) for family in fitted.families)
    yield _headline(example, place, f"{num_sequences} conversations" if num_sequences != 1 else "1 conversation")
    for note in fitted.notes:
        yield Text(f"{note.outcome}: {note.reason}", style="yellow")
    for sequence in (sequence for family in fitted.families for sequence in family):
        yield Text(f"{visible(sequence.place)}: {len(sequence.token_ids)} tokens, {sequence.num_trained_tokens} trained", style="bold")
        yield from _token_lines(sequence.token_ids, sequence.trained, sequence.media, chat)


def _headline(example: Example, place: str, what: str) -> Text:
    named = f"example {example.id} ({place}; task {example.task}, source {example.source}): {what}"
    return Text(visible(named), style="bold")


def _token_lines(token_ids: Sequence[int], trained: Sequence[bool], media: Sequence[MediaPart], chat: Chat) -> Iterator[Text]:
    for stretch in stretches(token_ids, trained, media, chat):
        place = f"{_MARKS[stretch.kind]} {stretch.start:>6}..{stretch.end - 1:<6} {stretch.positions:<14} "
        yield Text.assemble((place, "dim"), (stretch.text, _STYLES[stretch.kind]))


def stretches(token_ids: Sequence[int], trained: Sequence[bool], media: Sequence[MediaPart], chat: Chat) -> Iterator[Stretch]:
    """Yields the row as neighbouring tokens of one kind: all together hold each token once, in order."""
    positions = chat.positions(token_ids, media)
    names = _media_names(media, chat)
    start = 0
    while start < len(token_ids):
        kind, token_id = _kind(token_ids[start], trained[start], chat), token_ids[start]
        end = start + 1
        while (
            end < len(token_ids) and _kind(token_ids[end], trained[end], chat) == kind and (kind != "media" or token_ids[end] == token_id)
        ):
            end += 1
        text = f"[{next(names)}, {end - start} tokens]" if kind == "media" else visible(_decode(token_ids[start:end], chat))
        yield Stretch(kind=kind, start=start, end=end, text=text, positions=_ranges(positions[:, start:end]))
        start = end


def _kind(token_id: int, is_trained: bool, chat: Chat) -> str:
    if token_id in (chat.image_token_id, chat.video_token_id):
        return "media"
    return "trained" if is_trained else "context"


def _media_names(media: Sequence[MediaPart], chat: Chat) -> Iterator[str]:
    """Yields what each run of placeholders stands for: an image, or one temporal patch of a video."""
    num_images = num_videos = 0
    for part in media:
        if isinstance(part, ImagePart):
            num_images += 1
            yield f"image {num_images}: {part.image.width} x {part.image.height} pixels"
            continue
        num_videos += 1
        patches = chat.processed(part).grid[0]
        for patch in range(patches):
            yield f"video {num_videos}, patch {patch + 1} of {patches}: {part.frames[0].width} x {part.frames[0].height} pixels"


def _decode(token_ids: Sequence[int], chat: Chat) -> str:
    return chat.tokenizer.decode(list(token_ids), skip_special_tokens=False)


def _ranges(positions: Tensor) -> str:
    """Returns the range of each axis of positions [3, T], in one where they agree."""
    axes = [(int(axis.min()), int(axis.max())) for axis in positions]
    named = [str(low) if low == high else f"{low}..{high}" for low, high in axes]
    return named[0] if len(set(named)) == 1 else ", ".join(f"{axis} {text}" for axis, text in zip(("t", "h", "w"), named, strict=True))


def visible(text: str) -> str:
    """Returns the text on one line: a line end as `↵`, and what does not print (a terminal might obey it) as its escape."""
    return "".join(c if c.isprintable() else "↵" if c == "\n" else c.encode("unicode_escape").decode() for c in text)
