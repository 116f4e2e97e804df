"""A teacher's most likely ids at each trained token, read once and kept in files that are mapped into memory.

    soft_labels/labels.json           what they were made from, and the names of the parts
    soft_labels/00000/ids.npy         [N, K] int32      the trained token and the teacher's most likely ids
    soft_labels/00000/logprobs.npy    [N, K] float16    nats, over the whole vocabulary; -inf where an entry only fills the row
    soft_labels/00000/tail.npy        [N] float32       mass of all other ids
    soft_labels/00000/part.json       whose they are, and where the tokens of each sequence stand

A part is there whole or not at all, and so is `labels.json`, which is written last: a run that was killed makes what is missing.

16 bits hold a log-prob to one part in 2048, which moves the mass of an id by at most 0.5 % at 1 in 10,000 and less above; as a difference
from 1 the tail would be lost in that, so it is kept apart, and what is read is scaled to 1 less the tail.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch

from ..model.durable import sync_to_disk
from ..model.layout import Ranks
from ..model.packing import Batch, MediaSource, pack, weigh
from ..model.records import TrainSequence, VlpostError
from ..model.reference import SparseStates

MANIFEST = "labels.json"
PART_MANIFEST = "part.json"
FILES = {"ids": np.int32, "logprobs": np.float16, "tail": np.float32}
PART_SEQUENCES = 1000
"""Sequences of one part: what a killed run loses at most."""
_PARTIAL = ".partial"


_Part: TypeAlias = Mapping[str, np.ndarray]
"""The three arrays of a part."""


class SoftLabelsError(VlpostError):
    """Labels that do not belong to the rows that are trained on, or files that are not whole."""


def sequence_key(sequence: TrainSequence[Any]) -> str:
    """Returns a hash of token ids, of which are trained, and of images: labels of any other sequence are not its labels."""
    hasher = hashlib.sha256(np.asarray(sequence.token_ids, dtype=np.int64).tobytes())
    hasher.update(np.asarray(sequence.trained, dtype=np.bool_).tobytes())
    hasher.update("".join(part.digest for part in sequence.media).encode())
    return hasher.hexdigest()


def have_soft_labels(folder: Path, *, made_from: Mapping[str, Any]) -> bool:
    """Returns whether the folder holds whole labels that were made from this."""
    return _made_from(folder / MANIFEST) == json.loads(json.dumps(made_from))


def _made_from(manifest: Path) -> object:
    try:
        return json.loads(manifest.read_text(encoding="utf-8"))["made_from"]
    except (OSError, ValueError, KeyError, TypeError):  # not there, or half of a disk's block
        return None


def write_soft_labels(
    folder: Path,
    sequences: Sequence[tuple[str, TrainSequence[Any]]],
    *,
    states_of: Callable[[str], Callable[[Batch[Any]], SparseStates]],
    num_ids: int,
    media: MediaSource,
    token_budget: int,
    made_from: Mapping[str, Any],
    ranks: Ranks,
    part_sequences: int = PART_SEQUENCES,
) -> int:
    """Has each sequence read by the teacher whose name stands before it and writes what it says; returns how many parts were read now.

    `states_of(name)` opens a teacher, one after another, and none whose parts are whole; `num_ids` is how many ids a position has. Every
    rank reads, as a teacher may lie on all of them, and the first one writes. Raises `SoftLabelsError` without a sequence.
    """
    if not sequences:
        raise SoftLabelsError(f"{folder}: there is no row to read, each was left out as too long; raise sft.max_length")
    parts = _parts(sequences, part_sequences)
    keys = [{**made_from, "part": hashlib.sha256(" ".join(map(sequence_key, part)).encode()).hexdigest()} for _, part in parts]
    missing = [
        number for number, key in enumerate(keys) if _made_from(folder / _name(number) / PART_MANIFEST) != json.loads(json.dumps(key))
    ]
    missing = ranks.gather(missing)[0]  # the first may begin to write before another has looked
    if ranks.is_first:
        (folder / MANIFEST).unlink(missing_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
    for teacher in dict.fromkeys(parts[number][0] for number in missing):
        ask = states_of(teacher)
        for number in missing:
            if parts[number][0] == teacher:
                batches = pack(weigh([[sequence] for sequence in parts[number][1]], "token"), media=media, token_budget=token_budget)
                read = ((batch, ask(batch)) for batch in batches)
                if ranks.is_first:
                    _write_part(folder / _name(number), read, num_ids=num_ids, teacher=teacher, made_from=keys[number])
                else:
                    deque(read, maxlen=0)
        del ask  # the next teacher must not be loaded beside this one
    if ranks.is_first:
        wanted = [_name(number) for number in range(len(parts))]
        for path in folder.iterdir():
            if path.name not in wanted:
                shutil.rmtree(path)
        _put(folder / MANIFEST, json.dumps({"made_from": made_from, "parts": wanted}))
    ranks.wait()
    return len(missing)


def _parts(sequences: Sequence[tuple[str, TrainSequence[Any]]], size: int) -> list[tuple[str, list[TrainSequence[Any]]]]:
    """Returns the distinct sequences in parts of one teacher each; what two teachers wrote alike is read by the first."""
    distinct: dict[str, tuple[str, TrainSequence[Any]]] = {}
    for name, sequence in sequences:
        distinct.setdefault(sequence_key(sequence), (name, sequence))
    by_teacher: dict[str, list[TrainSequence[Any]]] = {}
    for name, sequence in distinct.values():
        by_teacher.setdefault(name, []).append(sequence)
    return [(name, own[start : start + size]) for name, own in by_teacher.items() for start in range(0, len(own), size)]


def _name(number: int) -> str:
    return f"{number:05d}"


def _write_part(
    folder: Path, read: Iterable[tuple[Batch[Any], SparseStates]], *, num_ids: int, teacher: str, made_from: Mapping[str, Any]
) -> None:
    """Writes what a teacher said of the batches under a name that is there whole or not at all."""
    partial = folder.with_name(_PARTIAL)
    for old in (partial, folder):
        shutil.rmtree(old, ignore_errors=True)
    partial.mkdir()
    places: dict[str, tuple[int, int]] = {}
    arrays: dict[str, list[np.ndarray]] = {name: [] for name in FILES}
    start = 0
    for batch, states in read:
        assert states.support_ids.shape == (len(batch.target_ids), num_ids), "a teacher names as many ids at every target"
        for name, values in _as_arrays(states).items():
            arrays[name].append(values)
        for sequence in batch.sequences:
            places[sequence_key(sequence)] = (start, sequence.num_trained_tokens)
            start += sequence.num_trained_tokens
    joined = {name: np.concatenate(values) for name, values in arrays.items()}
    for name, values in joined.items():
        np.save(partial / f"{name}.npy", values, allow_pickle=False)
        sync_to_disk(partial / f"{name}.npy")
    shapes = {name: values.shape for name, values in joined.items()}
    text = json.dumps({"made_from": made_from, "teacher": teacher, "shapes": shapes, "sequences": places})
    _put(partial / PART_MANIFEST, text)
    partial.rename(folder)
    sync_to_disk(folder.parent)


def _put(path: Path, text: str) -> None:
    """Writes a text under a name that is there whole or not at all, on the disk when this returns."""
    partial = path.with_name(f"{_PARTIAL}-{path.name}")
    partial.write_text(text, encoding="utf-8")
    sync_to_disk(partial)
    partial.rename(path)
    sync_to_disk(path.parent)


def _as_arrays(states: SparseStates) -> dict[str, np.ndarray]:
    """Returns what is written of a batch."""
    masses = torch.where(states.known, states.support_logprobs.double(), -torch.inf).exp()
    return {
        "ids": states.support_ids.cpu().numpy().astype(np.int32),
        "logprobs": torch.where(states.known, states.support_logprobs, -torch.inf).half().cpu().numpy(),
        "tail": (1.0 - masses.sum(dim=-1)).clamp_min(0.0).float().cpu().numpy(),
    }


class SoftLabels:
    """Labels on disk, by batch."""

    def __init__(self, folder: Path) -> None:
        """Raises `SoftLabelsError` for files that are not those of the manifest."""
        self.folder = folder
        self._places: dict[str, tuple[_Part, int, int]] = {}
        try:
            names = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["parts"]
            for name in names:
                manifest = json.loads((folder / name / PART_MANIFEST).read_text(encoding="utf-8"))
                part = _mapped(folder / name, manifest["shapes"])
                self._places |= {key: (part, start, start + count) for key, (start, count) in manifest["sequences"].items()}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SoftLabelsError(f"{folder}: no whole soft labels ({error}); remove the folder, they are made again") from error

    def states(self, batch: Batch[Any]) -> SparseStates:
        """Returns what the teacher said of the batch's targets; raises `SoftLabelsError` for a sequence that it has not read."""
        if not batch.sequences:  # what a rank computes while others still have batches
            nothing = torch.empty(0, 1)
            return SparseStates(logprobs=nothing[:, 0], support_ids=nothing.long(), support_logprobs=nothing, known=nothing > 0, metrics={})
        parts: dict[str, list[np.ndarray]] = {name: [] for name in FILES}
        for sequence in batch.sequences:
            place = self._places.get(sequence_key(sequence))
            if place is None:
                raise SoftLabelsError(
                    f"{self.folder}: no labels for the tokens of {sequence.place}: they are of other rows, or of rows that were cut or "
                    "masked in another way; remove the folder, they are made again"
                )
            part, start, end = place
            for name, file in part.items():
                parts[name].append(file[start:end])
        read = {name: torch.from_numpy(np.concatenate(arrays)) for name, arrays in parts.items()}
        ids, logprobs = read["ids"].long(), read["logprobs"].double()
        if not torch.equal(ids[:, 0], batch.target_ids.cpu()):
            raise SoftLabelsError(f"{self.folder}: the labels are of other tokens than are trained; remove the folder, they are made again")
        known = logprobs > -torch.inf
        mass = logprobs.exp().sum(dim=-1)
        exact = logprobs + torch.log((1.0 - read["tail"].double()) / mass)[:, None]
        exact = torch.where(known, exact, 0.0).float()
        return SparseStates(logprobs=exact[:, 0], support_ids=ids, support_logprobs=exact, known=known, metrics={})


def _mapped(folder: Path, shapes: Mapping[str, Sequence[int]]) -> _Part:
    """Returns the files of a part; raises `SoftLabelsError` for one of another shape or type than the manifest says."""
    files = {name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in FILES}
    for name, dtype in FILES.items():
        found = files[name]
        if list(found.shape) != shapes[name] or found.dtype != dtype:
            raise SoftLabelsError(
                f"{folder / name}.npy: {found.dtype} {found.shape}, {PART_MANIFEST} says {np.dtype(dtype)} {shapes[name]}; remove the "
                "folder, they are made again"
            )
    return files
