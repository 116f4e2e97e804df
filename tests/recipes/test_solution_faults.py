"""Bad examples among the worked solutions of the track: as many as asked for, and such that the rewards find them."""

import pytest
from vlpost.model.records import DataError, Rollout
from vlpost.recipes.handwriting import handwriting_example
from vlpost.rewards.code_switching import code_switching
from vlpost.rewards.repetition import repetition

TASKS = {"mixing": 2.0, "constrained": 1.0, "add": 1.0}
FAULTS = {"code_switching": 0.3, "repetition": 0.2, "form": 0.5}


def rows(faults, count=400, *, with_solution=True):
    return [
        handwriting_example("train", index, tasks=TASKS, seed=3, with_solution=with_solution, solution_faults=faults)
        for index in range(count)
    ]


def rollout(example):
    return Rollout(
        token_ids=(1, 2),
        sampled=(False, True),
        sampler_logprobs=(0.0, -1.0),
        media=(),
        text=example.messages[-1].text,
        prompt_suffix="",
        finish_reason="stop",
        policy_version=0,
    )


def question(example):
    return example.messages[:-1]


def test_only_the_solutions_differ_and_the_shares_are_those_asked_for():
    plain, spoiled = rows({}), rows(FAULTS)
    found = {}
    for clean, row in zip(plain, spoiled, strict=True):
        fault = row.metadata.get("solution_fault")
        found.setdefault(row.task, []).append(fault)
        assert (row.id, row.answer, question(row)) == (clean.id, clean.answer, question(clean))
        # A bare answer is already as short as `short` wants it.
        assert (row.messages == clean.messages) == (fault is None or row.metadata.get("form") == "short")
        assert "solution_fault" not in clean.metadata
    assert found["add"] == [None] * len(found["add"])
    shares = {fault: found[task].count(fault) / len(found[task]) for task, fault in [("mixing", "code_switching"), ("constrained", "form")]}
    shares["repetition"] = found["mixing"].count("repetition") / len(found["mixing"])
    for fault, share in shares.items():
        assert abs(share - FAULTS[fault]) < 0.1


def test_each_fault_is_what_its_reward_finds():
    seen = set()
    for row in rows(FAULTS):
        if row.task != "mixing":
            continue
        fault, response = row.metadata.get("solution_fault"), rollout(row)
        seen.add((fault, row.metadata["language"]))
        asked = handwriting_example("train", int(row.id.split("/")[-1]), tasks=TASKS, seed=3, with_solution=False)
        assert (code_switching(asked, response).value < 0) == (fault == "code_switching"), response.text
        assert (repetition(asked, response).value > 0) == (fault == "repetition"), response.text
    assert seen == {(fault, language) for fault in (None, "code_switching", "repetition") for language in ("en", "zh")}


def test_a_question_has_no_fault():
    for row in rows(FAULTS, 40, with_solution=False):
        assert "solution_fault" not in row.metadata


@pytest.mark.parametrize(
    ("tasks", "faults", "words"),
    [
        ({"add": 1.0}, {"form": 0.5}, r"solution_faults.form = 0.5: spoils constrained, which tasks does not have"),
        ({"mixing": 1.0}, {"code_switching": 0.7, "repetition": 0.6}, r"solution_faults of mixing: 1.3 in all, .* together at most 1"),
        ({"mixing": 1.0}, {"repetitions": 0.5}, r"unknown solution fault 'repetitions': did you mean 'repetition'"),
    ],
)
def test_faults_that_cannot_be_are_refused(tasks, faults, words):
    with pytest.raises(DataError, match=words):
        handwriting_example("train", 0, tasks=tasks, seed=0, with_solution=True, solution_faults=faults)
