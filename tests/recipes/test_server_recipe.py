"""RL with servers and responses drawn one step ahead: a killed server, Ctrl-C and a resume change nothing; what does not fit is refused."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from vlpost.model.records import VlpostError
from vlpost.recipes.check_memory import Devices, check_memory
from vlpost.recipes.curate_engine_config import EngineModel
from vlpost.recipes.load import load_recipe

RECIPE = """
method: rl
output: {output}
model: {{nano: {{size: s}}}}
sampler: {{max_response_tokens: 12, max_model_len: 96, max_videos_per_prompt: 0, serve: {{servers: {servers}}}}}
rewards: {{components: {{answer: {{use: "few.py:few_tokens"}}}}}}
data: {{use: handwriting, split: train, tasks: {{add: 2.0, arithmetic: 1.0}}}}
parity: {{num_examples: 3, num_publishes: 1}}
checkpoint: {{every: 3}}
rl: {{num_steps: 8, prompts_per_step: 6, group_size: 4, num_mini_batches: 2, staleness: 1}}
learner: {{learning_rate: 1.0e-3}}
"""

REWARD = '''
def few_tokens(example, rollout):
    """Higher for shorter responses, between 0 and 1."""
    return 1.0 / rollout.num_sampled_tokens + (sum(rollout.token_ids) % 7) / 10
'''


def write_recipe(folder: Path, servers: int, name: str = "recipe.yaml") -> Path:
    (folder / "few.py").write_text(REWARD)
    path = folder / name
    path.write_text(RECIPE.format(output=folder / "run", servers=servers))
    return path


def start(recipe: Path, *more: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "vlpost.recipes.run", "run", str(recipe), *more]
    with (recipe.parent / "console.log").open("a") as log:
        return subprocess.Popen(command, cwd=recipe.parent, stdout=log, stderr=log)


def said(recipe: Path) -> str:
    return (recipe.parent / "console.log").read_text()


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")] if path.exists() else []


def processes(*words: str) -> list[int]:
    """Returns the processes whose command line has all the words."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if all(word in line for word in words):
                found.append(int(entry.name))
    return found


def wait_for_step(process: subprocess.Popen, recipe: Path, count: int) -> None:
    deadline = time.monotonic() + 500
    while len(lines(recipe.parent / "run" / "metrics.jsonl")) < count:
        assert process.poll() is None, said(recipe)[-3000:]
        assert time.monotonic() < deadline, f"step {count} was not reached"
        time.sleep(0.02)


def outcome(folder: Path) -> tuple[list[dict], list[dict]]:
    rollouts = [{name: value for name, value in line.items() if name != "time"} for line in lines(folder / "run" / "rollouts.jsonl")]
    return lines(folder / "run" / "metrics.jsonl"), rollouts


def test_a_lost_server_and_a_stop_change_nothing(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    recipe = write_recipe(whole, servers=1)
    assert start(recipe).wait(timeout=900) == 0, said(recipe)[-3000:]

    recipe = write_recipe(broken, servers=2)
    served = ("vllm.entrypoints.openai.api_server", str(broken))
    run = start(recipe)
    wait_for_step(run, recipe, 1)
    victim = min(pid for pid in processes(*served) if pid not in processes("judge_server_main"))
    os.kill(victim, signal.SIGKILL)
    wait_for_step(run, recipe, 4)
    run.send_signal(signal.SIGINT)
    assert run.wait(timeout=500) == 130, said(recipe)[-3000:]
    assert processes(*served) == []
    stopped_after = len(lines(broken / "run" / "metrics.jsonl"))
    assert 4 <= stopped_after < 8
    # The servers are how, not what: their number may change on the way.
    recipe = write_recipe(broken, servers=1)
    assert start(recipe, "--resume").wait(timeout=900) == 0, said(recipe)[-3000:]

    told = [event["fields"]["what"] for event in lines(broken / "run" / "events.jsonl") if event["kind"] == "server"]
    assert sum("its server ended and is started again, time 1 of at most 5" in what for what in told) == 1, told
    (metrics, rollouts), (expected_metrics, expected) = outcome(broken), outcome(whole)
    assert [line["step"] for line in metrics] == [line["step"] for line in expected_metrics] == list(range(1, 9))
    assert len(rollouts) == 8 * 6 * 4
    drawn = ("step", "example_id", "response", "policy_version")
    assert set(drawn) <= set(rollouts[0]), sorted(rollouts[0])
    assert [[line[name] for name in drawn] for line in rollouts] == [[line[name] for name in drawn] for line in expected]
    assert [line["values"]["rollout_lag"] for line in metrics] == [0.0, *[2.0] * 7]
    for line, other in zip(metrics, expected_metrics, strict=True):
        for name in ("loss", "reward", "engine_kl_k3", "entropy", "response_tokens"):
            if name in other["values"]:
                assert line["values"][name] == pytest.approx(other["values"][name], rel=1e-2, abs=1e-5), name
    # What was drawn by older weights is seen as such, and nothing else is.
    gaps = [line["values"]["engine_kl_k3"] for line in metrics]
    assert gaps[0] < 1e-6 < min(gaps[1:])


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (", serve: {{servers: {servers}}}", "", "rl.staleness = 1 needs sampler.serve: the engine in this process cannot draw while"),
        ("staleness: 1", "staleness: 1, dynamic_sampling: {{max_rounds: 1}}", "rl.staleness = 1 with rl.dynamic_sampling: which examples"),
        ("staleness: 1", "staleness: 2", "rl.staleness"),
        (
            "learner:",
            "watchdog: {{publish_s: 60}}\nlearner:",
            "publish_timeout_s = 300 and watchdog.publish_s = 60: the watchdog would end",
        ),
        ("group_size: 4", "group_size: 300", "sampler.max_num_seqs = 256 is below the group_size = 300: with sampler.serve a server"),
        ("serve: {{servers: {servers}}}", "serve: {{servers: 2, devices: ['0']}}", "serve.devices = ['0'] with serve.servers = 2"),
        ("serve: {{servers: {servers}}}", "serve: {{arguments: {{api_key: x}}}}", "it stands for --api-key, which the run decides itself"),
        ("rate: 1.0e-3", "rate: 1.0e-3, lora: {{rank: 4}}", "servers take whole weights; write learner: {lora: {publish: merged}}"),
        (
            "learner:",
            "agent: {{tools: [{{use: image_zoom_in}}]}}\nlearner:",
            "rl.staleness = 1 with agent: conversations with tools",
        ),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, old, new, words):
    assert old in RECIPE
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.replace(old, new).format(output=tmp_path / "run", servers=2))
    with pytest.raises((ValueError, VlpostError)) as caught:
        load_recipe(path)
    assert words in " ".join(str(caught.value).split())


def test_an_engine_model_of_curate_has_its_engine_in_the_process():
    sampler = {"max_response_tokens": 8, "max_model_len": 96, "serve": {"servers": 1}}
    with pytest.raises(ValueError, match=r"sampler.serve is of stages that train or evaluate; here the engine runs in this process"):
        EngineModel.model_validate({"path": "org/name", "sampler": sampler})


@pytest.mark.parametrize(("serve", "counts"), [("", True), (", serve: {{servers: 1}}", True), (", serve: {{devices: ['7']}}", False)])
def test_servers_with_devices_of_their_own_are_no_part_of_the_learners_memory(tmp_path, serve, counts):
    path = tmp_path / "recipe.yaml"
    text = RECIPE.replace(", serve: {{servers: {servers}}}", serve).replace(", staleness: 1", "")
    path.write_text(text.format(output=tmp_path / "run"))
    (tmp_path / "few.py").write_text(REWARD)
    said = " ".join(check_memory(load_recipe(path), Devices(kind="cuda", count=1, device_bytes=80 * 2**30)))
    assert ("engine 32.00" in said) == counts, said
