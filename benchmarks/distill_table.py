"""Reinforcement learning against on-policy distillation from one student, in the form of table 21 of Qwen3's report (arXiv:2505.09388).

`python benchmarks/distill_table.py [--quick] [--seeds N ...] [--output FOLDER] [--resume]`: about two hours on two cores. All stages
are those of `recipes/nano_on_policy.yaml`, on sums of two handwritten numbers of four digits, worked out by columns in the think block:

- a teacher (4.6 million parameters) is trained once; its seconds are a column of their own;
- a seed's student (1.3 million) learns from the teacher's verified responses to a few hundred questions: the row "off-policy";
- from there, on questions that it has not seen and with nothing frozen, it goes on with SAPO, or with on-policy distillation. Both arms
  draw with the same engine, are measured on the same held-out scans, and take their learning rate from equally many trials, which are
  made on a student of another seed and judged on the validation split. SAPO's are half as long as its runs, those of distillation as long
  as its runs. The number of distillation steps is set there as well, so that they take a quarter of SAPO's seconds, less a margin.

  Besides accuracy, what it costs SAPO to get where distillation ends is read from the curves of both on the validation split.

Seconds are those of rollouts, rewards or teacher, updates and publishes; start and validation count for neither arm. A third arm shows
text alone to the same student, vision tower and mergers frozen, as the report's strong-to-weak stage does, and is measured on images.
Ends with one JSON line. `--quick`: one seed, few steps, and students that learn from worked solutions in place of the teacher's responses,
of which none is right after so few: it shows that the script works and proves nothing.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from vlpost.recipes.run_log import installed_versions
from vlpost.recipes.runner import DONE_FILE

ROOT = Path(__file__).resolve().parent.parent
RECIPE = ROOT / "recipes" / "nano_on_policy.yaml"
TUNING_SEED = 10
SHARE_OF_SECONDS = 0.25
MARGIN = 0.7
"""The number of distillation steps aims at so much of the share: SAPO's later steps are shorter than those of its trials, since ever more
groups have no signal, and seconds are no better known on a shared machine."""
PHASES = tuple(f"time/{phase}_s" for phase in ("rollout", "reward", "teacher", "update", "publish"))
LEARNING_RATES = {"sapo": (5e-5, 1e-4, 2e-4, 4e-4), "on_policy": (1.5e-4, 3e-4, 4.5e-4, 6e-4)}
"""Trials of each arm"""
WARM_UP = {"sapo": 10, "on_policy": 60}
"""Optimizer steps: Adam's first ones, of full size, unlearn half of what a student can"""
SAPO = {"num_steps": 200, "prompts_per_step": 32, "group_size": 8, "num_mini_batches": 2, "policy_loss": {"name": "sapo"}}
TRIAL_STEPS = {"sapo": 100, "on_policy": 26}
"""Steps of a trial: half of SAPO's run, and about as many as the other arm's, which is so short that warm-up decides"""
NUM_SAMPLES = 16
IMAGES, TEXT = "sum4_steps", "arithmetic"
"""Kinds of questions: sums of two numbers in an image; sums and differences of single digits in text"""
MEASURED = (IMAGES, TEXT)
QUICK = {
    "teacher": {"sft": {"num_steps": 2}},
    "evaluation": {"num_examples": 4, "num_samples": 2},
    "validation": {"every": 1, "num_examples": 4, "num_samples": 1},
}


def stages_of(recipe: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns the chain's stages by name."""
    return recipe["stages"]


class Runs:
    """Chains of the recipe's stages, each run by the command line in a folder of its own."""

    def __init__(self, folder: Path, is_quick: bool) -> None:
        self.folder = folder
        self.is_quick = is_quick
        self.recipe = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))

    def run(self, name: str, stages: Mapping[str, Any], seed: int) -> Path:
        """Runs the stages as a chain and returns its folder; a chain that an earlier call has finished is not run again."""
        folder = self.folder / name
        if all((folder / "run" / stage / DONE_FILE).exists() for stage in stages):
            return folder / "run"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        chain = {**self.recipe, "output": str(folder / "run"), "common": {**self.recipe["common"], "seed": seed}, "stages": dict(stages)}
        path = folder / "recipe.yaml"
        whole = json.loads(json.dumps(chain))  # no part is shared: a recipe may hold no alias
        path.write_text(yaml.safe_dump(whole, sort_keys=False), encoding="utf-8")
        subprocess.run([sys.executable, "-m", "vlpost.recipes.run", "run", str(path)], check=True, stdout=sys.stderr)
        return folder / "run"

    def stage(self, name: str, **changes: Any) -> dict[str, Any]:
        """Returns a stage of the recipe with `changes`, and small ones for `--quick`."""
        stage = {**stages_of(self.recipe)[name], **changes}
        for key, value in QUICK.get(name, {}).items() if self.is_quick else ():
            stage[key] = {**stage.get(key, {}), **value} if value else value
        return stage

    @property
    def num_samples(self) -> int:
        """Responses to each question of a measurement."""
        return QUICK["evaluation"]["num_samples"] if self.is_quick else NUM_SAMPLES

    def trial_steps(self, arm: str) -> int:
        """Returns the steps of a trial of an arm."""
        return 1 if self.is_quick else TRIAL_STEPS[arm]

    @property
    def sapo_steps(self) -> int:
        """Steps of SAPO's runs."""
        return 1 if self.is_quick else SAPO["num_steps"]

    def evaluation(self, model: Mapping[str, str], kind: str = IMAGES) -> dict[str, Any]:
        """Returns a stage that measures a model on the test split, on one kind of question."""
        settings = {"num_examples": 400, "num_samples": NUM_SAMPLES, **(QUICK["evaluation"] if self.is_quick else {})}
        return {"method": "evaluate", "model": dict(model), "evaluate": settings, "data": self.data("test", kind)}

    def data(self, split: str, kind: str = IMAGES, **changes: Any) -> dict[str, Any]:
        """Returns questions of one kind."""
        return {**self.recipe["common"]["data"], "tasks": {kind: 1.0}, "split": split, **changes}

    def arm(self, name: str, student: Path, teacher: str, *, learning_rate: float, num_steps: int) -> dict[str, Any]:
        """Returns the stage of an arm: SAPO, on-policy distillation, or the latter on text alone."""
        stage = self.stage("distilled", model={"path": str(student)}, data=self.data("train", seed=1))
        warm_up = WARM_UP["sapo" if name == "sapo" else "on_policy"]
        stage["learner"] = {**stage["learner"], "learning_rate": learning_rate, "warmup_steps": warm_up}
        settings = {"every": max(1, num_steps // 5), "num_examples": 200, "num_samples": 4, "greedy": False}
        stage["validation"] = {**settings, "data": self.data("validation"), **(QUICK["validation"] if self.is_quick else {})}
        if name == "sapo":
            del stage["distill"], stage["teachers"]
            return {**stage, "method": "rl", "rl": {**SAPO, "num_steps": num_steps}}
        stage["teachers"] = {"large": {"model": {"path": teacher}}}
        stage["distill"] = {**stage["distill"], "num_steps": num_steps}
        if name == "text":
            stage["data"] = self.data("train", TEXT, seed=1)
            stage["distill"] |= {"prompts": "text"}
            stage["learner"] |= {"freeze": ["vision", "merger"]}
        return stage


def curve(folder: Path, stage: str) -> list[tuple[float, float]]:
    """Returns (seconds, accuracy) of each validation of a stage."""
    seconds, found = 0.0, []
    for values in metrics_of(folder, stage):
        seconds += step_seconds(values)
        if "validation/accuracy" in values:
            found.append((seconds, values["validation/accuracy"]))
    return found


def seconds_to(points: Sequence[tuple[float, float]], accuracy: float) -> float | None:
    """Returns when a curve first has an accuracy, seconds, linear between its points; None: never."""
    before = (0.0, 0.0)
    for seconds, reached in points:
        if reached >= accuracy:
            return before[0] + (seconds - before[0]) * (accuracy - before[1]) / (reached - before[1]) if reached > before[1] else seconds
        before = (seconds, reached)
    return None


def metrics_of(folder: Path, stage: str) -> list[dict[str, float]]:
    """Returns what a stage has logged, in order."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record["values"] for record in records if record["phase"] == stage]


def step_seconds(values: Mapping[str, float]) -> float:
    """Returns the seconds of a step: of its phases, or, of supervised fine-tuning, the whole step's."""
    return sum(values.get(name, 0.0) for name in PHASES) or values.get("time/step_s", 0.0)


def seconds_of(folder: Path, stage: str) -> float:
    """Returns the seconds of all steps of a stage."""
    return sum(map(step_seconds, metrics_of(folder, stage)))


def evaluation_of(folder: Path, stage: str) -> dict[str, float]:
    """Returns what an evaluate stage measured, by names without the temperature."""
    measured = json.loads((folder / stage / "evaluation.json").read_text())
    return {name.split("/")[0]: value for name, value in measured.items() if name.startswith(("avg@", "pass@", "greedy"))}


def train_teacher(runs: Runs) -> dict[str, Any]:
    """Returns the teacher's folder, seconds and accuracy."""
    folder = runs.run("teacher", {"teacher": runs.stage("teacher"), "measured": runs.evaluation({"stage": "teacher"})}, seed=0)
    return {
        "export": str(folder / "teacher" / "export"),
        "seconds": seconds_of(folder, "teacher"),
        **evaluation_of(folder, "measured"),
    }


def train_student(runs: Runs, name: str, teacher: str, seed: int) -> Path:
    """Returns the run folder of a student after off-policy distillation, measured."""
    written = stages_of(runs.recipe)["student"]
    if runs.is_quick:  # after two steps the teacher has no response that anyone could learn from
        student = runs.stage("teacher", model=written["model"])
    else:
        student = runs.stage("student", teachers={name: {**one, "model": {"path": teacher}} for name, one in written["teachers"].items()})
    measured = {kind: runs.evaluation({"stage": "student"}, kind) for kind in MEASURED}
    return runs.run(name, {"student": student, **measured}, seed=seed)


def run_arm(runs: Runs, name: str, stage: Mapping[str, Any], seed: int, *, measure: Sequence[str]) -> dict[str, Any]:
    """Runs one arm and returns its seconds, its validations, and its accuracy on the kinds named."""
    measured = {kind: runs.evaluation({"stage": "arm"}, kind) for kind in measure}
    folder = runs.run(name, {"arm": stage, **measured}, seed=seed)
    return {"seconds": seconds_of(folder, "arm"), "curve": curve(folder, "arm"), **{kind: evaluation_of(folder, kind) for kind in measure}}


def tune(runs: Runs, teacher: str) -> tuple[dict[str, float], int, list[dict[str, Any]]]:
    """Returns each arm's learning rate, the number of distillation steps, and all trials."""
    export = train_student(runs, "tuning/student", teacher, TUNING_SEED) / "student" / "export"
    trials = []
    for arm, rates in LEARNING_RATES.items():
        for rate in rates[:1] if runs.is_quick else rates:
            stage = runs.arm(arm, export, teacher, learning_rate=rate, num_steps=runs.trial_steps(arm))
            done = run_arm(runs, f"tuning/{arm}-{rate:g}", stage, TUNING_SEED, measure=())
            trials.append({"arm": arm, "learning_rate": rate, "seconds": done["seconds"], "accuracy": done["curve"][-1][1]})
    best = {arm: max((t for t in trials if t["arm"] == arm), key=lambda t: t["accuracy"]) for arm in LEARNING_RATES}
    a_step = {arm: best[arm]["seconds"] / runs.trial_steps(arm) for arm in best}
    num_steps = max(1, int(MARGIN * SHARE_OF_SECONDS * runs.sapo_steps * a_step["sapo"] / a_step["on_policy"]))
    return {arm: trial["learning_rate"] for arm, trial in best.items()}, num_steps, trials


def measure_seed(runs: Runs, seed: int, teacher: str, rates: Mapping[str, float], num_steps: int) -> dict[str, Any]:
    """Returns one seed's row: the student, and what each arm made of it."""
    folder = train_student(runs, f"seed{seed}/student", teacher, seed)
    export = folder / "student" / "export"
    row: dict[str, Any] = {"seed": seed}
    row["student"] = {"seconds": seconds_of(folder, "student"), **{kind: evaluation_of(folder, kind) for kind in MEASURED}}
    for arm, steps in (("sapo", runs.sapo_steps), ("on_policy", num_steps), ("text", num_steps)):
        rate = rates["sapo" if arm == "sapo" else "on_policy"]
        stage = runs.arm(arm, export, teacher, learning_rate=rate, num_steps=steps)
        row[arm] = run_arm(runs, f"seed{seed}/{arm}", stage, seed, measure=MEASURED if arm == "text" else (IMAGES,))
    sapo, distilled = row["sapo"], row["on_policy"]
    row["share_of_seconds"] = distilled["seconds"] / sapo["seconds"]
    row["sapo_seconds_to_same"] = seconds_to(sapo["curve"], distilled["curve"][-1][1])
    row["gain"] = min(distilled[IMAGES][name] - sapo[IMAGES][name] for name in (f"avg@{runs.num_samples}", "greedy"))
    return row


def print_table(teacher: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], num_samples: int) -> None:
    """Prints the table to stderr: accuracy on held-out sums in percent, and seconds."""
    names = (f"avg@{num_samples}", "greedy", f"pass@{num_samples}")
    print(f"{'':26}{'  '.join(names)}  seconds", file=sys.stderr)
    print(f"{'teacher':26}{'  '.join(f'{teacher[name]:.1%}' for name in names)}  {teacher['seconds']:.0f}", file=sys.stderr)
    for label in ("student", "sapo", "on_policy", "text"):
        for row in rows:
            found = row[label]
            cells = "  ".join(f"{found[IMAGES][name]:.1%}" for name in names)
            print(f"{label + ', seed ' + str(row['seed']):26}{cells}  {found['seconds']:.0f}", file=sys.stderr)


def main() -> int:
    """Measures, prints a table to stderr and one JSON line to stdout."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--resume", action="store_true", help="keep the runs that are whole in the output folder; others are done again")
    parser.add_argument("--output", type=Path, default=ROOT / "outputs" / "benchmark_distill_table")
    arguments = parser.parse_args()
    if not arguments.resume:
        shutil.rmtree(arguments.output, ignore_errors=True)
    runs = Runs(arguments.output, arguments.quick)
    teacher = train_teacher(runs)
    rates, num_steps, trials = tune(runs, teacher["export"])
    rows: list[dict[str, Any]] = []
    for seed in [0] if arguments.quick else arguments.seeds:
        rows.append(measure_seed(runs, seed, teacher["export"], rates, num_steps))
        print_table(teacher, rows, runs.num_samples)
    smallest, largest_share = min(row["gain"] for row in rows), max(row["share_of_seconds"] for row in rows)
    is_ok = smallest > 0.0 and largest_share <= SHARE_OF_SECONDS
    result = {
        "name": "distill_table",
        "value": float(smallest),
        "unit": "accuracy on held-out sums, on-policy distillation less SAPO in at most a quarter of its seconds; smallest of seeds, "
        "sampled and greedy",
        "bar": 0.0,
        "ok": is_ok,
        "rows": {
            "teacher": teacher,
            "trials": trials,
            "learning_rates": rates,
            "distillation_steps": num_steps,
            "largest_share_of_seconds": largest_share,
            "mean_gain": statistics.mean(row["gain"] for row in rows),
            "seeds": rows,
        },
        "command": " ".join(["python", "benchmarks/distill_table.py", *sys.argv[1:]]),
        "versions": installed_versions(),
    }
    print(json.dumps(result))
    return 0 if is_ok or arguments.quick else 1


if __name__ == "__main__":
    sys.exit(main())
