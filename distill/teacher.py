"""A teacher in this process: a frozen model that reads the student's token ids, images and positions and says what it would draw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from PIL import Image, ImageOps
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from ..model.chat import Chat
from ..model.config import LearnerConfig
from ..model.layout import build_accelerator, is_sharded, machine_dtype
from ..model.learner import Distribution, Policy, frozen_states
from ..model.packing import Batch, pack, weigh
from ..model.records import DataError, Example, ImagePart, MediaPart, TrainSequence, VideoPart, VlpostError
from ..model.reference import FrozenCopy, ReferenceStates, SparseStates
from ..model.vision import vision_pass

_SHARED_VISION_FIELDS = ("patch_size", "temporal_patch_size", "spatial_merge_size")
_SHARED_IDS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
_SCORED_TOKENS = 8
_PROBE_PIXELS = 96
BLIND_GAP = 1e-6
"""Nats: a teacher whose log-probs all stay within this when its image is another one does not see images."""


class TeacherError(VlpostError):
    """A teacher that cannot read what the student writes, or does not see what it sees."""


class Teacher:
    """A frozen model, laid out over processes as the student is."""

    def __init__(self, model: PreTrainedModel, *, name: str, config: LearnerConfig, tasks: Sequence[str] = ()) -> None:
        """`name` is what messages call it; `tasks` are those that it teaches, none: whatever no other teacher names."""
        self.name = name
        self.tasks = tuple(tasks)
        self._is_sharded = is_sharded(config.layout)
        dtype = machine_dtype(config.dtype)
        self._accelerator = build_accelerator(config.layout, dtype)
        self._copy = FrozenCopy(Policy(model), config=config, accelerator=self._accelerator, dtype=dtype)

    def states(self, batch: Batch[Any], distribution: Distribution) -> ReferenceStates:
        """Returns its log-probs of the batch's targets and the hidden states and head that its whole distribution follows from.

        Temperature and allowed ids are the student's; ids, images and positions are those of the batch, computed once.
        """
        on_device = batch.to(self._accelerator.device)

        def compute(model: PreTrainedModel) -> ReferenceStates:
            vision = vision_pass(model.model, on_device.vision, must_run=self._is_sharded)
            return frozen_states(model, on_device, distribution, vision=vision, copy=self._copy)

        return self._copy.run(compute)

    def states_of(
        self, batches: Sequence[Batch[Any]], distribution: Distribution, student_ids: Sequence[Tensor] | None = None
    ) -> list[ReferenceStates]:
        """Returns `states` of each batch; the student's ids are of no use to it, as its whole distribution is there."""
        return [self.states(batch, distribution) for batch in batches]


class ScoringTeacher(Protocol):
    """What the stage needs of a teacher, in this process or behind a server."""

    name: str
    tasks: tuple[str, ...]

    def states_of(
        self, batches: Sequence[Batch[Any]], distribution: Distribution, student_ids: Sequence[Tensor] | None = None
    ) -> Sequence[ReferenceStates | SparseStates]:
        """Returns what it says of each batch's targets; `student_ids`, [N, k] a batch, are the student's most likely ids where the
        support has them.
        """
        ...


def check_sight(
    teacher: ScoringTeacher, sequence: TrainSequence[Any], blind: TrainSequence[Any], *, chat: Chat, distribution: Distribution
) -> float:
    """Returns the largest log-prob difference, nats, between a row and the same row about another image of the same size.

    Raises `TeacherError` where it is not above `BLIND_GAP`: the images do not reach the teacher.
    """
    seen = [
        teacher.states_of(pack(weigh([[row]], "token"), media=chat, token_budget=len(row.token_ids)), distribution)[0].logprobs
        for row in (sequence, blind)
    ]
    gap = (seen[0] - seen[1]).abs().max().item()
    if not gap > BLIND_GAP:
        raise TeacherError(
            f"teacher {teacher.name}: its log-probs in {sequence.place} stay the same (to {gap:.1e} nats) when the image is another one: "
            "it does not see images. Take a teacher that does, or train on text (distill.prompts: text)"
        )
    return gap


def sight_rows(example: Example, chat: Chat) -> tuple[TrainSequence[None], TrainSequence[None]]:
    """Returns the example's prompt with its last tokens to be scored, and the same with every colour of its images inverted."""
    prompt = chat.encode_prompt(example.messages)
    num_scored = min(_SCORED_TOKENS, len(prompt.token_ids) - 1)
    trained = (False,) * (len(prompt.token_ids) - num_scored) + (True,) * num_scored
    row = TrainSequence(place=f"example {example.id}", token_ids=prompt.token_ids, trained=trained, media=prompt.media, targets=None)
    return row, replace(row, media=tuple(_inverted(part) for part in prompt.media))


def _inverted(part: MediaPart) -> MediaPart:
    if isinstance(part, ImagePart):
        return ImagePart.from_image(ImageOps.invert(part.image.convert("RGB")))
    frames = [ImageOps.invert(frame.convert("RGB")) for frame in part.frames]
    return VideoPart.from_frames(frames, fps=part.fps, frame_indices=part.frame_indices, time_format=part.time_format)


def check_same_language(student: Chat, teacher: Chat, *, name: str) -> None:
    """Raises `TeacherError` unless the teacher's tokenizer has the student's ids, each with the same meaning.

    Heads may be padded to different lengths: ids beyond the tokenizer are never drawn.
    """
    ours, theirs = (chat.processor.tokenizer.get_vocab() for chat in (student, teacher))
    if ours != theirs:
        odd = sorted(token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token))
        raise TeacherError(
            f"teacher {name}: its tokenizer and the student's differ in {len(odd)} tokens, the first {odd[0]!r} (student "
            f"{ours.get(odd[0])}, teacher {theirs.get(odd[0])}): it cannot score the student's ids. Take a teacher of the same family"
        )


def check_same_images(student: PreTrainedModel, teacher: PreTrainedModel, *, name: str) -> None:
    """Raises `TeacherError` unless both models cut images into the same patches and mark them by the same ids."""
    check_same_patches(student.config, teacher.config, name=name)


def check_same_patches(student: PreTrainedConfig, teacher: PreTrainedConfig, *, name: str) -> None:
    """Raises `TeacherError` unless models of both settings cut images into the same patches and mark them by the same ids."""
    for where, fields in (("vision_config", _SHARED_VISION_FIELDS), ("config", _SHARED_IDS)):
        ours, theirs = (config if where == "config" else getattr(config, where) for config in (student, teacher))
        for field in fields:
            if getattr(ours, field) != getattr(theirs, field):
                raise TeacherError(
                    f"teacher {name}: {where}.{field} = {getattr(theirs, field)} and the student's is {getattr(ours, field)}: it "
                    "would read the student's image patches as something else. Take a teacher of the same family"
                )


def check_same_pixels(student: Chat, teacher: Chat, *, name: str) -> None:
    """Raises `TeacherError` unless both processors turn an image into the same numbers: a server uses the teacher's own."""
    ramp = bytes(index * 7 % 256 for index in range(3 * _PROBE_PIXELS**2))
    part = ImagePart.from_image(Image.frombytes("RGB", (_PROBE_PIXELS, _PROBE_PIXELS), ramp))
    ours, theirs = (chat.processed(part) for chat in (student, teacher))
    if ours.grid != theirs.grid or not torch.equal(ours.pixel_values, theirs.pixel_values):
        raise TeacherError(
            f"teacher {name}: its image processor makes other numbers of an image than the student's (size, mean or deviation differ): a "
            "server would show it another picture. Take a teacher of the same family, or one in this process (model, not serve)"
        )


def check_text_only(places: Sequence[tuple[str, bool]]) -> None:
    """Raises `DataError` naming the first row with an image or a video; `places` are (example id, has media)."""
    for place, has_media in places:
        if has_media:
            raise DataError(
                f"example {place} has an image or a video, and distill.prompts is text: give text rows, or write distill: "
                "{prompts: multimodal} and let the teacher see them"
            )
