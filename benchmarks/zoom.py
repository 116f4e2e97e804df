"""Thinking with images: numbers that are legible only after zooming in, without the tool, after a cold start, and after RL with it.

`python benchmarks/zoom.py [--quick] [--seeds N ...] [--output FOLDER] [--resume]`: two hours on two cores. A seed runs the first stages of
`recipes/nano_zoom.yaml`; each model answers the same 400 held-out questions four times at temperature 1. A third of them needs no call, a
third one, a third two (`metadata.target_calls`). Bars, on every seed:

- accuracy after tool RL at least 15 points above that without the tool, and 5 above that of its own cold start;
- the number of calls is within 0.5 of the target on average, and Spearman's rank correlation with it at least 0.7;
- the reward for calls is above what a policy that always calls once would get, to which models slid that were paid for answers alone
  (arXiv:2511.21631, 4.5).

The value is the smallest margin of accuracy over its two bars, all seeds. Ends with one JSON line. `--quick`: one seed and few steps; it
shows that the script works and proves nothing.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from vlpost.recipes.run_log import installed_versions
from vlpost.recipes.runner import DONE_FILE

ROOT = Path(__file__).resolve().parent.parent
RECIPE = ROOT / "recipes" / "nano_zoom.yaml"
MEASURED = {"no_tool": "evaluate_no_tool", "cold_start": "evaluate_cold_start", "tool_rl": "evaluate_tool_rl"}
OVER_NO_TOOL, OVER_COLD_START = 0.15, 0.05
MAX_GAP, MIN_CORRELATION = 0.5, 0.7
TARGETS, CALLS = (0, 1, 2), (0, 1, 2, 3, 4)
"""A policy of at most four turns rarely calls more often; what it does above four counts as four."""
TOLERANCE = 2.0
"""Of the reward for calls, as in the recipe."""
SEEN = '''
def seen(example, rollout, *, target: int, calls: int) -> float:
    """1.0 for a conversation of so many calls about a row with that target."""
    return float(example.metadata["target_calls"] == target and min(rollout.num_tool_calls, 4) == calls)
'''
QUICK = {
    "sft": {"num_steps": 2, "examples_per_step": 4},
    "rl": {"num_steps": 1, "prompts_per_step": 4, "group_size": 2},
    "evaluate": {"num_examples": 9, "num_samples": 1},
}


def write_recipe(folder: Path, seed: int, *, is_quick: bool) -> Path:
    """Writes the recipe's first stages, their measurements with the number of calls by target."""
    chain: dict[str, Any] = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))
    chain["common"]["seed"] = seed
    chain["stages"] = {name: stage for name, stage in chain["stages"].items() if name in MEASURED or name in MEASURED.values()}
    seen: dict[str, Any] = {
        f"seen_{target}_{calls}": {"use": "seen.py:seen", "weight": 0.0, "options": {"target": target, "calls": calls}}
        for target in TARGETS
        for calls in CALLS
    }
    for name in MEASURED.values():
        chain["stages"][name]["rewards"] = {"components": {"answer": {"use": "count"}, **seen}}
    for stage in chain["stages"].values() if is_quick else ():
        for key, few in QUICK.items():
            if key in stage:
                stage[key] |= few
    (folder / "seen.py").write_text(SEEN, encoding="utf-8")
    path = folder / "recipe.yaml"
    whole = json.loads(json.dumps(chain))  # no part is shared: a recipe may hold no alias
    path.write_text(yaml.safe_dump(whole, sort_keys=False), encoding="utf-8")
    return path


def run(folder: Path, seed: int, *, is_quick: bool) -> dict[str, dict[str, float]]:
    """Runs a seed, unless an earlier call has finished it, and returns what each model's measurement gave."""
    if not all((folder / "run" / stage / DONE_FILE).exists() for stage in MEASURED.values()):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        recipe = write_recipe(folder, seed, is_quick=is_quick)
        command = [sys.executable, "-m", "vlpost.recipes.run", "run", str(recipe), f"output={folder / 'run'}"]
        subprocess.run(command, check=True, stdout=sys.stderr)
    return {
        model: figures(json.loads((folder / "run" / stage / "evaluation.json").read_text(encoding="utf-8")))
        for model, stage in MEASURED.items()
    }


def figures(measured: Mapping[str, float]) -> dict[str, float]:
    """Returns accuracy, and how the number of calls lies to the target, of one measurement."""
    (sampled,) = (name for name in measured if name.startswith("avg@"))
    joint = np.array([[measured[f"reward/seen_{target}_{calls}/{sampled}"] for calls in CALLS] for target in TARGETS])
    joint /= joint.sum()
    targets, calls = np.array(TARGETS)[:, None], np.array(CALLS)[None, :]
    of_target, of_calls = joint.sum(axis=1), joint.sum(axis=0)
    return {
        "accuracy": measured[sampled],
        "greedy": measured["greedy"],
        "mean_calls": float((joint * calls).sum()),
        "mean_gap": float((joint * np.abs(calls - targets)).sum()),
        "correlation": correlation(joint, _ranks(of_target)[:, None], _ranks(of_calls)[None, :]),
        "calls_reward": float((joint * np.maximum(0.0, 1.0 - np.abs(calls - targets) / TOLERANCE)).sum()),
        "always_one_call_reward": float((of_target * np.maximum(0.0, 1.0 - np.abs(1 - np.array(TARGETS)) / TOLERANCE)).sum()),
        **{f"target_{target}": float(of_target[target]) for target in TARGETS},
    }


def _ranks(shares: np.ndarray) -> np.ndarray:
    """Returns the mean rank of each value, as shares of all: ties have one rank."""
    return np.cumsum(shares) - shares / 2


def correlation(joint: np.ndarray, left: np.ndarray, right: np.ndarray) -> float:
    """Returns Pearson's correlation of two values by their joint distribution; of ranks it is Spearman's. 0 where one never changes."""
    left, right = left - (joint * left).sum(), right - (joint * right).sum()
    spread = float(np.sqrt((joint * left**2).sum() * (joint * right**2).sum()))
    return float((joint * left * right).sum()) / spread if spread > 1e-12 else 0.0


def compare(seed: int, found: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """Returns a seed's row, and whether it holds every bar."""
    trained = found["tool_rl"]
    margins = {
        "over_no_tool": trained["accuracy"] - found["no_tool"]["accuracy"] - OVER_NO_TOOL,
        "over_cold_start": trained["accuracy"] - found["cold_start"]["accuracy"] - OVER_COLD_START,
        "gap": MAX_GAP - trained["mean_gap"],
        "correlation": trained["correlation"] - MIN_CORRELATION,
        "over_always_one_call": trained["calls_reward"] - trained["always_one_call_reward"],
    }
    has_all_targets = all(trained[f"target_{target}"] > 0 for target in TARGETS)
    return {"seed": seed, **found, "margins": margins, "ok": has_all_targets and all(margin >= 0 for margin in margins.values())}


def print_row(row: Mapping[str, Any]) -> None:
    """Prints a seed to stderr, a model a line."""
    for model in MEASURED:
        found = row[model]
        print(
            f"seed {row['seed']} {model:12} accuracy {found['accuracy']:.1%}, greedy {found['greedy']:.1%}, "
            f"calls {found['mean_calls']:.2f}, gap {found['mean_gap']:.2f}, correlation {found['correlation']:.2f}, "
            f"reward for calls {found['calls_reward']:.2f} (always one call: {found['always_one_call_reward']:.2f})",
            file=sys.stderr,
        )


def main() -> int:
    """Measures, prints a table to stderr and one JSON line to stdout."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--resume", action="store_true", help="keep the seeds that are whole in the output folder")
    parser.add_argument("--output", type=Path, default=ROOT / "outputs" / "benchmark_zoom")
    arguments = parser.parse_args()
    if not arguments.resume:
        shutil.rmtree(arguments.output, ignore_errors=True)
    rows = []
    for seed in [0] if arguments.quick else arguments.seeds:
        rows.append(compare(seed, run(arguments.output / f"seed{seed}", seed, is_quick=arguments.quick)))
        print_row(rows[-1])
    result = {
        "name": "zoom",
        "value": float(min(row["margins"][name] for row in rows for name in ("over_no_tool", "over_cold_start"))),
        "unit": "accuracy, smallest margin of tool RL over its bars against no tool and cold start, all seeds",
        "bar": 0.0,
        "ok": all(row["ok"] for row in rows),
        "rows": rows,
        "command": " ".join(["python", "benchmarks/zoom.py", *sys.argv[1:]]),
        "versions": installed_versions(),
    }
    print(json.dumps(result))
    return 0 if result["ok"] or arguments.quick else 1


if __name__ == "__main__":
    sys.exit(main())
