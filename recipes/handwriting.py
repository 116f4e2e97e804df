r"""The bundled track: questions about real handwritten digits with exact answers, drawn without end from scans that need no download.

The scans are the 1,797 of `sklearn.datasets.load_digits`, 8 x 8 pixels in 17 shades: the writer-independent test set of Alpaydin and
Kaynak's optdigits (UCI, 1998), by 13 writers. Which scan is whose was not kept, but the order was: the same sequence of 130 labels comes
14 times, with up to 8 missing (`FORM_STARTS`), which looks like one form filled in again and again. Splits are whole forms: 10 to train
(1,287 scans), 2 to validate (258), 2 to test (252). No scan is in two splits, and, if one form is one hand, at most one writer is.

| kind | the image shows | the answer | best constant guess |
|---|---|---|---|
| read | a number of 1 to 3 digits | the number | 1 in 30 |
| add | two digits | their sum, 0 to 18 | 1 in 10 |
| count | 3 to 6 digits | how often the asked digit is there, 0 to 3 | 1 in 4 |
| compare | two numbers of 1 or 2 digits with a gap between | A: the first is larger, B: the second, C: equal | 1 in 3 |
| arithmetic | (no image) | a + b or a - b >= 0 of single digits, 0 to 18 | 1 in 10 |

The 155 questions of `arithmetic` are the same in all splits: it keeps a skill alive, it cannot measure generalisation.

Everything is a function of (split, index, seed, settings) by SHA-256, the same in every process.
"""

from __future__ import annotations

import difflib
import hashlib
import math
import random
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate
from typing import TYPE_CHECKING, Any, get_args

from PIL import Image

from ..model.records import ROLES, DataError, Example, ImagePart, Message, Part, TextPart
from .schema import Language, Split, TaskKind

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

TASK_KINDS: tuple[TaskKind, ...] = get_args(TaskKind)
LANGUAGES: tuple[Language, ...] = get_args(Language)

FORM_STARTS = (0, 130, 256, 386, 516, 646, 776, 906, 1029, 1157, 1287, 1415, 1545, 1667)
"""Rows of `load_digits` at which the sequence of labels begins anew."""
SPLIT_SCANS: Mapping[Split, range] = {
    "train": range(0, FORM_STARTS[10]),
    "validation": range(FORM_STARTS[10], FORM_STARTS[12]),
    "test": range(FORM_STARTS[12], 1797),
}
"""Rows of `load_digits` that each split may show."""

DIGIT_PIXELS = (64, 64)
"""Default width and height of one digit: 2 x 2 vision tokens of Qwen3-VL, which cover 32 x 32 pixels each."""
MIN_DIGIT_PIXELS, MAX_DIGIT_PIXELS = 8, 512

_SHADES = 16
# 2^64 divided by the golden ratio: of all steps round a circle this one leaves the most even gaps.
_GOLDEN_STEP, _CIRCLE = 0x9E3779B97F4A7C15, 1 << 64
_CORPUS_DRAWS = 100

_PHRASINGS: Mapping[tuple[TaskKind, Language], tuple[str, ...]] = {
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
_CHOICES: Mapping[Language, str] = {"en": " A: the first, B: the second, C: equal.", "zh": "A：第一个，B：第二个，C：相等。"}
_FORMAT: Mapping[Language, str] = {"en": " Answer in \\boxed{}.", "zh": "用\\boxed{}作答。"}


@dataclass(frozen=True, kw_only=True, slots=True)
class _Question:
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
        return f"{self.working}\\boxed{{{self.answer}}}"


class _Dice:
    """Random draws that a key decides. `random.Random.random` is the one generator whose numbers Python promises never to change;
    numpy promises that for raw bits only."""

    def __init__(self, *key: str | int) -> None:
        self._random = random.Random(_hash(*key))

    def below(self, limit: int) -> int:
        """Returns one of 0 to limit - 1."""
        return int(self._random.random() * limit)

    def pick(self, choices: Sequence[Any]) -> Any:  # noqa: ANN401
        """Returns one of the choices."""
        return choices[self.below(len(choices))]

    def number(self, num_digits: int) -> int:
        """Returns a number of so many digits, the first of them not 0 unless it is the only one."""
        low, size = _number_range(num_digits)
        return low + self.below(size)

    def other_number(self, number: int, num_digits: int) -> int:
        """Returns a number of so many digits that is not `number`."""
        low, size = _number_range(num_digits)
        if not low <= number < low + size:
            return self.number(num_digits)
        return low + (number - low + 1 + self.below(size - 1)) % size


def handwriting_example(
    split: Split,
    index: int,
    *,
    tasks: Mapping[str, float],
    languages: Sequence[str] = LANGUAGES,
    seed: int,
    with_solution: bool,
    digit_pixels: tuple[int, int] = DIGIT_PIXELS,
) -> Example:
    r"""Returns example number `index` of an endless stream; the same arguments give the same example in every process.

    `tasks` maps kinds to shares, which are relative. Kind and language go round a circle in golden steps, so the mix is constant:
    among any n examples in a row the number of one kind in one language differs from its share of n by less than 4 (n up to 1,000)
    or 6 (n up to 100,000), whatever the shares. The order of `tasks` and `languages` and a common factor of the shares change nothing.

    With `with_solution` (for SFT) the messages end with a short response, `5+7=\boxed{12}`; without (for RL) with the question.
    Metadata: `language`; `digits` and `scans`, the image from left to right as values and as rows of `load_digits`; `target` (count),
    `numbers` (compare), `operands` and `sign` (arithmetic). The id is unique within one split, seed and `tasks`.

    The image is a row of digits of `digit_pixels` (width, height), bicubic, white on black.

    Raises `DataError` for an unknown split, kind or language, a share that is not a positive number, a negative index, and sizes
    outside 8 to 512 pixels.
    """
    _check_name("split", split, tuple(SPLIT_SCANS))
    if index < 0:
        raise DataError(f"handwriting index = {index}: examples are numbered from 0")
    if not all(MIN_DIGIT_PIXELS <= pixels <= MAX_DIGIT_PIXELS for pixels in digit_pixels):
        raise DataError(
            f"handwriting digit_pixels = {digit_pixels}: width and height must be {MIN_DIGIT_PIXELS} to {MAX_DIGIT_PIXELS} pixels; "
            "multiples of 32 fill whole vision tokens"
        )
    mix = _mix(tuple(tasks.items()), tuple(languages))
    kind, language = mix.at(index, phase=_hash("phase", split, seed) % _CIRCLE)
    dice = _Dice("example", split, seed, kind, language, index)
    question = _ask(kind, language, dice)
    scans = [None if digit is None else dice.pick(_scans_of_digit(split, digit)) for digit in question.cells]
    parts: tuple[Part, ...] = (TextPart(text=question.text),)
    if scans:
        parts = (ImagePart.from_image(_draw(scans, digit_pixels)), *parts)
    messages = (Message(role="user", parts=parts),)
    if with_solution:
        messages = (*messages, Message(role="assistant", parts=(TextPart(text=question.solution),)))
    return Example(
        id=f"handwriting/{split}/{kind}/{index:06d}",
        messages=messages,
        answer=question.answer,
        task=kind,
        source="handwriting",
        metadata={
            "language": language,
            "digits": [digit for digit in question.cells if digit is not None],
            "scans": [scan for scan in scans if scan is not None],
            **question.facts,
        },
    )


def handwriting_examples(
    split: Split,
    *,
    tasks: Mapping[str, float],
    languages: Sequence[str] = LANGUAGES,
    num_examples: int,
    seed: int,
    with_solution: bool,
    digit_pixels: tuple[int, int] = DIGIT_PIXELS,
) -> list[Example]:
    """Returns examples number 0 to `num_examples` - 1 of the stream (see `handwriting_example`)."""
    if num_examples < 1:
        raise DataError(f"handwriting num_examples = {num_examples}: must be at least 1")
    return [
        handwriting_example(
            split, index, tasks=tasks, languages=languages, seed=seed, with_solution=with_solution, digit_pixels=digit_pixels
        )
        for index in range(num_examples)
    ]


def tokenizer_corpus() -> Iterator[str]:
    """Yields the track's own text for training a tokenizer: turns of all kinds, phrasings and languages, the same every time."""
    yield from (f"{role}\n" for role in ROLES)
    for kind, language in _PHRASINGS:
        for number in range(_CORPUS_DRAWS):
            question = _ask(kind, language, _Dice("corpus", kind, language, number))
            yield f"user\n{question.text}"
            yield f"assistant\n{question.solution}"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Mix:
    """Which kind and language each example has: arcs of a circle, as long as their shares."""

    cells: tuple[tuple[TaskKind, Language], ...]
    ends: tuple[int, ...]
    """Where each arc ends, in parts of 2^64; the last is the whole circle."""

    def at(self, index: int, *, phase: int) -> tuple[TaskKind, Language]:
        return self.cells[bisect_right(self.ends, (phase + index * _GOLDEN_STEP) % _CIRCLE)]


@lru_cache(maxsize=64)
def _mix(tasks: tuple[tuple[str, float], ...], languages: tuple[str, ...]) -> _Mix:
    """Returns the mix that the settings ask for; `DataError` when they cannot be met."""
    if not tasks:
        raise DataError(f"handwriting tasks: empty; give at least one of {', '.join(TASK_KINDS)} with a share")
    for name, share in tasks:
        _check_name("task", name, TASK_KINDS)
        if not (math.isfinite(share) and share > 0):
            raise DataError(f"handwriting tasks.{name} = {share}: a share must be a number above 0; leave out a kind that is not wanted")
    if not languages or len(set(languages)) < len(languages):
        raise DataError(f"handwriting languages = {list(languages)}: give one or more of {', '.join(LANGUAGES)}, each once")
    for name in languages:
        _check_name("language", name, LANGUAGES)
    shares = dict(tasks)
    # In our order, not the caller's: a recipe with its keys in another order is the same recipe.
    cells: tuple[tuple[TaskKind, Language], ...] = tuple(
        (kind, language) for kind in TASK_KINDS if kind in shares for language in LANGUAGES if language in languages
    )
    sums = list(accumulate(shares[kind] for kind, _ in cells))
    return _Mix(cells=cells, ends=(*(int(end / sums[-1] * _CIRCLE) for end in sums[:-1]), _CIRCLE))


def _check_name(what: str, name: str, allowed: Sequence[str]) -> None:
    if name not in allowed:
        close = difflib.get_close_matches(str(name), allowed, n=1)
        meant = f"did you mean {close[0]!r}? " if close else ""
        raise DataError(f"handwriting: unknown {what} {name!r}: {meant}give one of {', '.join(allowed)}")


def _ask(kind: TaskKind, language: Language, dice: _Dice) -> _Question:
    phrasing: str = dice.pick(_PHRASINGS[kind, language])
    match kind:
        case "read":
            return _ask_read(phrasing, language, dice)
        case "add":
            return _ask_add(phrasing, language, dice)
        case "count":
            return _ask_count(phrasing, language, dice)
        case "compare":
            return _ask_compare(phrasing, language, dice)
        case "arithmetic":
            return _ask_arithmetic(phrasing, language, dice)


def _ask_read(phrasing: str, language: Language, dice: _Dice) -> _Question:
    number = dice.number(1 + dice.below(3))
    return _Question(text=phrasing + _FORMAT[language], working="", answer=str(number), cells=_digits_of(number))


def _ask_add(phrasing: str, language: Language, dice: _Dice) -> _Question:
    left, right = dice.below(10), dice.below(10)
    return _Question(text=phrasing + _FORMAT[language], working=f"{left}+{right}=", answer=str(left + right), cells=(left, right))


def _ask_count(phrasing: str, language: Language, dice: _Dice) -> _Question:
    target, length, count = dice.below(10), 3 + dice.below(4), dice.below(4)
    digits = [target] * count + [(target + 1 + dice.below(9)) % 10 for _ in range(length - count)]
    for last in range(length - 1, 0, -1):
        place = dice.below(last + 1)
        digits[last], digits[place] = digits[place], digits[last]
    return _Question(
        text=phrasing.format(target=target) + _FORMAT[language],
        # Without commas: six digits then take 11 tokens instead of 16, and they look like the answer of `read`.
        working="".join(map(str, digits)) + ":",
        answer=str(count),
        cells=tuple(digits),
        facts={"target": target},
    )


def _ask_compare(phrasing: str, language: Language, dice: _Dice) -> _Question:
    letter, sign = dice.pick((("A", ">"), ("B", "<"), ("C", "=")))
    number = dice.number(1 + dice.below(2))
    other = number if letter == "C" else dice.other_number(number, 1 + dice.below(2))
    first, second = sorted((number, other), reverse=letter == "A")
    return _Question(
        text=phrasing + _CHOICES[language] + _FORMAT[language],
        working=f"{first}{sign}{second}:",
        answer=letter,
        cells=(*_digits_of(first), None, *_digits_of(second)),
        facts={"numbers": [first, second]},
    )


def _ask_arithmetic(phrasing: str, language: Language, dice: _Dice) -> _Question:
    left, right, sign = dice.below(10), dice.below(10), dice.pick("+-")
    if sign == "-":
        left, right = max(left, right), min(left, right)
    return _Question(
        text=phrasing.format(left=left, right=right, sign=sign) + _FORMAT[language],
        working=f"{left}{sign}{right}=",
        answer=str(left + right if sign == "+" else left - right),
        facts={"operands": [left, right], "sign": sign},
    )


def _number_range(num_digits: int) -> tuple[int, int]:
    """Returns the smallest number of so many digits and how many there are."""
    low = 0 if num_digits == 1 else 10 ** (num_digits - 1)
    return low, 10**num_digits - low


def _digits_of(number: int) -> tuple[int, ...]:
    return tuple(map(int, str(number)))


def _hash(*key: str | int) -> int:
    return int.from_bytes(hashlib.sha256("/".join(map(str, ("handwriting", *key))).encode()).digest(), "big")


@lru_cache(maxsize=1)
def _scans() -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Returns the scans [1797, 8, 8], shades 0 (paper) to 16 (ink), and their digits [1797]."""
    # Takes a second to import; questions without an image, `vlpost check` and the tokenizer's corpus do not need it.
    from sklearn.datasets import load_digits

    bunch: Any = load_digits()
    return bunch.images, bunch.target


@lru_cache(maxsize=32)
def _scans_of_digit(split: Split, digit: int) -> tuple[int, ...]:
    _, digits = _scans()
    return tuple(scan for scan in SPLIT_SCANS[split] if digits[scan] == digit)


@lru_cache(maxsize=2)
def _upscaled(digit_pixels: tuple[int, int]) -> NDArray[np.uint8]:
    """Returns all scans in grey, [1797, height, width], 0 (paper) to 255 (ink)."""
    import numpy as np

    scans, _ = _scans()
    grey = np.rint(scans * (255 / _SHADES)).astype(np.uint8)
    return np.stack([np.asarray(Image.fromarray(scan).resize(digit_pixels, Image.Resampling.BICUBIC)) for scan in grey])


def _draw(scans: Sequence[int | None], digit_pixels: tuple[int, int]) -> Image.Image:
    """Returns the row of scans, one `digit_pixels` cell each; None is an empty cell."""
    import numpy as np

    upscaled = _upscaled(digit_pixels)
    empty = np.zeros_like(upscaled[0])
    return Image.fromarray(np.concatenate([empty if scan is None else upscaled[scan] for scan in scans], axis=1))
