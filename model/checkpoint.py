"""Checkpoints that survive a kill at any moment, and export as a Hugging Face folder.

A folder is written aside, synced, listed in a manifest with sizes and SHA-256, and renamed into place: under its final name it is
whole or it was damaged later, and the manifest tells. Only safetensors and JSON are written and read, so that reading a checkpoint
never runs code. One process writes a checkpoint folder at a time.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .durable import sync_to_disk
from .records import VlpostError

logger = logging.getLogger(__name__)

_MANIFEST = "manifest.json"
_STATE = "state.json"
_STEP_FOLDER = re.compile(r"step-(\d{6,})")
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_SPACE_FACTOR = 1.1
"""Free bytes asked for per byte of tensors: headers, block rounding, and what others write meanwhile."""
_MAX_JSON_BYTES = 64 * 2**20


class CheckpointError(VlpostError):
    """A checkpoint or export that could not be written or read; the message names the folder, the fault and what to do."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """What a checkpoint folder holds.

    Example: `step-000012/` with `model.safetensors` and `state.json` gives `step=12`, `tensors={"model": {...}}`.
    """

    step: int
    tensors: Mapping[str, Mapping[str, Tensor]]
    """By file stem, then by name; on the CPU."""
    state: Mapping[str, Any]
    """Plain JSON values."""


class Saveable(Protocol):
    """A Hugging Face model, adapter or processor."""

    def save_pretrained(self, save_directory: str) -> Any:  # noqa: ANN401
        """Writes itself into a folder."""


def save_checkpoint(
    root: Path,
    step: int,
    *,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    keep: int,
    protect: Collection[int] = (),
) -> Path:
    """Writes `root/step-NNNNNN` and returns it once it would survive a kill or a power cut.

    Keeps the newest `keep` whole ones, and beside them those of the steps in `protect`.

    Tensors keep dtype, shape and bits. Tied or non-contiguous tensors are copied first: each name gets its own bytes in the file and
    comes back as its own tensor, so tie again after loading. `state` must be plain JSON that reads back equal: string keys, lists
    (no tuples), finite numbers.

    Steps go up. A whole checkpoint of this or a later step is an error, since a run resumed from `newest_checkpoint` cannot meet
    one: the folder belongs to another run, or the step is saved twice. A damaged one is moved aside as `.torn-step-NNNNNN`.

    Raises `CheckpointError` before writing if the disk has less free than 1.1 x the tensors' bytes + the state, and when a write
    fails; the partial folder is then gone and older checkpoints are untouched.
    """
    if step < 0 or keep < 1:
        raise CheckpointError(f"{root}: step = {step}, keep = {keep}: step must be at least 0 and keep at least 1")
    state_json = _encode_state(state)
    for stem, named in tensors.items():
        _check_names(stem, named)
    final = checkpoint_folder(root, step)
    partial = root / f".partial-{final.name}"
    needed = math.ceil(_SPACE_FACTOR * sum(t.numel() * t.element_size() for named in tensors.values() for t in named.values())) + len(
        state_json
    )
    try:
        root.mkdir(parents=True, exist_ok=True)
        _sweep(root)
        _make_way(root, step)
        free = shutil.disk_usage(root).free
        if free < needed:
            raise CheckpointError(
                f"{root}: step {step} needs {_megabytes(needed)} on disk and {_megabytes(free)} are free; nothing was written, "
                f"{_survivor(root)}; free some space, lower `keep`, or save elsewhere"
            )
        partial.mkdir()
        for stem, named in tensors.items():
            save_file(_independent(named), partial / f"{stem}.safetensors")
        (partial / _STATE).write_bytes(state_json)
        _seal(partial, {"step": step})
        partial.rename(final)
        sync_to_disk(root)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)  # what cannot be deleted now goes at the next save
        raise CheckpointError(
            f"{root}: step {step} could not be saved ({error}): {_megabytes(needed)} needed, {_free_space(root)}; "
            f"the partial folder was removed, {_survivor(root)}; free some space or mend the disk, then save again"
        ) from error
    _retain(root, final, keep, protect)
    return final


def saved_steps(root: Path) -> list[int]:
    """Returns the steps that have a checkpoint folder, whole or not, in order; `checkpoint_folder` tells where."""
    return [step for step, _ in _step_folders(root)]


def checkpoint_folder(root: Path, step: int) -> Path:
    """Returns where the checkpoint of a step lies."""
    return root / f"step-{step:06d}"


def newest_checkpoint(root: Path) -> Path | None:
    """Returns the newest checkpoint whose manifest verifies (sizes and hashes), or None; skipped ones are logged with what is wrong."""
    for _, folder in reversed(_step_folders(root)):
        damage = find_damage(folder)
        if damage is None:
            return folder
        logger.warning("checkpoint %s skipped: %s", folder, damage)
    return None


def load_checkpoint(path: Path) -> Checkpoint:
    """Returns the contents of a checkpoint folder, verified against its manifest first; damage is a `CheckpointError` that names it."""
    damage = find_damage(path)
    if damage is not None:
        raise CheckpointError(f"{path}: not a whole checkpoint: {damage}; `newest_checkpoint` finds the newest whole one")
    manifest = json.loads(_read_json(path / _MANIFEST))
    if "step" not in manifest or _STATE not in manifest["files"]:
        raise CheckpointError(f"{path}: an exported model, not a checkpoint: its manifest has no step or no {_STATE}")
    strange = [name for name in manifest["files"] if name != _STATE and not name.endswith(".safetensors")]
    if strange:
        raise CheckpointError(
            f"{path}: lists {strange[0]!r}: a checkpoint holds {_STATE} and .safetensors files and nothing that could run; "
            "it is not one of ours, do not use it"
        )
    stems = [name.removesuffix(".safetensors") for name in manifest["files"] if name != _STATE]
    try:
        tensors = {stem: load_file(path / f"{stem}.safetensors") for stem in stems}
        state = json.loads(_read_json(path / _STATE))
    except (SafetensorError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the manifest fits and a file cannot be read ({error}); it is not one of ours") from error
    return Checkpoint(step=manifest["step"], tensors=tensors, state=state)


def _read_json(path: Path) -> bytes:
    """Returns the bytes of a JSON file, bounded: ours have kilobytes."""
    size = path.stat().st_size
    if size > _MAX_JSON_BYTES:
        raise ValueError(f"{path.name} has {_megabytes(size)}, at most {_megabytes(_MAX_JSON_BYTES)} are read")
    return path.read_bytes()


def find_damage(folder: Path) -> str | None:
    """Returns what is wrong with a saved or exported folder, by its manifest, or None when every file is there bit for bit.

    Files that the manifest does not list are not looked at and never read.
    """
    try:
        manifest = json.loads(_read_json(folder / _MANIFEST))
    except OSError as error:
        return f"{_MANIFEST} cannot be read ({error.strerror})"
    except (ValueError, RecursionError) as error:
        return f"{_MANIFEST} is not JSON ({error})"
    files = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(files, dict) or not all(isinstance(entry, dict) for entry in files.values()):
        return f"{_MANIFEST} lists no files"
    named_step = _STEP_FOLDER.fullmatch(folder.name)
    if named_step is not None and manifest.get("step") != int(named_step[1]):
        return f"{_MANIFEST} is of step {manifest.get('step')}"
    for name, entry in files.items():
        path = folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            return f"{_MANIFEST} lists {name!r}, which lies outside the folder"
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != entry.get("bytes"):
            return f"{name} has {path.stat().st_size} bytes, the manifest says {entry.get('bytes')}"
        if _sha256(path) != entry.get("sha256"):
            return f"{name} has another SHA-256 than the manifest says"
    return None


def _check_names(stem: str, named: Mapping[str, Tensor]) -> None:
    if not _PLAIN_NAME.fullmatch(stem):
        raise CheckpointError(f"tensor file {stem!r}: the name must be of letters, digits, '_', '-' and '.', it becomes a file name")
    for name, tensor in named.items():
        if name == "__metadata__":
            raise CheckpointError(f"tensor {stem}/{name}: safetensors keeps this name for itself; choose another")
        if tensor.layout != torch.strided or tensor.is_meta:
            raise CheckpointError(
                f"tensor {stem}/{name} is {'on the meta device' if tensor.is_meta else tensor.layout}: only dense tensors can be saved"
            )


def _independent(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors contiguous and without shared memory, which safetensors refuses; copies only where it must."""
    seen: set[tuple[torch.device, int]] = set()
    independent: dict[str, Tensor] = {}
    for name, tensor in named.items():
        storage = (tensor.device, tensor.untyped_storage().data_ptr())
        plain = tensor.detach().resolve_conj().resolve_neg()
        independent[name] = plain.clone(memory_format=torch.contiguous_format) if storage in seen else plain.contiguous()
        seen.add(storage)
    return independent


def _encode_state(state: Mapping[str, Any]) -> bytes:
    _check_json(state, "state")
    return json.dumps(state, allow_nan=False, indent=1).encode()


def _check_json(value: object, place: str) -> None:
    """Raises unless the value reads back from JSON as it is; `json` itself would turn tuples and number keys into something else."""
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise CheckpointError(f"{place}: key {key!r} is a {type(key).__name__}: keys must be strings, JSON has no other")
            _check_json(item, f"{place}.{key}")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            _check_json(item, f"{place}[{index}]")
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise CheckpointError(f"{place} = {value}: JSON has no such number; save None or a finite number")
    elif not isinstance(value, str | int | None):
        raise CheckpointError(f"{place} is a {type(value).__name__}: state is plain JSON (dict, list, str, int, float, bool, None)")


def _seal(folder: Path, head: Mapping[str, Any]) -> None:
    """Syncs every file of the folder, then its manifest, then the folders themselves."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    files = {}
    for path in paths:
        sync_to_disk(path)
        files[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
    (folder / _MANIFEST).write_text(json.dumps({"format": 1, **head, "files": files}, indent=1), encoding="utf-8")
    sync_to_disk(folder / _MANIFEST)
    for inner in folder.rglob("*"):
        if inner.is_dir():
            sync_to_disk(inner)
    sync_to_disk(folder)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _step_folders(root: Path) -> list[tuple[int, Path]]:
    if not root.is_dir():
        return []
    found = [(match, path) for path in root.iterdir() if path.is_dir() and (match := _STEP_FOLDER.fullmatch(path.name))]
    return sorted((int(match[1]), path) for match, path in found)


def _sweep(root: Path) -> None:
    """Removes what a killed save or a killed deletion left behind."""
    for path in [*root.glob(".partial-step-*"), *root.glob(".deleted-step-*")]:
        shutil.rmtree(path)


def _make_way(root: Path, step: int) -> None:
    for found, folder in _step_folders(root):
        if found < step:
            continue
        damage = find_damage(folder)
        if damage is None:
            raise CheckpointError(
                f"{root}: step {step} cannot be saved beside the whole checkpoint {folder.name}: steps only go up; resume from that one, "
                "delete it, or save to another folder"
            )
        aside = root / f".torn-{folder.name}"
        if aside.exists():
            shutil.rmtree(aside)
        logger.warning("checkpoint %s moved to %s: %s", folder, aside.name, damage)
        folder.rename(aside)


def _retain(root: Path, newest: Path, keep: int, protect: Collection[int]) -> None:
    """Deletes whole checkpoints beyond the newest `keep`; a folder without its files is not counted and left for a person to look at."""
    older = [(step, folder) for step, folder in reversed(_step_folders(root)) if folder != newest and (folder / _MANIFEST).is_file()]
    for folder in [folder for step, folder in older[keep - 1 :] if step not in protect]:
        deleted = root / f".deleted-{folder.name}"
        try:
            folder.rename(deleted)  # first the name, so that a kill during the deletion leaves no torn checkpoint
            shutil.rmtree(deleted)
        except OSError as error:
            logger.warning("old checkpoint %s could not be deleted (%s); the new one is saved, the next save tries again", folder, error)


def _survivor(root: Path) -> str:
    folders = _step_folders(root)
    return f"the previous checkpoint {folders[-1][1].name} is intact" if folders else "there was no checkpoint before it"


def _free_space(root: Path) -> str:
    try:
        return f"{_megabytes(shutil.disk_usage(root).free)} free"
    except OSError as error:
        return f"free space unknown ({error.strerror})"


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"


def export_model(
    folder: Path, *, model: Saveable, processor: Saveable, adapter_of: str | None = None, weights: Mapping[str, Tensor] | None = None
) -> Path:
    """Writes model and processor as a Hugging Face folder with our manifest, and returns it once it would survive a power cut.

    `weights`, as the hub names and lays them out, are written in place of the model's own, where those are shards.
    A model with an adapter is written merged, itself only read; with `adapter_of`, the folder or hub name of its base, only the
    adapter is written, as peft and vLLM load it.

    Written aside and renamed into place. An earlier export (a folder with a manifest) is replaced: it is renamed to `.old-<name>`,
    then deleted; between the two renames a kill leaves the old export under that name, and the next export puts it back first. A
    folder that is neither empty nor an export is never replaced. Raises `CheckpointError` when writing fails or the model's
    or the processor's files are not there afterwards.
    """
    # Not at the top: transformers takes seconds to import, and saving or reading a checkpoint does without it.
    from .experts import GatheredModel, save_model
    from .lora import exportable

    model = exportable(model, adapter_of=adapter_of) if weights is None else GatheredModel(model=model, weights=weights)
    partial, old = folder.with_name(f".partial-{folder.name}"), folder.with_name(f".old-{folder.name}")
    try:
        if old.exists() and not folder.exists():
            old.rename(folder)
        if folder.exists() and any(folder.iterdir()) and not (folder / _MANIFEST).is_file():
            raise CheckpointError(
                f"{folder}: holds files and no {_MANIFEST}, so it is not an export and is not replaced; export to another folder"
            )
        for stale in (partial, old):
            if stale.exists():
                shutil.rmtree(stale)
        partial.mkdir(parents=True)
        save_model(model, partial)
        processor.save_pretrained(str(partial))
        _check_export(partial, folder)
        _seal(partial, {})
        if folder.exists():
            folder.rename(old)
        partial.rename(folder)
        sync_to_disk(folder.parent)
        if old.exists():
            shutil.rmtree(old)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        if old.exists() and not folder.exists():
            old.rename(folder)
        raise CheckpointError(
            f"{folder}: the model could not be exported ({error}), {_free_space(folder.parent)}; an earlier export is untouched; "
            "free some space or mend the disk, then export again"
        ) from error
    return folder


def _check_export(partial: Path, folder: Path) -> None:
    written = {path.relative_to(partial).as_posix() for path in partial.rglob("*") if path.is_file()}
    wanted = {
        "the model's configuration": {"config.json", "adapter_config.json"},
        "the weights": {name for name in written if name.endswith(".safetensors")},
        "the tokenizer": {"tokenizer_config.json"},
        "the processor": {"processor_config.json", "preprocessor_config.json"},
        "the chat template": {"chat_template.jinja", "chat_template.json"},
    }
    missing = [what for what, names in wanted.items() if not names & written]
    if missing:
        shutil.rmtree(partial)
        raise CheckpointError(
            f"{folder}: {', '.join(missing)} missing after save_pretrained, which wrote {sorted(written)}; nothing was replaced"
        )
