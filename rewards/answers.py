"""Finding the final answer in a response. Text in, text out: every function is total and runs in linear time.

The rules are strict, because whatever is paid will be written. Thinking is never read. An answer stands in
`<answer>...</answer>` or in the balanced braces of `\\boxed{...}`; a response without either *is* its answer, whole. Two
different answers are no answer.
"""

from __future__ import annotations

import re

THINK_OPEN = "<think>"
THINK_CLOSE = "</think>"
MAX_NESTED_BOXES = 4
"""Boxes around a box that are taken off; more would cost quadratic time and no honest response writes them."""
_TAGGED = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL)
_BRACES = re.compile(r"\\boxed\s{0,8}\{|\\.|[{}]", re.DOTALL)
# The block of full-width ASCII variants, and the ideographic space.
_HALF_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {0x3000: 0x20}
_WRAPPERS = (
    *(("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"), ("**", "**")),
    *(("\\text{", "}"), ("\\mathrm{", "}"), ("\\textbf{", "}")),
)


def strip_thinking(text: str, *, prompt_suffix: str) -> str | None:
    """Returns the visible part of a response, or None when there is none.

    The thinking part is open from the start when the chat template wrote an opening tag after the assistant header
    (`prompt_suffix`) and did not close it, or when the response begins with one. It ends at the first closing tag; without one
    the response never came to an answer. A further think tag in the visible part makes the response malformed: None.
    """
    opened_by_prompt = prompt_suffix.rfind(THINK_OPEN) > prompt_suffix.rfind(THINK_CLOSE)
    response = text.strip()
    if not opened_by_prompt and response.startswith(THINK_OPEN):
        opened_by_response, response = True, response.removeprefix(THINK_OPEN)
    else:
        opened_by_response = False
    before, close, after = response.partition(THINK_CLOSE)
    if not close and (opened_by_prompt or opened_by_response):
        return None
    # A closing tag without an opening one still ends a thinking part: what stands before it was not meant to be seen.
    visible = after if close else before
    if THINK_OPEN in visible or THINK_CLOSE in visible:
        return None
    return visible.strip()


def tagged(text: str) -> tuple[str, ...]:
    """Returns the contents of all `<answer>...</answer>`, trimmed, in order."""
    return tuple(match.group(1).strip() for match in _TAGGED.finditer(text))


def boxed(text: str) -> tuple[str, ...]:
    r"""Returns the contents of all outermost `\boxed{...}` with balanced braces, trimmed, in order; `\{` and `\}` do not count."""
    open_braces: list[tuple[bool, int]] = []
    spans: list[tuple[int, int]] = []
    for match in _BRACES.finditer(text):
        token = match.group()
        if token == "}":
            if open_braces:
                is_box, start = open_braces.pop()
                if is_box:
                    # Boxes inside this one were closed before it, and stand at the end.
                    while spans and spans[-1][0] > start:
                        spans.pop()
                    spans.append((start, match.start()))
        elif token.endswith("{") and token != r"\{":
            open_braces.append((token != "{", match.end()))
    return tuple(text[start:end].strip() for start, end in spans)


def final_answer(text: str, *, prompt_suffix: str) -> str | None:
    r"""Returns the final answer of a response, or None when it has none or several that differ.

    Tried in this order on the visible part: `<answer>...</answer>` (a box inside it counts instead of the tag),
    `\boxed{...}`, else the whole visible text, trimmed. If tags and boxes hold different texts (white space aside), the
    response hedges and has no answer: `\boxed{3} ... \boxed{4}` is None, `\boxed{3} ... \boxed{3}` is `3`, and so is
    `\boxed{1/2} ... \boxed{0.5}` None: whether two texts mean the same is not for this function.
    """
    visible = strip_thinking(text, prompt_suffix=prompt_suffix)
    if visible is None:
        return None
    candidates = [answer for content in tagged(visible) for answer in (boxed(content) or (content,))]
    candidates += boxed(_TAGGED.sub(" ", visible))
    distinct = {"".join(candidate.split()): candidate for candidate in candidates}
    if len(distinct) > 1:
        return None
    answer = candidates[-1] if candidates else visible
    for _ in range(MAX_NESTED_BOXES):
        if len(nested := boxed(answer)) != 1 or not answer.startswith("\\boxed") or not answer.endswith("}"):
            break
        answer = nested[0]
    return answer or None


def half_width(text: str) -> str:
    """Returns the text with full-width letters, digits and punctuation as their ASCII forms."""
    return text.translate(_HALF_WIDTH)


def normalise_spaces(text: str) -> str:
    """Returns the text in half width, trimmed, with every run of white space as one space."""
    return " ".join(half_width(text).split())


def bare(text: str) -> str:
    r"""Returns the text without what is only dress: outer white space, `$..$`, `\(..\)`, `**..**`, `\text{..}`, a final full stop.

    Meant for short answers; the caller bounds the length.
    """
    stripped = normalise_spaces(text)
    while True:
        before = stripped
        stripped = stripped.removesuffix("。").removesuffix(".").strip()
        for opening, closing in _WRAPPERS:
            if len(stripped) > len(opening) + len(closing) and stripped.startswith(opening) and stripped.endswith(closing):
                stripped = stripped[len(opening) : -len(closing)].strip()
        if stripped == before:
            return stripped
