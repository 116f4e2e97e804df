import json
import math
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from vlpost.model.records import VlpostError
from vlpost.recipes import report
from vlpost.recipes.report import PANELS, Curve, draw_curves, read_curves, running_mean
from vlpost.recipes.run_log import RunLog


def write_run(folder, *records):
    with RunLog(folder, console=None, trackers=()) as log:
        for phase, step, values in records:
            log.metrics(phase, step, values)
    return folder


@pytest.fixture
def drawn(monkeypatch):
    """The panels that reach the figure, with the phases of each."""
    panels = {}
    draw = report._draw_panel

    def watch(axes, panel, curves, color_of):
        draw(axes, panel, curves, color_of)
        panels[axes.get_title(loc="left")] = {curve.phase: color_of[curve.phase] for curve in curves}

    monkeypatch.setattr(report, "_draw_panel", watch)
    return panels


def test_curves_are_read_by_phase_and_null_is_a_gap(tmp_path):
    write_run(tmp_path, ("sft", 1, {"loss": 2.0}), ("rl", 1, {"reward": 0.5}), ("sft", 2, {"loss": math.nan}), ("kl", 7, {"loss": 1.0}))
    sft, kl = read_curves(tmp_path / "metrics.jsonl", ["loss", "entropy"])
    assert (sft.metric, sft.phase, sft.steps, sft.values[0]) == ("loss", "sft", (1, 2), 2.0)
    assert math.isnan(sft.values[1])
    assert kl == Curve(metric="loss", phase="kl", steps=(7,), values=(1.0,))
    assert read_curves(tmp_path / "metrics.jsonl", ["entropy"]) == []


def test_only_panels_with_values_are_drawn_and_a_phase_keeps_its_color(tmp_path, drawn):
    write_run(
        tmp_path,
        ("sft", 1, {"loss": 2.0, "grad_norm": 1.0}),
        ("rl", 1, {"reward": 0.5, "entropy": math.nan}),
        ("sft", 1, {"validation/accuracy": 0.1}),
        ("rl", 2, {"reward": 0.7, "engine_kl_k3": 1e-5, "loss": 0.1}),
    )
    path = draw_curves(tmp_path)
    assert path == tmp_path / "curves.png"
    assert {title: list(phases) for title, phases in drawn.items()} == {
        "Training loss": ["sft", "rl"],
        "Validation accuracy": ["sft"],
        "Reward": ["rl"],
        "KL of engine and trainer": ["rl"],
    }
    assert len({phases["rl"] for phases in drawn.values() if "rl" in phases}) == 1
    assert drawn["Training loss"]["sft"] != drawn["Training loss"]["rl"]
    with Image.open(path) as image:
        colors = {color for _, color in image.convert("RGB").getcolors(maxcolors=2**20)}
        assert image.width > 1000
    assert (0x00, 0x72, 0xB2) in colors
    assert (0xD5, 0x5E, 0x00) in colors


@pytest.mark.parametrize("num_panels", range(1, len(PANELS) + 1))
@pytest.mark.parametrize("num_steps", [1, 60])
def test_any_number_of_panels_and_steps_is_drawn(tmp_path, drawn, num_panels, num_steps):
    values = {panel.metric: 0.5 for panel in PANELS[:num_panels]}
    draw_curves(write_run(tmp_path, *[("rl", step, values) for step in range(num_steps)]))
    assert list(drawn) == [panel.title for panel in PANELS[:num_panels]]


def test_a_line_that_is_still_being_written_is_left_out(tmp_path):
    write_run(tmp_path, ("sft", 1, {"loss": 2.0}))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"time": 1.0, "pha')
    assert read_curves(tmp_path / "metrics.jsonl", ["loss"]) == [Curve(metric="loss", phase="sft", steps=(1,), values=(2.0,))]


@pytest.mark.parametrize("broken", ["{broken}", '{"step": 1}', "[]"])
def test_a_broken_line_is_named(tmp_path, broken):
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"phase": "sft", "step": 1, "values": {}}) + f"\n{broken}\n")
    with pytest.raises(VlpostError, match=r"metrics\.jsonl, line 2: no line of metrics .*remove it"):
        draw_curves(tmp_path)


@pytest.mark.parametrize("records", [(), (("sft", 1, {"grad_norm": 1.0}),), (("sft", 1, {"loss": math.nan}),)])
def test_a_log_without_a_value_to_draw_gives_none(tmp_path, records):
    assert draw_curves(write_run(tmp_path, *records)) is None
    assert not (tmp_path / "curves.png").exists()


def test_a_folder_without_a_log_is_named(tmp_path):
    with pytest.raises(VlpostError, match=r"absent/metrics\.jsonl: the run's log cannot be read .*give the folder of a run"):
        draw_curves(tmp_path / "absent")


def test_the_running_mean_looks_both_ways_and_steps_over_gaps():
    assert running_mean([1.0, 3.0, math.nan, 5.0, 8.0], reach=1) == [2.0, 2.0, 4.0, 6.5, 6.5]
    assert math.isnan(running_mean([math.nan, 1.0], reach=0)[0])


@given(st.lists(st.floats(-1e3, 1e3), min_size=1), st.integers(0, 10))
def test_a_running_mean_stays_between_the_extremes(values, reach):
    means = running_mean(values, reach=reach)
    assert len(means) == len(values)
    assert all(min(values) - 1e-9 <= value <= max(values) + 1e-9 for value in means)


def test_the_module_starts_without_torch_and_matplotlib():
    code = "import sys, vlpost.recipes.report; assert not {'torch', 'matplotlib', 'accelerate'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
