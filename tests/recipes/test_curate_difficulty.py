"""`verify` and `difficulty`: which candidates are right, and the band of pass rates, with the cases of the report exactly."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vlpost.model.records import DataError, Example, Message, TextPart
from vlpost.recipes.curate_config import DifficultyConfig, PassRateBand, VerifyConfig
from vlpost.recipes.curate_difficulty import DifficultyStep, VerifyStep, band_problem, in_order
from vlpost.recipes.curate_step import Candidate, CuratedRow, StepContext

CONTEXT = StepContext(recipe_folder=Path(), output=Path(), seed=0)


def message(role, text):
    return Message(role=role, parts=(TextPart(text=text),))


def candidate(text="", *, model="strong", value=None, num_tokens=10, with_image=True, finish_reason="stop"):
    return Candidate(
        text=text,
        prompt_suffix="",
        finish_reason=finish_reason,
        num_tokens=num_tokens,
        model=model,
        seed=0,
        value=value,
        with_image=with_image,
    )


def row(row_id, *candidates, answer="3", turns=("How many?",), task="count"):
    roles = ("user", "assistant") * len(turns)
    messages = tuple(message(role, text) for role, text in zip(roles, turns, strict=False))
    return CuratedRow(example=Example(id=row_id, messages=messages, answer=answer, task=task, source="made"), candidates=tuple(candidates))


def solved(num_right, num_responses, *, model="strong", num_tokens=10):
    return [candidate(model=model, value=float(place < num_right), num_tokens=num_tokens) for place in range(num_responses)]


def difficulty(models, rows, **settings):
    config = DifficultyConfig.model_validate({"use": "difficulty", "models": models, **settings})
    with DifficultyStep(config).open(CONTEXT) as opened:
        return opened.run(rows, shard=0)


@pytest.fixture
def verify(tmp_path):
    def run(rows, *, weight=1.0, **settings):
        rewards = {"components": {"answer": {"use": "count", "weight": weight}}, **settings.pop("rewards", {})}
        config = VerifyConfig.model_validate({"use": "verify", "rewards": rewards, **settings})
        with VerifyStep(config).open(StepContext(recipe_folder=tmp_path, output=tmp_path, seed=0)) as opened:
            return opened.run(rows, shard=0)

    return run


# ---------------------------------------------------------------- difficulty


def test_the_rules_of_the_report_on_sixteen_responses():
    rows = [
        row(f"{strong}-{trained}", *solved(strong, 16), *solved(trained, 16, model="trained"))
        for strong, trained in ((16, 14), (16, 15), (16, 16), (0, 0), (1, 0), (0, 14))
    ]
    result = difficulty({"strong": {"min_solved": 1}, "trained": {"max_pass_rate": 0.9}}, rows)
    assert [kept.example.id for kept in result.rows] == ["16-14", "1-0"]
    assert dict(result.dropped) == {
        "16-15": "too easy for trained: 15 of 16 right, at most 0.9 of them may be",
        "16-16": "too easy for trained: 16 of 16 right, at most 0.9 of them may be",
        "0-0": "too hard for strong: 0 of 16 right, at least 1 must be",
        "0-14": "too hard for strong: 0 of 16 right, at least 1 must be",
    }
    assert result.rows[0].notes == {
        "pass_rate/strong": 1.0, "mean_tokens/strong": 10.0, "pass_rate/trained": 0.875, "mean_tokens/trained": 10.0,
    }  # fmt: skip
    assert result.rows[0].candidates == rows[0].candidates, "groups stay whole"
    assert result.histogram == {
        "pass rate of strong": {"16/16": 3, "0/16": 2, "1/16": 1},
        "pass rate of trained": {"14/16": 2, "15/16": 1, "16/16": 1, "0/16": 2},
    }


@given(solved_of=st.integers(0, 40), more=st.integers(0, 40), percent=st.integers(0, 99), floor=st.integers(0, 5))
def test_the_band_is_the_comparison_of_whole_numbers(solved_of, more, percent, floor):
    total = solved_of + more or 1
    problem, by_length = band_problem(solved_of, total, band=PassRateBand(min_solved=floor, max_pass_rate=percent / 100), mean_tokens=1.0)
    expected = "too hard" if solved_of < floor else "too easy" if 100 * solved_of > percent * total else None
    assert (problem[0] if problem else None) == expected
    assert not by_length


def test_nine_of_ten_is_at_most_nine_tenths():
    assert band_problem(9, 10, band=PassRateBand(max_pass_rate=0.9), mean_tokens=1.0) == (None, False)
    assert band_problem(27, 30, band=PassRateBand(max_pass_rate=0.9), mean_tokens=1.0) == (None, False)


def test_long_responses_keep_an_easy_row_but_not_one_out_of_reach():
    band = {"strong": {"min_solved": 1, "max_pass_rate": 0.5, "long_tokens": 100}}
    rows = [
        row("easy and long", *solved(4, 4, num_tokens=100)),
        row("easy and short", *solved(4, 4, num_tokens=99)),
        row("hard and long", *solved(0, 4, num_tokens=500)),
        row("fair and short", *solved(2, 4)),
    ]
    result = difficulty(band, rows)
    assert [kept.example.id for kept in result.rows] == ["easy and long", "fair and short"]
    assert result.metrics == {"kept_by_length": 1}


def test_what_counts_as_right_is_a_reward_and_blind_tries_do_not_count():
    rows = [row("a", candidate(value=0.9), candidate(value=1.2), candidate(value=1.0, with_image=False))]
    assert difficulty({"strong": {"min_solved": 2}}, rows).dropped == (("a", "too hard for strong: 1 of 2 right, at least 2 must be"),)
    assert len(difficulty({"strong": {"min_solved": 2}}, rows, solved_reward=0.9).rows) == 1


def test_a_row_without_candidates_of_the_model_is_dropped_and_one_without_values_is_an_error():
    result = difficulty({"strong": {"min_solved": 1}}, [row("a", candidate(model="other", value=1.0))])
    assert result.dropped == (("a", "no candidate of strong: its pass rate is unknown"),)
    with pytest.raises(DataError, match=r"row 'a': candidate 2 of 2 of strong has no value; put a step with use: verify before"):
        difficulty({"strong": {"min_solved": 1}}, [row("a", candidate(value=1.0), candidate())])


@pytest.mark.parametrize(
    ("band", "words"),
    [
        ({}, "min_solved is 0 and max_pass_rate 1.0: no row could ever be dropped"),
        ({"min_solved": 1, "long_tokens": 5}, "long_tokens has no effect with max_pass_rate: 1.0"),
        ({"max_pass_rate": 1.1}, "less than or equal to 1"),
    ],
)
def test_a_band_that_means_nothing_is_refused(band, words):
    with pytest.raises(ValueError, match=words):
        PassRateBand.model_validate(band)


def test_bars_stand_from_none_right_to_all_right():
    assert list(in_order({"16/16": 1, "2/16": 1, "0/16": 1, "1/8": 1, "10/16": 1})) == ["0/16", "1/8", "2/16", "10/16", "16/16"]


# ---------------------------------------------------------------- verify


def test_every_candidate_gets_its_value_in_order(verify):
    result = verify(
        [row("a", candidate("3"), candidate("4"), candidate("<answer>3</answer>")), row("b", candidate("5"), answer="5")], weight=2.0
    )
    assert [[one.value for one in kept.candidates] for kept in result.rows] == [[2.0, 0.0, 2.0], [2.0]]
    assert result.metrics == {"responses": 4, "unavailable": 0}
    assert result.dropped == result.changed == ()


def test_below_the_floor_candidates_go_and_rows_without_any(verify):
    result = verify([row("a", candidate("3"), candidate("4")), row("b", candidate("1"), candidate("2"))], min_value=1.0)
    assert [[one.text for one in kept.candidates] for kept in result.rows] == [["3"]]
    assert result.changed == (("a", "candidates taken out: 1 wrong of 2"),)
    assert result.dropped == (("b", "no candidate is right: 2 were tried, the best value is 0"),)


def test_a_conversation_is_judged_by_its_own_last_turn(verify):
    rows = [row("a", turns=("How many?", "3")), row("b", turns=("How many?", "4")), row("c")]
    result = verify(rows, min_value=1.0)
    assert [(kept.example.id, kept.notes) for kept in result.rows] == [("a", {"value": 1.0})]
    reasons = dict(result.dropped)
    assert reasons["b"].startswith("response is wrong: value 0, at least 1 is asked; answer: ")
    assert reasons["c"] == "no response to verify: the row has neither candidates nor an assistant turn at its end"


def test_an_answer_that_cannot_be_verified_is_a_reason_and_a_task_that_nobody_judges_an_error(verify):
    result = verify([row("a", candidate("3"), answer="many")])
    assert result.rows == ()
    assert result.dropped[0][1].startswith("answer cannot be verified: ")
    with pytest.raises(DataError, match="no reward component judges its task 'count'"):
        verify([row("a", candidate("3"))], rewards={"components": {"answer": {"use": "count", "tasks": ["other"]}}})


FAILING = """
def broken(example, rollout):
    if rollout.text == "x":
        raise RuntimeError("out of order")
    return float(rollout.text == example.answer)
"""


@pytest.mark.parametrize(
    ("policy", "kept", "words"),
    [
        ("drop_rollout", ["a", "b"], "candidates taken out: 1 that could not be judged of 2"),
        ("drop_group", ["b"], "could not be judged: another candidate of the row could not"),
    ],
)
def test_what_cannot_be_judged_follows_the_recipe(verify, tmp_path, policy, kept, words):
    (tmp_path / "plugin.py").write_text(FAILING)
    rewards = {
        "components": {"own": {"use": "plugin.py:broken", "isolate": False}}, "on_unavailable": policy, "max_unavailable_frac": 0.5,
    }  # fmt: skip
    result = verify([row("a", candidate("x"), candidate("3")), row("b", candidate("3"), candidate("4"))], rewards=rewards)
    assert [one.example.id for one in result.rows] == kept
    found = dict(result.changed + result.dropped)["a"]
    assert found.startswith(words.partition(":")[0])
    assert result.metrics["responses"] == 4
