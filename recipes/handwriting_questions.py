r"""Questions of the handwriting track about one row of digits, or none: what is asked, what is shown, how a solution is written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from .data_config import Language, TaskKind
from .handwriting_scans import Dice, digits_of

CORPUS_PHRASINGS: Mapping[tuple[TaskKind, Language], tuple[str, ...]] = {
    ("read", "en"): ("What number is written here?", "Read the number in the image.", "Which number do you see?"),
    ("read", "zh"): ("图中写的是什么数？", "读出图中的数。", "你看到的是哪个数？"),
    ("add", "en"): ("What is the sum of the two digits?", "Add the two digits in the image.", "What do the two digits add up to?"),
    ("add", "zh"): ("图中两个数字的和是多少？", "把图中的两个数字相加。", "两个数字相加等于多少？"),
    ("count", "en"): (
        "How often is the digit {target} written here?",
        "Count the digit {target} in the image.",
        "How often do you see the digit {target}?",
    ),
    ("count", "zh"): ("图中有几个数字{target}？", "数字{target}出现了几次？", "数一数图中有几个{target}。"),
    ("compare", "en"): ("Which number is larger?", "Which of the two numbers is larger?", "Compare the two numbers in the image."),
    ("compare", "zh"): ("哪个数更大？", "图中两个数哪个更大？", "比较图中的两个数。"),
    ("arithmetic", "en"): ("What is {left} {sign} {right}?", "{left} {sign} {right} = ?", "How much is {left} {sign} {right}?"),
    ("arithmetic", "zh"): ("{left}{sign}{right}等于多少？", "{left}{sign}{right}=？", "{left}{sign}{right}是多少？"),
}
"""The first kinds, in the order of the tokenizer's corpus: a change here changes every nano's vocabulary."""
_SUM_PHRASINGS: Mapping[Language, tuple[str, ...]] = {
    "en": ("What is the sum of the two numbers?", "Add the two numbers in the image.", "What do the two numbers add up to?"),
    "zh": ("图中两个数的和是多少？", "把图中的两个数相加。", "两个数相加等于多少？"),
}
_BLIND_PHRASINGS: Mapping[Language, tuple[str, ...]] = {
    "en": ("The two digits are {left} and {right}. What is the sum?", "You see {left} and {right}. Add the two digits."),
    "zh": ("图中两个数字是{left}和{right}。和是多少？", "你看到{left}和{right}。把两个数字相加。"),
}
_UNTOLD: Mapping[Language, str] = {"en": "what you see", "zh": "图中的数"}
_CHOICES: Mapping[Language, str] = {"en": " A: the first, B: the second, C: equal.", "zh": "A：第一个，B：第二个，C：相等。"}
BOXED: Mapping[Language, str] = {"en": " Answer in \\boxed{}.", "zh": "用\\boxed{}作答。"}
"""What questions with a short answer end with."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """What is asked, before scans are chosen."""

    text: str
    working: str
    """What the solution writes before the boxed answer."""
    answer: str
    cells: tuple[int | None, ...] = ()
    """The digits of the image from left to right; None is a gap, nothing at all a question without an image."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Metadata of this kind of question."""

    @property
    def solution(self) -> str:
        """The response of a perfect policy."""
        return f"{self.working}\\boxed{{{self.answer}}}"


def ask(kind: TaskKind, language: Language, dice: Dice) -> Question:
    """Returns a question of one of the kinds in `QUESTION_KINDS`."""
    return _ASK[kind](language, dice)


def _phrasing(kind: TaskKind, language: Language, dice: Dice) -> str:
    return dice.pick(CORPUS_PHRASINGS[kind, language])


def _ask_read(language: Language, dice: Dice) -> Question:
    phrasing = _phrasing("read", language, dice)
    number = dice.number(1 + dice.below(3))
    return Question(text=phrasing + BOXED[language], working="", answer=str(number), cells=digits_of(number))


def _ask_add(language: Language, dice: Dice) -> Question:
    phrasing = _phrasing("add", language, dice)
    left, right = dice.below(10), dice.below(10)
    return Question(text=phrasing + BOXED[language], working=f"{left}+{right}=", answer=str(left + right), cells=(left, right))


def _ask_count(language: Language, dice: Dice) -> Question:
    phrasing = _phrasing("count", language, dice)
    target, length, count = dice.below(10), 3 + dice.below(4), dice.below(4)
    digits = [target] * count + [(target + 1 + dice.below(9)) % 10 for _ in range(length - count)]
    for last in range(length - 1, 0, -1):
        place = dice.below(last + 1)
        digits[last], digits[place] = digits[place], digits[last]
    return Question(
        text=phrasing.format(target=target) + BOXED[language],
        # Without commas: six digits then take 11 tokens instead of 16, and they look like the answer of `read`.
        working="".join(map(str, digits)) + ":",
        answer=str(count),
        cells=tuple(digits),
        facts={"target": target},
    )


def _ask_compare(language: Language, dice: Dice) -> Question:
    phrasing = _phrasing("compare", language, dice)
    letter, sign = dice.pick((("A", ">"), ("B", "<"), ("C", "=")))
    number = dice.number(1 + dice.below(2))
    other = number if letter == "C" else dice.other_number(number, 1 + dice.below(2))
    first, second = sorted((number, other), reverse=letter == "A")
    return Question(
        text=phrasing + _CHOICES[language] + BOXED[language],
        working=f"{first}{sign}{second}:",
        answer=letter,
        cells=(*digits_of(first), None, *digits_of(second)),
        facts={"numbers": [first, second]},
    )


def _ask_arithmetic(language: Language, dice: Dice) -> Question:
    phrasing = _phrasing("arithmetic", language, dice)
    left, right, sign = dice.below(10), dice.below(10), dice.pick("+-")
    if sign == "-":
        left, right = max(left, right), min(left, right)
    return Question(
        text=phrasing.format(left=left, right=right, sign=sign) + BOXED[language],
        working=f"{left}{sign}{right}=",
        answer=str(left + right if sign == "+" else left - right),
        facts={"operands": [left, right], "sign": sign},
    )


def _ask_sum(language: Language, dice: Dice, *, num_digits: int) -> Question:
    phrasing: str = dice.pick(_SUM_PHRASINGS[language])
    left, right = dice.number(num_digits), dice.number(num_digits)
    return Question(
        text=phrasing + BOXED[language],
        working="",
        answer=str(left + right),
        cells=(*digits_of(left), None, *digits_of(right)),
        facts={"operands": [left, right], "needs_image": True},
    )


def _ask_sum_steps(language: Language, dice: Dice, *, num_digits: int) -> Question:
    question = _ask_sum(language, dice, num_digits=num_digits)
    left, right = question.facts["operands"]
    return replace(question, working=f"<think>\n{sum_steps(left, right)}\n</think>\n\n")


def sum_steps(left: int, right: int) -> str:
    """Returns the written-out addition of two numbers of equally many digits: both as read, the ones, then each column with the carry.

    `sum_steps(38, 47)` is `38+47:8+7=15,3+4+1=8`. Punctuation without spaces: the tokens then are those of the other kinds' solutions.
    """
    columns = list(zip(reversed(digits_of(left)), reversed(digits_of(right)), strict=True))
    ones = sum(columns[0])
    steps, carry = ["{}+{}={}".format(*columns[0], ones)], ones // 10
    for above, below in columns[1:]:
        total = above + below + carry
        steps.append(f"{above}+{below}+{carry}={total}")
        carry = total // 10
    return f"{left}+{right}:{','.join(steps)}"


def _ask_blind(language: Language, dice: Dice) -> Question:
    phrasing: str = dice.pick(_BLIND_PHRASINGS[language])
    left, right = dice.below(10), dice.below(10)
    # Which of the two is left out: the first, the second, or (as often as these together) neither.
    hidden = dice.pick(("left", "right", None, None))
    told = {"left": str(left), "right": str(right)} | ({hidden: _UNTOLD[language]} if hidden else {})
    return Question(
        text=phrasing.format(**told) + BOXED[language],
        working=f"{left}+{right}=",
        answer=str(left + right),
        cells=(left, right),
        facts={"operands": [left, right], "needs_image": hidden is not None},
    )


_ASK: Mapping[TaskKind, Callable[[Language, Dice], Question]] = {
    "read": _ask_read,
    "add": _ask_add,
    "count": _ask_count,
    "compare": _ask_compare,
    "arithmetic": _ask_arithmetic,
    "sum2": partial(_ask_sum, num_digits=2),
    "sum2_steps": partial(_ask_sum_steps, num_digits=2),
    "blind": _ask_blind,
    "sum4": partial(_ask_sum, num_digits=4),
    "sum4_steps": partial(_ask_sum_steps, num_digits=4),
}
QUESTION_KINDS: tuple[TaskKind, ...] = tuple(_ASK)
"""Kinds whose image is one row of digits, or that have none."""
