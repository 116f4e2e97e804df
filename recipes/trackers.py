"""Accelerate's trackers: where metrics go beside the run's own files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Trackers:
    """Accelerate's trackers: one a phase where they write to a folder (TensorBoard can then cut one phase), else one for the run."""

    def __init__(self, folder: Path, names: tuple[str, ...]) -> None:
        self.folder = folder
        self.names = names
        self._open: dict[tuple[str, str], Any] = {}
        self._purge_steps: dict[str, int] = {}

    def check(self) -> None:
        """Raises `ValueError` for a tracker that cannot work here; Accelerate itself would leave it out without a word."""
        if not self.names:
            return
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
        from accelerate.utils import LoggerType

        for name in self.names:
            if name not in LOGGER_TYPE_TO_CLASS:
                raise ValueError(f"tracker {name!r}: must be one of {', '.join(sorted(str(known) for known in LOGGER_TYPE_TO_CLASS))}")
            if name in LoggerType.list() and name not in {str(found) for found in get_available_trackers()}:
                raise ValueError(f"tracker {name!r}: its package is not installed; install it or take the tracker out of the recipe")

    def log(self, phase: str, step: int, values: Mapping[str, float]) -> None:
        """Hands a step's finite numbers to every tracker; raises `OSError` when one cannot write."""
        from_phase = {f"{phase}/{name}": value for name, value in values.items()}
        for name in self.names:
            tracker = self._tracker(name, phase)
            tracker.log(dict(values) if tracker.requires_logging_directory else from_phase, step=step)

    def _tracker(self, name: str, phase: str) -> Any:  # noqa: ANN401
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        cls: Any = LOGGER_TYPE_TO_CLASS[name]
        key = (name, phase if cls.requires_logging_directory else "")
        if key not in self._open:
            if cls.requires_logging_directory:
                purge = {"purge_step": self._purge_steps.pop(phase)} if name == "tensorboard" and phase in self._purge_steps else {}
                tracker = cls(phase, str(self.folder / name), **purge)
            else:
                tracker = cls(self.folder.name)
            tracker.start()
            self._open[key] = tracker
        return self._open[key]

    def purge_after(self, phase: str, step: int) -> None:
        """Makes TensorBoard forget the later steps of a phase, which will be done again."""
        self._purge_steps[phase] = step + 1
        if ("tensorboard", phase) in self._open:
            self._open.pop(("tensorboard", phase)).finish()

    def drop(self, phase: str) -> None:
        """Forgets the trackers of a phase that could not write; the next numbers open new ones."""
        for key in [key for key in self._open if key[1] in (phase, "")]:
            del self._open[key]

    def finish(self) -> None:
        """Closes all trackers."""
        for tracker in self._open.values():
            tracker.finish()
        self._open.clear()
