"""An interrupted and resumed chain ends where the uninterrupted one does: equal bytes of weights, equal logs."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

RECIPE = """
method: chain
output: {output}
common:
  model: {{nano: {{size: s}}}}
  sampler: {{max_response_tokens: 8, max_model_len: 96, max_videos_per_prompt: 0, max_images_per_prompt: 1}}
  rewards: {{components: {{answer: {{use: "{rewards}:few_tokens"}}}}}}
  data: {{use: handwriting, split: train, tasks: {{add: 2.0, arithmetic: 1.0}}}}
  parity: {{num_examples: 3}}
  checkpoint: {{every: 3}}
stages:
  sft:
    method: sft
    sft: {{num_steps: 10, examples_per_step: 6, plateau: {{patience: 9}}}}
    learner: {{learning_rate: 1.0e-3, warmup_steps: 4, schedule: cosine}}
    validation: {{every: 4, num_examples: 4, num_samples: 2, data: {{use: handwriting, split: validation, tasks: {{add: 1.0}}}}}}
  sapo:
    method: rl
    model: {{stage: sft}}
    rl: {{num_steps: 8, prompts_per_step: 4, group_size: 4, num_mini_batches: 2, dynamic_sampling: {{max_rounds: 2}}}}
    learner: {{learning_rate: 1.0e-3}}
  measure:
    method: evaluate
    model: {{stage: sapo}}
    data: {{split: test}}
    evaluate: {{num_examples: 4, num_samples: 2}}
"""

# An untrained policy never answers right; what it can do is stop early. Rounded, so that some groups have no signal and are replaced.
REWARD = '''
def few_tokens(example, rollout):
    """Higher for shorter responses, between 0 and 1."""
    return round(1.0 / rollout.num_sampled_tokens, 1)
'''


# Rows that a nano learns by heart in seconds: it calls the tool, whose picture is the answer to nothing.
TOOL_RECIPE = """
method: chain
output: {output}
common:
  model: {{nano: {{size: s}}}}
  sampler: {{max_response_tokens: 64, max_model_len: 384, max_videos_per_prompt: 0, max_images_per_prompt: 2}}
  rewards: {{components: {{answer: {{use: "tools.py:by_tokens"}}}}}}
  data: {{use: jsonl, path: prompts.jsonl}}
  parity: {{num_examples: 3}}
  checkpoint: {{every: 2}}
  agent: {{tools: [{{use: "tools.py:look"}}], max_turns: 3, max_images: 2, describe_tools: false}}
stages:
  sft:
    method: sft
    data: {{path: conversations.jsonl}}
    sft: {{num_steps: 60, examples_per_step: 8}}
    learner: {{learning_rate: 2.0e-3, warmup_steps: 5}}
    checkpoint: {{every: 30}}
  sapo:
    method: rl
    model: {{stage: sft}}
    rl: {{num_steps: 6, prompts_per_step: 4, group_size: 4, num_mini_batches: 2}}
    learner: {{learning_rate: 1.0e-4}}
  measure:
    method: evaluate
    model: {{stage: sapo}}
    evaluate: {{num_examples: 4, num_samples: 2}}
"""

TOOLS = '''
from PIL import Image


def look(at: int) -> Image.Image:
    """Shows a colour."""
    return Image.new("RGB", (64, 64), (30 * at % 256, 0, 0))


def by_tokens(example, rollout):
    """Depends on every token, so that no group is without a signal."""
    return sum(rollout.token_ids) % 11 / 10
'''


def write_recipe(folder: Path) -> Path:
    (folder / "few.py").write_text(REWARD)
    path = folder / "recipe.yaml"
    path.write_text(RECIPE.format(output=folder / "run", rewards="few.py"))
    return path


def write_tool_recipe(folder: Path) -> Path:
    (folder / "tools.py").write_text(TOOLS)
    path = folder / "recipe.yaml"
    path.write_text(TOOL_RECIPE.format(output=folder / "run"))
    Image.new("RGB", (64, 64), (120, 0, 0)).save(folder / "seen.png")
    with (folder / "prompts.jsonl").open("w") as prompts, (folder / "conversations.jsonl").open("w") as conversations:
        for number in range(8):
            asked = {"role": "user", "content": f"look at {number}"}
            called = {"type": "function", "function": {"name": "look", "arguments": {"at": number}}}
            told = [
                {"role": "assistant", "content": "", "tool_calls": [called]},
                {"role": "tool", "content": [{"type": "image", "image": "seen.png"}]},
                {"role": "assistant", "content": f"\\boxed{{{number}}}"},
            ]
            for file, messages in ((prompts, [asked]), (conversations, [asked, *told])):
                file.write(json.dumps({"id": f"row-{number}", "messages": messages, "answer": str(number)}) + "\n")
    return path


def start(recipe: Path, *more: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "vlpost.recipes.run", "run", str(recipe), *more]
    with (recipe.parent / "console.log").open("a") as log:
        return subprocess.Popen(command, cwd=recipe.parent, stdout=log, stderr=log)


def finish(process: subprocess.Popen, recipe: Path, status: int) -> str:
    assert process.wait(timeout=400) == status, (recipe.parent / "console.log").read_text()[-3000:]
    return (recipe.parent / "console.log").read_text()


def steps_done(recipe: Path, phase: str) -> int:
    path = recipe.parent / "run" / "metrics.jsonl"
    if not path.exists():
        return 0
    lines = path.read_text().splitlines(keepends=True)
    return sum(json.loads(line)["phase"] == phase for line in lines if line.endswith("\n"))


def wait_for(process: subprocess.Popen, recipe: Path, phase: str, count: int) -> None:
    deadline = time.monotonic() + 300
    while steps_done(recipe, phase) < count:
        assert process.poll() is None, (recipe.parent / "console.log").read_text()[-3000:]
        assert time.monotonic() < deadline, f"{phase} did not reach step {count}"
        time.sleep(0.05)


def outcome(recipe: Path) -> dict[str, object]:
    """Everything a run leaves that does not depend on the clock."""
    run = recipe.parent / "run"
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rollouts = [json.loads(line) for line in (run / "rollouts.jsonl").read_text().splitlines()]
    for line in [*metrics, *rollouts]:
        line.pop("time", None)
    for line in metrics:
        line["values"] = {name: value for name, value in line["values"].items() if not name.startswith("time/")}
    evaluation = json.loads((run / "measure" / "evaluation.json").read_text())
    evaluation.pop("model")
    return {
        "sft": (run / "sft" / "export" / "model.safetensors").read_bytes(),
        "sapo": (run / "sapo" / "export" / "model.safetensors").read_bytes(),
        "metrics": metrics,
        "rollouts": rollouts,
        "evaluation": evaluation,
    }


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    recipe = write_recipe(tmp_path_factory.mktemp("whole"))
    finish(start(recipe), recipe, 0)
    left = outcome(recipe)
    refilled = [line["values"]["refill_groups"] for line in left["metrics"] if line["phase"] == "sapo"]
    assert sum(map(bool, refilled)) > 0, "no step drew further groups: the runs would not differ if they were lost"
    return left


def assert_same(recipe: Path, uninterrupted: dict[str, object]) -> None:
    resumed = outcome(recipe)
    assert uninterrupted["sft"] != uninterrupted["sapo"], "SAPO changed nothing: the test would prove nothing"
    assert resumed["sft"] == uninterrupted["sft"], "the weights after SFT differ"
    assert resumed["sapo"] == uninterrupted["sapo"], "the weights after SAPO differ"
    assert resumed["metrics"] == uninterrupted["metrics"]
    assert resumed["rollouts"] == uninterrupted["rollouts"]
    assert resumed["evaluation"] == uninterrupted["evaluation"]


def test_ctrl_c_in_both_stages_then_resume_is_the_uninterrupted_run(tmp_path, uninterrupted):
    recipe = write_recipe(tmp_path)
    for phase, count, more in (("sft", 4, ()), ("sapo", 4, ("--resume",))):
        process = start(recipe, *more)
        wait_for(process, recipe, phase, count)
        process.send_signal(signal.SIGINT)
        said = finish(process, recipe, 130)
        assert "stopped and saved; go on with: vlpost run" in said.replace("\n", " ")
        assert "--resume" in said
    finish(start(recipe, "--resume"), recipe, 0)
    assert_same(recipe, uninterrupted)


def test_kill_then_resume_is_the_uninterrupted_run(tmp_path, uninterrupted):
    recipe = write_recipe(tmp_path)
    process = start(recipe)
    wait_for(process, recipe, "sapo", 5)
    process.kill()
    finish(process, recipe, -signal.SIGKILL)
    finish(start(recipe, "--resume"), recipe, 0)
    assert_same(recipe, uninterrupted)


def test_conversations_with_tools_go_on_as_if_they_had_not_been_killed(tmp_path):
    whole, killed = (write_tool_recipe(tmp_path / name) for name in ("whole", "killed") if (tmp_path / name).mkdir() is None)
    finish(start(whole), whole, 0)
    left = outcome(whole)
    assert all(line["values"]["tool_calls"] > 0 for line in left["metrics"] if line["phase"] == "sapo")
    assert any(line["images"] for line in left["rollouts"])
    process = start(killed)
    wait_for(process, killed, "sapo", 3)
    process.kill()
    finish(process, killed, -signal.SIGKILL)
    finish(start(killed, "--resume"), killed, 0)
    assert_same(killed, left)


def test_resume_with_another_recipe_is_refused(tmp_path):
    recipe = write_recipe(tmp_path)
    process = start(recipe)
    wait_for(process, recipe, "sft", 4)
    process.kill()
    process.wait()
    said = finish(start(recipe, "--resume", "stages.sft.learner.learning_rate=2.0e-3"), recipe, 1)
    assert "learner.learning_rate was 0.001, is 0.002" in said
    said = finish(start(recipe), recipe, 1)
    assert "is not empty: add --resume to go on" in said
