r"""A judge that can be checked: a nano model learns from exact truth to judge answers, is served by vLLM, and pays for SAPO.

`python benchmarks/nano_judge.py [--quick] [--seed N] [--output FOLDER]`: 40 minutes on one core. The steps:

1. A judge of 1.3 million parameters by SFT: the prompts are those that `llm_judge` sends, the verdicts are the rule `count`'s. Questions
   are those of the handwriting track, responses are written by this script: right, wrong by a little, the right number in the wrong place.
2. A policy by SFT on few steps, which is right about every second time, measured on held-out scans by rule.
3. The judge is served by vLLM and gives its verdicts on the policy's responses, which it has never seen the like of. The value is the share
   of verdicts that agree with the rule, mean of right and wrong responses; bar: 95 %. Both kinds of errors are counted: wrong answers that
   it pays, right ones that it does not.
4. SAPO from the policy, with no reward but the judge's, and measured by rule: what a policy gains from a judge that errs so often.

Ends with one JSON line. `--quick`: few rows and steps; it shows that the script works and proves nothing.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from vlpost.model.nano import build_nano
from vlpost.model.records import Example, Rollout
from vlpost.recipes.evaluation_record import OUTCOMES_FILE
from vlpost.recipes.handwriting import handwriting_example
from vlpost.recipes.run_log import installed_versions
from vlpost.rewards import RewardResult, RewardsConfig
from vlpost.rewards.judge_prompt import load_rubric, render, turns
from vlpost.rewards.llm_judge import LlmJudgeOptions, open_llm_judge
from vlpost.rewards.visual_answer import count

ROOT = Path(__file__).resolve().parent.parent
MIN_AGREEMENT = 0.95
TASKS = {"add": 1.0, "arithmetic": 0.5, "sum2": 2.0, "mixing": 0.5}
POLICY_TASKS = {"add": 1.0, "sum2": 1.0}
RUBRIC = """
name: same_number
kind: axes
reference: required
task: Is the number in the box of the response the number of the reference?
axes:
  correct: {guide: 1 if it is; 0 if not}
reason_chars: 0
canaries:
  - {name: same, prompt: "Add the digits.", reference: "12", response: '\\boxed{12}', expected: good}
  - {name: other, prompt: "Add the digits.", reference: "12", response: '\\boxed{13}', expected: bad}
  - {name: worked, prompt: "Add the two numbers.", reference: "117", response: '48+69=\\boxed{117}', expected: good}
  - {name: not-in-the-box, prompt: "Add the two numbers.", reference: "117", response: '48+69=117, \\boxed{107}', expected: bad}
"""
ROWS = 12_000
SERVED = {"max_model_len": 1024, "enforce_eager": True, "max_num_seqs": 16, "dtype": "float32"}


def rollout_of(text: str) -> Rollout:
    """Returns a response of this text, as a reward sees it."""
    return Rollout(
        token_ids=(1, 2),
        sampled=(False, True),
        sampler_logprobs=(0.0, -0.5),
        media=(),
        text=text,
        prompt_suffix="",
        finish_reason="stop",
        policy_version=0,
    )


def is_right(example: Example, text: str) -> bool:
    """Returns what the rule says."""
    verdict = count(example, rollout_of(text))
    assert isinstance(verdict, RewardResult)
    return verdict.value == 1.0


def near(number: int, dice: random.Random) -> int:
    """Returns another number that a policy may well have meant: a digit read or carried wrongly, two exchanged, or any of that size."""
    digits = str(number)
    place = dice.randrange(len(digits))
    candidates = [
        number + dice.choice((-10, -1, 1, 10)),
        int(digits[:place] + str(dice.randrange(10)) + digits[place + 1 :]),
        int(digits[::-1]),
        dice.randrange(10 ** len(digits)),
        int(digits[:-1] or "0"),
        int(digits + str(dice.randrange(10))),
    ]
    return dice.choice([candidate for candidate in candidates if candidate >= 0 and candidate != number] or [number + 1])


def written_response(example: Example, dice: random.Random) -> str:
    """Returns a response to a question: the solution's form or another one, with the right number or not."""
    right = int(example.answer)
    said = right if dice.random() < 0.5 else near(right, dice)
    decoy = right if said != right and dice.random() < 0.5 else near(right, dice)
    solution = example.messages[-1].text.replace(f"\\boxed{{{right}}}", f"\\boxed{{{said}}}")
    forms = (
        (6, solution),
        (3, f"\\boxed{{{said}}}"),
        (2, f"{dice.randrange(100)}+{dice.randrange(100)}=\\boxed{{{said}}}"),
        (1, f"{decoy}, \\boxed{{{said}}}"),
        (1, f"\\boxed{{{decoy}}}\\boxed{{{said}}}"),
        (0.5, str(said)),
        (0.5, f"\\boxed{{{said}"),
    )
    return dice.choices([form for _, form in forms], weights=[weight for weight, _ in forms])[0]


def judged_rows(split: str, num_rows: int, *, seed: int) -> Iterator[tuple[Example, str]]:
    """Yields questions of the track, each with a response."""
    dice = random.Random(f"{split} {seed}")
    for index in range(num_rows):
        example = handwriting_example(split, index, tasks=TASKS, seed=seed, with_solution=True)
        yield example, written_response(example, dice)


def write_rows(path: Path, rows: Sequence[tuple[Example, str]], rubric_file: Path) -> Counter[int]:
    """Writes what the judge is asked and the rule's verdict as SFT rows, and returns how often each verdict stands there."""
    rubric = load_rubric(rubric_file.name, recipe_folder=rubric_file.parent)
    verdicts: Counter[int] = Counter()
    with path.open("w", encoding="utf-8") as file:
        for number, (example, response) in enumerate(rows):
            question = {"prompt": turns(example.messages[:-1]), "reference": example.answer, "response": response}
            verdict = int(is_right(example, response))
            verdicts[verdict] += 1
            answer = {"role": "assistant", "content": json.dumps({"correct": verdict})}
            messages = [*render(rubric, question, image_urls=(), seed=0, attempt=0), answer]
            file.write(json.dumps({"id": str(number), "messages": messages}, ensure_ascii=False) + "\n")
    return verdicts


def corpus_of(path: Path) -> Iterator[str]:
    """Yields the turns of the rows, to train a tokenizer on."""
    for line in path.read_text(encoding="utf-8").splitlines()[:2000]:
        yield from (f"{message['role']}\n{message['content']}" for message in json.loads(line)["messages"])


def run_recipe(folder: Path, recipe: Mapping[str, Any]) -> Path:
    """Writes a recipe, runs it, and returns its run folder."""
    path = folder / f"{recipe['output'].rpartition('/')[2]}.yaml"
    whole = json.loads(json.dumps(recipe))  # no part is shared: a recipe may hold no alias
    path.write_text(yaml.safe_dump(whole, sort_keys=False), encoding="utf-8")
    subprocess.run([sys.executable, "-m", "vlpost.recipes.run", "run", str(path)], check=True, stdout=sys.stderr)
    return Path(recipe["output"])


def train_judge(folder: Path, *, seed: int, is_quick: bool) -> tuple[Path, Counter[int]]:
    """Returns the folder of the judge's weights, and how many of its rows were right and wrong."""
    rows = list(judged_rows("train", 64 if is_quick else ROWS, seed=seed))
    verdicts = write_rows(folder / "rows.jsonl", rows, folder / "same_number.yaml")
    build_nano(folder / "judge_start", size="s", corpus=corpus_of(folder / "rows.jsonl"), seed=seed, vocab_size=768)
    recipe = {
        "method": "sft",
        "output": str(folder / "judge"),
        "seed": seed,
        "model": {"path": str(folder / "judge_start")},
        "data": {"use": "jsonl", "path": str(folder / "rows.jsonl")},
        "rewards": {"components": {"verdict": {"use": "exact"}}},
        "sampler": {"max_response_tokens": 16, "max_model_len": 1024, "max_images_per_prompt": 1, "max_videos_per_prompt": 0},
        "sft": {"num_steps": 2 if is_quick else ROWS // 16, "examples_per_step": 16, "weighting": "sqrt"},
        "learner": {"learning_rate": 1e-3, "warmup_steps": 1 if is_quick else 40, "weight_decay": 0.01, "schedule": "linear"},
    }
    return run_recipe(folder, recipe) / "export", verdicts


def judge_settings(export: Path, log_file: Path) -> dict[str, Any]:
    """Returns `rewards.judge`: the nano in a server of the run's own."""
    return {
        "serve": {"model": str(export), "log_file": str(log_file), "start_timeout_s": 300.0, "arguments": SERVED},
        "max_tokens": 16,
        "max_concurrent": 32,
    }


def policy_recipe(folder: Path, stage: str, method: Mapping[str, Any], *, seed: int, is_quick: bool) -> dict[str, Any]:
    """Returns a chain of one training stage and its measurement, by rule, on held-out scans."""
    data = {"use": "handwriting", "split": "train", "tasks": POLICY_TASKS}
    measured = {"num_examples": 8 if is_quick else 400, "num_samples": 2, "greedy": False}
    return {
        "method": "chain",
        "output": str(folder / stage),
        "common": {
            "seed": seed,
            "data": data,
            "rewards": {"components": {"answer": {"use": "count"}}},
            "sampler": {"max_response_tokens": 48, "max_model_len": 160, "max_images_per_prompt": 1, "max_videos_per_prompt": 0},
        },
        "stages": {
            stage: dict(method),
            "measured": {"method": "evaluate", "model": {"stage": stage}, "data": {"split": "test"}, "evaluate": measured},
        },
    }


def measure_agreement(run: Path, judge: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Returns how the served judge's verdicts on a run's measured responses compare with the rule's."""
    rows, truth = [], []
    for line in (run / "measured" / OUTCOMES_FILE).read_text(encoding="utf-8").splitlines():
        outcome = json.loads(line)
        split, task, number = outcome["id"].split("/")[1:]
        example = handwriting_example(split, int(number), tasks=POLICY_TASKS, seed=0, with_solution=False)
        assert example.task == task, "the measurement's questions can be drawn again"
        for response in outcome["responses"]:
            rows.append((example, rollout_of(response["text"])))
            truth.append(response["components"]["answer"] == 1.0)
    config = RewardsConfig.model_validate({"components": {"judge": {"use": "llm_judge"}}, "judge": dict(judge)})
    with open_llm_judge(LlmJudgeOptions(rubric="same_number.yaml"), config, folder) as opened:
        verdicts = [verdict for verdict, _seconds in opened.judge(rows)]
    judged = [(verdict.value == 1.0, right) for verdict, right in zip(verdicts, truth, strict=True) if isinstance(verdict, RewardResult)]
    paid, unpaid = [said for said, right in judged if not right], [not said for said, right in judged if right]
    return {
        "responses": len(rows),
        "unavailable": len(rows) - len(judged),
        "right_by_rule": sum(truth) / len(truth),
        "agreement": sum(said == right for said, right in judged) / max(1, len(judged)),
        "balanced_agreement": 1 - (share(paid) + share(unpaid)) / 2,
        "wrong_paid": share(paid),
        "right_unpaid": share(unpaid),
    }


def share(flags: Sequence[bool]) -> float:
    """Returns the share that is true; 1.0 of none, so that a kind of response that never came up counts as an error."""
    return sum(flags) / len(flags) if flags else 1.0


def accuracy(run: Path) -> float:
    """Returns the accuracy by rule that a chain measured."""
    measured = json.loads((run / "measured" / "evaluation.json").read_text(encoding="utf-8"))
    (name,) = (name for name in measured if name.startswith("avg@"))
    return measured[name]


def main() -> int:
    """Measures, prints a table to stderr and one JSON line to stdout."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=ROOT / "outputs" / "benchmark_nano_judge")
    arguments = parser.parse_args()
    folder, is_quick = arguments.output.resolve(), arguments.quick
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "same_number.yaml").write_text(RUBRIC, encoding="utf-8")
    export, verdicts = train_judge(folder, seed=arguments.seed, is_quick=is_quick)
    judge = judge_settings(export, folder / "judge_server.log")
    if is_quick:  # a judge of two steps fails every canary
        judge["canary_every"] = 0

    sft = {
        "method": "sft",
        "model": {"nano": {"size": "s"}},
        "sft": {"num_steps": 2 if is_quick else 500, "examples_per_step": 32, "weighting": "sqrt"},
        "learner": {"learning_rate": 1e-3, "warmup_steps": 20, "weight_decay": 0.01, "schedule": "linear"},
    }
    policy = run_recipe(folder, policy_recipe(folder, "policy", sft, seed=arguments.seed, is_quick=is_quick))
    before = measure_agreement(policy, judge, folder)

    sapo = {
        "method": "rl",
        "model": {"path": str(policy / "policy" / "export")},
        "data": {"seed": 1},
        "rewards": {
            "components": {
                "answer": {"use": "count", "weight": 0.0},
                "judge": {"use": "llm_judge", "options": {"rubric": "same_number.yaml"}},
            },
            "judge": judge,
        },
        "rl": {"num_steps": 1 if is_quick else 60, "prompts_per_step": 4 if is_quick else 32, "group_size": 8, "num_mini_batches": 2,
               "policy_loss": {"name": "sapo"}},
        "learner": {"learning_rate": 1e-4, "warmup_steps": 10, "weight_decay": 0.0, "schedule": "linear"},
    }  # fmt: skip
    trained = run_recipe(folder, policy_recipe(folder, "sapo", sapo, seed=arguments.seed, is_quick=is_quick))
    after = measure_agreement(trained, judge, folder)
    gained = accuracy(trained) - accuracy(policy)
    for name, found in (("before SAPO", before), ("after SAPO", after)):
        print(name, *(f"{key} {value:.4g}" for key, value in found.items()), sep="  ", file=sys.stderr)
    print(f"accuracy by rule {accuracy(policy):.1%} -> {accuracy(trained):.1%}, paid by the judge alone", file=sys.stderr)
    result = {
        "name": "nano_judge",
        "value": float(before["balanced_agreement"]),
        "unit": "served judge's verdicts on held-out responses of a policy that agree with the rule, mean of right and wrong ones",
        "bar": MIN_AGREEMENT,
        "ok": before["balanced_agreement"] >= MIN_AGREEMENT and before["unavailable"] == 0,
        "rows": {"before": before, "after": after, "gained_by_rule": gained, "rows_right": verdicts[1], "rows_wrong": verdicts[0]},
        "command": " ".join(["python", "benchmarks/nano_judge.py", *sys.argv[1:]]),
        "versions": installed_versions(),
    }
    print(json.dumps(result))
    return 0 if result["ok"] or is_quick else 1


if __name__ == "__main__":
    sys.exit(main())
