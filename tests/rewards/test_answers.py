"""Finding the final answer: what is thinking, what is an answer, and what is hedging."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vlpost.rewards.answers import boxed, final_answer, strip_thinking, tagged

PIECES = [
    "<think>",
    "</think>",
    "<answer>",
    "</answer>",
    "\\boxed{",
    "\\boxed {",
    "{",
    "}",
    "\\{",
    "\\}",
    "\\",
    "$",
    "4",
    "5",
    " ",
    "\n",
    "好",
    "\x00",
]
pieced_text = st.lists(st.sampled_from(PIECES), max_size=40).map("".join)
any_text = pieced_text | st.text(max_size=60)


@pytest.mark.parametrize(
    ("text", "prompt_suffix", "visible"),
    [
        ("12", "", "12"),
        ("<think>3 + 9</think>\n12", "", "12"),
        ("3 + 9</think>\n12", "<think>\n", "12"),
        ("3 + 9, so 12", "<think>\n", None),
        ("<think>3 + 9, so 12", "", None),
        ("12", "<think>\n\n</think>\n\n", "12"),
        ("3 + 9</think>12", "", "12"),
        ("a</think>12</think>13", "<think>", None),
        ("12 <think>or 13</think>", "", ""),
        ("<think>a</think>12<think>b", "", None),
        ("<think></think>", "", ""),
    ],
)
def test_thinking_part_is_taken_off(text, prompt_suffix, visible):
    assert strip_thinking(text, prompt_suffix=prompt_suffix) == visible


@pytest.mark.parametrize(
    ("text", "contents"),
    [
        (r"\boxed{12}", ("12",)),
        (r"so \boxed{\frac{1}{2}} holds", (r"\frac{1}{2}",)),
        (r"\boxed{\{1, 2\}}", (r"\{1, 2\}",)),
        (r"\boxed{\{1}", (r"\{1",)),
        (r"\boxed{1} and \boxed { 2 }", ("1", "2")),
        (r"\boxed{\boxed{3}}", (r"\boxed{3}",)),
        (r"\boxed{a \boxed{3} b \boxed{4}}", (r"a \boxed{3} b \boxed{4}",)),
        (r"\boxed{4", ()),
        (r"\boxed{ \boxed{4}", ("4",)),
        (r"\boxed{}", ("",)),
        ("}} {12}", ()),
    ],
)
def test_boxes_have_balanced_braces(text, contents):
    assert boxed(text) == contents


def test_tags_hold_their_trimmed_contents():
    assert tagged("<answer> 4 </answer> and <answer>\n5</answer>") == ("4", "5")
    assert tagged("<answer>4 <answer>5</answer>") == ("5",)
    assert tagged("<answer>4") == ()


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("  12 \n", "12"),
        ("It is <answer>12</answer>.", "12"),
        (r"It is \boxed{12}.", "12"),
        (r"<answer>It is \boxed{12}</answer>", "12"),
        (r"\boxed{\boxed{12}}", "12"),
        (r"\boxed{1 2}, again \boxed{1  2}", "1  2"),
        (r"<answer>12</answer> \boxed{12}", "12"),
        (r"\boxed{3} ... no, \boxed{4}", None),
        (r"<answer>3</answer> \boxed{4}", None),
        ("<answer>3</answer><answer>4</answer>", None),
        (r"<answer>\boxed{3} or \boxed{4}</answer>", None),
        (r"\boxed{}", None),
        ("<answer> </answer> 12", None),
        ("", None),
        (r"<think>\boxed{12}", None),
        (r"<think>\boxed{12}</think>", None),
        (r"<think>\boxed{12}</think> I give up", "I give up"),
        (r"<think>\boxed{3}</think> \boxed{4}", "4"),
    ],
)
def test_final_answer(text, answer):
    assert final_answer(text, prompt_suffix="") == answer


@given(any_text, st.sampled_from(["", "<think>\n", "<think></think>"]))
def test_final_answer_is_total_and_comes_from_the_visible_text(text, prompt_suffix):
    answer = final_answer(text, prompt_suffix=prompt_suffix)
    visible = strip_thinking(text, prompt_suffix=prompt_suffix)
    if answer is not None:
        assert answer == answer.strip() != ""
        assert visible is not None
        assert answer in visible


@given(any_text)
def test_nothing_inside_thinking_is_read(thinking):
    thought = thinking.replace("</think>", "")
    assert final_answer(f"{thought}</think>\\boxed{{7}}", prompt_suffix="<think>\n") == "7"
    assert final_answer(thought, prompt_suffix="<think>\n") is None


@given(pieced_text, st.text(alphabet="0123456789+", min_size=1, max_size=5))
def test_boxed_agrees_with_a_scan_that_counts_braces(text, content):
    """Second implementation: try every opening, walk forward and count."""

    def close_of(start: int) -> int | None:
        depth, position = 1, start
        while position < len(text):
            if text[position] == "\\":
                position += 2
                continue
            depth += {"{": 1, "}": -1}.get(text[position], 0)
            if depth == 0:
                return position
            position += 1
        return None

    text = f"{text} \\boxed{{{content}}}"
    found, position = [], 0
    while position < len(text):
        opening = next((head for head in ("\\boxed{", "\\boxed {") if text.startswith(head, position)), None)
        if opening is not None and (end := close_of(position + len(opening))) is not None:
            found.append(text[position + len(opening) : end].strip())
            position = end + 1
        elif opening is None and text[position] == "\\":
            position += 2
        else:
            position += len(opening or " ")
    assert list(boxed(text)) == found


def test_a_long_hostile_response_is_read_in_one_pass():
    for piece in ("\\boxed{", "\\boxed{\\boxed{", "<answer>", "<think>", "{", "}", "\\", "<answer></answer>"):
        assert final_answer(piece * 40_000, prompt_suffix="") in (None, piece * 40_000)
