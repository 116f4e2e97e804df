r"""The bundled track: questions about real handwritten digits with exact answers, drawn without end from scans that need no download.

The scans are the 1,797 of `sklearn.datasets.load_digits`, 8 x 8 pixels in 17 shades: the writer-independent test set of Alpaydin and
Kaynak's optdigits (UCI, 1998), by 13 writers. Which scan is whose was not kept, but the order was: the same sequence of 130 labels comes
14 times, with up to 8 missing (`handwriting_scans.FORM_STARTS`), which looks like one form filled in again and again. Splits are whole
forms: 10 to train (1,287 scans), 2 to validate (258), 2 to test (252). No scan is in two splits, and, if one form is one hand, at most one
writer is.

| kind | the image shows | the answer | best constant guess |
|---|---|---|---|
| read | a number of 1 to 3 digits | the number | 1 in 30 |
| add | two digits | their sum, 0 to 18 | 1 in 10 |
| count | 3 to 6 digits | how often the asked digit is there, 0 to 3 | 1 in 4 |
| compare | two numbers of 1 or 2 digits with a gap between | A: the first is larger, B: the second, C: equal | 1 in 3 |
| arithmetic | (no image) | a + b or a - b >= 0 of single digits, 0 to 18 | 1 in 10 |
| find | 3 to 6 digits anywhere on a canvas | the box of the asked digit, `[{"bbox_2d": [x1, y1, x2, y2], "label": "7"}]` | IoU 0.10 |
| video | a flip-book of 3 to 5 pages of 1 to 3 seconds | when the asked digit is there, `[[start, end]]` in seconds | IoU 0.26 |
| multi_image | two or three images with a number below 100 each | which one is largest, 1 to 3, or their sum | 1 in 5 |
| multi_turn | two digits; the first turn asks for the first | their sum, asked for in the second turn | 1 in 10 |
| page | a page of 200 to 4,000 pixels a side, 8 to 3,403 numbers | the number in the asked line and column | 1 in 30 |
| sum2, sum2_steps | two numbers of two digits with a gap between | their sum, 20 to 198 | 1 in 90 |
| sum4, sum4_steps | two numbers of four digits with a gap between | their sum, 2,000 to 19,998 | 1 in 9,000 |
| blind | two digits, of which the question tells both or only one | their sum, 0 to 18 | 1 in 10 |
| zoom, zoom_calls | a canvas with a large number, a small one, or two small digits | the sum of all numbers, 0 to 99 | 1 in 27 |
| ordered | 1, 2, 3, ... up to 3 to 6 in a row | how many digits, 3 to 6 | 1 in 4 |
| counter | such a row with one place empty | how many digits, 2 to 5 | 1 in 4 |
| mixing | two digits; the question quotes one in the other language | their sum, 0 to 18, in a sentence of its own language | 1 in 10 |
| program | a digit | a Python program that adds it to what it reads, multiplies or repeats it | 1 in 30 |
| json | two to four digits | a JSON object of two of: the digits, their sum, the largest, how many | 1 in 90 |
| constrained | a number of 1 to 3 digits | the number, written as the question wants it: a list, an opening, a length, ... | 1 in 30 |

Rewards that fit, by name: `count` where the answer is a whole number, `choice` for compare, `box` for find, `time_span` for video,
`code_execution` for program, `json` for json; beside `count`, `code_switching` for mixing and `format` for constrained.

The small numbers of `zoom` and `zoom_calls` have 8 x 8 pixels a digit on a canvas of 1,000 x 1,000: a nano of at most 64 image tokens sees
2 x 2 pixels of each, until it zooms in on the grey plate that they stand on. A third of the rows needs no zoom, a third one, a third two.
Both ask the same with the same pictures at the same index; the solution of `zoom_calls` calls the zoom tool (`TRACK_ZOOM`) first.

In a row of `ordered` the last digit tells how many there are, and so does where the row ends; a policy that learns that habit answers
each row of `counter` wrong, by one too many (`metadata["usual_answer"]`). Train on `ordered` to make the habit and on `counter` to undo it.

The 155 questions of `arithmetic` are the same in all splits: it keeps a skill alive, it cannot measure generalisation. Half of the rows of
`blind` can be solved without the image, and each says which it is: `metadata["needs_image"]`, which all kinds from `find` on have. `sum2`
and `sum2_steps`, and `sum4` and `sum4_steps`, ask the same with the same pictures at the same index; they differ in the solution alone, the
answer against steps in a think block before it.

Everything is a function of (split, index, seed, settings) by SHA-256, the same in every process.
"""

from __future__ import annotations

import difflib
import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from types import MappingProxyType
from typing import get_args

from ..model.records import ROLES, DataError, Example, ImagePart, Message, Part, TextPart
from .data_config import Language, SolutionFault, Split, TaskKind
from .handwriting_forms import FAULTS_OF_KIND, FORM_SCENES
from .handwriting_questions import CORPUS_PHRASINGS, QUESTION_KINDS, ask
from .handwriting_scans import SPLIT_SCANS, Dice, Size, draw_row, hash_key
from .handwriting_scenes import PAGE_PIXELS, SCENE_KINDS, Scene, SceneSource, draw_scene
from .handwriting_zoom import ZOOM_SCENES

TASK_KINDS: tuple[TaskKind, ...] = get_args(TaskKind)
LANGUAGES: tuple[Language, ...] = get_args(Language)

DIGIT_PIXELS = (64, 64)
"""Default width and height of one digit: 2 x 2 vision tokens of Qwen3-VL, which cover 32 x 32 pixels each."""
MIN_DIGIT_PIXELS, MAX_DIGIT_PIXELS = 8, 512
MIN_PAGE_PIXELS, MAX_PAGE_PIXELS = PAGE_PIXELS

# 2^64 divided by the golden ratio: of all steps round a circle this one leaves the most even gaps.
_GOLDEN_STEP, _CIRCLE = 0x9E3779B97F4A7C15, 1 << 64
_CORPUS_DRAWS = 100
# One question for both, so that models trained on either have seen the same.
_DRAWN_AS: Mapping[str, TaskKind] = {"sum2_steps": "sum2", "zoom_calls": "zoom", "sum4_steps": "sum4"}


def handwriting_example(
    split: Split,
    index: int,
    *,
    tasks: Mapping[str, float],
    languages: Sequence[str] = LANGUAGES,
    seed: int,
    with_solution: bool,
    digit_pixels: Size = DIGIT_PIXELS,
    page_pixels: Size = PAGE_PIXELS,
    solution_faults: Mapping[str, float] = MappingProxyType({}),
) -> Example:
    r"""Returns example number `index` of an endless stream; the same arguments give the same example in every process.

    `tasks` maps kinds to shares, which are relative. Kind and language go round a circle in golden steps, so the mix is constant:
    among any n examples in a row the number of one kind in one language differs from its share of n by less than 4 (n up to 1,000)
    or 6 (n up to 100,000), whatever the shares. The order of `tasks` and `languages` and a common factor of the shares change nothing.

    With `with_solution` (for SFT) the messages end with a short response, `5+7=\boxed{12}`; without (for RL) with a question; the
    first answer of `multi_turn` is there in both. Metadata: `language`; `digits` and `scans`, the images from left to right (a film: in
    order; a page: of the asked number alone) as values and as rows of `load_digits`; `target` (count, find, video), `numbers` (compare,
    multi_image, zoom), `operands` (arithmetic, sums, blind, mixing), `sign` (arithmetic), `seconds` a page lasts (video), `asked`
    (multi_image: largest or sum; program: plus, times or repeat), `line`, `column`, `lines`, `columns` (page, from 1), `boxes` of the
    small numbers in 0 to 1000 and `target_calls`, how many zooms are needed (zoom, zoom_calls), `usual_answer` (ordered, counter),
    `answer_language` (mixing), `code` with hidden cases (program), `schema` (json), `constraints` and the `form` that they make up
    (constrained), `solution_fault` (a solution that has one), `needs_image` (from `find` on). The id is unique within one split, seed and
    `tasks`.

    Images are rows of digits of `digit_pixels` (width, height), bicubic, white on black. The box of `find` holds the digit's ink
    (`ink_box`). `zoom` has sizes of its own (`handwriting_zoom`). Films have two frames a second. Numbers on a page have digits of 24 x 32
    pixels; its width and height are drawn from `page_pixels` (smallest, largest), as often small as large on a scale of factors. 4,000 x
    4,000 are 15,625 vision tokens: a nano whose `max_image_tokens` is below that gets the page scaled down, and by default cannot read it.

    `solution_faults` gives, by fault, the share of solutions that have it (`FAULTS_OF_KIND`); what is asked stays the same.

    Raises `DataError` for an unknown split, kind or language, a share that is not a positive number, a negative index, digits outside 8
    to 512 pixels and pages outside 200 to 4,000.
    """
    _check_name("split", split, tuple(SPLIT_SCANS))
    if index < 0:
        raise DataError(f"handwriting index = {index}: examples are numbered from 0")
    if not all(MIN_DIGIT_PIXELS <= pixels <= MAX_DIGIT_PIXELS for pixels in digit_pixels):
        raise DataError(
            f"handwriting digit_pixels = {digit_pixels}: width and height must be {MIN_DIGIT_PIXELS} to {MAX_DIGIT_PIXELS} pixels; "
            "multiples of 32 fill whole vision tokens"
        )
    if not MIN_PAGE_PIXELS <= page_pixels[0] <= page_pixels[1] <= MAX_PAGE_PIXELS:
        raise DataError(
            f"handwriting page_pixels = {page_pixels}: give the smallest and the largest side of a page, {MIN_PAGE_PIXELS} to "
            f"{MAX_PAGE_PIXELS} pixels"
        )
    mix = _mix(tuple(tasks.items()), tuple(languages))
    _check_faults(tasks, solution_faults)
    kind, language = mix.at(index, phase=hash_key("phase", split, seed) % _CIRCLE)
    key = (split, seed, _DRAWN_AS.get(kind, kind), language, index)
    fault = _fault(kind, solution_faults, Dice("fault", *key))
    source = SceneSource(
        split=split, language=language, digit_pixels=digit_pixels, page_pixels=page_pixels, dice=Dice("example", *key), fault=fault
    )
    scene = _draw(kind, source)
    messages = scene.messages
    if with_solution:
        messages = (*messages, *scene.steps, Message(role="assistant", parts=(TextPart(text=scene.solution),)))
    return Example(
        id=f"handwriting/{split}/{kind}/{index:06d}",
        messages=messages,
        answer=scene.answer,
        task=kind,
        source="handwriting",
        metadata={"language": language, "digits": list(scene.digits), "scans": list(scene.scans), **scene.facts}
        | ({"solution_fault": fault} if with_solution and fault else {}),
    )


def _fault(kind: TaskKind, shares: Mapping[str, float], dice: Dice) -> SolutionFault | None:
    """Returns what is wrong with an example's solution, if anything."""
    drawn = dice.fraction()
    for fault in FAULTS_OF_KIND.get(kind, ()):
        drawn -= shares.get(fault, 0.0)
        if drawn < 0:
            return fault
    return None


def _draw(kind: TaskKind, source: SceneSource) -> Scene:
    if kind in QUESTION_KINDS:
        return _question_scene(kind, source)
    if kind in SCENE_KINDS:
        return draw_scene(kind, source)
    return (FORM_SCENES | ZOOM_SCENES)[kind](source)


def _question_scene(kind: TaskKind, source: SceneSource) -> Scene:
    """Returns a question about one row of digits with its picture."""
    question = ask(kind, source.language, source.dice)
    scans = [None if digit is None else source.scan(digit) for digit in question.cells]
    parts: tuple[Part, ...] = (TextPart(text=question.text),)
    if scans:
        parts = (ImagePart.from_image(draw_row(scans, source.digit_pixels)), *parts)
    return Scene(
        messages=(Message(role="user", parts=parts),),
        solution=question.solution,
        answer=question.answer,
        digits=[digit for digit in question.cells if digit is not None],
        scans=[scan for scan in scans if scan is not None],
        facts=question.facts,
    )


def handwriting_examples(
    split: Split,
    *,
    tasks: Mapping[str, float],
    languages: Sequence[str] = LANGUAGES,
    num_examples: int,
    seed: int,
    with_solution: bool,
    digit_pixels: Size = DIGIT_PIXELS,
    page_pixels: Size = PAGE_PIXELS,
) -> list[Example]:
    """Returns examples number 0 to `num_examples` - 1 of the stream (see `handwriting_example`)."""
    if num_examples < 1:
        raise DataError(f"handwriting num_examples = {num_examples}: must be at least 1")
    return [
        handwriting_example(
            split,
            index,
            tasks=tasks,
            languages=languages,
            seed=seed,
            with_solution=with_solution,
            digit_pixels=digit_pixels,
            page_pixels=page_pixels,
        )
        for index in range(num_examples)
    ]


def tokenizer_corpus() -> Iterator[str]:
    """Yields the track's own text for training a tokenizer: turns of the first five kinds in all phrasings and languages, the same every
    time. The later kinds are not in it: every nano's vocabulary would change."""
    yield from (f"{role}\n" for role in ROLES)
    for kind, language in CORPUS_PHRASINGS:
        for number in range(_CORPUS_DRAWS):
            question = ask(kind, language, Dice("corpus", kind, language, number))
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


def _check_faults(tasks: Mapping[str, float], shares: Mapping[str, float]) -> None:
    """Raises unless every fault has a kind to spoil and those of a kind are at most all of its solutions."""
    for name, share in shares.items():
        kinds = [kind for kind, faults in FAULTS_OF_KIND.items() if name in faults]
        _check_name("solution fault", name, [fault for faults in FAULTS_OF_KIND.values() for fault in faults])
        if not any(kind in tasks for kind in kinds):
            raise DataError(f"handwriting solution_faults.{name} = {share}: spoils {' and '.join(kinds)}, which tasks does not have")
    for kind, faults in FAULTS_OF_KIND.items():
        whole = sum(shares.get(fault, 0.0) for fault in faults)
        if not all(shares.get(fault, 0.0) >= 0 for fault in faults) or whole > 1:
            raise DataError(f"handwriting solution_faults of {kind}: {whole:g} in all, must be shares of 0 to 1 and together at most 1")


def _check_name(what: str, name: str, allowed: Sequence[str]) -> None:
    if name not in allowed:
        close = difflib.get_close_matches(str(name), allowed, n=1)
        meant = f"did you mean {close[0]!r}? " if close else ""
        raise DataError(f"handwriting: unknown {what} {name!r}: {meant}give one of {', '.join(allowed)}")
