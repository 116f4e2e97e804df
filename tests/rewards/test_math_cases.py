"""The written cases of `math_answer` and properties of its parts: verdicts, extraction, numerals, quantities, structures, bounds."""

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from vlpost.rewards.math_answer import math_answer, self_check
from vlpost.rewards.math_bounds import beyond_bounds
from vlpost.rewards.math_compare import known_equal
from vlpost.rewards.math_extract import as_one_list, candidate_answers, example_answer
from vlpost.rewards.math_normalise import expression, numeral
from vlpost.rewards.math_quantity import Quantity, read_number, read_quantity, same_quantity
from vlpost.rewards.math_structure import as_interval, split_top_level, structure
from vlpost.rewards.result import RewardResult
from vlpost.rewards.worker import WorkerPool, WorkerRequest

GROUPS = yaml.safe_load(Path(__file__).with_name("math_cases.yaml").read_text(encoding="utf-8"))
CASES = [(group, *case) for group, cases in GROUPS.items() if group not in ("hostile", "hostile_repeated", "payloads") for case in cases]
# What breaks readers: every bracket, sign and command that one of the modules treats specially.
PIECES = st.sampled_from(
    [
        *"()[]{}^_=,;:|&%$!?.+-*/<>~@#",
        *"0129xn三分之百负点一万 \n",
        *[
            "\\frac",
            "\\sqrt",
            "\\pi",
            "\\pm",
            "\\cup",
            "\\in",
            "\\ldots",
            "\\{",
            "\\}",
            "\\langle",
            "\\rangle",
            "\\left(",
            "\\right)",
            "\\text{",
            "\\boxed{",
            "\\\\",
            "\\",
        ],
        *("\\begin{pmatrix}", "\\end{pmatrix}", "<answer>", "</answer>", "<think>", "</think>", "The answer is ", " or ", " and "),
        *(" cm", "^\\circ", "\\overline{3}", "1,234", "10^{10}"),
    ]
)
TEXTS = st.one_of(st.text(max_size=40), st.lists(PIECES, max_size=16).map("".join))
NUMBERS = st.one_of(
    st.integers(-(10**6), 10**6).map(str),
    st.decimals(-1000, 1000, places=3).map(str),
    st.tuples(st.integers(-99, 99), st.integers(1, 99)).map(lambda pair: f"\\frac{{{pair[0]}}}{{{pair[1]}}}"),
    st.tuples(st.integers(-99, 99), st.integers(1, 99)).map(lambda pair: f"{pair[0]}/{pair[1]}"),
)


@pytest.fixture(scope="module")
def pool() -> Iterator[WorkerPool]:
    with WorkerPool("math_answer", num_workers=2, timeout_s=60.0) as started:
        yield started


@pytest.fixture(scope="module")
def verdicts(pool, make_example, make_rollout) -> list[object]:
    found = [math_answer(make_example(answer), make_rollout(response)) for _group, answer, response, _right in CASES]
    asked = [verdict for verdict in found if isinstance(verdict, WorkerRequest)]
    judged = iter(pool.judge(asked))
    return [next(judged)[0] if isinstance(verdict, WorkerRequest) else verdict for verdict in found]


def test_the_table_holds_the_promised_cases():
    assert {group: len(rows) for group, rows in GROUPS.items() if group in ("issues", "false_accepts", "false_rejects")} == {
        "issues": 24,
        "false_accepts": 9,
        "false_rejects": 10,
    }
    assert len(GROUPS["hostile"]) + len(GROUPS["hostile_repeated"]) >= 24
    assert len(GROUPS["payloads"]) >= 50
    assert len(CASES) >= 260


@pytest.mark.parametrize("group", sorted({case[0] for case in CASES}))
def test_every_written_case_has_its_verdict(group, verdicts):
    wrong = [
        (answer, response, verdict)
        for (of_group, answer, response, right), verdict in zip(CASES, verdicts, strict=True)
        if of_group == group and not (isinstance(verdict, RewardResult) and verdict.value == float(right))
    ]
    assert wrong == []


def test_every_answer_of_the_table_is_found_right_by_its_own_check(pool, make_example, make_rollout):
    answers = sorted({answer for _group, answer, _response, _right in CASES})
    assert len(answers) > 130
    for answer in answers:
        assert known_equal(example_answer(answer), example_answer(answer), decimal_places=6) is True
    own = pool.judge([self_check(make_example(answer)) for answer in answers])
    assert [answer for answer, (verdict, _) in zip(answers, own, strict=True) if verdict != RewardResult(value=1.0)] == []
    boxed = [math_answer(make_example(answer), make_rollout(f"So it is $\\boxed{{{answer}}}$.")) for answer in answers]
    assert [answer for answer, verdict in zip(answers, boxed, strict=True) if verdict != RewardResult(value=1.0)] == []


@pytest.mark.parametrize("dress", ["${}$", "$${}$$", "\\({}\\)", "\\[ {} \\]", "\\boxed{{{}}}", "**{}**", " {}. "])
def test_dress_of_the_examples_answer_changes_no_normal_form(dress):
    answers = [answer for group, answer, _response, _right in CASES if group in ("numbers", "intervals", "lists", "matrices")]
    assert [answer for answer in answers if example_answer(dress.format(answer)) != example_answer(answer)] == []


@settings(max_examples=300)
@given(TEXTS, TEXTS)
def test_the_part_in_the_trainer_is_total_and_symmetric_where_it_decides_by_text(make_example, make_rollout, one, other):
    result = math_answer(make_example(one), make_rollout(other))
    assert isinstance(result, WorkerRequest) or result.value in (0.0, 1.0)
    normal = [expression(one), expression(other)]
    assert [expression(text) for text in normal if len(text) < 30 and text.isalnum()] == [
        text for text in normal if len(text) < 30 and text.isalnum()
    ]
    assert isinstance(beyond_bounds(one), str)
    structure(normal[0])
    candidate_answers(one, prompt_suffix="", answer_in="prose")
    assert known_equal(*normal, decimal_places=6) in (True, False, None)


@settings(max_examples=200)
@given(NUMBERS, NUMBERS)
def test_exact_numbers_agree_with_fractions_and_both_ways(one, other):
    quantities = [read_quantity(expression(text)) for text in (one, other)]
    assert quantities[0] is not None
    assert quantities[1] is not None
    values = [Fraction(text.replace("\\frac{", "").replace("}{", "/").rstrip("}")) for text in (one, other)]
    assert [quantity.value for quantity in quantities] == values
    # Three places never stand for an exact number.
    assert known_equal(expression(one), expression(other), decimal_places=6) is (values[0] == values[1])
    assert known_equal(expression(other), expression(one), decimal_places=6) is (values[0] == values[1])


@settings(max_examples=100)
@given(st.integers(0, 9999))
def test_chinese_and_english_numerals_are_read_as_their_number(number):
    digits, units = "零一二三四五六七八九", ("", "十", "百", "千")
    chinese, zero = "", False
    for place, digit in zip(range(len(str(number)) - 1, -1, -1), str(number), strict=True):
        if digit == "0":
            zero = bool(chinese)
            continue
        chinese += ("零" if zero else "") + digits[int(digit)] + units[place]
        zero = False
    assert numeral(chinese or "零") == str(number)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0.\\overline{3}", Fraction(1, 3)),
        ("0.1\\overline{6}", Fraction(1, 6)),
        ("2\\frac{1}{4}", Fraction(9, 4)),
        ("-\\frac12", Fraction(-1, 2)),
    ],
)
def test_numbers_are_read_exactly(text, value):
    assert read_number(text) == Quantity(value=value)


@pytest.mark.parametrize("text", ["", "x", "1/0", "\\frac{1}{0}", "1.2.3", "--1", "3_2", "1_1", "\\frac{x}{2}", "9" * 500])
def test_what_is_no_number_is_left_to_the_parser(text):
    assert read_number(text) is None


@pytest.mark.parametrize(
    ("answer", "prediction", "same"),
    [
        ("10%", "10", True),
        ("10", "10%", False),
        ("5 cm", "50 mm", True),
        ("5 cm", "50 g", False),
        ("1 m^2", "10000 cm^2", True),
        ("1 m^2", "1 m", False),
    ],
)
def test_units_follow_their_rules(answer, prediction, same):
    read = [read_quantity(expression(text)) for text in (answer, prediction)]
    assert read[0] is not None
    assert read[1] is not None
    assert same_quantity(read[0], read[1], decimal_places=6) is same


def test_structures_are_told_apart():
    kinds = {
        text: getattr(structure(text), "kind", None)
        for text in ("1,2", "(1,2)", "\\{1,2\\}", "(1,2,3)", "[0,1)", "1:2", "x+1", "f(1,2)", "\\frac{1,2}{3}")
    }
    assert kinds == {
        **{"1,2": "list", "(1,2)": "pair", "\\{1,2\\}": "set", "(1,2,3)": "tuple", "[0,1)": "pair", "1:2": "ratio"},
        **{"x+1": None, "f(1,2)": None, "\\frac{1,2}{3}": None},
    }
    assert split_top_level("(1,2),{3,4},\\langle 5,6\\rangle", (",",)) == ["(1,2)", "{3,4}", "\\langle 5,6\\rangle"]
    assert as_interval("0 \\le x < 1") == structure("[0,1)")
    assert as_interval("x > 3") == structure("(3,\\infty)")


def test_boxes_are_one_list_only_when_the_answer_is_one():
    assert as_one_list("1, 2", ("2", "1")) == ("2, 1",)
    assert as_one_list("1", ("2", "1")) == ("2", "1")
    assert as_one_list("1, 2, 3", ("2", "1")) == ("2", "1")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("9^{9^{9}}", "a power of millions of digits"),
        ("(10^9)!", "the factorial of a huge number"),
        ("(" * 50 + "1" + ")" * 50, "brackets nested 50 deep"),
        ("\\binom{10^8}{5}", "a binomial coefficient of huge numbers"),
        ("e^{e^{e^{e^{79}}}}", "a tower of powers"),
    ],
)
def test_what_no_verifier_can_compute_is_named(text, reason):
    assert beyond_bounds(expression(text)) == reason


def test_no_written_answer_is_beyond_the_bounds():
    texts = [text for _group, answer, response, _right in CASES for text in (answer, response)]
    assert [text for text in texts if beyond_bounds(expression(text))] == []


def test_an_honest_answer_beyond_the_bounds_may_be_compared(make_example, make_rollout):
    assert isinstance(math_answer(make_example("9^{9^{9}}"), make_rollout("9^{9^{9}} + 0")), WorkerRequest)
    assert math_answer(make_example("9^{9^{9}}"), make_rollout("9^{9^{9}}")) == RewardResult(value=1.0)


def test_prose_is_read_only_on_request(make_example, make_rollout):
    response = "So the largest of them is $12$."
    assert isinstance(math_answer(make_example("12"), make_rollout(response)), WorkerRequest)
    assert math_answer(make_example("12"), make_rollout(response), answer_in="prose") == RewardResult(value=1.0)
    assert math_answer(make_example("12"), make_rollout("there are 12 of them, not 13"), answer_in="prose").value == 0.0  # pyright: ignore[reportAttributeAccessIssue]


def test_decimal_places_are_an_option(make_example, make_rollout):
    assert math_answer(make_example("1/3"), make_rollout("0.333")) == RewardResult(value=0.0, note="a different answer")
    assert math_answer(make_example("1/3"), make_rollout("0.333"), decimal_places=3) == RewardResult(value=1.0)
