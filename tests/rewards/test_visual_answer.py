"""Whole numbers, options and exact texts: exact tables, and no text that makes a verifier raise."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vlpost.model.records import DataError
from vlpost.rewards import RewardResult, Unavailable
from vlpost.rewards.visual_answer import (
    MAX_RESPONSE_CHARS,
    REWARDS,
    check_choice_answer,
    check_count_answer,
    check_exact_answer,
    choice,
    count,
    exact,
    option_letter,
    whole_number,
)

ONES = "零一二三四五六七八九"


@pytest.mark.parametrize(
    ("text", "number"),
    [
        *(
            ("12", 12),
            ("12.", 12),
            (" 12 。", 12),
            ("１２", 12),
            ("１２．", 12),
            ("-3", -3),
            ("−3", -3),
            ("+3", 3),
            ("007", 7),
            ("1,234", 1234),
        ),
        *(
            ("$12$", 12),
            ("**12**", 12),
            ("\\text{12}", 12),
            ("$\\text{twelve}$", 12),
            ("Twelve", 12),
            ("zero", 0),
            ("TWENTY.", 20),
            ("两", 2),
        ),
        *(
            ("12.0", None),
            ("1/2", None),
            ("12 apples", None),
            ("1 2", None),
            ("12,34", None),
            ("3 or 4", None),
            ("", None),
            ("twenty-one", None),
        ),
        *(
            ("²", None),
            ("①", None),
            ("٣", None),
            ("½", None),
            ("1e3", None),
            ("0x10", None),
            ("9" * 5000, None),
            ("一百", None),
            ("二三", None),
        ),
    ],
)
def test_whole_number(text, number):
    assert whole_number(text) == number


def test_all_chinese_numerals_to_99():
    for number in range(100):
        tens, ones = divmod(number, 10)
        text = ONES[ones] if tens == 0 else ("" if tens == 1 else ONES[tens]) + "十" + (ONES[ones] if ones else "")
        assert whole_number(text) == number, text
    assert whole_number("一十二") == 12


@given(st.integers(-(10**14), 10**14))
def test_every_whole_number_is_read_however_it_is_dressed(number):
    for dressed in (f"{number}", f"{number:,}", f" ${number}$.", str(number).translate({ord("0") + d: 0xFF10 + d for d in range(10)})):
        assert whole_number(dressed) == number


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        *(
            ("B", "B"),
            ("b", "B"),
            ("(B)", "B"),
            ("[B]", "B"),
            ("B)", "B"),
            ("B.", "B"),
            ("B:", "B"),
            ("（Ｂ）", "B"),
            ("【B】", "B"),
            ("option B", "B"),
        ),
        *(("选项B", "B"), ("选 B", "B"), ("选A或B", None), ("**B**", "B"), ("\\text{B}", "B"), ("$B$", "B"), ("Option (c).", "C")),
        *(
            ("A or B", None),
            ("A, B", None),
            ("AB", None),
            ("A/B", None),
            ("(A) (B)", None),
            ("", None),
            ("1", None),
            ("B. blue", None),
            ("\u212a", None),
        ),
    ],
)
def test_option_letter(text, letter):
    assert option_letter(text) == letter


@pytest.mark.parametrize(
    ("verifier", "answer", "text", "value"),
    [
        (count, "3", "<think>4</think>three", 1.0),
        (count, "3", "I count \\boxed{3}", 1.0),
        (count, "3", "\\boxed{3} or \\boxed{4}", 0.0),
        (count, "3", "there are 3", 0.0),
        (count, "3", "<think>3", 0.0),
        (choice, "B", "<answer>(b)</answer>", 1.0),
        (choice, "B", "<answer>A or B</answer>", 0.0),
        (choice, "B", "<answer>A</answer><answer>B</answer>", 0.0),
        (exact, "red  car", "ｒｅｄ\ncar", 1.0),
        (exact, "red car", "Red car", 0.0),
        (exact, "red car", "red car or blue car", 0.0),
    ],
)
def test_verdicts(verifier, answer, text, value, make_example, make_rollout):
    assert verifier(make_example(answer), make_rollout(text)).value == value


@given(
    verifier=st.sampled_from([count, choice, exact]),
    answer=st.sampled_from(["3", "B", "red", "", "\ud800"]),
    text=st.text(max_size=300),
)
def test_verifiers_are_total(verifier, answer, text, make_example, make_rollout):
    for written in (text, f"\\boxed{{{text}}}", f"<answer>{text}</answer>"):
        verdict = verifier(make_example(answer), make_rollout(written))
        assert isinstance(verdict, Unavailable) or (isinstance(verdict, RewardResult) and verdict.value in (0.0, 1.0))


@given(case=st.sampled_from([(count, "3"), (choice, "B"), (exact, "red")]), other=st.text(max_size=30).filter(str.strip))
def test_two_different_answers_are_never_paid(case, other, make_example, make_rollout):
    verifier, answer = case
    if "".join(other.split()) != answer:
        text = f"<answer>{answer}</answer> <answer>{other}</answer>"
        if not any(tag in other for tag in ("<answer>", "</answer>")):
            assert verifier(make_example(answer), make_rollout(text)).value == 0.0


@pytest.mark.parametrize(
    ("check", "verifier", "answer", "words"),
    [
        (check_count_answer, count, "many", "no whole number"),
        (check_choice_answer, choice, "A or B", "no option letter"),
        (check_exact_answer, exact, " \u3000", "is empty"),
    ],
)
def test_an_answer_of_the_wrong_kind_is_named_and_never_scored(check, verifier, answer, words, make_example, make_rollout):
    example = make_example(answer, number=7)
    with pytest.raises(DataError, match=rf"example 'add-7'.*{words}"):
        check(example)
    verdict = verifier(example, make_rollout("3"))
    assert isinstance(verdict, Unavailable)
    assert words in verdict.reason


@pytest.mark.parametrize(("name", "answer"), [("count", "12"), ("count", "十二"), ("choice", "(b)"), ("exact", "红色 car")])
def test_the_examples_own_answer_gets_full_value(name, answer, make_example, make_rollout):
    entry = REWARDS[name]
    entry.check_answer(make_example(answer))
    assert entry.function(make_example(answer), make_rollout(entry.gold_response(make_example(answer)))).value == 1.0


def test_a_response_beyond_the_bound_is_not_searched(make_example, make_rollout):
    text = "x" * MAX_RESPONSE_CHARS + "\\boxed{3}"
    assert count(make_example("3"), make_rollout(text[-100:])).value == 1.0
    assert count(make_example("3"), make_rollout(text)).value == 0.0
