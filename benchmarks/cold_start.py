r"""Thinking against answering at once: sums of two handwritten two-digit numbers, learned from the same rows with and without the steps.

`python benchmarks/cold_start.py [--quick] [--seeds N ...] [--output FOLDER]`: three quarters of an hour on two cores. A seed runs
`vlpost run recipes/nano_cold_start.yaml` (the thinking nano), then the same recipe on the answers alone with the template that opens no
think block, for as long as the thinking nano's trained tokens last it. That run never sees a row twice, and is measured on the held-out
scans as it goes, on the questions that the thinking nano is measured on. Compared are

- equal examples: the answer-only nano has seen the same rows, each once;
- equal seconds: its updates have taken as long as the thinking nano's (validation and saving do not count for either);
- equal trained tokens: its targets are as many; it then has seen several times as many rows.

The thinking nano is measured once, when its training has ended. The answer-only nano counts with the best of its measurements until it has
drawn level, the first one at or beyond that point included, which can only favour it. Accuracy is taken greedily and by sampling at
temperature 1, and the smaller gain counts. Ends with one JSON line. `--quick`: one seed and few steps: it shows that the script works and
proves nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import yaml
from transformers import AutoTokenizer
from vlpost.recipes.handwriting import handwriting_examples
from vlpost.recipes.run_log import installed_versions

ROOT = Path(__file__).resolve().parent.parent
RECIPE = ROOT / "recipes" / "nano_cold_start.yaml"
STAGE = "stages.cold_start"
MIN_GAIN = 0.10
COMPARISONS = ("examples", "seconds", "trained_tokens")
MEASURES = ("greedy", "sampled")
HELD_OUT = {"num_examples": 400, "num_samples": 2, "data.split": "test"}
QUICK = {"num_examples": 8}


@dataclass(frozen=True, kw_only=True, slots=True)
class Mark:
    """A measurement: what the updates before it have cost, and the accuracy."""

    examples: int
    seconds: float
    trained_tokens: float
    greedy: float
    sampled: float


def run(folder: Path, seed: int, *, every: int, is_quick: bool, overrides: tuple[str, ...] = ()) -> list[Mark]:
    """Runs the recipe with measurements on held-out scans every so many steps, and returns these in order."""
    measuring = HELD_OUT | (QUICK if is_quick else {}) | {"every": every}
    validation = [f"{STAGE}.validation.{key}={value}" for key, value in measuring.items()]
    # The recipe's own evaluation would measure once more what the last of these has measured.
    evaluation = [f"stages.evaluate.evaluate.{key}=1" for key in ("num_examples", "num_samples")]
    command = [sys.executable, "-m", "vlpost.recipes.run", "run", str(RECIPE), f"output={folder}", f"common.seed={seed}"]
    subprocess.run([*command, *validation, *evaluation, *overrides], check=True, stdout=sys.stderr)
    per_step = stage_of(folder)["sft"]["examples_per_step"]
    examples, seconds, tokens = 0, 0.0, 0.0
    marks = []
    for record in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()):
        values = record["values"]
        if "trained_tokens" in values:
            examples, seconds, tokens = examples + per_step, seconds + values["time/step_s"], tokens + values["trained_tokens"]
        if "validation/greedy" in values:
            greedy, sampled = values["validation/greedy"], values["validation/accuracy"]
            marks.append(Mark(examples=examples, seconds=seconds, trained_tokens=tokens, greedy=greedy, sampled=sampled))
    return marks


def stage_of(folder: Path) -> dict:
    """Returns the training stage as it ran, every value written out."""
    return yaml.safe_load((folder / "recipe.resolved.yaml").read_text())["stages"]["cold_start"]


def tokens_per_answer(folder: Path) -> float:
    """Returns the mean number of trained tokens of an answer alone: its own and the one that ends the turn."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = handwriting_examples("train", tasks={"sum2": 1.0}, num_examples=300, seed=0, with_solution=True)
    return 1 + sum(len(tokenizer(row.messages[-1].text)["input_ids"]) for row in rows) / len(rows)


def train_both(folder: Path, seed: int, num_steps: int, is_quick: bool) -> tuple[Mark, list[Mark]]:
    """Trains the thinking nano and then the answer-only nano until each cost of the first is met; returns one mark and many."""
    steps = f"{STAGE}.sft.num_steps"
    (thinking,) = run(folder / "thinking", seed, every=num_steps, is_quick=is_quick, overrides=(f"{steps}={num_steps}",))
    every = max(1, num_steps // 2)
    per_step = stage_of(folder / "thinking")["sft"]["examples_per_step"]
    needed = thinking.trained_tokens / (tokens_per_answer(folder / "thinking" / "cold_start" / "export") * per_step)
    # Whole marks, with a margin since the rows of the run may be a little shorter than those counted.
    last = math.ceil(1.03 * needed / every) * every
    tasks = [f"{key}.tasks={{sum2: 1.0}}" for key in ("common.data", f"{STAGE}.validation.data")]
    changes = ("common.model.nano.thinking=false", f"{steps}={last}", *tasks)
    return thinking, run(folder / "answers", seed, every=every, is_quick=is_quick, overrides=changes)


def compare(seed: int, thinking: Mark, answers: list[Mark]) -> list[dict]:
    """Returns a row for each comparison of one seed."""
    rows = []
    for comparison in COMPARISONS:
        level = [getattr(mark, comparison) >= getattr(thinking, comparison) for mark in answers]
        if not any(level):
            raise SystemExit(f"seed {seed}: the answer-only nano never drew level in {comparison}: {answers[-1]} against {thinking}")
        until = answers[: level.index(True) + 1]
        row = {"seed": seed, "equal": comparison, "thinking_cost": getattr(thinking, comparison), "cost": getattr(until[-1], comparison)}
        row["num_examples"] = until[-1].examples
        for measure in MEASURES:
            best = max(getattr(mark, measure) for mark in until)
            row |= {f"thinking_{measure}": getattr(thinking, measure), f"answers_{measure}": best}
        row["gain"] = min(row[f"thinking_{measure}"] - row[f"answers_{measure}"] for measure in MEASURES)
        rows.append(row)
    return rows


def print_table(rows: list[dict]) -> None:
    """Prints the comparisons to stderr, accuracies in percent."""
    names = (
        "seed",
        "equal",
        "thinking_cost",
        "cost",
        "num_examples",
        *(f"{who}_{m}" for m in MEASURES for who in ("thinking", "answers")),
        "gain",
    )
    print("  ".join(names), file=sys.stderr)
    for row in rows:
        cells = [f"{row[name]:.1%}" if name.endswith((*MEASURES, "gain")) else f"{row[name]}" for name in names[5:]]
        costs = [str(row["seed"]), row["equal"], f"{row['thinking_cost']:.0f}", f"{row['cost']:.0f}", str(row["num_examples"])]
        print("  ".join(cell.rjust(len(name)) for cell, name in zip([*costs, *cells], names, strict=True)), file=sys.stderr)


def main() -> int:
    """Measures, prints a table to stderr and one JSON line to stdout."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=ROOT / "outputs" / "benchmark_cold_start")
    arguments = parser.parse_args()
    shutil.rmtree(arguments.output, ignore_errors=True)
    recipe_steps = yaml.safe_load(RECIPE.read_text())["stages"]["cold_start"]["sft"]["num_steps"]
    seeds, num_steps = ([0], 4) if arguments.quick else (arguments.seeds, recipe_steps)
    marks, rows = [], []
    for seed in seeds:
        thinking, answers = train_both(arguments.output / f"seed{seed}", seed, num_steps, arguments.quick)
        marks.append({"seed": seed, "thinking": asdict(thinking), "answers": [asdict(mark) for mark in answers]})
        rows += compare(seed, thinking, answers)
        print_table(rows)
    gains = {name: sum(row["gain"] for row in rows if row["equal"] == name) / len(seeds) for name in COMPARISONS}
    result = {
        "name": "cold_start",
        "value": min(gains.values()),
        "unit": "accuracy on held-out sums, thinking less answer-only, mean of the seeds, smallest of equal examples, seconds and tokens",
        "bar": MIN_GAIN,
        "ok": min(gains.values()) >= MIN_GAIN and min(row["gain"] for row in rows) > 0,
        "rows": {"gains": gains, "comparisons": rows, "marks": marks},
        "command": " ".join(["python", "benchmarks/cold_start.py", *sys.argv[1:]]),
        "versions": installed_versions(),
    }
    print(json.dumps(result))
    return 0 if result["ok"] or arguments.quick else 1


if __name__ == "__main__":
    sys.exit(main())
