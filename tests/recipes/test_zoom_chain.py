"""The recipe of thinking with images, two steps a stage: conversations with the zoom tool on the real engine, from YAML to the log."""

import json
from pathlib import Path

import pytest
import yaml
from vlpost.recipes.load import load_recipe
from vlpost.recipes.run import main

RECIPE = Path(__file__).parents[2] / "recipes" / "nano_zoom.yaml"
SHORT = [
    "stages.no_tool.sft.num_steps=1",
    "stages.no_tool.sft.examples_per_step=2",
    "stages.cold_start.sft.num_steps=2",
    "stages.cold_start.sft.examples_per_step=2",
    "stages.tool_rl.rl.num_steps=2",
    "stages.tool_rl.rl.prompts_per_step=2",
    "stages.tool_rl.rl.group_size=2",
    "common.sampler.max_response_tokens=12",
    *(f"stages.{stage}.evaluate.{key}=2" for stage in ("evaluate_no_tool", "evaluate_cold_start", "evaluate_tool_rl")
      for key in ("num_examples", "num_samples")),
]  # fmt: skip


def test_the_stages_that_draw_have_the_tool_and_the_first_measurement_has_none():
    stages = dict(load_recipe(RECIPE).stages)
    with_tool = {name for name, stage in stages.items() if getattr(stage, "agent", None) is not None}
    assert with_tool == {
        "evaluate_cold_start", "tool_rl", "evaluate_tool_rl", "student_cold_start", "student_tool_rl", "evaluate_student_tool_rl",
    }  # fmt: skip
    assert stages["tool_rl"].rewards.components["calls"].when == "answer"


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("zoom") / "run"
    chain = yaml.safe_load(RECIPE.read_text())
    # An agent of two steps gets no question right: there is nothing that a student could learn.
    chain["stages"] = {name: stage for name, stage in chain["stages"].items() if "student" not in name}
    recipe = folder.parent / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(chain, sort_keys=False))
    assert main(["run", str(recipe), f"output={folder}", *SHORT]) == 0
    return folder


def test_every_stage_runs_and_the_turns_are_logged(run_folder):
    lines = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    values = {phase: [line["values"] for line in lines if line["phase"] == phase] for phase in {line["phase"] for line in lines}}
    steps = values["tool_rl"]
    assert len(steps) == 2
    for step in steps:
        assert step["turns"] >= 1.0
        assert {"tool_calls", "tool_errors", "ended_turns_frac", "ended_context_frac", "ended_unavailable_frac"} <= step.keys()
        assert step["ended_unavailable_frac"] == 0.0
    (measured,) = values["evaluate_tool_rl"]
    assert "tool_calls" in measured
    (without,) = values["evaluate_no_tool"]
    assert "tool_calls" not in without


def test_the_gate_passed_on_conversations(run_folder):
    events = [json.loads(line) for line in (run_folder / "events.jsonl").read_text().splitlines()]
    gaps = [event["fields"]["engine_gap"] for event in events if event["kind"] == "parity"]
    assert gaps
    assert max(gaps) <= 1e-4


def test_check_opens_the_tools_and_refuses_one_that_is_not_there(capsys, tmp_path):
    assert main(["check", str(RECIPE)]) == 0
    assert "tool_rl: agent: tools image_zoom_in_tool, at most 4 turns" in capsys.readouterr().out
    assert main(["check", str(RECIPE), 'common.agent.tools=[{use: "os.path:nothing"}]']) == 1
    assert "has no function 'nothing'" in capsys.readouterr().err
