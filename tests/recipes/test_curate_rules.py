"""`response_filter`: each rule on responses that break it and on their neighbours that do not."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vlpost.model.records import Example, Message, TextPart
from vlpost.recipes.curate_config import ResponseFilterConfig
from vlpost.recipes.curate_rules import ResponseFilterStep, agree, last_stated
from vlpost.recipes.curate_step import Candidate, CuratedRow, StepContext

STEPS = "First I look at the left digit, which is a three. The right one is a four. Three and four are seven."
LOOP = "the red car passes the old bridge and then turns left again at once, " * 12


def message(role, text):
    return Message(role=role, parts=(TextPart(text=text),))


def row(*texts, prompt="What is the sum of the two digits?", suffix="", finish_reason="stop", turns=()):
    messages = (message("user", prompt), *(message("assistant", turn) for turn in turns))
    candidates = tuple(
        Candidate(text=text, prompt_suffix=suffix, finish_reason=finish_reason, num_tokens=9, model="m", seed=0) for text in texts
    )
    return CuratedRow(example=Example(id="a", messages=messages, answer="7", task="add", source="made"), candidates=candidates)


def run(*rows, **settings):
    with ResponseFilterStep(ResponseFilterConfig.model_validate({"use": "response_filter", **settings})).open(
        StepContext(recipe_folder=Path(), output=Path(), seed=0)
    ) as opened:
        return opened.run(rows, shard=0)


def reason(text, *, suffix="", finish_reason="stop", prompt="What is the sum of the two digits?", **settings):
    result = run(row(text, suffix=suffix, finish_reason=finish_reason, prompt=prompt), **settings)
    return result.dropped[0][1].removeprefix("no candidate passes the rules: the first of 1 has ") if result.dropped else None


@pytest.mark.parametrize(
    ("text", "settings", "words"),
    [
        ("7", {"finish_reason": "length"}, "truncation, the token budget cut it off"),
        ("7", {"finish_reason": "length", "truncated": "keep"}, None),
        ("", {}, "wrong format, it is empty"),
        ("<think>3 and 4", {}, "wrong format, 1 opening and 0 closing think tags"),
        ("3 and 4</think>7", {}, "wrong format, 0 opening and 1 closing think tags"),
        ("3 and 4</think>7", {"suffix": "<think>\n"}, None),
        ("<think>a</think>7<think>b</think>", {}, "wrong format, 2 opening and 2 closing think tags"),
        ("well <think>a</think>7", {}, "wrong format, its thinking part does not stand at its start"),
        ("<think>3 and 4</think>\n", {}, "wrong format, nothing is left outside of its thinking part"),
        ("7", {"thinking": "required"}, "wrong format, it has no thinking part"),
        ("<think>\n\n</think>7", {"thinking": "required"}, "wrong format, its thinking part is empty"),
        ("<think>\n\n</think>7", {}, None),
        ("<think>3 and 4</think>7", {"thinking": "forbidden"}, "wrong format, it has a thinking part"),
        ("It is 7", {"answer_form": "boxed"}, "wrong format, no answer is boxed in it"),
        ("It is \\boxed{7}", {"answer_form": "boxed"}, None),
        ("It is \\boxed{}", {"answer_form": "boxed"}, "wrong format, no answer is boxed in it"),
        ("\\boxed{7} or \\boxed{8}", {"answer_form": "boxed"}, "wrong format, it marks several answers that differ"),
        ("It is <answer>7</answer>", {"answer_form": "tagged"}, None),
        (f"{LOOP}\nSo it is 7", {}, "repetition, "),
        (f"{LOOP}\nSo it is 7", {"max_repeated_frac": None}, None),
        (f"<think>{LOOP}</think>{STEPS}", {}, "repetition, "),
        (f"{STEPS}\n左边的数字是三，右边的数字是四，加起来等于七。这就是最后的结果。\n7", {}, "language mixing, answer: "),
        (f"{STEPS}\n左边的数字是三，右边的数字是四，加起来等于七。这就是最后的结果。\n7", {"max_foreign_frac": None}, None),
        (f"{STEPS}\n7", {"min_reasoning_words": 15}, None),
        ("Seven.\n7", {"min_reasoning_words": 15}, "guessing, 1 words before the answer, at least 15 are asked"),
        ("7", {"min_reasoning_words": 1}, "guessing, 0 words before the answer, at least 1 are asked"),
        (f"<think>{STEPS}</think>7", {"min_reasoning_words": 15}, None),
        (f"{STEPS} \\boxed{{7}}", {"min_reasoning_words": 15}, None),
        ("<think>The picture is dark. I'll just guess 7.</think>7", {}, "guessing, it says `I'll just guess`"),
        ("图片看不清，随便猜一个。答案是7", {"prompt": "两个数字的和是多少？"}, "guessing, it says `随便猜`"),
        (f"<think>My first guess is 9. {STEPS} {STEPS} {STEPS} {STEPS} {STEPS}</think>7", {"max_repeated_frac": None}, None),
        ("<think>I'll just guess 7.</think>7", {"guesses": "keep"}, None),
        (f"<think>{STEPS} So the answer is 8.</think>7", {}, "disagreement, its thinking ends with `8`, its answer is `7`"),
        (f"<think>{STEPS} So the answer is 8.</think>7", {"disagreeing": "keep"}, None),
        (f"<think>The answer is 8? No. {STEPS} So the answer is 7.</think>\\boxed{{7}}", {}, None),
        (f"<think>{STEPS} The answer is not 8.</think>7", {}, None),
        (f"<think>{STEPS} The answer: 3 + 4</think>7", {}, None),
        (f"<think>{STEPS} \\boxed{{8}}</think>So it is \\boxed{{7}}", {}, "disagreement, "),
    ],
)
def test_a_rule_and_its_border(text, settings, words):
    found = reason(text, **settings)
    assert (found is None) == (words is None), found
    assert words is None or found.startswith(words)


def test_candidates_that_break_a_rule_go_and_are_counted():
    result = run(row("7", "", "7" * 3, f"{LOOP} 7"))
    assert [one.text for one in result.rows[0].candidates] == ["7", "777"]
    assert result.changed == (("a", "candidates taken out: 1 with wrong format, 1 with repetition, of 4"),)
    assert result.metrics == {"responses": 4, "broken/wrong format": 1, "broken/repetition": 1}


def test_a_conversation_is_judged_by_its_last_turn():
    assert run(row(turns=("7",))).rows[0].candidates == ()
    assert run(row(turns=("",))).dropped == (("a", "wrong format: it is empty"),)
    assert run(row()).dropped == (("a", "no response to filter: the row has neither candidates nor an assistant turn at its end"),)


@pytest.mark.parametrize(
    ("stated", "answer", "is_same"),
    [
        ("7", "7", True), ("7", "8", False), ("1", "12", False), ("0.5", "1/2", True), ("1,234", "1234", True), ("7 apples", "7", True),
        ("B", "B", True), ("b", "C", False), ("a red car", "the blue one", True), ("3+4", "7", True), ("７", "7", True), ("5/0", "x", True),
    ],
)  # fmt: skip
def test_answers_that_agree(stated, answer, is_same):
    assert agree(stated, answer) is is_same


def test_the_answer_that_is_named_last_counts():
    assert last_stated("The answer is 3. No, the answer is 4.5.") == "4.5"
    assert last_stated("答案是 12，不对。答案是 13。") == "13"
    assert last_stated(r"The answer is 3, that is \boxed{5}") == "5"
    assert last_stated("Nothing is said.") is None


@given(st.text(max_size=300))
def test_every_text_is_judged(text):
    result = run(row(text), min_reasoning_words=3)
    assert len(result.rows) + len(result.dropped) == 1


def test_a_setting_that_can_drop_nothing_is_refused():
    with pytest.raises(ValueError, match=r"max_foreign_frac is 1.0: no response could break it"):
        ResponseFilterConfig.model_validate({"use": "response_filter", "max_foreign_frac": 1.0})
