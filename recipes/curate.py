"""`vlpost curate RECIPE`: a data set through steps, shard by shard, in a way that a kill at any moment loses at most one shard.

The data set is read into shards of `shard_rows` rows under `steps/00-read`. Step after step, each shard becomes one file of the step's
folder with a manifest beside it: what went in and out, every drop with its reason, seconds, and three hashes: of the step (its settings,
the files that they name, the seed, the library's version), of the rows that went in, of the rows that came out. A shard is whole when
its manifest is there and all of it fits; whole shards are skipped. So a killed run goes on where it was, a recipe that has changed is
done again from the first step that has, and a later shard whose rows turn out the same is not done again.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from ..model.records import Example, VlpostError
from ..rewards.manager import RewardManager
from .curate_config import STEP_FOLDER, CurateRecipe, VerifyConfig
from .curate_engine_config import ImageNecessityConfig
from .curate_fingerprint import changed_settings, step_key
from .curate_output import summarise, write_data_set
from .curate_registry import BuiltStep, build_step
from .curate_rows import read_keys, read_shard, rows_hash, write_shard, write_text
from .curate_source import BadRow, finite_examples, source_rows
from .curate_step import CuratedRow, OpenStep, OrderedStep, StepContext, StepResult, WholeStep

READ = "read"
STEPS_FOLDER = "steps"
STEP_FILE = "step.json"
SHARDS_FILE = "shards.json"
LOCK_FILE = ".lock"
NUM_PRINTED_REASONS = 3
"""Reasons for dropped rows that a step's line on the console names."""


class CurateError(VlpostError):
    """A run of `vlpost curate` that cannot go on; the message names step, shard and what to do."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardManifest:
    """What a step made of one shard, as it stands beside the shard's file."""

    step: str
    """Hash of the step."""
    input: str
    """Hash of what the shard's rows were made from."""
    content: str
    """Hash of the rows that came out."""
    sha256: str
    """Of the shard's file."""
    rows_in: int
    rows_out: int
    dropped: tuple[tuple[str, str], ...]
    changed: tuple[tuple[str, str], ...]
    metrics: Mapping[str, float]
    histogram: Mapping[str, Mapping[str, int]]
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class DoneStep:
    """A step all of whose shards are whole."""

    name: str
    use: str
    folder: Path
    manifests: tuple[ShardManifest, ...]
    num_reused: int
    """Shards that were whole before this process began."""


def curate(recipe: CurateRecipe, *, recipe_folder: Path, allow_code: bool, check_interrupt: Callable[[], None] = lambda: None) -> Path:
    """Runs the recipe, or what is left of it, and returns the output folder. Says on standard output what it does.

    `check_interrupt` is called before each shard of a step; what it raises ends the run, and whole shards are kept. Raises `CurateError`
    when another process works in the folder or a step does not account for its rows; steps raise their own errors.
    """
    steps = {name: build_step(config) for name, config in recipe.steps.items()}  # a step that cannot be built is an error now
    recipe.output.mkdir(parents=True, exist_ok=True)
    context = StepContext(recipe_folder=recipe_folder, output=recipe.output, seed=recipe.seed, allow_code=allow_code)
    with _locked(recipe.output):
        done = [_read(recipe, context)]
        for number, (name, built) in enumerate(steps.items(), start=1):
            done.append(_run_step(built, name=name, number=number, before=done[-1], context=context, check_interrupt=check_interrupt))
        _remove_others(recipe.output / STEPS_FOLDER, [step.folder.name for step in done])
        summary = summarise(recipe, [(step.name, step.use, [asdict(manifest) for manifest in step.manifests]) for step in done])
        write_data_set(recipe, summary, shards=[shard_file(done[-1].folder, place) for place in range(len(done[-1].manifests))])
    return recipe.output


def check_curate(recipe: CurateRecipe, *, recipe_folder: Path, allow_code: bool) -> list[str]:
    """Returns a line for each data set, step and reward after a look at what can be known without running: first rows, rewards' options."""
    lines: list[str] = []
    for name, config in recipe.data.items():
        rows = finite_examples(config, conversations=recipe.rows == "conversations", seed=recipe.seed, place=f"data.{name}")
        first = next(rows, None)
        if first is None:
            raise CurateError(f"data.{name}: there is no row that can be used; give at least one")
        lines.append(f"data {name}: its first row is {first.id}")
    for name, config in recipe.steps.items():
        build_step(config)
        lines.append(f"step {name}: {config.use}")
        if isinstance(config, VerifyConfig | ImageNecessityConfig):
            manager = RewardManager(config.rewards, recipe_folder=recipe_folder, allow_code=allow_code)
            lines += [f"step {name}: reward {line}" for line in manager.describe()]
    return lines


@contextmanager
def _locked(output: Path) -> Iterator[None]:
    """Holds the folder: two processes that write the same shards would each find the other's half."""
    with (output / LOCK_FILE).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CurateError(f"{output}: another `vlpost curate` works in this folder; wait for it, or give another output") from error
        yield


def _say(words: str) -> None:
    print(words, flush=True)


def shard_file(folder: Path, place: int) -> Path:
    """Returns where the rows of a step's shard lie; its manifest lies beside it, with `.json`."""
    return folder / f"shard-{place:05d}.parquet"


# ---------------------------------------------------------------- manifests


def _whole(folder: Path, place: int, *, step: str, source: str) -> ShardManifest | None:
    """Returns the manifest of a shard that is whole and was made by this step from these rows, or None."""
    path = shard_file(folder, place)
    try:
        held = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        manifest = ShardManifest(**{**held, **{key: tuple(map(tuple, held[key])) for key in ("dropped", "changed")}})
        is_ours = manifest.step == step and manifest.input == source
        return manifest if is_ours and _sha256(path) == manifest.sha256 else None
    except (OSError, ValueError, KeyError, TypeError):  # not there, half of a disk's block, or of another version: done again
        return None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _finish(folder: Path, place: int, manifest: ShardManifest) -> None:
    write_text(shard_file(folder, place).with_suffix(".json"), json.dumps(asdict(manifest), ensure_ascii=False, indent=1))


def _enter(folder: Path, *, key: str, settings: Mapping[str, Any], name: str) -> None:
    """Makes a step's folder ready and says when its shards were made by other settings."""
    folder.mkdir(parents=True, exist_ok=True)
    for partial in folder.glob(".partial-*"):
        partial.unlink()
    path = folder / STEP_FILE
    described = {"step": key, "settings": settings}
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        before = None
    if before is not None and before["step"] != key:
        _say(f"{name}: changed ({changed_settings(before['settings'], settings)}); it is done again")
    if before != described:
        write_text(path, json.dumps(described, ensure_ascii=False, indent=1))


def _remove_others(steps: Path, wanted: Sequence[str]) -> None:
    """Removes the folders of steps that the recipe no longer has."""
    for folder in steps.iterdir():
        if folder.name not in wanted and STEP_FOLDER.fullmatch(folder.name):
            _say(f"{folder.name}: no longer in the recipe; its shards are removed")
            shutil.rmtree(folder)


def _remove_behind(folder: Path, num_shards: int) -> None:
    """Removes shards of a longer data set that an earlier run has left."""
    for path in folder.glob("shard-*"):
        if int(path.stem.removeprefix("shard-")) >= num_shards:
            path.unlink()


# ---------------------------------------------------------------- reading


def _read(recipe: CurateRecipe, context: StepContext) -> DoneStep:
    """Reads the data sets into shards; what an earlier process read is not read again, except to find the place where it was."""
    folder = recipe.output / STEPS_FOLDER / f"00-{READ}"
    settings = {
        "data": {name: config.model_dump(mode="json") for name, config in recipe.data.items()},
        "rows": recipe.rows,
        "shard_rows": recipe.shard_rows,
    }
    key = step_key(settings, context)
    _enter(folder, key=key, settings=settings, name=READ)
    manifests: list[ShardManifest] = []
    while (whole := _whole(folder, len(manifests), step=key, source=str(len(manifests)))) is not None:
        manifests.append(whole)
    num_reused = len(manifests)
    if _num_shards(folder, key) != num_reused:
        rows = source_rows(recipe, start=sum(manifest.rows_in for manifest in manifests))
        seen = {row.id for place in range(num_reused) for row in read_keys(shard_file(folder, place))}
        started = time.perf_counter()
        while (result := _next_shard(rows, num_rows=recipe.shard_rows, seen=seen)) is not None:
            place, rows_in = len(manifests), len(result.rows) + len(result.dropped)
            manifests.append(_write(folder, place, result, step=key, source=str(place), rows_in=rows_in, pixels={}, started=started))
            started = time.perf_counter()
        if not manifests:
            raise CurateError("data: there is no row; give at least one")
        _remove_behind(folder, len(manifests))
        write_text(folder / SHARDS_FILE, json.dumps({"step": key, "num_shards": len(manifests)}))
    rows_in, rows_out = sum(manifest.rows_in for manifest in manifests), sum(manifest.rows_out for manifest in manifests)
    bad = f", {rows_in - rows_out} bad rows left out" if rows_in > rows_out else ""
    _say(f"{READ}: {rows_out} rows in {_shards(len(manifests))}{bad}{_reused(num_reused)}")
    return DoneStep(name=READ, use=READ, folder=folder, manifests=tuple(manifests), num_reused=num_reused)


def _next_shard(rows: Iterator[Example | BadRow], *, num_rows: int, seen: set[str]) -> StepResult | None:
    """Returns the next so many usable rows with the bad ones among them, or None behind the last row."""
    kept: list[CuratedRow] = []
    dropped: list[tuple[str, str]] = []
    for row in rows:
        if isinstance(row, BadRow):
            dropped.append((row.id, row.reason))
            continue
        if row.id in seen:
            raise CurateError(f"data: row id {row.id!r} is there twice; ids seed the sampling and must differ")
        seen.add(row.id)
        kept.append(CuratedRow(example=row))
        if len(kept) == num_rows:
            break
    return StepResult(rows=tuple(kept), dropped=tuple(dropped)) if kept or dropped else None


def _num_shards(folder: Path, key: str) -> int | None:
    """Returns how many shards the data set has, None when no process has read it to its end."""
    try:
        held = json.loads((folder / SHARDS_FILE).read_text(encoding="utf-8"))
        return held["num_shards"] if held["step"] == key else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _shards(number: int) -> str:
    return f"{number} shard{'' if number == 1 else 's'}"


def _reused(number: int) -> str:
    return f", {number} of them from before" if number else ""


# ---------------------------------------------------------------- steps


def _run_step(
    built: BuiltStep, *, name: str, number: int, before: DoneStep, context: StepContext, check_interrupt: Callable[[], None]
) -> DoneStep:
    """Runs a step over the shards that are not whole; with none of those it is not even opened."""
    folder = context.output / STEPS_FOLDER / f"{number:02d}-{name}"
    key = step_key(built.settings, context)
    _enter(folder, key=key, settings=built.settings, name=name)
    inputs = _inputs([manifest.content for manifest in before.manifests], order=built.order)
    manifests = [_whole(folder, place, step=key, source=source) for place, source in enumerate(inputs)]
    missing = [place for place, manifest in enumerate(manifests) if manifest is None]
    num_reused = len(manifests) - len(missing)
    if missing:
        with built.step.open(context) as opened:
            if built.order == "whole":
                keys = [key for place in range(len(inputs)) for key in read_keys(shard_file(before.folder, place))]
                cast("WholeStep", opened).survey(keys)
            for place in range(missing[-1] + 1):
                if manifests[place] is None:
                    check_interrupt()
                    manifests[place] = _run_shard(
                        opened, place, name=name, key=key, source=inputs[place], before=before.folder, folder=folder, decode=built.decode
                    )
                elif built.order == "ordered":
                    cast("OrderedStep", opened).observe(read_shard(shard_file(folder, place), decode=built.decode).rows)
    _remove_behind(folder, len(inputs))
    done = tuple(manifest for manifest in manifests if manifest is not None)
    assert len(done) == len(inputs), "every shard is whole now"
    rows_in, rows_out = sum(manifest.rows_in for manifest in done), sum(manifest.rows_out for manifest in done)
    _say(f"{name}: {rows_in} rows in, {rows_out} out, {_shards(len(done))}{_reused(num_reused)}{_reasons(done)}")
    return DoneStep(name=name, use=built.settings["use"], folder=folder, manifests=done, num_reused=num_reused)


def _reasons(manifests: Sequence[ShardManifest]) -> str:
    """Returns the heads of the reasons for which rows were dropped, the most frequent first; the card has them with examples."""
    heads = Counter(reason.partition(":")[0] for manifest in manifests for _, reason in manifest.dropped)
    listed = [f"{head} {count}" for head, count in heads.most_common(NUM_PRINTED_REASONS)]
    more = [f"{len(heads) - len(listed)} other reasons"] if len(heads) > len(listed) else []
    return f"; dropped: {', '.join([*listed, *more])}" if heads else ""


def _inputs(contents: Sequence[str], *, order: str) -> list[str]:
    """Returns the hash of what each shard's result depends on: its own rows, those before it too, or all."""
    if order == "any":
        return list(contents)
    hasher = hashlib.sha256()
    chain: list[str] = []
    for content in contents:
        hasher.update(content.encode())
        chain.append(hasher.hexdigest())
    if order == "ordered":
        return chain
    return [hashlib.sha256(f"{chain[-1]} {content}".encode()).hexdigest() for content in contents]


def _run_shard(
    opened: OpenStep, place: int, *, name: str, key: str, source: str, before: Path, folder: Path, decode: bool
) -> ShardManifest:
    started = time.perf_counter()
    shard = read_shard(shard_file(before, place), decode=decode)
    try:
        result = opened.run(shard.rows, shard=place)
    except VlpostError as error:
        raise CurateError(f"step {name}, shard {place}: {error}\nWhole shards are kept; the same command goes on here.") from error
    _refuse_unaccounted(result, shard.rows, place=f"step {name}, shard {place}")
    manifest = _write(folder, place, result, step=key, source=source, rows_in=len(shard.rows), pixels=shard.pixels, started=started)
    _say(f"  {name}, shard {place}: {manifest.rows_in} rows in, {manifest.rows_out} out, {manifest.seconds:.1f} s")
    return manifest


def _refuse_unaccounted(result: StepResult, rows: Sequence[CuratedRow], *, place: str) -> None:
    """Raises a `CurateError` unless each row was kept, in order, or dropped with a reason."""
    kept, dropped = [row.example.id for row in result.rows], [row_id for row_id, _ in result.dropped]
    gone = set(dropped)
    if (
        len(gone) < len(dropped)
        or kept != [row.example.id for row in rows if row.example.id not in gone]
        or len(kept) + len(gone) != len(rows)
    ):
        raise CurateError(
            f"{place}: {len(rows)} rows in, {len(kept)} kept and {len(dropped)} dropped do not add up row by row, or their order has "
            "changed; the step has a fault, nothing of this shard was written"
        )


def _write(
    folder: Path,
    place: int,
    result: StepResult,
    *,
    step: str,
    source: str,
    rows_in: int,
    pixels: Mapping[str, tuple[bytes, ...]],
    started: float,
) -> ShardManifest:
    """Writes a shard and then its manifest: without the second, the first does not count."""
    path = shard_file(folder, place)
    write_shard(path, result.rows, pixels=pixels)
    manifest = ShardManifest(
        step=step,
        input=source,
        content=rows_hash(result.rows),
        sha256=_sha256(path),
        rows_in=rows_in,
        rows_out=len(result.rows),
        dropped=result.dropped,
        changed=result.changed,
        metrics=dict(result.metrics),
        histogram={title: dict(bars) for title, bars in result.histogram.items()},
        seconds=time.perf_counter() - started,
    )
    _finish(folder, place, manifest)
    return manifest
