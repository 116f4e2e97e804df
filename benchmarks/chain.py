"""The whole chain from one YAML: how long it takes, what each stage does to every task, and whether kills change anything.

`python benchmarks/chain.py [--quick] [--seed N] [--output FOLDER]`: an hour and a half on two cores. `vlpost run recipes/nano_chain.yaml`
runs twice: once undisturbed, whose minutes are the value; and once killed at two random moments (`kill -9` of all its processes) and
resumed with `--resume`. Bars: at most 45 minutes, engine starts and measurements included; every stage's weights and every response of an
evaluation equal to the undisturbed run's, byte for byte. Prints the accuracy of every task after every stage, on held-out scans. Ends
with one JSON line. `--quick`: few steps, and no learning from the teacher's responses, of which none is right after so few; it shows that
the script works and proves nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from vlpost.recipes.chain_summary import TABLE_FILE
from vlpost.recipes.run_log import EVENTS_FILE, installed_versions

ROOT = Path(__file__).resolve().parent.parent
RECIPE = ROOT / "recipes" / "nano_chain.yaml"
MAX_MINUTES = 45.0
NUM_KILLS = 2
QUICK_STEPS = {"sft": {"num_steps": 2}, "rl": {"num_steps": 1, "group_size": 2}, "distill": {"num_steps": 1, "prompts_per_step": 16}}
QUICK_EVALUATION = {"num_examples": 14, "num_samples": 1}


def write_recipe(path: Path, *, seed: int, is_quick: bool) -> None:
    """Writes the recipe with a seed; for `--quick` with few steps."""
    chain: dict[str, Any] = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))
    chain["common"]["seed"] = seed
    if is_quick:
        stages = {name: stage for name, stage in chain["stages"].items() if "off_policy" not in name}
        stages["on_policy"]["model"] = {"stage": "cold_start"}
        for stage in stages.values():
            for key, few in QUICK_STEPS.items():
                if key in stage:
                    stage[key] |= few
        chain["stages"] = stages
        chain["common"]["evaluate"] |= QUICK_EVALUATION
    path.write_text(yaml.safe_dump(chain, sort_keys=False), encoding="utf-8")


def run(recipe: Path, folder: Path, *, resume: bool, kill_after_s: float | None) -> bool:
    """Runs the chain and returns whether it came to its end; else it was killed after so many seconds, with all that it had started."""
    command = [sys.executable, "-m", "vlpost.recipes.run", "run", str(recipe), f"output={folder}", *(["--resume"] if resume else [])]
    process = subprocess.Popen(command, stdout=sys.stderr, start_new_session=True)
    try:
        status = process.wait(kill_after_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return False
    if status:
        raise SystemExit(f"{' '.join(command)} ended with status {status}")
    return True


def run_killed(recipe: Path, folder: Path, kill_at_s: Sequence[float]) -> int:
    """Runs the chain, kills it whenever so many seconds have gone by, all attempts counted together, and returns the number of kills."""
    num_kills, before = 0, 0.0
    for moment in kill_at_s:
        if run(recipe, folder, resume=_has_begun(folder), kill_after_s=moment - before):
            return num_kills
        num_kills, before = num_kills + 1, moment
        if (folder / TABLE_FILE).exists():  # killed on its way out, with nothing left to resume
            return num_kills
    run(recipe, folder, resume=_has_begun(folder), kill_after_s=None)
    return num_kills


def _has_begun(folder: Path) -> bool:
    """Returns whether there is something to resume; what a run wrote that was killed before is removed."""
    has_begun = (folder / EVENTS_FILE).exists()
    if not has_begun:
        shutil.rmtree(folder, ignore_errors=True)
    return has_begun


def outcome(folder: Path) -> dict[str, str]:
    """Returns a hash of each stage's weights, and of every response of each evaluate stage, by the name of the file."""
    files = [*folder.glob("*/export/*.safetensors"), *folder.glob("*/evaluation.jsonl")]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(files)}


def accuracy_table(folder: Path) -> dict[str, dict[str, float]]:
    """Returns the accuracy of each task by the stage that it was measured after, in the order of the chain."""
    stages = yaml.safe_load((folder / "recipe.resolved.yaml").read_text(encoding="utf-8"))["stages"]
    table: dict[str, dict[str, float]] = {}
    for name, stage in stages.items():
        if stage["method"] == "evaluate":
            measured = json.loads((folder / name / "evaluation.json").read_text(encoding="utf-8"))
            of_tasks = [key.split("/") for key in measured if key.startswith("task/") and key.split("/")[2].startswith("avg@")]
            table[stage["model"]["stage"]] = {parts[1]: measured["/".join(parts)] for parts in of_tasks}
    return table


def print_table(table: dict[str, dict[str, float]]) -> None:
    """Prints accuracy in percent to stderr, a stage a line."""
    tasks = sorted({task for row in table.values() for task in row})
    print(f"{'after':18}{''.join(f'{task:>13}' for task in tasks)}", file=sys.stderr)
    for stage, row in table.items():
        print(f"{stage:18}{''.join(f'{row[task]:13.1%}' for task in tasks)}", file=sys.stderr)


def main() -> int:
    """Measures, prints a table to stderr and one JSON line to stdout."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=ROOT / "outputs" / "benchmark_chain")
    arguments = parser.parse_args()
    shutil.rmtree(arguments.output, ignore_errors=True)
    arguments.output.mkdir(parents=True)
    recipe = arguments.output / "recipe.yaml"
    write_recipe(recipe, seed=arguments.seed, is_quick=arguments.quick)
    start = time.perf_counter()
    run(recipe, arguments.output / "whole", resume=False, kill_after_s=None)
    seconds = time.perf_counter() - start
    table = accuracy_table(arguments.output / "whole")
    print_table(table)
    dice = random.Random(arguments.seed)
    kill_at_s = sorted(dice.uniform(0.0, seconds) for _ in range(NUM_KILLS))
    num_kills = run_killed(recipe, arguments.output / "killed", kill_at_s)
    whole, killed = outcome(arguments.output / "whole"), outcome(arguments.output / "killed")
    different = sorted(name for name in whole.keys() | killed.keys() if whole.get(name) != killed.get(name))
    result = {
        "name": "chain",
        "value": seconds / 60,
        "unit": "minutes of the whole chain, engine starts and measurements included",
        "bar": MAX_MINUTES,
        "ok": seconds <= 60 * MAX_MINUTES and not different,
        "rows": {"accuracy": table, "kill_at_s": kill_at_s, "kills": num_kills, "files": len(whole), "different_after_kills": different},
        "command": " ".join(["python", "benchmarks/chain.py", *sys.argv[1:]]),
        "versions": installed_versions(),
    }
    print(json.dumps(result))
    return 0 if result["ok"] or arguments.quick else 1


if __name__ == "__main__":
    sys.exit(main())
