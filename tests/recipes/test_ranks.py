"""A whole chain on two processes (FSDP2, an engine each) is the same run as on one."""

import json
import os
import subprocess
import sys

import pytest
import yaml
from vlpost.model.records import VlpostError
from vlpost.recipes.load import load_recipe
from vlpost.recipes.stages import _check_shares

PLUGIN = "def even_ids(example, rollout):\n    return sum(token % 2 == 0 for token in rollout.token_ids) / len(rollout.token_ids)\n"
"""A reward that tells random responses apart, so that there are updates to compare."""


def recipe(folder):
    sampler = {"max_response_tokens": 8, "max_model_len": 128, "max_images_per_prompt": 1, "max_videos_per_prompt": 0}
    data = {"use": "handwriting", "split": "train", "tasks": {"add": 1.0, "arithmetic": 0.5}, "languages": ["en"]}
    return {
        "method": "chain",
        "output": str(folder),
        "trackers": [],
        "common": {
            "model": {"nano": {"size": "s", "tied": False}},
            "data": data,
            "rewards": {"components": {"even": {"use": "reward.py:even_ids"}}},
            "sampler": sampler,
        },
        "stages": {
            "sft": {
                "method": "sft",
                "data": {"num_examples": 32},
                "sft": {"num_steps": 3, "examples_per_step": 8},
                "learner": {"learning_rate": 1e-3, "token_budget": 128},
            },
            "rl": {
                "method": "rl",
                "model": {"stage": "sft"},
                "rl": {"num_steps": 1, "prompts_per_step": 4, "group_size": 4, "kl": {"in": "loss", "estimator": "exact", "coef": 0.1}},
                "learner": {"learning_rate": 1e-4, "token_budget": 256},
            },
            # Another engine than the stage before: closing the first one must not take the ranks' group with it.
            "evaluate": {
                "method": "evaluate",
                "model": {"stage": "rl"},
                "evaluate": {"num_examples": 5, "num_samples": 2},
                "sampler": {"max_num_seqs": 16},
            },
        },
    }


def run(folder, launcher):
    path = folder.parent / f"{folder.name}.yaml"
    path.write_text(yaml.safe_dump(recipe(folder), sort_keys=False))
    (folder.parent / "reward.py").write_text(PLUGIN)
    command = [sys.executable, *launcher, "-m", "vlpost.recipes.run", "run", str(path)]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    values = {(line["phase"], line["step"]): line["values"] for line in metrics}
    return values, json.loads((folder / "evaluate" / "evaluation.json").read_text()), done.stdout


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    two = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return folder, run(folder / "one", []), run(folder / "two", two)


def test_the_runs_are_the_same(runs):
    _, (one, evaluation, _), (two, other_evaluation, said) = runs
    assert one.keys() == two.keys() == {("sft", 1), ("sft", 2), ("sft", 3), ("rl", 1), ("evaluate", 0)}
    for step in range(1, 4):
        for name in ("loss", "grad_norm", "trained_tokens", "learning_rate"):
            assert two["sft", step][name] == pytest.approx(one["sft", step][name], rel=1e-4), (step, name)
    assert one["rl", 1]["groups_without_signal"] == 0.0
    names = ("reward", "grad_norm", "response_tokens", "trained_tokens", "sampled_tokens", "entropy", "reference_kl_k3", "ratio_p50_pos")
    for name in names:
        assert two["rl", 1][name] == pytest.approx(one["rl", 1][name], rel=1e-3, abs=1e-6), name
    assert one["rl", 1]["skipped_updates"] == two["rl", 1]["skipped_updates"] == 0.0
    assert max(values["rl", 1]["engine_max_abs_gap"] for values in (one, two)) < 1e-4
    accuracy = {name: value for name, value in evaluation.items() if isinstance(value, float)}
    assert accuracy == pytest.approx({name: other_evaluation[name] for name in accuracy}, abs=1e-6)
    assert "2 processes, fsdp2" in said


def test_the_first_rank_writes_the_run_and_the_others_their_own_rollouts(runs):
    folder, _, _ = runs
    counts = [len((folder / name / "rollouts.jsonl").read_text().splitlines()) for name in ("one", "two", "two/rank-1")]
    assert counts == [16, 8, 8]
    assert {path.name for path in (folder / "two" / "rl" / "export").iterdir()} == {
        path.name for path in (folder / "one" / "rl" / "export").iterdir()
    }
    assert not (folder / "two" / "rank-1" / "checkpoints").exists()


def test_examples_that_cannot_be_shared_are_refused(tmp_path):
    path = tmp_path / "r.yaml"
    (tmp_path / "reward.py").write_text(PLUGIN)
    path.write_text(yaml.safe_dump(recipe(tmp_path / "out"), sort_keys=False))
    stages = dict(load_recipe(path, []).stages)
    for num_ranks in (1, 2, 4, 8):
        _check_shares(stages["sft"], num_ranks)
    with pytest.raises(
        VlpostError, match=r"sft\.examples_per_step = 8 cannot be shared equally by 3 processes in every update: .* multiple of 3"
    ):
        _check_shares(stages["sft"], 3)
    _check_shares(stages["rl"], 2)
    with pytest.raises(VlpostError, match=r"rl\.prompts_per_step = 4 cannot be shared equally by 4 processes .* multiple of 8"):
        _check_shares(stages["rl"], 4)
