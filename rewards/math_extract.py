r"""Finding what a response gives as its mathematical answer. Text in, text out; nothing is evaluated.

Strict, because whatever is paid will be written: every answer that a response gives must be right, so that naming several can only lose.
"""

from __future__ import annotations

import re
from typing import Literal, TypeAlias

from .answers import bare, boxed, strip_thinking, tagged
from .math_normalise import expression
from .math_structure import structure

AnswerPlace: TypeAlias = Literal["final", "prose"]
MAX_CANDIDATES = 6
"""Different answers in one response that are still compared, each with the example's; more are hedging."""
MAX_RAW_CHARS = 12_000
"""A longer answer is left as it is written: it is too long for any reader, and taking off its dress could cost quadratic time."""
MAX_RAW_ANSWERS = 60
"""More different answers than this in one response are not normalised: hedging without end."""
_TAG = re.compile(r"<answer>(?:(?!<answer>).)*?</answer>", re.DOTALL)
_ANCHOR = re.compile(
    r"(?:\b(?:the )?(?:final )?answer(?: is)?\s?[:：]|"
    r"\b(?:the |my |our )?(?:final )?answer is\b(?! not)|答案(?:是|为|：|:)|^answer(?=\s*[$\\\\]))"
    r"[ \t]*[:：]?\*{0,2}",
    re.IGNORECASE | re.MULTILINE,
)
_CLOSING_WORDS = re.compile(r"\s*I hope it is correct\.?\s*$", re.IGNORECASE)
_ESCAPED = re.compile(r"\\\\(?=[A-Za-z(\[\])])")
_NOT_PROSE = re.compile(r"\\(?:text|textnormal|mathrm|mbox)\s?\{[^{}]*\}|\\[A-Za-z]+(?:\{(?:[pbvV]?matrix|array)\})?")
_PROSE = re.compile(r"[A-Za-z]{2,}")
_FORMULA = re.compile(
    r"(?:\$\$[^$]{1,2000}\$\$|\$(?:\\\$|[^$]){1,2000}\$|\\\[.{1,2000}?\\\]|\\\(.{1,2000}?\\\))(?:\s?%| percent| pct)?", re.DOTALL
)
_NUMBER = re.compile(r"(?<![A-Za-z\d])-?\d[\d,]*(?:[.,]\d+)?(?:/\d+)?(?:\s?%| percent| pct)?(?![A-Za-z\d]*[A-Z\d])")
MAX_PROSE_CHARS = 4000
"""How much of a text's end is searched for its last formula."""
_EMPTY_LINE = re.compile(r"\n\s*\n")


def candidate_answers(text: str, *, prompt_suffix: str, answer_in: AnswerPlace = "final") -> tuple[str, ...]:
    r"""Returns the different answers that the visible part of a response gives, normalised, in order; none when it gives none.

    Tags `<answer>...</answer>` (a box inside counts instead) and `\boxed{...}`; without either, what follows "the answer is" or
    "final answer:", up to the end of the response; without that, the whole visible text. In `prose` the last formula or number of such
    a text is its answer.
    """
    visible = strip_thinking(text, prompt_suffix=prompt_suffix)
    if visible is None:
        return ()
    visible = _unescaped(visible)
    found = [answer for content in tagged(visible) for answer in (boxed(content) or (content,))]
    found += boxed(_TAG.sub(" ", visible))
    if not found:
        found = _after_anchor(visible) or [visible]
        if answer_in == "prose":
            found = [_last_formula(found[-1])]
    raw = list(dict.fromkeys(map(_innermost, found)))
    normal = [expression(answer) if len(answer) <= MAX_RAW_CHARS and len(raw) <= MAX_RAW_ANSWERS else answer for answer in raw]
    distinct = {"".join(answer.split()): answer for answer in normal}
    return tuple(answer for key, answer in distinct.items() if key) if "" not in distinct else ()


def example_answer(text: str) -> str:
    """Returns the example's answer, normalised; of an answer with boxes only what they hold, as one list."""
    boxes = tuple(dict.fromkeys(boxed(_unescaped(text))))
    return expression(", ".join(boxes)) if boxes else expression(text)


def as_one_list(answer: str, candidates: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the candidates as one list where the example's answer is a list of as many parts, else as they are: two boxes, two roots."""
    if len(candidates) < 2:
        return candidates
    found = structure(answer)
    is_list = found is not None and found.kind in ("list", "set") and len(found.parts) == len(candidates)
    parts = [structure(candidate) for candidate in candidates]
    if is_list and not any(part is not None and part.kind in ("list", "set") for part in parts):
        return (", ".join(candidates),)
    return candidates


def _last_formula(text: str) -> str:
    """Returns the last formula of a text with words, else its last number; a text without words is one formula."""
    if not _PROSE.search(_NOT_PROSE.sub(" ", text)):
        return text
    tail = text[-MAX_PROSE_CHARS:]
    # A formula that ends the text stands behind any number; else whichever is last.
    formulas, numbers = list(_FORMULA.finditer(tail)), list(_NUMBER.finditer(tail))
    if formulas and (not numbers or formulas[-1].end() >= numbers[-1].start()):
        return formulas[-1].group()
    return numbers[-1].group() if numbers else text


def _unescaped(text: str) -> str:
    r"""Returns a text that was escaped twice on its way (`\\\\boxed{`) as it was meant."""
    return _ESCAPED.sub(lambda _match: "\\", text.replace("\\n", "\n")) if "\\\\boxed" in text else text


def _innermost(text: str) -> str:
    nested = boxed(text)
    return nested[0] if len(nested) == 1 and text.startswith("\\boxed") and text.endswith("}") else text


def _after_anchor(visible: str) -> list[str]:
    """Returns what follows each "the answer is"; the last one must end the response, so that no doubt can follow it."""
    anchors = list(_ANCHOR.finditer(visible))
    if not anchors:
        return []
    # An anchor right after another ("Final Answer: The final answer is 3") only leads to it.
    ends = [match.start() for match in anchors[1:]] + [len(visible)]
    pieces = [visible[match.end() : end] for match, end in zip(anchors, ends, strict=True)]
    if len(pieces[-1]) > MAX_RAW_CHARS:
        return []
    kept = [bare(_CLOSING_WORDS.sub("", piece[:MAX_RAW_CHARS]).strip().rstrip("*").strip()) for piece in pieces]
    answers = [piece for piece in kept if piece]
    if len(answers) > 1:
        # An earlier answer stands in running text: only its first sentence is meant.
        answers[:-1] = [re.split(r"[\n。]|\.\s", piece)[0] for piece in answers[:-1]]
    return answers if answers and not _EMPTY_LINE.search(answers[-1]) else []
