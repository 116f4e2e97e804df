"""The quickstart on three seeds, beside two baselines: SFT continued for SAPO's wall time, and the SFT model at temperature 0.5.

`python benchmarks/quickstart.py [--quick] [--output FOLDER]`: about half an hour on two cores. Runs `vlpost run recipes/quickstart.yaml`
a seed, then continues that seed's SFT for as many seconds as its SAPO stage took and measures it on the same test examples. Ends
with one JSON line. `--quick`: one seed, few steps: it shows that the script works and proves nothing.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RECIPE = ROOT / "recipes" / "quickstart.yaml"
QUICK = (
    "stages.sft.sft.num_steps=20",
    "common.validation.every=4",
    "common.validation.num_examples=8",
    "stages.sapo.rl.num_steps=4",
    "stages.evaluate_sft.evaluate.num_examples=16",
    "stages.evaluate_sapo.evaluate.num_examples=16",
)
MAX_MINUTES, MIN_GAIN, MIN_GREEDY_GAIN, MAX_GAP = 12.0, 0.15, 0.03, 1e-4


def run(recipe: Path, *overrides: str) -> float:
    """Runs a recipe by the command line and returns its wall time in seconds."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "vlpost.recipes.run", "run", str(recipe), *overrides], check=True, stdout=sys.stderr)
    return time.perf_counter() - start


def evaluation(folder: Path) -> dict[str, float]:
    """Returns what an evaluate stage measured."""
    return json.loads((folder / "evaluation.json").read_text())


def lines(path: Path) -> list[dict]:
    """Returns the records of a JSON-lines file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def continue_sft(folder: Path, seed: int, quick: bool) -> dict[str, float]:
    """Trains the SFT export on for as long as SAPO took, on the same 200 examples, and returns its test evaluation."""
    metrics = lines(folder / "metrics.jsonl")
    phases = ("time/rollout_s", "time/reward_s", "time/update_s", "time/publish_s")
    sapo_s = sum(m["values"].get(name, 0.0) for m in metrics if m["phase"] == "sapo" for name in phases)
    sft_steps = [m["values"]["time/step_s"] for m in metrics if m["phase"] == "sft" and "time/step_s" in m["values"]]
    num_steps = max(1, round(sapo_s / (sum(sft_steps) / len(sft_steps))))
    recipe = folder / "continued.yaml"
    text = RECIPE.read_text()
    start, end = text.index("  evaluate_sft:"), text.index("  evaluate_sapo:")
    recipe.write_text(text[:start] + text[end:].replace("stage: sapo", "stage: sft").replace("evaluate_sapo", "evaluate_continued"))
    overrides = [
        f"output={folder / 'continued'}",
        f"common.seed={seed + 1000}",
        f"stages.sft.model={{path: {folder / 'sft' / 'export'}}}",
        f"stages.sft.sft.num_steps={num_steps}",
        "stages.sft.sft.plateau=null",
        "common.validation=null",
        "stages.sft.learner.warmup_steps=0",
    ]
    if quick:
        overrides.append("stages.evaluate_continued.evaluate.num_examples=16")
    run(recipe, *overrides)
    return evaluation(folder / "continued" / "evaluate_continued")


def measure_seed(folder: Path, seed: int, quick: bool) -> dict[str, float]:
    """Returns one seed's row."""
    wall_s = run(RECIPE, f"output={folder}", f"common.seed={seed}", *(QUICK if quick else ()))
    sft, sapo = evaluation(folder / "evaluate_sft"), evaluation(folder / "evaluate_sapo")
    continued = continue_sft(folder, seed, quick)
    metrics = lines(folder / "metrics.jsonl")
    gates = [event["fields"]["engine_gap"] for event in lines(folder / "events.jsonl") if event["kind"] == "parity"]
    steps = [m["values"]["engine_max_abs_gap"] for m in metrics if m["values"].get("engine_max_abs_gap") is not None]
    return {
        "seed": seed,
        "minutes": wall_s / 60,
        "sft_steps": sum(m["phase"] == "sft" and "loss" in m["values"] for m in metrics),
        "sft_avg@8": sft["avg@8/1"],
        "sapo_avg@8": sapo["avg@8/1"],
        "sft_greedy": sft["greedy"],
        "sapo_greedy": sapo["greedy"],
        "sft_pass@8": sft["pass@8/1"],
        "sapo_pass@8": sapo["pass@8/1"],
        "sft_avg@8_at_0.5": sft["avg@8/0.5"],
        "sft_continued_avg@8": continued["avg@8/1"],
        "sft_continued_greedy": continued["greedy"],
        "gate_max_gap": max(gates),
        "num_gates": len(gates),
        "steps_max_gap": max(steps, default=0.0),
    }


def main() -> None:
    """Measures, prints a table to stderr and one JSON line to stdout."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--output", type=Path, default=ROOT / "outputs" / "benchmark_quickstart")
    arguments = parser.parse_args()
    shutil.rmtree(arguments.output, ignore_errors=True)
    seeds = (0,) if arguments.quick else (0, 1, 2)
    rows = [measure_seed(arguments.output / f"seed{seed}", seed, arguments.quick) for seed in seeds]
    gains = [row["sapo_avg@8"] - row["sft_avg@8"] for row in rows]
    greedy = sum(row["sapo_greedy"] - row["sft_greedy"] for row in rows) / len(rows)
    solvable = sum(row["sapo_pass@8"] - row["sft_pass@8"] for row in rows) / len(rows)
    gap = max(max(row["gate_max_gap"], row["steps_max_gap"]) for row in rows)
    bars = [
        {"what": "minutes, slowest seed", "value": max(row["minutes"] for row in rows), "bar": MAX_MINUTES, "at_most": True},
        {"what": "avg@8 gain, mean of seeds", "value": sum(gains) / len(gains), "bar": MIN_GAIN, "at_most": False},
        {"what": "engine against learner, nats", "value": gap, "bar": MAX_GAP, "at_most": True},
    ]
    ratios = [bar["value"] / bar["bar"] if bar["at_most"] else bar["bar"] / max(bar["value"], 1e-9) for bar in bars]
    honest = greedy >= MIN_GREEDY_GAIN or solvable >= 0
    result = {
        "name": "quickstart",
        "value": max(ratios),
        "unit": "worst ratio to its bar (1 or less is met)",
        "bar": 1.0,
        "ok": max(ratios) <= 1 and min(gains) > 0 and honest,
        "rows": {"bars": bars, "seeds": rows, "smallest_gain": min(gains), "greedy_gain": greedy, "pass@8_gain": solvable},
        "command": " ".join(["python", "benchmarks/quickstart.py", *sys.argv[1:]]),
        "versions": json.loads((arguments.output / "seed0" / "versions.json").read_text()),
    }
    for row in rows:
        print(row, file=sys.stderr)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
