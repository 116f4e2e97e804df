"""Supervised stages in phases: which examples a step sees, with which settings, and that a resumed run is the uninterrupted one."""

import json
from pathlib import Path

import pytest
import vlpost.recipes
import yaml
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError
from safetensors.torch import load_file
from vlpost.model.records import Example, ImagePart, Message, TextPart
from vlpost.recipes import run, sft_phases, stages
from vlpost.recipes.load import RecipeError, load_recipe
from vlpost.recipes.schema import InterleaveConfig, SftRecipe
from vlpost.recipes.sft_phases import dealt, examples_of_step, open_phases, plan_of_step, plan_phases, training_data
from vlpost.recipes.training import comparable_recipe
from vlpost.sft.train import SftStage


def digits(task, **more):
    return {"use": "handwriting", "tasks": {task: 1.0}, "num_examples": 40, **more}


def recipe(**changes):
    values = {
        "method": "sft",
        "output": "out",
        "model": {"nano": {}},
        "sampler": {"max_response_tokens": 8, "max_model_len": 64},
        "rewards": {"components": {"answer": {"use": "count"}}},
        "learner": {"learning_rate": 1e-3, "token_budget": 512},
        "sft": {"examples_per_step": 4},
        "phases": {
            "short": {"num_steps": 3, "data": digits("add"), "max_length": 64, "too_long": "drop"},
            "long": {"num_steps": 5, "data": digits("read"), "examples_per_step": 2, "interleave": {"phase": "short"}},
        },
    }
    return SftRecipe.model_validate({key: value for key, value in (values | changes).items() if value is not None})


# ---------------------------------------------------------------- plans


def test_phases_follow_each_other():
    short, long = plan_phases(recipe())
    assert [(plan.name, plan.first_step, plan.num_steps, plan.first_example) for plan in (short, long)] == [
        ("short", 0, 3, 0),
        ("long", 3, 5, 12),
    ]
    assert (short.config.examples_per_step, short.config.max_length, short.config.too_long, short.config.num_steps) == (4, 64, "drop", 3)
    assert (long.config.examples_per_step, long.config.max_length, long.config.too_long, long.config.num_steps) == (2, None, "refuse", 5)
    assert long.config.weighting == short.config.weighting == "sqrt"
    assert [plan_of_step((short, long), step).name for step in range(8)] == ["short"] * 3 + ["long"] * 5
    assert [examples_of_step((short, long), step) for step in (0, 2, 3, 7)] == [(0, 4), (8, 4), (12, 2), (20, 2)]


def test_the_order_of_a_share_is_worked_out_once_and_not_at_every_step(monkeypatch):
    asked = []

    class Counting(sft_phases.ShareOrder):
        def counts(self, num_places):
            asked.append(num_places)
            return super().counts(num_places)

    monkeypatch.setattr(sft_phases, "ShareOrder", Counting)
    odd = recipe().phases["long"].model_copy(update={"interleave": InterleaveConfig(phase="short", share=0.271828)})
    changed = recipe(phases={"short": recipe().phases["short"], "long": odd})
    plans = [plan_phases(changed) for _ in range(20)]
    assert plans == plans[:1] * 20
    assert asked in ([12, 10], [10]), "the examples of each phase once, of a share of 1 perhaps before this test"


def test_a_recipe_without_phases_is_one():
    (only,) = plan_phases(recipe(phases=None, data=digits("add"), sft={"num_steps": 7, "examples_per_step": 4}))
    assert (only.name, only.num_steps, only.first_step, only.draws[0].start) == ("", 7, 0, 0)
    assert examples_of_step((only,), 6) == (24, 4)


def test_an_interleaved_phase_goes_on_with_the_earlier_data():
    plans = plan_phases(recipe())
    assert [(draw.share, draw.start, list(draw.data.tasks)) for draw in plans[1].draws] == [(0.5, 0, ["read"]), (0.5, 12, ["add"])]
    stream = open_phases(plans, seed=0)
    whole = stream.examples(0, 22)
    short_alone = open_phases(plan_phases(recipe(phases=None, data=digits("add"), sft={"num_steps": 9, "examples_per_step": 4})), seed=0)
    assert [example.id for example in whole if example.task == "add"] == [example.id for example in short_alone.examples(0, 17)]
    for step in range(3, 8):
        assert sorted(example.task for example in stream.examples(*examples_of_step(plans, step))) == ["add", "read"]


@pytest.mark.parametrize(("share", "count"), [(0.1, 1), (0.3, 3), (0.9, 9)])
def test_the_ratio_is_exact_in_every_step(share, count):
    phases = {
        "short": {"num_steps": 2, "data": digits("add")},
        "long": {"num_steps": 6, "data": digits("read"), "interleave": {"phase": "short", "share": share}},
    }
    plans = plan_phases(recipe(phases=phases, sft={"examples_per_step": 10}))
    stream = open_phases(plans, seed=0)
    for step in range(2, 8):
        assert [example.task for example in stream.examples(*examples_of_step(plans, step))].count("add") == count


def test_equal_data_is_one_data_set_that_goes_on():
    phases = {"first": {"num_steps": 3}, "second": {"num_steps": 3, "max_length": 128}}
    plans = plan_phases(recipe(phases=phases, data=digits("add")))
    seen = [example.id for example in open_phases(plans, seed=0).examples(0, 24)]
    assert len(set(seen)) == 24
    assert [draw.start for plan in plans for draw in plan.draws] == [0, 12]


@given(start=st.integers(0, 30), count=st.integers(1, 12))
def test_any_window_is_what_one_long_reading_has_there(start, count):
    stream = open_phases(plan_phases(recipe()), seed=1)
    whole = stream.examples(0, start + count)
    assert [example.id for example in stream.examples(start, count)] == [example.id for example in whole[start:]]


def test_every_data_set_of_a_stage_is_named():
    mixed = {"use": "mix", "parts": {"a": {"share": 1, "data": digits("add")}, "b": {"share": 2, "data": digits("count")}}}
    phases = {"one": {"num_steps": 1}, "two": {"num_steps": 1, "data": digits("read")}}
    named = training_data(recipe(phases=phases, data=mixed))
    assert {key: (list(data.tasks), has_solution) for key, data, has_solution in named} == {
        "data.parts.a.data": (["add"], True),
        "data.parts.b.data": (["count"], True),
        "phases.two.data": (["read"], True),
    }


# ---------------------------------------------------------------- ranks


def sized(name, letters, side=0):
    parts = (TextPart(text="x" * letters),)
    if side:
        parts += (ImagePart.from_image(Image.new("RGB", (side, side))),)
    return Example(id=name, messages=(Message(role="user", parts=parts),), answer="", task="t", source="s")


@given(letters=st.lists(st.integers(0, 900), min_size=1, max_size=12), ranks=st.integers(1, 4))
def test_dealing_loses_no_example(letters, ranks):
    examples = [sized(str(number), count) for number, count in enumerate(letters)]
    given_out = dealt(examples, ranks)
    assert sorted(example.id for example in given_out) == sorted(example.id for example in examples)
    if ranks == 1:
        assert given_out == examples


def test_long_rows_are_dealt_to_all_ranks():
    # As a mix of two halves brings them: one rank would get all images.
    examples = [sized(str(number), 30, side=640 if number % 2 else 0) for number in range(8)]
    assert [sum(bool(example.media) for example in dealt(examples, 2)[rank::2]) for rank in (0, 1)] == [2, 2]
    assert [sum(bool(example.media) for example in examples[rank::2]) for rank in (0, 1)] == [0, 4]
    unequal = dealt([sized(str(number), 3 * 2**number) for number in range(4)], 2)
    assert [example.id for example in unequal] == ["3", "2", "0", "1"]


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"phases": None, "data": digits("add")}, "sft.num_steps is missing: give it, or phases with num_steps of their own"),
        ({"sft": {"num_steps": 3, "examples_per_step": 4}}, "sft.num_steps = 3: the phases say how many steps there are; take it out"),
        (
            {
                "sft": {"examples_per_step": 4, "plateau": {}},
                "validation": {"every": 1, "data": {"use": "handwriting", "tasks": {"add": 1.0}}},
            },
            "sft.plateau would end the first phase it is met in",
        ),
        ({"phases": None, "sft": {"num_steps": 3, "examples_per_step": 4}}, "data is missing: name what is trained on"),
        ({"phases": {"a": {"num_steps": 1}}}, "phases.a.data is missing, and the recipe has no data of its own: give one of them"),
        (
            {"data": digits("add")},
            "data is used by no phase, each has its own: take it out (under a chain's common, write data: null here)",
        ),
        (
            {"phases": {"a": {"num_steps": 1, "data": digits("add"), "max_length": 1024}}},
            "phases.a.max_length = 1024 is above learner.token_budget = 512: a row of that length could not be trained on",
        ),
        ({"sft": {"examples_per_step": 4, "max_length": 513}}, "sft.max_length = 513 is above learner.token_budget = 512"),
        (
            {"phases": {"a": {"num_steps": 1, "data": digits("add"), "interleave": {"phase": "b"}}}},
            "phases.a.interleave.phase = 'b': must be an earlier phase, one of []",
        ),
        (
            {
                "phases": {
                    "a": {"num_steps": 1, "data": digits("add")},
                    "b": {"num_steps": 1, "data": digits("add"), "interleave": {"phase": "a"}},
                }
            },
            "phases.b.interleave.phase = 'a': has the same data as 'b' itself: there is nothing to interleave",
        ),
        ({"phases": {"": {"num_steps": 1, "data": digits("add")}}}, "at least 1 character"),
        (
            {"phases": {"a": {"num_steps": 1, "data": digits("add"), "interleave": {"phase": "a", "share": 1.0}}}},
            "Input should be less than 1",
        ),
    ],
)
def test_phases_that_do_not_fit_are_refused(changes, words):
    with pytest.raises(ValidationError) as caught:
        recipe(**changes)
    assert words in str(caught.value)


# ---------------------------------------------------------------- runs

RECIPE = """
method: sft
output: {output}
model: {{nano: {{size: s}}}}
sampler: {{max_response_tokens: 8, max_model_len: 96}}
rewards: {{components: {{answer: {{use: count}}}}}}
learner: {{learning_rate: 1.0e-3, token_budget: 512, warmup_steps: 2, schedule: cosine, dtype: float32}}
checkpoint: {{every: 2, keep: 9}}
trackers: []
sft: {{examples_per_step: 4}}
phases:
  short:
    num_steps: 3
    max_length: {limit}
    too_long: drop
    data: {{use: handwriting, tasks: {{add: 1.0, arithmetic: 1.0}}, num_examples: 12}}
  long:
    num_steps: 4
    examples_per_step: 2
    data: {{use: handwriting, tasks: {{read: 1.0}}, num_examples: 8}}
    interleave: {{phase: short}}
"""


class StoppedError(Exception):
    """The machine is gone."""


class Recording(SftStage):
    """Keeps which examples each update of this process saw; `stop_after` of them it breaks down."""

    seen = []  # noqa: RUF012
    stop_after = None

    def step(self, examples):
        if len(Recording.seen) == Recording.stop_after:
            raise StoppedError
        Recording.seen.append([example.id for example in examples])
        return super().step(examples)


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Returns a function that runs the recipe in `tmp_path/<name>` and returns its examples, step by step."""
    monkeypatch.setattr(stages, "SftStage", Recording)

    def begin(name, *, limit=512, stop_after=None, resume=False):
        path = tmp_path / f"{name}.yaml"
        path.write_text(RECIPE.format(output=tmp_path / name, limit=limit), encoding="utf-8")
        monkeypatch.setattr(Recording, "seen", [])
        monkeypatch.setattr(Recording, "stop_after", stop_after)
        if stop_after is None:
            assert run.main(["run", str(path), *(["--resume"] if resume else [])]) == 0
        else:
            with pytest.raises(StoppedError):
                run.main(["run", str(path)])
        return Recording.seen

    return begin


def outcome(folder):
    """Returns weights and metrics of a run, without what depends on the clock."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    metrics = [(line["step"], {n: v for n, v in line["values"].items() if not n.startswith("time/")}) for line in lines]
    return load_file(folder / "export" / "model.safetensors"), metrics


def events(folder, kind):
    lines = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    return [line["fields"] for line in lines if line["kind"] == kind]


def test_a_run_killed_in_either_phase_and_resumed_is_the_uninterrupted_run(start, tmp_path):
    whole = start("whole")
    weights, metrics = outcome(tmp_path / "whole")
    assert [len(examples) for examples in whole] == [4, 4, 4, 2, 2, 2, 2]
    rates = [values["learning_rate"] for _, values in metrics]
    assert rates[0] < rates[1] == rates[2] == 1e-3
    assert rates[2:] == sorted(set(rates[2:]), reverse=True), "one schedule over both phases"
    assert [event["name"] for event in events(tmp_path / "whole", "phase")] == ["short", "long"]
    # Checkpoints after steps 2, 4 and 6: killed after step 3, at the border; after step 5, in the middle of the second phase.
    for stop_after, saved in ((3, 2), (5, 4)):
        name = f"stopped-{stop_after}"
        assert start(name, stop_after=stop_after) == whole[:stop_after]
        assert start(name, resume=True) == whole[saved:]
        resumed_weights, resumed_metrics = outcome(tmp_path / name)
        assert resumed_metrics == metrics
        assert all(weights[key].equal(resumed_weights[key]) for key in weights)


def test_dropped_rows_change_no_other_steps_examples_and_are_named_in_the_log(start, tmp_path):
    whole = start("whole")
    assert start("dropping", limit=30) == whole
    _, metrics = outcome(tmp_path / "dropping")
    dropped = events(tmp_path / "dropping", "row")
    assert [values["rows_dropped"] for _, values in metrics[3:]] == [0.0] * 4, "the second phase has room for all"
    assert 0 < len(dropped) == sum(values["rows_dropped"] for _, values in metrics) < 12
    for event in dropped:
        assert event["outcome"] == "dropped"
        assert event["id"] in whole[event["step"] - 1]
        assert event["reason"].startswith("too long: ")
        assert event["reason"].endswith(" tokens with images expanded, at most 30")
    assert events(tmp_path / "whole", "row") == []


def test_phases_in_another_order_are_another_recipe():
    phases = {name: {"num_steps": 3, "data": digits(name)} for name in ("add", "read")}
    turned = dict(reversed(phases.items()))
    assert comparable_recipe(recipe(phases=phases)) == comparable_recipe(recipe(phases=dict(phases)))
    assert comparable_recipe(recipe(phases=phases)) != comparable_recipe(recipe(phases=turned))


# ---------------------------------------------------------------- shipped recipes

SHIPPED = ("qwen3_vl_8b_sft.yaml", "qwen3_vl_8b_thinking_cold_start.yaml")


@pytest.mark.parametrize("name", SHIPPED)
def test_the_shipped_recipes_load_and_say_that_they_were_not_run(name):
    path = Path(vlpost.recipes.__file__).parent / name
    assert isinstance(load_recipe(path).recipe, SftRecipe)
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# Not run")
    assert len(text.splitlines()) <= 60
    assert "<" not in json.dumps(yaml.safe_load(text))


def test_a_typo_in_a_phase_is_named_with_the_nearest_key(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(output="out", limit=64).replace("too_long: drop", "to_long: drop"), encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert str(caught.value) == f"{path}: phases.short.to_long: unknown key; did you mean 'too_long'?"
    path.write_text(RECIPE.format(output="out", limit=64), encoding="utf-8")
    loaded = load_recipe(path, ["phases.long.num_steps=9"])
    assert plan_phases(loaded.recipe)[1].num_steps == 9
    assert loaded.origins["phases.long.num_steps"] == "command line"


def test_check_reads_the_rows_of_every_phase_and_part(tmp_path, capsys):
    line = {"id": "r", "messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "1"}]}
    for name in ("one", "two", "three"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(line) + "\n", encoding="utf-8")
    sources = {name: {"use": "jsonl", "path": str(tmp_path / f"{name}.jsonl")} for name in ("one", "two", "three")}
    values = yaml.safe_load(RECIPE.format(output="out", limit=64))
    values["phases"]["short"]["data"] = {
        "use": "mix",
        "parts": {"a": {"share": 1, "data": sources["one"]}, "b": {"share": 2, "data": sources["two"]}},
    }
    values["phases"]["long"]["data"] = sources["three"]
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    assert run.main(["check", str(path)]) == 0
    said = capsys.readouterr().out
    for key, name in (("phases.short.data.parts.a.data", "one"), ("phases.short.data.parts.b.data", "two"), ("phases.long.data", "three")):
        assert f"sft: {key} {tmp_path / name}.jsonl: 1 rows" in said
    (tmp_path / "three.jsonl").write_text(json.dumps({**line, "messages": line["messages"][:1]}) + "\n", encoding="utf-8")
    assert run.main(["check", str(path)]) == 1
    assert "row 'r' does not end with an assistant message" in capsys.readouterr().err
