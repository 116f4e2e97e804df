"""Puzzles: forms of a grid, the rules of sudoku, permutations and orders, and totality."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vlpost.model.records import DataError
from vlpost.rewards import RewardResult, Unavailable
from vlpost.rewards.puzzle import check_puzzle_answer, puzzle, read_grid

SOLVED = "1234\n3412\n2143\n4321"
OTHER = "1234\n3421\n2143\n4312"
SUDOKU = {"kind": "sudoku", "clues": [[1, 2, 3, 4], [3, 4, 0, 0], [2, 1, 4, 3], [4, 3, 0, 0]], "block": [2, 2]}
SORTED = {"kind": "sorted", "items": {"a": 3, "b": 1, "c": 3.0}}


@pytest.fixture(scope="session")
def make_puzzle(make_example):
    return lambda answer, metadata=None: dataclasses.replace(make_example(answer), metadata={"puzzle": metadata} if metadata else {})


@pytest.mark.parametrize(
    "text",
    [
        *("12\n34", "1 2\n3 4", "1,2\n3,4", "| 1 | 2 |\n| 3 | 4 |", "[[1, 2], [3, 4]]", '[["1", "2"], ["3", "4"]]', '["12", "34"]'),
        *("```\n12\n34\n```", "```json\n[[1,2],[3,4]]\n```", "１２\n３４", "<think>no</think><answer>12\n34</answer>"),
    ],
)
def test_forms_of_one_grid_are_equal(text, make_puzzle, make_rollout):
    assert puzzle(make_puzzle("12\n34"), make_rollout(text)).value == 1.0


@pytest.mark.parametrize(
    ("metadata", "answer", "text", "value"),
    [
        (None, "12\n34", "12\n33", 0.0),
        (None, "12\n34", "12\n3", 0.0),
        (None, "12\n34", "12\n34\n12", 0.0),
        (None, "12\n34", "[[1, 2], [3, true]]", 0.0),
        (None, "12\n34", "<think>12\n34", 0.0),
        (None, "东西\n南北", "东 西\n南 北", 1.0),
        (SUDOKU, SOLVED, SOLVED, 1.0),
        (SUDOKU, SOLVED, OTHER, 1.0),
        (SUDOKU, SOLVED, "1234\n3412\n2143\n4312", 0.0),
        (SUDOKU, SOLVED, "2134\n3412\n1243\n4321", 0.0),
        (SUDOKU, SOLVED, "1234\n3412\n2143", 0.0),
        ({"kind": "permutation"}, "c, a, b", "c -> a -> b", 1.0),
        ({"kind": "permutation"}, "c, a, b", '["c", "a", "b"]', 1.0),
        ({"kind": "permutation"}, "红、绿、蓝", "红，绿，蓝", 1.0),
        ({"kind": "permutation"}, "c, a, b", "c, b, a", 0.0),
        ({"kind": "permutation"}, "c, a, b", "c < a < b", 0.0),
        ({"kind": "permutation"}, "c, a, b", "c, a, b, b", 0.0),
        (SORTED, "b, a, c", "b, c, a", 1.0),
        (SORTED, "b, a, c", "a, b, c", 0.0),
        (SORTED, "b, a, c", "b, a", 0.0),
        (SORTED, "b, a, c", "b, a, a", 0.0),
        ({**SORTED, "descending": True}, "a, c, b", "c, a, b", 1.0),
    ],
)
def test_puzzle_values(metadata, answer, text, value, make_puzzle, make_rollout):
    assert puzzle(make_puzzle(answer, metadata), make_rollout(text)).value == value


@pytest.mark.parametrize(
    ("metadata", "answer", "words"),
    [
        ({"kind": "chess"}, "12", "kind must be one of"),
        ("grid", "12", "kind must be one of"),
        ({**SUDOKU, "block": [3, 3]}, SOLVED, "clues must be"),
        ({**SUDOKU, "clues": [[1]]}, SOLVED, "clues must be"),
        (SUDOKU, "1234\n3412\n2143\n4312", "does not solve"),
        ({"kind": "sorted", "items": {"a": "x"}}, "a", "items must map"),
        (SORTED, "a, b, c", "does not solve"),
        (None, "", "no grid"),
        ({"kind": "permutation"}, "a,,b", "no sequence"),
    ],
)
def test_data_that_cannot_be_judged_are_named(metadata, answer, words, make_puzzle, make_rollout):
    example = make_puzzle(answer, metadata)
    with pytest.raises(DataError, match=rf"example 'add-0'.*{words}"):
        check_puzzle_answer(example)
    assert isinstance(puzzle(example, make_rollout("12")), Unavailable)


@given(st.lists(st.lists(st.integers(0, 99), min_size=3, max_size=3), min_size=1, max_size=5))
def test_a_grid_is_read_however_it_is_written(rows):
    as_json = read_grid(str(rows))
    assert as_json == read_grid("\n".join(" ".join(map(str, row)) for row in rows)) == tuple(tuple(map(str, row)) for row in rows)


pieces = st.lists(st.sampled_from([*'0123456789[]{},|"\n ->→、', "true", "null", "```"]))


@given(
    kind=st.sampled_from([(None, "12"), (SUDOKU, SOLVED), (SORTED, "b, a, c")]), text=st.one_of(st.text(max_size=100), pieces.map("".join))
)
def test_puzzle_is_total(kind, text, make_puzzle, make_rollout):
    metadata, answer = kind
    for own in (answer, text):
        verdict = puzzle(make_puzzle(own, metadata), make_rollout(text))
        assert isinstance(verdict, Unavailable) or (isinstance(verdict, RewardResult) and verdict.value in (0.0, 1.0))
