"""General reinforcement learning: form, mixed languages, repetition and reasoning before and after, on held-out scans.

`python benchmarks/general_rl.py [--quick] [--seeds N ...] [--output FOLDER]`: half an hour on two cores. A seed runs
`vlpost run recipes/nano_general_rl.yaml`: supervised fine-tuning on rows of which a known share are bad examples, then SAPO with rewards
for answers and form and penalties for mixing and repetition. Both models are measured by the same recipe on the same held-out questions,
by sampling at temperature 1:

- form: share of the responses to `constrained` questions that meet every constraint;
- mixing: share of the responses to `mixing` questions that go on in another language than they were asked in;
- repetition: mean share of a response that repeats itself;
- reasoning: accuracy on `add` and `arithmetic`; habit: accuracy on `counter`, whose rows contradict what the first stage taught.

Bars: the first three each better, reasoning not lower by more than two points, on every seed. The value is the lowest margin over the bars,
in accuracy. Ends with one JSON line. `--quick`: one seed and few steps: it shows that the script works and proves nothing.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from vlpost.recipes.run_log import installed_versions

ROOT = Path(__file__).resolve().parent.parent
RECIPE = ROOT / "recipes" / "nano_general_rl.yaml"
STAGES = {"before": "evaluate_sft", "after": "evaluate_general_rl"}
MAX_LOSS = 0.02
"""Of reasoning."""
QUICK = ("stages.sft.sft.num_steps=4", "stages.general_rl.rl.num_steps=1", "stages.general_rl.rl.prompts_per_step=4",
         *(f"stages.{stage}.evaluate.{key}" for stage in STAGES.values() for key in ("num_examples=20", "num_samples=2")))  # fmt: skip


def run(folder: Path, seed: int, *, is_quick: bool) -> None:
    """Runs the recipe with the command line."""
    command = [sys.executable, "-m", "vlpost.recipes.run", "run", str(RECIPE), f"output={folder}", f"common.seed={seed}"]
    subprocess.run([*command, *(QUICK if is_quick else ())], check=True, stdout=sys.stderr)


def figures(folder: Path, stage: str, num_samples: int) -> dict[str, float]:
    """Returns what an evaluation measured, by the names above."""
    measured = json.loads((folder / stage / "evaluation.json").read_text())

    def mean(name: str) -> float:
        return measured[f"{name}/avg@{num_samples}/1"]

    return {
        "form": mean("reward/form"),
        "mixing": -mean("reward/mixing"),
        "repetition": mean("reward/repetition"),
        "reasoning": (mean("task/add") + mean("task/arithmetic")) / 2,
        "habit": mean("task/counter"),
    }


def compare(seed: int, before: dict[str, float], after: dict[str, float]) -> dict[str, Any]:
    """Returns one seed's row, with the margin over each bar."""
    margins = {
        "form": after["form"] - before["form"],
        "mixing": before["mixing"] - after["mixing"],
        "repetition": before["repetition"] - after["repetition"],
        "reasoning": after["reasoning"] - before["reasoning"] + MAX_LOSS,
    }
    return {"seed": seed, "before": before, "after": after, "margins": margins, "ok": all(margin > 0 for margin in margins.values())}


def print_row(row: dict[str, Any]) -> None:
    """Prints one seed to stderr, before and after in percent."""
    cells = [f"{name} {row['before'][name]:.1%} -> {row['after'][name]:.1%}" for name in row["before"]]
    print(f"seed {row['seed']}: {', '.join(cells)}", file=sys.stderr)


def main() -> int:
    """Measures, prints a line a seed to stderr and one JSON line to stdout."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=ROOT / "outputs" / "benchmark_general_rl")
    arguments = parser.parse_args()
    shutil.rmtree(arguments.output, ignore_errors=True)
    rows = []
    for seed in [0] if arguments.quick else arguments.seeds:
        folder = arguments.output / f"seed{seed}"
        run(folder, seed, is_quick=arguments.quick)
        recipe = yaml.safe_load((folder / "recipe.resolved.yaml").read_text())
        found = [figures(folder, stage, recipe["stages"][stage]["evaluate"]["num_samples"]) for stage in STAGES.values()]
        rows.append(compare(seed, *found))
        print_row(rows[-1])
    result = {
        "name": "general_rl",
        "value": float(min(margin for row in rows for margin in row["margins"].values())),
        "unit": "accuracy, smallest margin over the bars of form, mixing, repetition and reasoning, all seeds",
        "bar": 0.0,
        "ok": all(row["ok"] for row in rows),
        "rows": rows,
        "command": " ".join(["python", "benchmarks/general_rl.py", *sys.argv[1:]]),
        "versions": installed_versions(),
    }
    print(json.dumps(result))
    return 0 if result["ok"] or arguments.quick else 1


if __name__ == "__main__":
    sys.exit(main())
