"""Kill -9 at random moments of start, training, rollout and save; after each an automatic resume, without a hand.

`python benchmarks/kill.py [--quick] [--output FOLDER] [--seed N]`: 100 kills, about a quarter of an hour on two cores. A parent that has
imported everything forks each attempt, which runs the real `run_recipe`, and kills it after a random time: some while it starts, some
in the middle of a save, the rest anywhere. A run ends with the same bytes of weights, optimizer, random state and logs as one that
nobody killed. The value is the number of faults: attempts that ended by themselves with an error (a manual step), checkpoints under
their final name that are torn, resumes from another checkpoint than the newest whole one, runs that end in other bytes. `--quick`: 4
kills. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from vlpost.recipes.run import set_environment

ROOT = Path(__file__).resolve().parent.parent
COMMON = """
model: {nano: {size: s}}
sampler: {max_response_tokens: 8, max_model_len: 96, max_videos_per_prompt: 0, max_images_per_prompt: 1}
rewards: {components: {answer: {use: "few.py:few_tokens"}}}
data: {use: handwriting, split: train, tasks: {add: 2.0, arithmetic: 1.0}}
parity: {num_examples: 2, num_publishes: 1}
trackers: []
alarms: [{metric: grad_norm, above: 1.0e6, action: roll_back}]
learner: {learning_rate: 1.0e-3, dtype: float32}
"""
RECIPES = {
    "sft": "method: sft\ncheckpoint: {every: 2}\nsft: {num_steps: 30, examples_per_step: 4}\n",
    "rl": "method: rl\ncheckpoint: {every: 2}\nrl: {num_steps: 24, prompts_per_step: 4, group_size: 4, num_mini_batches: 2}\n",
}
# An untrained policy never answers right; what it can do is stop early, so every group has signal.
REWARD = '''
def few_tokens(example, rollout):
    """Higher for shorter responses, between 0 and 1."""
    return 1.0 / rollout.num_sampled_tokens
'''
KILLS = {"sft": 50, "rl": 50}
QUICK_KILLS = {"sft": 3, "rl": 1}
MAX_KILLS_OF_A_RUN = 10
POLL_S = 0.001
MAX_ATTEMPT_S = 300.0


@dataclass(kw_only=True)
class Tally:
    """What happened to the runs of one recipe."""

    kills: int = 0
    kills_by_phase: Counter[str] = field(default_factory=Counter)
    half_written_saves: int = 0
    """Kills that left a partial checkpoint behind"""
    resumes: int = 0
    runs: int = 0
    faults: list[str] = field(default_factory=list)


def start(recipe: Path, folder: Path, log: Path) -> int:
    """Forks an attempt at the run, which resumes what there is, and returns its process id."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(descriptor, stream)
        from vlpost.recipes.load import load_recipe
        from vlpost.recipes.runner import run_recipe

        status = run_recipe(load_recipe(recipe, [f"output={folder}"]), resume=(folder / "events.jsonl").exists(), allow_code=False)
    except BaseException:  # a fork must not return into the code of its parent
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def phase_in_flight(folder: Path) -> str:
    """Returns the innermost phase that the attempt's watchdog has noted."""
    try:
        lines = (folder / "phase-rank0.txt").read_text().splitlines()
    except FileNotFoundError:
        return "outside"
    return lines[0].split()[0] if lines else "between phases"


def kill(pid: int, folder: Path, chance: random.Random, usual_s: float) -> bool:
    """Kills the attempt at a random moment and returns True; False when it ended before."""
    aim = chance.choices(("start", "anywhere", "save"), weights=(1, 5, 2))[0]
    began = time.monotonic()
    wait_s = chance.uniform(0.0, usual_s)
    trained_at: float | None = None
    while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        now = time.monotonic()
        phase = phase_in_flight(folder)
        if trained_at is None and phase in ("save", "step", "update", "rollout", "reward"):
            trained_at = now
        due = began + wait_s if aim == "start" else (trained_at + wait_s if trained_at is not None else float("inf"))
        if now >= due and (aim != "save" or phase == "save"):
            time.sleep(chance.uniform(0.0, 0.03) if aim == "save" else 0.0)
            break
        if now - began > MAX_ATTEMPT_S:
            break
        time.sleep(POLL_S)
    else:
        return False
    os.kill(pid, signal.SIGKILL)
    return True


def outcome(folder: Path) -> dict[str, object]:
    """Returns everything that a run leaves and that does not depend on the clock."""
    logs: dict[str, object] = {}
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        path = folder / name
        records = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        for record in records:
            record.pop("time")
            record["values"] = {key: value for key, value in record.get("values", {}).items() if not key.startswith("time/")}
        logs[name] = records
    last = sorted((folder / "checkpoints").glob("step-*"))[-1]
    files = [*sorted(last.glob("*.safetensors")), last / "state.json", folder / "export" / "model.safetensors"]
    return {**logs, "last": last.name, **{file.name if file.parent == last else "export": file.read_bytes() for file in files}}


def newest_whole(folder: Path, tally: Tally) -> int:
    """Returns the step of the newest whole checkpoint, 0 without one; a torn one under its final name is a fault."""
    from vlpost.model.checkpoint import checkpoint_folder, find_damage, saved_steps

    root = folder / "checkpoints"
    whole = 0
    for step in saved_steps(root):
        damage = find_damage(checkpoint_folder(root, step))
        if damage is None:
            whole = step
        else:
            tally.faults.append(f"{folder}: torn checkpoint of step {step}: {damage}")
    return whole


def resumed_steps(folder: Path) -> list[int]:
    """Returns where each resume so far went on."""
    path = folder / "events.jsonl"
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return [event["fields"]["step"] for event in map(json.loads, lines) if event["kind"] == "resumed"]


def attempt(recipe: Path, folder: Path, tally: Tally, chance: random.Random | None, usual_s: float) -> bool:
    """Starts or resumes the run once and returns True when it has finished; without `chance` nobody kills it."""
    log = folder.with_suffix(".log")
    expected, before = newest_whole(folder, tally), len(resumed_steps(folder))
    pid = start(recipe, folder, log)
    killed = chance is not None and kill(pid, folder, chance, usual_s)
    _, status = os.waitpid(pid, 0)
    resumes = resumed_steps(folder)[before:]
    tally.resumes += len(resumes)
    if any(step != expected for step in resumes):
        tally.faults.append(f"{folder}: resumed after step {resumes}, the newest whole checkpoint was of step {expected}")
    if killed and not (folder / "done.json").exists():
        phase = phase_in_flight(folder)
        tally.kills += 1
        tally.kills_by_phase[phase] += 1
        tally.half_written_saves += phase == "save" and any((folder / "checkpoints").glob(".partial-step-*"))
        return False
    if status and not killed:
        tally.faults.append(f"{folder}: ended with status {os.waitstatus_to_exitcode(status)}: {log.read_text()[-1500:]}")
    return True


def measure(recipe: Path, output: Path, num_kills: int, chance: random.Random) -> dict[str, object]:
    """Kills runs of the recipe until `num_kills` is reached and compares each with one that nobody killed."""
    began = time.monotonic()
    tally = Tally()
    attempt(recipe, output / "whole", tally, None, 0.0)
    metrics = [json.loads(line)["time"] for line in (output / "whole" / "metrics.jsonl").read_text().splitlines()]
    usual_s = metrics[-1] - metrics[0]
    expected = outcome(output / "whole")
    num_equal = 0
    while tally.kills < num_kills and not tally.faults:
        tally.runs += 1
        folder = output / f"run{tally.runs}"
        last_kill = min(num_kills, tally.kills + MAX_KILLS_OF_A_RUN)
        while not attempt(recipe, folder, tally, chance if tally.kills < last_kill else None, usual_s):
            print(f"{recipe.stem}: {tally.kills} kills, {dict(tally.kills_by_phase)}", file=sys.stderr, flush=True)
        if not tally.faults:
            found = outcome(folder)
            differing = [name for name in expected if found.get(name) != expected[name]]
            num_equal += not differing
            if differing:
                tally.faults.append(f"{folder}: differs from the uninterrupted run in {', '.join(differing)}")
    return {
        "recipe": recipe.stem,
        "kills": tally.kills,
        "kills_by_phase": dict(tally.kills_by_phase),
        "half_written_saves": tally.half_written_saves,
        "resumes": tally.resumes,
        "runs": tally.runs,
        "runs_with_equal_bytes": num_equal,
        "faults": tally.faults,
        "seconds": time.monotonic() - began,
    }


def main() -> None:
    """Kills and prints one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--output", type=Path, default=ROOT / "outputs" / "benchmark_kill")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    output = arguments.output.resolve()
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    (output / "few.py").write_text(REWARD)
    set_environment()
    with warnings.catch_warnings():
        # vllm 0.32 walks over every attribute of its modules at import and so touches torch's deprecated ones.
        warnings.simplefilter("ignore", FutureWarning)
        import vllm  # noqa: F401 - here, once, and not in every fork
        import vlpost.recipes.runner  # noqa: F401
        from vlpost.recipes.run_log import installed_versions
    chance = random.Random(arguments.seed)
    rows = []
    for name, num_kills in (QUICK_KILLS if arguments.quick else KILLS).items():
        folder = output / name
        folder.mkdir()
        recipe = output / f"{name}.yaml"
        recipe.write_text(f"output: {folder}\n{COMMON}{RECIPES[name]}")
        rows.append(measure(recipe, folder, num_kills, chance))
    faults = sum(len(row["faults"]) for row in rows)
    hit_save = sum(row["half_written_saves"] for row in rows) > 0
    result = {
        "name": "kill",
        "value": float(faults),
        "unit": f"faults in {sum(row['kills'] for row in rows)} kills",
        "bar": 0.0,
        "ok": faults == 0 and (hit_save or arguments.quick),
        "rows": rows,
        "command": " ".join(["python", "benchmarks/kill.py", *sys.argv[1:]]),
        "versions": installed_versions(),
    }
    for row in rows:
        print(row, file=sys.stderr)
    print(json.dumps(result))
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
