"""On-policy distillation by the command line: a chain of teacher, student and distillation on a nano with the real engine."""

import json
import subprocess
import sys

import pytest
from vlpost.recipes.load import RecipeError, load_recipe

RECIPE = """
method: chain
output: {output}
common:
  sampler: {{max_response_tokens: 8, max_model_len: 96, max_videos_per_prompt: 0, max_images_per_prompt: 1}}
  rewards: {{components: {{answer: {{use: count}}}}}}
  data: {{use: handwriting, split: train, tasks: {{add: 1.0}}}}
stages:
  teacher:
    method: sft
    model: {{nano: {{size: m}}}}
    sft: {{num_steps: 2, examples_per_step: 4}}
    learner: {{learning_rate: 1.0e-3}}
  distilled:
    method: on_policy_distill
    model: {{nano: {{size: s}}}}
    teachers: {{larger: {{model: {{stage: teacher}}}}}}
    parity: {{num_examples: 4, num_publishes: 2}}
    checkpoint: {{every: 1}}
    distill: {{num_steps: 3, prompts_per_step: 4, group_size: 2, prompts: multimodal}}
    learner: {{learning_rate: 1.0e-3}}
"""


def run(folder, *arguments):
    command = [sys.executable, "-m", "vlpost.recipes.run", "run", "recipe.yaml", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_small_student_follows_a_larger_teacher(tmp_path):
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(output=tmp_path / "run"))
    done = run(tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    said = " ".join(done.stdout.split())
    assert "distilled: teacher larger:" in said
    assert "teacher larger sees images: inverted, they move its log-probs" in said

    steps = [line["values"] for line in lines(tmp_path / "run" / "metrics.jsonl") if line["phase"] == "distilled"]
    assert len(steps) == 3
    assert all(step["teacher_divergence"] > 1e-3 for step in steps)
    assert all(step["grad_norm"] > 0 and step["engine_max_abs_gap"] < 1e-4 for step in steps)
    assert all(step["sampled_tokens"] == step["trained_tokens"] for step in steps)
    gates = [event["fields"] for event in lines(tmp_path / "run" / "events.jsonl") if event["kind"] == "parity"]
    assert [gate["when"] for gate in gates] == ["before the first step", "after publish 1", "after publish 2"]
    drawn = lines(tmp_path / "run" / "rollouts.jsonl")
    assert len(drawn) == 3 * 4 * 2
    assert {line["unjudged"]["teacher"] for line in drawn} == {"on-policy distillation scores tokens, not responses"}

    # The nanos of both sizes were built, each from its own settings.
    sizes = {json.loads(path.read_text())["nano"]["size"] for path in (tmp_path / "run").glob("nano*/nano_settings.json")}
    assert sizes == {"s", "m"}


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (
            "stage: teacher}",
            "stage: later}",
            "teachers.larger.model.stage = 'later': must be an earlier training stage, one of \\['teacher'\\]",
        ),
        (", prompts: multimodal", "", "distill.prompts is text, and learner.freeze leaves out vision and merger"),
        (
            "{{larger: ",
            "{{other: {{model: {{stage: teacher}}}}, larger: ",
            "teachers 'other' and 'larger' both teach the tasks that no other",
        ),
        ("teachers: {{larger: {{model: {{stage: teacher}}}}}}", "teachers: {{}}", "at least 1"),
    ],
)
def test_a_recipe_that_does_not_fit_together_is_refused(tmp_path, old, new, words):
    assert old in RECIPE
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace(old, new).format(output=tmp_path / "run"))
    with pytest.raises(RecipeError, match=words):
        load_recipe(tmp_path / "recipe.yaml")
