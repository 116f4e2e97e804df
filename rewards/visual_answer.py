"""Verifiers of short answers about what an image shows: a whole number, one option, an exact text. Each gives 1.0 or 0.0.

They are total: no text makes them raise, and a row whose own answer cannot be read is `Unavailable`, never 0.0. Answers of
more than `MAX_ANSWER_CHARS` characters are malformed, and so are responses of more than `MAX_RESPONSE_CHARS`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from ..model.records import DataError, Example, Rollout
from .answers import bare, final_answer, normalise_spaces
from .built_in import BuiltInReward
from .result import RewardResult, Unavailable

MAX_ANSWER_CHARS = 200
"""Longest final answer of `count` and `choice`, characters."""
MAX_RESPONSE_CHARS = 200_000
"""Longest response that is searched for an answer, characters."""

_DIGITS = re.compile(r"[+\-−]?(?:[0-9]{1,15}|[0-9]{1,3}(?:,[0-9]{3}){1,4})")
_CHINESE_DIGITS = {"零": 0, "〇": 0, "一": 1, "二": 2, "两": 2, "三": 3, "四": 4, "五": 5, "六": 6, "七": 7, "八": 8, "九": 9}
_CHINESE_TENS = re.compile(r"([一二三四五六七八九]?)十([一二三四五六七八九]?)")
_ENGLISH_NUMBERS = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    *("eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty"),
)
_OPTION = re.compile(r"(?:option |选项? ?)?(?:\(([a-z])\)|\[([a-z])\]|【([a-z])】|\{([a-z])\}|([a-z])\)?):?", re.IGNORECASE | re.ASCII)


def whole_number(text: str) -> int | None:
    """Returns the whole number that the text is, or None.

    Digits (full-width too, thousands commas, a sign), Chinese numerals from 零 to 九十九, English words from zero to twenty.
    """
    if len(text) > MAX_ANSWER_CHARS:
        return None
    token = bare(text).lower()
    if _DIGITS.fullmatch(token):
        return int(token.replace(",", "").replace("−", "-"))
    if token in _CHINESE_DIGITS:
        return _CHINESE_DIGITS[token]
    if tens := _CHINESE_TENS.fullmatch(token):
        return 10 * _CHINESE_DIGITS.get(tens.group(1), 1) + _CHINESE_DIGITS.get(tens.group(2), 0)
    return _ENGLISH_NUMBERS.index(token) if token in _ENGLISH_NUMBERS else None


def option_letter(text: str) -> str | None:
    """Returns the one option that the text names, as a capital letter, or None; `(B)`, `b.` and `option B` are B, `A or B` is None."""
    if len(text) > MAX_ANSWER_CHARS:
        return None
    match = _OPTION.fullmatch(bare(text))
    return next(letter for letter in match.groups() if letter).upper() if match else None


def check_count_answer(example: Example) -> None:
    """Raises a `DataError` unless the example's answer is a whole number."""
    if whole_number(example.answer) is None:
        raise DataError(f"example {example.id!r}: answer {example.answer!r} is no whole number, which `count` compares with; write digits")


def check_choice_answer(example: Example) -> None:
    """Raises a `DataError` unless the example's answer is one option letter."""
    if option_letter(example.answer) is None:
        raise DataError(f"example {example.id!r}: answer {example.answer!r} is no option letter, as `choice` needs; write A to Z")


def check_exact_answer(example: Example) -> None:
    """Raises a `DataError` if the example's answer is empty."""
    if not normalise_spaces(example.answer):
        raise DataError(f"example {example.id!r}: the answer is empty and `exact` would pay an empty response; give the row an answer")


def _prediction(rollout: Rollout) -> str | None:
    if len(rollout.text) > MAX_RESPONSE_CHARS:
        return None
    return final_answer(rollout.text, prompt_suffix=rollout.prompt_suffix)


def count(example: Example, rollout: Rollout) -> RewardResult | Unavailable:
    """Returns 1.0 when the final answer is the example's whole number, else 0.0 (see `whole_number` for what is read)."""
    answer = whole_number(example.answer)
    if answer is None:
        return Unavailable(reason=f"example {example.id!r}: answer {example.answer!r} is no whole number")
    prediction = _prediction(rollout)
    if prediction is None:
        return RewardResult(value=0.0, note="no final answer, several that differ, or a response that is too long")
    number = whole_number(prediction)
    if number is None:
        return RewardResult(value=0.0, note="the final answer is not one whole number")
    return RewardResult(value=float(number == answer), note=f"read {number}")


def choice(example: Example, rollout: Rollout) -> RewardResult | Unavailable:
    """Returns 1.0 when the final answer names the example's option and no other, else 0.0 (see `option_letter`)."""
    answer = option_letter(example.answer)
    if answer is None:
        return Unavailable(reason=f"example {example.id!r}: answer {example.answer!r} is no option letter")
    prediction = _prediction(rollout)
    if prediction is None:
        return RewardResult(value=0.0, note="no final answer, several that differ, or a response that is too long")
    letter = option_letter(prediction)
    if letter is None:
        return RewardResult(value=0.0, note="the final answer does not name exactly one option")
    return RewardResult(value=float(letter == answer), note=f"read {letter}")


def exact(example: Example, rollout: Rollout) -> RewardResult | Unavailable:
    """Returns 1.0 when the final answer equals the example's, white space and full-width forms aside, else 0.0; case counts."""
    answer = normalise_spaces(example.answer)
    if not answer:
        return Unavailable(reason=f"example {example.id!r}: the answer is empty")
    prediction = _prediction(rollout)
    if prediction is None:
        return RewardResult(value=0.0, note="no final answer, several that differ, or a response that is too long")
    return RewardResult(value=float(normalise_spaces(prediction) == answer))


REWARDS: Mapping[str, BuiltInReward] = {
    "count": BuiltInReward(
        summary="the final answer is the example's whole number",
        value_range=(0.0, 1.0),
        check_answer=check_count_answer,
        function=count,
    ),
    "choice": BuiltInReward(
        summary="the final answer names the example's option and no other",
        value_range=(0.0, 1.0),
        check_answer=check_choice_answer,
        function=choice,
    ),
    "exact": BuiltInReward(
        summary="the final answer is the example's text, white space and full-width forms aside",
        value_range=(0.0, 1.0),
        check_answer=check_exact_answer,
        function=exact,
    ),
}
