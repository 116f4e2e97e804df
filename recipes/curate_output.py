"""What `vlpost curate` leaves behind: parquet files for training, a manifest, a card, and a list of every dropped row."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa

from ..model.records import ImagePart, Part, TextPart
from .curate_card import cut_off_words, printed_histograms, write_card
from .curate_config import CurateRecipe
from .curate_rows import Pixels, as_conversations, png_files, read_shard, row_text, writable_candidates, write_table, write_text
from .curate_step import CuratedRow
from .show import flat_values

MANIFEST_FILE = "manifest.json"
DROPPED_FILE = "dropped.jsonl"
DATA_FOLDER = "data"
WHOLE_SPLIT = "train"
"""Split of rows that no `split` step has named one for."""
NUM_KEPT_EXAMPLES = 3
"""Rows named in the summary for each reason; all of them stand in `dropped.jsonl`."""

_CALL = pa.struct([("type", pa.string()), ("function", pa.struct([("name", pa.string()), ("arguments", pa.string())]))])
_PART = pa.struct(
    [
        ("type", pa.string()),
        ("text", pa.string()),
        ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        (
            "video",
            pa.struct(
                [
                    ("frames", pa.list_(pa.binary())),
                    ("fps", pa.float64()),
                    ("frame_indices", pa.list_(pa.int64())),
                    ("time_format", pa.string()),
                ]
            ),
        ),
    ]
)
_MESSAGE = pa.struct(
    [("role", pa.string()), ("content", pa.list_(_PART)), ("tool_calls", pa.list_(_CALL)), ("tools", pa.list_(pa.string()))]
)
DATA_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("messages", pa.list_(_MESSAGE)),
        ("answer", pa.string()),
        ("task", pa.string()),
        ("source", pa.string()),
        ("metadata", pa.string()),
        ("notes", pa.string()),
        ("candidates", pa.string()),
    ]
)
"""`metadata`, `notes` and `candidates` are JSON texts; an image is a PNG file under `bytes`."""


def summarise(recipe: CurateRecipe, steps: Sequence[tuple[str, str, Sequence[Mapping[str, Any]]]]) -> dict[str, Any]:
    """Returns what was done as plain JSON: each step's (name, use, shard manifests) added up over the shards."""
    return {
        "vlpost": version("vlpost"),
        "recipe": recipe.model_dump(mode="json"),
        "steps": [{**_summary_of_step(name, use, manifests), "settings": _given_settings(recipe, name)} for name, use, manifests in steps],
        "dropped": [
            {"step": name, "id": row_id, "reason": reason}
            for name, _, manifests in steps
            for manifest in manifests
            for row_id, reason in manifest["dropped"]
        ],
        "content": hashlib.sha256(
            json.dumps([recipe.write, recipe.max_per_query, *(manifest["content"] for manifest in steps[-1][2])]).encode()
        ).hexdigest(),
    }


def _summary_of_step(name: str, use: str, manifests: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    metrics: Counter[str] = Counter()
    histogram: dict[str, Counter[str]] = {}
    reasons: dict[str, dict[str, dict[str, Any]]] = {"dropped": {}, "changed": {}}
    for manifest in manifests:
        metrics.update(manifest["metrics"])
        for title, bars in manifest["histogram"].items():
            histogram.setdefault(title, Counter()).update(bars)
        for kind, by_head in reasons.items():
            for row_id, reason in manifest[kind]:
                found = by_head.setdefault(reason.partition(":")[0], {"count": 0, "rows": []})
                found["count"] += 1
                if len(found["rows"]) < NUM_KEPT_EXAMPLES:
                    found["rows"].append([row_id, reason])
    return {
        "name": name,
        "use": use,
        "shards": len(manifests),
        "rows_in": sum(manifest["rows_in"] for manifest in manifests),
        "rows_out": sum(manifest["rows_out"] for manifest in manifests),
        **{kind: dict(sorted(by_head.items(), key=lambda item: -item[1]["count"])) for kind, by_head in reasons.items()},
        "metrics": dict(sorted(metrics.items())),
        "histogram": histogram,
        "seconds": sum(manifest["seconds"] for manifest in manifests),
    }


def _given_settings(recipe: CurateRecipe, name: str) -> dict[str, Any]:
    """Returns the settings of a step that are not the default, by dotted key; none for the reading."""
    if name not in recipe.steps:
        return {}
    return {key: value for key, value in flat_values(recipe.steps[name].model_dump(mode="json", exclude_defaults=True)) if key != "use"}


def write_data_set(recipe: CurateRecipe, summary: dict[str, Any], *, shards: Sequence[Path]) -> None:
    """Writes the data set, its card and, last of all, `manifest.json`: while that is there, all of it is whole."""
    output = recipe.output
    dropped = summary.pop("dropped")
    if _is_whole(output, summary):
        print(f"{output}: the data set is whole, nothing was left to do", flush=True)
        return
    (output / MANIFEST_FILE).unlink(missing_ok=True)
    partial = output / f".partial-{DATA_FOLDER}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    summary["files"] = {}
    summary["cut_off"] = sum(
        _write_files(recipe, shard, place=place, folder=partial, files=summary["files"]) for place, shard in enumerate(shards)
    )
    shutil.rmtree(output / DATA_FOLDER, ignore_errors=True)
    partial.rename(output / DATA_FOLDER)
    write_text(output / DROPPED_FILE, "".join(f"{json.dumps(entry, ensure_ascii=False)}\n" for entry in dropped))
    write_card(output, summary)
    write_text(output / MANIFEST_FILE, json.dumps(summary, ensure_ascii=False, indent=1))
    for line in printed_histograms(summary):
        print(line)
    total = sum(file["rows"] for file in summary["files"].values())
    if summary["cut_off"]:
        print(f"{output}: {cut_off_words(summary['cut_off'])}", flush=True)
    print(f"{output}: {total} rows in {len(summary['files'])} files; README.md says what was done", flush=True)


def _is_whole(output: Path, summary: Mapping[str, Any]) -> bool:
    """Returns whether the folder holds this very data set already."""
    try:
        held = json.loads((output / MANIFEST_FILE).read_text(encoding="utf-8"))
        same = [held[key] == json.loads(json.dumps(summary[key])) for key in ("vlpost", "recipe", "steps", "content")]
        return all(same) and all((output / name).stat().st_size == file["bytes"] for name, file in held["files"].items())
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _write_files(recipe: CurateRecipe, shard: Path, *, place: int, folder: Path, files: dict[str, dict[str, Any]]) -> int:
    """Writes a shard's rows as a file for each split that they have; returns how many are conversations whose end was cut off."""
    read = read_shard(shard, decode=False)
    by_split: dict[str, list[CuratedRow]] = {}
    for row in read.rows:
        written = as_conversations(row, max_per_query=recipe.max_per_query) if recipe.write == "conversations" else [row]
        by_split.setdefault(row.notes.get("split", WHOLE_SPLIT), []).extend(written)
    for split, rows in by_split.items():
        if not rows:
            continue
        path = folder / f"{split}-{place:05d}.parquet"
        write_table(path, pa.Table.from_pylist([_columns(row, read.pixels) for row in rows], schema=DATA_SCHEMA))
        content = path.read_bytes()
        files[f"{DATA_FOLDER}/{path.name}"] = {
            "split": split, "rows": len(rows), "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest(),
        }  # fmt: skip
    if recipe.write == "rows":
        return 0
    return sum(candidate.finish_reason == "length" for row in read.rows for candidate in writable_candidates(row)[: recipe.max_per_query])


def _columns(row: CuratedRow, pixels: Pixels) -> dict[str, Any]:
    example, held = row.example, json.loads(row_text(row))
    return {
        "id": example.id,
        "messages": [
            {
                "role": message.role,
                "content": [_part(part, pixels) for part in message.parts],
                "tool_calls": [
                    {"type": "function", "function": {"name": call.name, "arguments": call.arguments}} for call in message.tool_calls
                ],
                "tools": list(message.tools),
            }
            for message in example.messages
        ],
        "answer": example.answer,
        "task": example.task,
        "source": example.source,
        **{key: json.dumps(held[key], ensure_ascii=False) for key in ("metadata", "notes", "candidates")},
    }


def _part(part: Part, pixels: Pixels) -> dict[str, Any]:
    if isinstance(part, TextPart):
        return {"type": "text", "text": part.text}
    encoded = pixels.get(part.digest) or png_files(part)
    if isinstance(part, ImagePart):
        return {"type": "image", "image": {"bytes": encoded[0], "path": f"{part.digest[:16]}.png"}}
    return {
        "type": "video",
        "video": {"frames": list(encoded), "fps": part.fps, "frame_indices": list(part.frame_indices), "time_format": part.time_format},
    }
