r"""Questions of the handwriting track about more than one row of digits: places, films, several images, several turns, whole pages."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..model.records import ImagePart, Message, Part, TextPart, VideoPart
from .data_config import Language, SolutionFault, Split, TaskKind
from .handwriting_questions import BOXED
from .handwriting_scans import Dice, Size, digits_of, draw_at, draw_row, ink_box, scans_of_digit

FRAMES_PER_S = 2
"""Of the flip-books: Qwen3-VL takes two frames a video token, so a token is one second of one page."""
PAGE_PIXELS: Size = (200, 4000)
"""Default smallest and largest width and height of a document page."""
PAGE_DIGIT_PIXELS: Size = (24, 32)
"""Width and height of a digit on a document page."""
PAGE_CELL_PIXELS: Size = (96, 48)
"""Of a document page: a number has at most 3 digits; the rest is margin."""

_COORDINATES = 1000
_FIND_CELLS = (4, 2)

_FIND_PHRASINGS: Mapping[Language, tuple[str, ...]] = {
    "en": ("Where is the digit {target}?", "Find the digit {target} in the image."),
    "zh": ("数字{target}在图中哪里？", "在图中找出数字{target}。"),
}
_FIND_FORMAT: Mapping[Language, str] = {
    "en": ' Answer with [{{"bbox_2d": [x1, y1, x2, y2], "label": "{target}"}}], 0 to 1000.',
    "zh": '用[{{"bbox_2d": [x1, y1, x2, y2], "label": "{target}"}}]作答，0到1000。',
}
_VIDEO_PHRASINGS: Mapping[Language, tuple[str, ...]] = {
    "en": ("From which second to which do you see the digit {target}?", "When do you see the digit {target}?"),
    "zh": ("从第几秒到第几秒看到数字{target}？", "数字{target}是什么时候出现的？"),
}
_VIDEO_FORMAT: Mapping[Language, str] = {
    "en": " Answer in \\boxed{[[start, end]]}, in seconds.",
    "zh": "用\\boxed{[[开始, 结束]]}作答，以秒为单位。",
}
_LARGEST_PHRASINGS: Mapping[Language, tuple[str, ...]] = {
    "en": ("Which image shows the largest number?", "In which image is the number the largest?"),
    "zh": ("哪个图中的数更大？", "几个图中，第几个图的数最大？"),
}
_TOTAL_PHRASINGS: Mapping[Language, tuple[str, ...]] = {
    "en": ("What is the sum of the numbers in the images?", "What do the numbers of all images add up to?"),
    "zh": ("图中的数的和是多少？", "把几个图中的数相加。"),
}
_IMAGE_NUMBER: Mapping[Language, str] = {"en": "Image {number}: ", "zh": "图{number}："}
_FIRST_TURN: Mapping[Language, tuple[str, ...]] = {
    "en": ("Which is the first digit?", "What digit is written first?"),
    "zh": ("第一个数字是多少？", "先写的是哪个数字？"),
}
_SECOND_TURN: Mapping[Language, tuple[str, ...]] = {
    "en": ("And what is the sum of the two digits?", "Now add the two digits."),
    "zh": ("两个数字的和是多少？", "把两个数字相加。"),
}
_PAGE_PHRASINGS: Mapping[Language, tuple[str, ...]] = {
    "en": ("What number is written in line {line}, column {column}?", "Read the number in line {line}, column {column}."),
    "zh": ("第{line}行第{column}列写的是什么数？", "读出第{line}行第{column}列的数。"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Scene:
    """A question with all that it shows; messages end with the user's turn."""

    messages: tuple[Message, ...]
    solution: str
    """The response of a perfect policy."""
    answer: str
    digits: Sequence[int]
    scans: Sequence[int]
    """Rows of `load_digits`, one a digit."""
    facts: Mapping[str, Any]
    """Metadata of this kind of question."""
    steps: tuple[Message, ...] = ()
    """What a perfect policy calls and its tools answer, before the solution."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SceneSource:
    """Where a scene is drawn from and how large."""

    split: Split
    language: Language
    digit_pixels: Size
    page_pixels: Size
    dice: Dice
    fault: SolutionFault | None = None
    """What is wrong with the solution."""

    def scan(self, digit: int) -> int:
        """Returns a scan of the digit."""
        return self.dice.pick(scans_of_digit(self.split, digit))

    def phrasing(self, phrasings: Mapping[Language, tuple[str, ...]]) -> str:
        """Returns one of the phrasings in the scene's language."""
        return self.dice.pick(phrasings[self.language])


def draw_scene(kind: TaskKind, source: SceneSource) -> Scene:
    """Returns a scene of one of the kinds in `SCENE_KINDS`."""
    return _DRAW[kind](source)


def _user(*parts: Part) -> Message:
    return Message(role="user", parts=parts)


def _says(text: str) -> Message:
    return Message(role="assistant", parts=(TextPart(text=text),))


def _draw_find(source: SceneSource) -> Scene:
    dice, (width, height) = source.dice, source.digit_pixels
    columns, rows = _FIND_CELLS
    # Cells a quarter larger than a digit, which lies anywhere in its own: boxes are not a few fixed ones, and digits never overlap.
    slack = (width // 4, height // 4)
    size = (columns * (width + slack[0]), rows * (height + slack[1]))
    cells = sorted(dice.several(range(columns * rows), 3 + dice.below(4)))
    target_cell, target = dice.pick(cells), dice.below(10)
    digits = [target if cell == target_cell else (target + 1 + dice.below(9)) % 10 for cell in cells]
    scans = [source.scan(digit) for digit in digits]
    places: dict[tuple[int, int], int] = {}
    box: list[int] = []
    for cell, scan in zip(cells, scans, strict=True):
        left = cell % columns * (width + slack[0]) + dice.below(slack[0] + 1)
        top = cell // columns * (height + slack[1]) + dice.below(slack[1] + 1)
        places[left, top] = scan
        if cell == target_cell:
            box = _relative_box(scan, (left, top), source.digit_pixels, size=size)
    image = draw_at(places, source.digit_pixels, size=size)
    answer = json.dumps([{"bbox_2d": box, "label": str(target)}])
    text = (source.phrasing(_FIND_PHRASINGS) + _FIND_FORMAT[source.language]).format(target=target)
    return Scene(
        messages=(_user(ImagePart.from_image(image), TextPart(text=text)),),
        solution=answer,
        answer=answer,
        digits=digits,
        scans=scans,
        facts={"target": target, "needs_image": True},
    )


def _relative_box(scan: int, corner: tuple[int, int], digit_pixels: Size, *, size: Size) -> list[int]:
    """Returns the box of the scan's ink, 0 to 1000 over the canvas, each number rounded to the nearest (a half up)."""
    ink = ink_box(scan)
    # In eighths of a pixel, the size of a scan's own pixels, so that the arithmetic is exact.
    eighths = [8 * corner[axis % 2] + ink[axis] * digit_pixels[axis % 2] for axis in range(4)]
    return [(2 * _COORDINATES * eighth + 8 * size[axis % 2]) // (16 * size[axis % 2]) for axis, eighth in enumerate(eighths)]


def _draw_video(source: SceneSource) -> Scene:
    dice = source.dice
    digits = dice.several(range(10), 3 + dice.below(3))
    seconds = [1 + dice.below(3) for _ in digits]
    scans = [source.scan(digit) for digit in digits]
    place = dice.below(len(digits))
    start = sum(seconds[:place])
    span = [start, start + seconds[place]]
    pages = [draw_row([scan], source.digit_pixels) for scan in scans]
    frames = [page for page, lasts in zip(pages, seconds, strict=True) for _ in range(lasts * FRAMES_PER_S)]
    film = VideoPart.from_frames(frames, fps=float(FRAMES_PER_S), frame_indices=range(len(frames)))
    text = source.phrasing(_VIDEO_PHRASINGS).format(target=digits[place]) + _VIDEO_FORMAT[source.language]
    answer = json.dumps([span])
    return Scene(
        messages=(_user(film, TextPart(text=text)),),
        solution=f"\\boxed{{{answer}}}",
        answer=answer,
        digits=digits,
        scans=scans,
        facts={"target": digits[place], "seconds": seconds, "needs_image": True},
    )


def _draw_multi_image(source: SceneSource) -> Scene:
    dice, count = source.dice, 2 + source.dice.below(2)
    asks_largest = dice.below(2) == 0
    numbers = dice.several(range(100), count)
    rows = [[source.scan(digit) for digit in digits_of(number)] for number in numbers]
    parts: list[Part] = []
    for place, row in enumerate(rows, start=1):
        label = _IMAGE_NUMBER[source.language].format(number=place)
        parts += [TextPart(text=label), ImagePart.from_image(draw_row(row, source.digit_pixels))]
    if asks_largest:
        answer, working = str(numbers.index(max(numbers)) + 1), ",".join(map(str, numbers)) + ":"
    else:
        answer, working = str(sum(numbers)), "+".join(map(str, numbers)) + "="
    text = source.phrasing(_LARGEST_PHRASINGS if asks_largest else _TOTAL_PHRASINGS) + BOXED[source.language]
    return Scene(
        messages=(_user(*parts, TextPart(text=text)),),
        solution=f"{working}\\boxed{{{answer}}}",
        answer=answer,
        digits=[digit for number in numbers for digit in digits_of(number)],
        scans=[scan for row in rows for scan in row],
        facts={"numbers": numbers, "asked": "largest" if asks_largest else "sum", "needs_image": True},
    )


def _draw_multi_turn(source: SceneSource) -> Scene:
    dice = source.dice
    first, second = dice.below(10), dice.below(10)
    scans = [source.scan(first), source.scan(second)]
    image = ImagePart.from_image(draw_row(scans, source.digit_pixels))
    answer = str(first + second)
    messages = (
        _user(image, TextPart(text=source.phrasing(_FIRST_TURN) + BOXED[source.language])),
        _says(f"\\boxed{{{first}}}"),
        _user(TextPart(text=source.phrasing(_SECOND_TURN) + BOXED[source.language])),
    )
    solution = f"{first}+{second}=\\boxed{{{answer}}}"
    return Scene(messages=messages, solution=solution, answer=answer, digits=[first, second], scans=scans, facts={"needs_image": True})


def _draw_page(source: SceneSource) -> Scene:
    dice = source.dice
    sides = _page_sides(*source.page_pixels)
    size = (dice.pick(sides), dice.pick(sides))
    columns, lines = size[0] // PAGE_CELL_PIXELS[0], size[1] // PAGE_CELL_PIXELS[1]
    column, line = dice.below(columns), dice.below(lines)
    places: dict[tuple[int, int], int] = {}
    asked: tuple[int, list[int]] | None = None
    for number_at in range(columns * lines):
        row, place = divmod(number_at, columns)
        number = dice.number(1 + dice.below(3))
        scans = [source.scan(digit) for digit in digits_of(number)]
        for offset, scan in enumerate(scans):
            places[place * PAGE_CELL_PIXELS[0] + offset * PAGE_DIGIT_PIXELS[0], row * PAGE_CELL_PIXELS[1]] = scan
        if (row, place) == (line, column):
            asked = number, scans
    assert asked is not None
    number, scans = asked
    text = source.phrasing(_PAGE_PHRASINGS).format(line=line + 1, column=column + 1) + BOXED[source.language]
    return Scene(
        messages=(_user(ImagePart.from_image(draw_at(places, PAGE_DIGIT_PIXELS, size=size)), TextPart(text=text)),),
        solution=f"\\boxed{{{number}}}",
        answer=str(number),
        digits=digits_of(number),
        scans=scans,
        facts={"line": line + 1, "column": column + 1, "lines": lines, "columns": columns, "needs_image": True},
    )


def _page_sides(smallest: int, largest: int) -> list[int]:
    """Returns sides from the smallest to the largest, each about a quarter longer than the one before: small pages are as common as
    large ones on a scale of factors."""
    sides = [smallest]
    while sides[-1] * 5 // 4 < largest:
        sides.append(sides[-1] * 5 // 4)
    return sides if sides[-1] == largest else [*sides, largest]


_DRAW: Mapping[TaskKind, Callable[[SceneSource], Scene]] = {
    "find": _draw_find,
    "video": _draw_video,
    "multi_image": _draw_multi_image,
    "multi_turn": _draw_multi_turn,
    "page": _draw_page,
}
SCENE_KINDS: tuple[TaskKind, ...] = tuple(_DRAW)
"""Kinds that this module draws."""
