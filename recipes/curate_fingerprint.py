"""The hash that says whether a step of `vlpost curate` is the one that made a shard: settings, seed, files that they name, version."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .curate_step import StepContext
from .show import flat_values

MAX_HASHED_BYTES = 64 * 2**20
"""Larger files go by size and time of change, as weights do: reading 60 GB to find that nothing is new would be a step of its own."""
WRITTEN_KEYS = ("cache", "log_file")
"""Settings that name files which a run itself writes: what stands in them makes no step another one."""
_NUM_SHOWN = 5


def step_key(settings: Mapping[str, Any], context: StepContext) -> str:
    """Returns the SHA-256 of what a step is.

    A value that names a file or folder, as it stands or from the recipe's folder, counts with its content: a file of up to 64 MiB by its
    bytes, a larger one by size and time of change, a folder by the names, sizes and times of all that lies in it. What such a file
    names in turn, the images of a jsonl file say, is not looked at.
    """
    files = {text: found for text in sorted(set(_texts(settings))) if (found := _file_state(text, context)) is not None}
    described = {"settings": settings, "files": files, "seed": context.seed, "version": version("vlpost")}
    return hashlib.sha256(json.dumps(described, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def _texts(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, below in value.items():
            if key not in WRITTEN_KEYS:
                yield from _texts(below)
    elif isinstance(value, list | tuple):
        for below in value:
            yield from _texts(below)


def _file_state(text: str, context: StepContext) -> str | None:
    name = text.rpartition(":")[0] if ".py:" in text else text  # a reward plug-in is file.py:function
    if not any(mark in name for mark in "/.") or not name.strip("./"):  # `.` and `/` are folders, and never what a setting means
        return None
    for path in (Path(name), context.recipe_folder / name):
        try:
            if path.is_file():
                return _state_of_file(path)
            if path.is_dir():
                return _state_of_folder(path)
        except (OSError, ValueError):  # too long for a name, or with a zero byte: no file is called that
            continue
    return None


def _state_of_file(path: Path) -> str:
    status = path.stat()
    if status.st_size > MAX_HASHED_BYTES:
        return f"{status.st_size} bytes at {status.st_mtime_ns}"
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _state_of_folder(folder: Path) -> str:
    hasher = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            status = path.stat()
            hasher.update(f"{path.relative_to(folder)} {status.st_size} {status.st_mtime_ns}\n".encode())
    return hasher.hexdigest()


def changed_settings(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Returns which settings differ, `models.strong.min_solved: 0 -> 1`, or that it is something that they name."""
    old, new = dict(flat_values(before)), dict(flat_values(now))
    changes = [f"{key}: {old.get(key, 'absent')} -> {new.get(key, 'absent')}" for key in {**old, **new} if old.get(key) != new.get(key)]
    if not changes:
        return "the seed, a file that it names, or the version of vlpost"
    more = f" and {len(changes) - _NUM_SHOWN} more" if len(changes) > _NUM_SHOWN else ""
    return ", ".join(changes[:_NUM_SHOWN]) + more
