"""A reward plug-in that misbehaves inside a run: the step finishes, and no response is scored for what the plug-in did."""

import json

import pytest
from vlpost.recipes.run import main

FAULTS = ("raise", "hang", "nan", "text", "leave", "kill")
PLUG_IN = f"""
import os, signal, sys, time, zlib

FAULTS = {FAULTS!r}


def choose(text):
    return (FAULTS + ("fine",) * len(FAULTS))[zlib.crc32(text.encode()) % (2 * len(FAULTS))]


def faulty(example, rollout):
    '''Judges half of all texts and misbehaves on the others.'''
    what = choose(rollout.text)
    if what == "raise":
        raise RuntimeError("raised")
    if what == "hang":
        time.sleep(3600)
    if what == "leave":
        os._exit(0)
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    return {{"nan": float("nan"), "text": "1.0"}}.get(what, 0.1 + zlib.crc32(rollout.text.encode()) % 7 / 10)


def short(example, rollouts):
    '''Judges every second group, and one response too few of each other.'''
    values = [0.1 + zlib.crc32(rollout.text.encode()) % 7 / 10 for rollout in rollouts]
    return values[int(example.id[-1]) % 2:]
"""
RECIPE = """
method: rl
output: {folder}/run
model: {{nano: {{size: s}}}}
sampler: {{max_response_tokens: 8, max_model_len: 96, max_videos_per_prompt: 0, max_images_per_prompt: 1}}
data: {{use: handwriting, split: train, tasks: {{add: 1.0}}}}
parity: {{num_examples: 2}}
trackers: []
rewards: {{components: {{mine: {{use: "mine.py:{function}"}}}}, max_unavailable_frac: 1.0, timeout_s: 0.5}}
rl: {{num_steps: 2, prompts_per_step: 4, group_size: 8}}
learner: {{learning_rate: 1.0e-3}}
"""
WORDS = {
    "raise": "RuntimeError: raised",
    "hang": "no verdict in 0.5 s",
    "nan": "must be a finite number",
    "text": "returned a str",
    "leave": "the process died with exit status 0",
    "kill": "the process died by SIGKILL",
}


def run_with(function, folder):
    """Runs the recipe with one of the plug-in's functions and returns the run's folder."""
    (folder / "mine.py").write_text(PLUG_IN)
    (folder / "recipe.yaml").write_text(RECIPE.format(folder=folder, function=function))
    assert main(["run", str(folder / "recipe.yaml")]) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    return run_with("faulty", tmp_path_factory.mktemp("faults"))


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_what_was_not_judged_has_its_reason_and_no_reward(run_folder):
    written = [line for line in lines(run_folder / "rollouts.jsonl") if line["phase"] == "rl"]
    reasons = [line["unjudged"]["mine"] for line in written if line["unjudged"]]
    assert all(line["reward"] is None and line["rewards"] == {} for line in written if line["unjudged"])
    assert all(0.1 <= line["reward"] <= 0.7 for line in written if not line["unjudged"])
    assert all(any(words in reason for words in WORDS.values()) for reason in reasons)
    assert {what for what, words in WORDS.items() if any(words in reason for reason in reasons)} == set(FAULTS)


def test_the_steps_learn_from_what_was_judged(run_folder):
    steps = [line["values"] for line in lines(run_folder / "metrics.jsonl") if line["phase"] == "rl"]
    assert len(steps) == 2
    for step in steps:
        assert 0.0 < step["unavailable_frac"] < 1.0
        assert step["reward/mine/judged"] + step["reward/mine/unavailable"] == 32
        assert 0.1 <= step["reward"] <= 0.7
        assert step["skipped_updates"] == 0


def test_a_group_with_a_list_of_the_wrong_length_is_not_judged_and_the_others_are(tmp_path):
    run_folder = run_with("short", tmp_path)
    written = [line for line in lines(run_folder / "rollouts.jsonl") if line["phase"] == "rl"]
    assert {int(line["example_id"][-1]) % 2 for line in written} == {0, 1}
    for line in written:
        if int(line["example_id"][-1]) % 2:
            assert line["reward"] is None
            assert "returned 7 values for 8 rollouts" in line["unjudged"]["mine"]
        else:
            assert 0.1 <= line["reward"] <= 0.7
            assert not line["unjudged"]
    for step in (line["values"] for line in lines(run_folder / "metrics.jsonl") if line["phase"] == "rl"):
        assert step["reward/mine/judged"] == step["reward/mine/unavailable"] == 16
        assert step["skipped_updates"] == 0
