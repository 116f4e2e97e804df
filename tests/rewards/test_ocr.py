"""Transcriptions: the distance against the textbook recurrence, normalisation, and totality."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vlpost.model.records import DataError
from vlpost.rewards import RewardResult, Unavailable
from vlpost.rewards.ocr import MAX_TEXT_CHARS, check_ocr_answer, edit_distance, ocr, similarity


def textbook_distance(first, second):
    above = list(range(len(second) + 1))
    for row, a in enumerate(first, 1):
        here = [row]
        for column, b in enumerate(second):
            here.append(min(above[column + 1] + 1, here[-1] + 1, above[column] + (a != b)))
        above = here
    return above[-1]


words = st.text(alphabet="abc中", max_size=90)


@given(words, words)
def test_the_distance_is_that_of_the_textbook(first, second):
    assert edit_distance(first, second) == edit_distance(second, first) == textbook_distance(first, second)


@given(st.text(max_size=30), st.text(max_size=30))
def test_similarity_is_symmetric_and_1_only_for_equal_texts(first, second):
    assert similarity(first, second) == similarity(second, first)
    assert (similarity(first, second) == 1.0) == (first == second)


@pytest.mark.parametrize(
    ("answer", "text", "value"),
    [
        ("kitten", "sitting", 4 / 7),
        ("Hello world", "Hello\n world ", 1.0),
        ("Hello", "ｈｅｌｌｏ", 0.8),
        ("你好，世界", "你 好,\n世 界", 1.0),
        ("中文 and English", "中文and English", 1.0),
        ("a b", "ab", 2 / 3),
        ("abc", "```text\nabc\n```", 1.0),
        ("e\u0301", "é", 1.0),
        ("abc", "<think>abc", 0.0),
        ("abc", "<think>x</think>abc", 1.0),
        ("abc", "<answer>abc</answer><answer>abd</answer>", 0.0),
        ("abc", "a" * (MAX_TEXT_CHARS + 1), 0.0),
        ("abc", "xyz", 0.0),
    ],
)
def test_ocr_values(answer, text, value, make_example, make_rollout):
    assert ocr(make_example(answer), make_rollout(text)).value == pytest.approx(value)


def test_case_and_the_threshold_are_options(make_example, make_rollout):
    assert ocr(make_example("ABC"), make_rollout("abc"), ignore_case=True).value == 1.0
    example, rollout = make_example("abcd"), make_rollout("abcx")
    assert ocr(example, rollout, min_similarity=0.75).value == 0.75
    below = ocr(example, rollout, min_similarity=0.76)
    assert (below.value, below.metrics["similarity"]) == (0.0, 0.75)


@pytest.mark.parametrize("answer", ["", " \n", "a" * (MAX_TEXT_CHARS + 1)])
def test_an_answer_that_cannot_be_compared_is_refused(answer, make_example, make_rollout):
    with pytest.raises(DataError, match="example 'add-0'"):
        check_ocr_answer(make_example(answer))
    assert isinstance(ocr(make_example(answer), make_rollout("a")), Unavailable)


@given(answer=st.text(max_size=100), text=st.text(max_size=100))
def test_ocr_is_total(answer, text, make_example, make_rollout):
    verdict = ocr(make_example(answer), make_rollout(text))
    assert isinstance(verdict, Unavailable) or (isinstance(verdict, RewardResult) and 0.0 <= verdict.value <= 1.0)
