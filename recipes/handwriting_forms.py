"""Questions of the handwriting track that test habits and forms: counts against habit, one language, programs, JSON, constraints."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..model.records import ImagePart, Message, TextPart
from .data_config import Language, SolutionFault, TaskKind
from .handwriting_questions import BOXED, CORPUS_PHRASINGS
from .handwriting_scans import digits_of, draw_row
from .handwriting_scenes import Scene, SceneSource

_ROW_CELLS = 7
"""Of a row that is counted: one more than the most digits, so that its width says nothing."""
_ROW_LENGTHS = (3, 4, 5, 6)
_NUM_CASES = 3

_COUNT_PHRASINGS: Mapping[Language, tuple[str, ...]] = {
    "en": ("How many digits are written here?", "Count all digits in the image."),
    "zh": ("图中一共写了几个数字？", "数一数图中一共有几个数字。"),
}
# The other language stands in backquotes: a prompt's own language is then the one that it asks in (rewards/language_masks.py).
_MIXING_PHRASINGS: Mapping[Language, tuple[str, ...]] = {
    "en": (
        "Someone asks `{question}` Tell them in one English sentence, with the sum in \\boxed{{}}.",
        "The task is `{question}` Solve it, write one whole sentence in English and the sum in \\boxed{{}}.",
    ),
    "zh": ("有人问`{question}`用一句中文回答，把和写在\\boxed{{}}里。", "题目是`{question}`写一句完整的中文，并把和写在\\boxed{{}}里。"),
}
_MIXING_SOLUTIONS: Mapping[Language, str] = {
    "en": "The two digits in the image are {left} and {right}, so the sum of them is \\boxed{{{total}}}.",
    "zh": "图中写了两个数字，是{left}和{right}，它们加起来的和等于\\boxed{{{total}}}。",
}
_CLAUSE_ENDS = ", ", "，"
_NUM_REPEATS = 4
_OTHER: Mapping[Language, Language] = {"en": "zh", "zh": "en"}

_PROGRAM_PHRASINGS: Mapping[Language, tuple[str, ...]] = {
    "en": (
        "Write a Python program that reads a whole number and prints {result}.",
        "Write a Python program: it reads a number, prints {result}.",
    ),
    "zh": ("写一个Python程序，读入一个整数，输出{result}。", "用Python写程序：读入一个数，输出{result}。"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class _Operation:
    """What a program does with the number that it reads and the digit of the image."""

    words: Mapping[Language, str]
    program: str
    apply: Callable[[int, int], str]
    """(number, digit) -> the line that is printed."""
    max_number: int


_OPERATIONS: Mapping[str, _Operation] = {
    "plus": _Operation(
        words={"en": "it plus the digit in the image", "zh": "它加图中数字的和"},
        program="print(int(input())+{digit})",
        apply=lambda number, digit: str(number + digit),
        max_number=99,
    ),
    "times": _Operation(
        words={"en": "it times the digit in the image", "zh": "它乘图中数字的积"},
        program="print(int(input())*{digit})",
        apply=lambda number, digit: str(number * digit),
        max_number=99,
    ),
    "repeat": _Operation(
        words={"en": "the digit in the image that many times in a row", "zh": "这么多个连着的图中数字"},
        program='print("{digit}"*int(input()))',
        apply=lambda number, digit: str(digit) * number,
        max_number=9,
    ),
}

_JSON_PHRASINGS: Mapping[Language, tuple[str, ...]] = {
    "en": ("Read the digits. Answer with JSON: {shape}", "Write what you see as JSON: {shape}"),
    "zh": ("读出图中的数字，用JSON作答：{shape}", "把图中的数字写成JSON：{shape}"),
}
_WHOLE = {"type": "integer", "minimum": 0}
_DIGITS = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 9}, "minItems": 1}
_JSON_KEYS: Mapping[str, tuple[str, Mapping[str, Any], Callable[[Sequence[int]], object]]] = {
    "digits": ("[...]", _DIGITS, list),
    "sum": ("...", _WHOLE, sum),
    "largest": ("...", _WHOLE, max),
    "count": ("...", _WHOLE, len),
}
_JSON_FORMS = (("digits", "sum"), ("digits", "largest"), ("count", "sum"))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Form:
    """A constraint on how a number is written down, and a response that meets it."""

    words: Mapping[Language, str]
    constraints: Callable[[Language, Sequence[int]], list[dict[str, Any]]]
    solution: Callable[[Language, Sequence[int], str], str]
    """(language, digits, boxed number) -> response."""


_OPENING: Mapping[Language, str] = {"en": "The number", "zh": "图中的数"}
_CLOSING: Mapping[Language, str] = {"en": "done", "zh": "完毕"}
_IS: Mapping[Language, str] = {"en": " is ", "zh": "是"}
_TITLE: Mapping[Language, str] = {"en": "<<Number>>", "zh": "《数》"}
_NUM_WORDS: Mapping[Language, int] = {"en": 4, "zh": 6}
_MAX_CHARACTERS = 12


def _starts(language: Language) -> dict[str, Any]:
    return {"kind": "starts_with", "text": _OPENING[language]}


def _ends(language: Language) -> dict[str, Any]:
    return {"kind": "ends_with", "text": _CLOSING[language]}


_FORMS: Mapping[str, _Form] = {
    "bullets": _Form(
        words={"en": "First list the digits as bullets, one a line.", "zh": "先把每个数字写成一个列表项，一行一个，用*开头。"},
        constraints=lambda _, digits: [{"kind": "bullets", "exactly": len(digits)}],
        solution=lambda _, digits, boxed: "\n".join(f"* {digit}" for digit in digits) + f"\n{boxed}",
    ),
    "numbered": _Form(
        words={"en": "First list the digits, numbered from 1, one a line.", "zh": "先把每个数字写成编号列表，从1开始，一行一个。"},
        constraints=lambda _, digits: [{"kind": "numbered_items", "exactly": len(digits)}],
        solution=lambda _, digits, boxed: "\n".join(f"{place}. {digit}" for place, digit in enumerate(digits, 1)) + f"\n{boxed}",
    ),
    "opening": _Form(
        words={"en": f'Begin with "{_OPENING["en"]}".', "zh": f"以“{_OPENING['zh']}”开头。"},
        constraints=lambda language, _: [_starts(language)],
        solution=lambda language, _, boxed: _OPENING[language] + _IS[language] + boxed,
    ),
    "closing": _Form(
        words={"en": f'End with "{_CLOSING["en"]}".', "zh": f"以“{_CLOSING['zh']}”结尾。"},
        constraints=lambda language, _: [_ends(language)],
        solution=lambda language, _, boxed: f"{boxed} {_CLOSING[language]}",
    ),
    "frame": _Form(
        words={
            "en": f'Begin with "{_OPENING["en"]}" and end with "{_CLOSING["en"]}".',
            "zh": f"以“{_OPENING['zh']}”开头，以“{_CLOSING['zh']}”结尾。",
        },
        constraints=lambda language, _: [_starts(language), _ends(language)],
        solution=lambda language, _, boxed: f"{_OPENING[language]}{_IS[language]}{boxed} {_CLOSING[language]}",
    ),
    "short": _Form(
        words={"en": f"Use at most {_MAX_CHARACTERS} characters.", "zh": f"最多{_MAX_CHARACTERS}个字符。"},
        constraints=lambda *_: [{"kind": "characters", "at_most": _MAX_CHARACTERS}],
        solution=lambda _language, _digits, boxed: boxed,
    ),
    "words": _Form(
        # A box is two words to the counter: its name and what it holds; a Chinese character is one.
        words={"en": f"Use exactly {_NUM_WORDS['en']} words, boxed and the number among them.", "zh": "用四个汉字，再写框里的数。"},
        constraints=lambda language, _: [{"kind": "words", "exactly": _NUM_WORDS[language]}],
        solution=lambda language, _, boxed: {"en": "I see ", "zh": "我看到了"}[language] + boxed,
    ),
    "title": _Form(
        words={"en": "Put a title in double angle brackets first.", "zh": "先写一个用《》括起来的标题。"},
        constraints=lambda *_: [{"kind": "title"}],
        solution=lambda language, _, boxed: f"{_TITLE[language]}\n{boxed}",
    ),
}


def _row(source: SceneSource, digits: Sequence[int | None]) -> tuple[ImagePart, list[int]]:
    """Returns a picture of the row, None being an empty cell, and its scans."""
    scans = [None if digit is None else source.scan(digit) for digit in digits]
    return ImagePart.from_image(draw_row(scans, source.digit_pixels)), [scan for scan in scans if scan is not None]


def _scene(
    image: ImagePart, text: str, *, solution: str, answer: str, shown: tuple[Sequence[int], Sequence[int]], facts: Mapping[str, Any]
) -> Scene:
    digits, scans = shown
    return Scene(
        messages=(Message(role="user", parts=(image, TextPart(text=text))),),
        solution=solution,
        answer=answer,
        digits=list(digits),
        scans=list(scans),
        facts={**facts, "needs_image": True},
    )


def _draw_ordered(source: SceneSource) -> Scene:
    return _draw_counted(source, is_usual=True)


def _draw_counter(source: SceneSource) -> Scene:
    return _draw_counted(source, is_usual=False)


def _draw_counted(source: SceneSource, *, is_usual: bool) -> Scene:
    """Returns a row 1, 2, 3, ... whose last digit tells how many there are, or one with an empty place, where it tells one too many."""
    dice = source.dice
    text = source.phrasing(_COUNT_PHRASINGS) + BOXED[source.language]
    length = dice.pick(_ROW_LENGTHS)
    cells: list[int | None] = [*range(1, length + 1)]
    if not is_usual:
        cells[1 + dice.below(length - 2)] = None
    before = dice.below(_ROW_CELLS - length + 1)
    image, scans = _row(source, [None] * before + cells + [None] * (_ROW_CELLS - length - before))
    digits = [digit for digit in cells if digit is not None]
    answer = str(len(digits))
    return _scene(image, text, solution=f"\\boxed{{{answer}}}", answer=answer, shown=(digits, scans), facts={"usual_answer": str(length)})


def _draw_mixing(source: SceneSource) -> Scene:
    dice, language = source.dice, source.language
    question = dice.pick(CORPUS_PHRASINGS["add", _OTHER[language]])
    text = source.phrasing(_MIXING_PHRASINGS).format(question=question)
    digits = [dice.below(10), dice.below(10)]
    image, scans = _row(source, digits)
    total = sum(digits)
    solution = _mixing_solution(language, source.fault).format(left=digits[0], right=digits[1], total=total)
    return _scene(
        image, text, solution=solution, answer=str(total), shown=(digits, scans), facts={"operands": digits, "answer_language": language}
    )


def _mixing_solution(language: Language, fault: SolutionFault | None) -> str:
    """Returns the sentence; with a fault, one that goes on in the other language, or says its first half again and again."""
    first, end, second = _clauses(language)
    if fault == "code_switching":
        second = _clauses(_OTHER[language])[2]
    return (first + end) * (_NUM_REPEATS if fault == "repetition" else 1) + second


def _clauses(language: Language) -> tuple[str, str, str]:
    """Returns both halves of a sentence and what stands between them."""
    (end,) = [end for end in _CLAUSE_ENDS if end in _MIXING_SOLUTIONS[language]]
    first, _, second = _MIXING_SOLUTIONS[language].rpartition(end)
    return first, end, second


def _draw_program(source: SceneSource) -> Scene:
    dice, language = source.dice, source.language
    name = dice.pick(tuple(_OPERATIONS))
    operation = _OPERATIONS[name]
    text = source.phrasing(_PROGRAM_PHRASINGS).format(result=operation.words[language])
    digit = dice.below(10)
    image, scans = _row(source, [digit])
    numbers = dice.several(range(2, operation.max_number + 1), _NUM_CASES)
    program = operation.program.format(digit=digit)
    cases = [{"stdin": f"{number}\n", "stdout": operation.apply(number, digit) + "\n"} for number in numbers]
    return _scene(
        image,
        text,
        solution=f"```python\n{program}\n```",
        answer=program,
        shown=([digit], scans),
        facts={"asked": name, "code": {"cases": cases, "solution": program}},
    )


def _draw_json(source: SceneSource) -> Scene:
    dice = source.dice
    keys: tuple[str, ...] = dice.pick(_JSON_FORMS)
    shape = "{" + ", ".join(f'"{key}": {_JSON_KEYS[key][0]}' for key in keys) + "}"
    text = source.phrasing(_JSON_PHRASINGS).format(shape=shape)
    digits = [dice.below(10) for _ in range(2 + dice.below(3))]
    image, scans = _row(source, digits)
    answer = json.dumps({key: _JSON_KEYS[key][2](digits) for key in keys})
    schema = {
        "type": "object",
        "properties": {key: dict(_JSON_KEYS[key][1]) for key in keys},
        "required": list(keys),
        "additionalProperties": False,
    }
    return _scene(image, text, solution=answer, answer=answer, shown=(digits, scans), facts={"schema": schema})


def _draw_constrained(source: SceneSource) -> Scene:
    dice, language = source.dice, source.language
    question = dice.pick(CORPUS_PHRASINGS["read", language])
    name = dice.pick(tuple(_FORMS))
    form = _FORMS[name]
    digits = digits_of(dice.number(1 + dice.below(3)))
    image, scans = _row(source, digits)
    answer = "".join(map(str, digits))
    boxed = f"\\boxed{{{answer}}}"
    separator = " " if language == "en" else ""
    return _scene(
        image,
        question + BOXED[language] + separator + form.words[language],
        solution=boxed if source.fault == "form" else form.solution(language, digits, boxed),
        answer=answer,
        shown=(digits, scans),
        facts={"form": name, "constraints": form.constraints(language, digits)},
    )


FORM_SCENES: dict[TaskKind, Callable[[SceneSource], Scene]] = {
    "ordered": _draw_ordered,
    "counter": _draw_counter,
    "mixing": _draw_mixing,
    "program": _draw_program,
    "json": _draw_json,
    "constrained": _draw_constrained,
}
"""What draws each kind."""
FAULTS_OF_KIND: Mapping[TaskKind, tuple[SolutionFault, ...]] = {"mixing": ("code_switching", "repetition"), "constrained": ("form",)}
"""What can be wrong with a solution of each kind."""
