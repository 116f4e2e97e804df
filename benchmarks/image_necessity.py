"""The image-necessity filter on rows whose truth is known: precision and recall of what it drops.

`python benchmarks/image_necessity.py [--quick] [--output FOLDER]`: half an hour on two cores. Trains nanos of three seeds by the SFT recipe
below on the training scans, then filters questions about held-out scans: half of the `blind` rows name both digits in their text and can
be solved without the image, the other half name one of them and cannot. A dropped row counts as found. The filter drops what both models
of a pair solve; three pairs have the bar, and the value is the lower of precision and recall of the worst. What each model does alone
stands beside them: one that repeats one guess in all its tries loses precision. Ends with one JSON line. `--quick`: one pair, few steps
and rows: it shows that the script works and proves nothing. Training ends when the accuracy on the validation scans no longer rises; that
rule, tries, how many must be right, and temperature were chosen on the validation scans; the test scans are for this measurement alone.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

# Before the first import that brings torch or vllm.
os.environ.update({"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1"})
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from vlpost.recipes.curate_engine_config import ImageNecessityConfig
from vlpost.recipes.curate_necessity import ImageNecessityStep
from vlpost.recipes.curate_step import CuratedRow, StepContext
from vlpost.recipes.handwriting import handwriting_examples

ROOT = Path(__file__).resolve().parent.parent
BAR = 0.95
TRIES, MIN_SOLVED, TEMPERATURE, SHARD_ROWS = 6, 5, 1.0, 250
# Rows of `arithmetic` show no image: without them a nano has never seen a question without one.
RECIPE = """\
method: sft
trackers: []
model: {nano: {size: s}}
data: {use: handwriting, split: train, tasks: {blind: 3.0, arithmetic: 1.0}, languages: [en]}
rewards: {components: {answer: {use: count}}}
sampler: {max_response_tokens: 16, max_model_len: 192, max_images_per_prompt: 1, max_videos_per_prompt: 0}
sft: {num_steps: 1800, examples_per_step: 32, plateau: {patience: 2, min_gain: 0.005}}
learner: {learning_rate: 1.0e-3, warmup_steps: 20, weight_decay: 0.01, schedule: linear}
validation:
  every: 150
  num_examples: 300
  num_samples: 4
  greedy: false
  data: {use: handwriting, split: validation, tasks: {blind: 1.0}, languages: [en]}
"""


def train(folder: Path, seed: int, *, quick: bool) -> Path:
    """Trains a nano by the command line and returns its model folder."""
    folder.mkdir(parents=True)
    recipe = folder / "sft.yaml"
    recipe.write_text(RECIPE, encoding="utf-8")
    overrides = [f"output={folder / 'sft'}", f"seed={seed}", *(["sft.num_steps=10", "validation.num_examples=8"] if quick else [])]
    subprocess.run([sys.executable, "-m", "vlpost.recipes.run", "run", str(recipe), *overrides], check=True, stdout=sys.stderr)
    return folder / "sft" / "export"


def measure(folder: Path, models: Mapping[str, Path], *, num_rows: int, seed: int) -> dict:
    """Returns what the filter found among held-out rows; `seed` chooses rows and tries."""
    sampler = {
        "temperature": TEMPERATURE,
        "max_response_tokens": 16,
        "max_model_len": 192,
        "max_images_per_prompt": 1,
        "max_videos_per_prompt": 0,
    }
    config = ImageNecessityConfig.model_validate(
        {
            "use": "image_necessity",
            "tries": TRIES,
            "min_solved": MIN_SOLVED,
            "rewards": {"components": {"answer": {"use": "count"}}},
            "models": {name: {"path": str(path), "sampler": sampler} for name, path in models.items()},
        }
    )
    examples = handwriting_examples("test", tasks={"blind": 1.0}, languages=["en"], num_examples=num_rows, seed=seed, with_solution=False)
    dropped: set[str] = set()
    metrics: dict[str, float] = {}
    start = time.perf_counter()
    with ImageNecessityStep(config).open(StepContext(recipe_folder=folder, output=folder, seed=seed)) as step:
        for first in range(0, num_rows, SHARD_ROWS):
            rows = [CuratedRow(example=example) for example in examples[first : first + SHARD_ROWS]]
            result = step.run(rows, shard=first // SHARD_ROWS)
            dropped |= {row_id for row_id, _ in result.dropped}
            for name, value in result.metrics.items():
                metrics[name] = metrics.get(name, 0.0) + value
    solvable = {example.id for example in examples if not example.metadata["needs_image"]}
    found = len(dropped & solvable)
    return {
        "models": list(models),
        "rows": num_rows,
        "solvable": len(solvable),
        "dropped": len(dropped),
        "precision": found / len(dropped) if dropped else 0.0,
        "recall": found / len(solvable),
        "tries_right_frac": metrics["tries_solved"] / metrics["tries"],
        "chance_of_a_try": metrics["chance/tries_solved"] / (TRIES * len(models) * metrics["chance/rows_known"]),
        "chance_of_a_drop": metrics["chance/rows_solved"] / metrics["chance/rows_known"],
        "filter_s": time.perf_counter() - start,
    }


def main() -> None:
    """Measures, prints a table to stderr and one JSON line to stdout."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--output", type=Path, default=ROOT / "outputs" / "benchmark_image_necessity")
    arguments = parser.parse_args()
    shutil.rmtree(arguments.output, ignore_errors=True)
    seeds = (0, 1) if arguments.quick else (0, 1, 2)
    start = time.perf_counter()
    models = {f"seed{seed}": train(arguments.output / f"seed{seed}", seed, quick=arguments.quick) for seed in seeds}
    train_s = time.perf_counter() - start
    num_rows, rows = 40 if arguments.quick else 1000, []
    alone = [(name,) for name in models]
    for names in [*itertools.combinations(models, 2), *(() if arguments.quick else alone)]:
        found = measure(arguments.output, {name: models[name] for name in names}, num_rows=num_rows, seed=len(rows))
        rows.append({**found, "has_bar": len(names) > 1, "train_s": train_s})
        print(rows[-1], file=sys.stderr, flush=True)
    value = min(min(row["precision"], row["recall"]) for row in rows if row["has_bar"])
    result = {
        "name": "image_necessity",
        "value": value,
        "unit": "lower of precision and recall, worst pair of models",
        "bar": BAR,
        "ok": value >= BAR,
        "rows": rows,
        "command": " ".join(["python", "benchmarks/image_necessity.py", *sys.argv[1:]]),
        "versions": json.loads((arguments.output / "seed0" / "sft" / "versions.json").read_text()),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
