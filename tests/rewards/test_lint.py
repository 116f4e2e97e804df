"""The lint: right answers are paid, empty ones are not, or the recipe is refused."""

import pytest
from vlpost.model.records import DataError
from vlpost.rewards import RewardResult, RewardsConfig, registry
from vlpost.rewards.built_in import BuiltInReward
from vlpost.rewards.lint import MAX_ROWS, PROBES, lint_rewards


def lint(components, examples, folder=None):
    config = RewardsConfig.model_validate({"components": components})
    return lint_rewards(config, examples, recipe_folder=folder, allow_code=False)


def register(monkeypatch, **functions):
    def entry(function, **changes):
        return BuiltInReward(summary="-", value_range=(0.0, 1.0), function=function, **changes)

    entries = {name: entry(**value) if isinstance(value, dict) else entry(value) for name, value in functions.items()}
    monkeypatch.setattr(registry, "BUILT_IN_REWARDS", {**registry.BUILT_IN_REWARDS, **entries})


def test_a_sound_verifier_has_no_faults(make_example):
    report = lint({"answer": {"use": "count"}}, [make_example(str(number), number=number) for number in range(11, 15)])
    means = {name: outcome.mean for name, outcome in report.outcomes["answer"].items()}
    assert set(means) == {probe.name for probe in PROBES}
    assert (means["gold"], means["thinking gold"]) == (1.0, 1.0)
    assert {means[name] for name in ("gold only in thoughts", "empty", "empty after thoughts", "wrong", "truncated", "prompt copied")} == {
        0.0
    }
    assert report.faults == ()
    assert report.lines()[0].startswith("reward  gold  thinking gold")


def test_a_verifier_that_never_pays_is_refused(make_example, monkeypatch):
    """The always-zero worker of ROLL's multiple choice, which shipped for months."""
    register(monkeypatch, zero=lambda example, rollout: RewardResult(value=0.0))
    report = lint({"it": {"use": "zero"}}, [make_example("3")])
    assert report.faults[0] == (
        "it (zero): example 'add-0', gold: the data's own answer gets 0, not 1; mend the row, or judge it with another reward"
    )
    assert "thinking gold" in report.faults[1]
    assert report.lines()[-2:] == [f"FAULT {fault}" for fault in report.faults]


def test_a_verifier_that_pays_for_nothing_is_refused(make_example, monkeypatch):
    register(monkeypatch, always=lambda example, rollout: RewardResult(value=0.5 if rollout.text != example.answer else 1.0))
    faults = lint({"it": {"use": "always"}}, [make_example("3")]).faults
    assert any(", empty: a response without an answer gets 0.5; it must not be paid" in fault for fault in faults)
    assert any(", gold only in thoughts: a response without an answer gets 0.5" in fault for fault in faults)


def test_a_verifier_that_is_blind_to_the_prompts_think_tag_is_refused(make_example, monkeypatch):
    register(monkeypatch, blind=lambda example, rollout: RewardResult(value=float(example.answer in rollout.text)))
    faults = lint({"it": {"use": "blind"}}, [make_example("3")]).faults
    assert len(faults) == 1
    assert ", gold only in thoughts: " in faults[0]


def test_an_unavailable_gold_is_refused_with_its_reason(make_example, monkeypatch):
    def broken(example, rollout):
        raise RuntimeError("no luck")

    register(monkeypatch, broken=broken)
    faults = lint({"it": {"use": "broken"}}, [make_example("3")]).faults
    assert "the data's own answer gets unavailable (RuntimeError: no luck), not 1" in faults[0]


def test_a_penalty_is_full_at_zero_and_silence_deserves_it(make_example, monkeypatch):
    register(
        monkeypatch, penalty={"function": lambda example, rollout: RewardResult(value=-float(len(rollout.text) > 90)), "gold_value": 0.0}
    )
    assert lint({"it": {"use": "penalty", "weight": -1.0}}, [make_example("3")]).faults == ()


def test_a_row_without_a_known_right_response_is_tried_on_the_rest(make_example, monkeypatch):
    def no_gold(example):
        raise DataError("no solution")

    register(monkeypatch, some={"function": lambda example, rollout: RewardResult(value=0.0), "gold_response": no_gold})
    report = lint({"it": {"use": "some"}}, [make_example("3")])
    assert report.faults == ()
    assert report.outcomes["it"]["gold"].num_judged == 0
    assert report.outcomes["it"]["empty"].num_judged == 1


def test_rows_are_spread_and_routed(make_example, tmp_path):
    (tmp_path / "mine.py").write_text("def number(example, rollout):\n    return float(example.id.rpartition('-')[2])\n", encoding="utf-8")
    components = {"mine": {"use": "mine.py:number", "tasks": ["add"]}, "none": {"use": "exact", "tasks": ["read"]}}
    report = lint(components, [make_example(str(number), number=number) for number in range(1000)], folder=tmp_path)
    assert report.outcomes["mine"]["empty"].num_judged == MAX_ROWS
    assert report.outcomes["mine"]["empty"].mean == pytest.approx(499.5, abs=1)
    assert report.skipped == {"none": "no row is judged by it"}
    assert report.faults == (), "what a plug-in's right value is, only its author knows"
    assert report.lines()[-1] == "none: not tried, no row is judged by it"


def test_unavailable_answers_of_a_plug_in_are_shown(make_example, tmp_path):
    (tmp_path / "mine.py").write_text("def broken(example, rollout):\n    raise RuntimeError('no luck')\n", encoding="utf-8")
    lines = lint({"mine": {"use": "mine.py:broken"}}, [make_example("1")], folder=tmp_path).lines()
    assert lines[1].split()[:2] == ["mine", "unavailable"]
    assert lines[2] == "mine: unavailable on 1 rows: RuntimeError: no luck"
