r"""How a mathematical answer is put together: list, set, tuple or interval, matrix, union, ratio, sequence, relation. Text in, parts out.

Nothing is evaluated. The parts are compared one by one by `math_compare`, so that `\{1,2\}` is not `(1,2)`, `1,2,\ldots,n` is not
`1,3,5,\ldots,2n-1`, and "1331 and 1728" is not 1728. Every function is total and linear in the length of the text.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Kind = Literal["list", "set", "pair", "tuple", "matrix", "union", "ratio"]
_OPENING, _CLOSING = "([{", ")]}"
_MATRIX = re.compile(r"^\\begin\{([pbvVB]?)(?:matrix|array)\}(?:\{[clr| ]{0,20}\})?(.*)\\end\{[pbvVB]?(?:matrix|array)\}$", re.DOTALL)
_WORD_NAME = r"[A-Za-z]{1,4}(?:_\{?\w{1,8}\}?)?"
_NAMED = re.compile(
    rf"^(?:{_WORD_NAME}(?::{_WORD_NAME})?|"
    r"\([A-Za-z](?:, ?[A-Za-z]){1,5}\)|\\(?:alpha|beta|gamma|delta|epsilon|theta|lambda|mu|nu|phi|psi|omega|rho|sigma|angle [A-Z]{1,3})|"
    r"[A-Za-z]\([A-Za-z]\))\s?(?:=|\\in(?![a-z]))\s?(.+)$"
)
_TIME = re.compile(r"^\d{1,2}:[0-5]\d(?::[0-5]\d)? ?(?:[ap]\.?m\.?)?$", re.IGNORECASE)
_BOTH_BOUNDS = re.compile(r"^([^<>=,]{1,80}?)\s?(<|\\le(?![a-z]))\s?[A-Za-z]\s?(<|\\le(?![a-z]))\s?([^<>=,]{1,80})$")
_ONE_BOUND = re.compile(r"^[A-Za-z]\s?(<|>|\\[lg]e(?![a-z]))\s?([^<>=,]{1,80})$")
_EQUALS = re.compile(r"(?<![<>!\\:])=")


@dataclass(frozen=True, kw_only=True, slots=True)
class Structure:
    r"""An answer of several parts: `[0,1)` is `Structure(kind="pair", parts=("0", "1"), ends="[)")`."""

    kind: Kind
    parts: tuple[str, ...]
    ends: str = ""
    """Brackets of a pair; rows x columns of a matrix."""


def split_top_level(text: str, separators: tuple[str, ...]) -> list[str]:
    r"""Returns the trimmed pieces between separators that stand outside of all brackets; `\{` and `\langle` count as brackets."""
    pieces, depth, start, index = [], 0, 0, 0
    while index < len(text):
        if text.startswith(("\\langle", "\\begin"), index):
            depth, index = depth + 1, index + 6
        elif text.startswith(("\\rangle", "\\end{"), index):
            depth, index = depth - 1, index + 4
        elif text[index] in _OPENING:
            depth += 1
        elif text[index] in _CLOSING:
            depth -= 1
        elif depth <= 0:
            found = next((separator for separator in separators if text.startswith(separator, index)), None)
            if found is not None:
                pieces.append(text[start:index].strip())
                start = index = index + len(found)
                continue
        index += 1
    pieces.append(text[start:].strip())
    return pieces


def is_wrapped(text: str) -> bool:
    """Returns whether the first character is a bracket that is closed by the last one."""
    depth = 0
    for index, character in enumerate(text):
        depth += (character in _OPENING) - (character in _CLOSING)
        if depth == 0:
            return index == len(text) - 1 and index > 0
    return False


def without_name(text: str) -> tuple[str, str]:
    r"""Returns the name that an answer is given to, and the answer: `n=2,3` is `("n", "2,3")`; no name where there is a chain."""
    match = _NAMED.match(text)
    if match is None or _EQUALS.search(match[1]) or re.search(r"[<>]|\\[lg]e(?![a-z])", match[1]):
        return "", text
    return "".join(text[: match.start(1)].replace("\\in", "=").split()).removesuffix("="), match[1].strip()


def structure(text: str) -> Structure | None:
    """Returns the outermost structure of a normalised answer, or None when it has a single part."""
    if (matrix := _matrix(text)) is not None:
        return matrix
    words = re.sub(r",?(?:\s|(?<=\)))(?:and|or)(?:\s|(?=\())", ", ", text)
    pieces = split_top_level(words, (",", ";"))
    if len(pieces) > 1:
        return Structure(kind="list", parts=tuple(part for piece in pieces for part in _both_signs(piece)))
    if len(both := _both_signs(text)) > 1:
        return Structure(kind="list", parts=tuple(both))
    unions = split_top_level(text, ("\\cup",))
    if len(unions) > 1:
        return Structure(kind="union", parts=tuple(unions))
    inside = _inside(text)
    if inside is not None:
        kind, content, ends = inside
        parts = split_top_level(content, (",", ";"))
        if kind == "set":
            return (
                Structure(kind="set", parts=tuple(part for piece in parts for part in _both_signs(piece)))
                if _is_plain_set(content)
                else None
            )
        if len(parts) > 1:
            is_pair = len(parts) == 2 and kind == "pair"
            return Structure(kind="pair", parts=tuple(parts), ends=ends) if is_pair else _tuple(parts, ends=ends)
        return None
    ratio = split_top_level(text, (":",))
    if len(ratio) > 1 and all(ratio):
        return Structure(kind="ratio", parts=tuple(ratio), ends="time" if _TIME.match(text) else "")
    return None


def _inside(text: str) -> tuple[Literal["set", "pair", "vector"], str, str] | None:
    if text.startswith("\\{") and text.endswith("\\}") and is_wrapped(text[1:-2] + "}"):
        return "set", text[2:-2].strip(), ""
    if text.startswith("\\langle") and text.endswith("\\rangle"):
        return "vector", text[7:-7].strip(), "()"
    if len(text) > 2 and text[0] in _OPENING and text[-1] in _CLOSING and _closes_at_end(text):
        return ("set", text[1:-1].strip(), "") if text[0] == "{" else ("pair", text[1:-1].strip(), text[0] + text[-1])
    return None


def _closes_at_end(text: str) -> bool:
    """As `is_wrapped`, for half-open intervals, whose brackets differ."""
    return is_wrapped(text)


def _is_plain_set(content: str) -> bool:
    """A set that is described, not listed, is for the parser."""
    return not re.search(r"\\mid|\||\\colon|:", content)


def _tuple(parts: list[str], *, ends: str) -> Structure | None:
    return Structure(kind="tuple", parts=tuple(parts)) if ends in ("()", "[]") else None


def _matrix(text: str) -> Structure | None:
    match = _MATRIX.match(text)
    if match is None or "\\begin" in match[2]:
        return None
    rows = [row.strip() for row in match[2].replace("\\hline", " ").split("\\\\")]
    cells = [[cell.strip() for cell in row.split("&")] for row in rows if row]
    if not cells or len({len(row) for row in cells}) != 1:
        return None
    # Bars are a determinant, which is a number.
    return (
        None
        if match[1] in ("v", "V")
        else Structure(kind="matrix", parts=tuple(cell for row in cells for cell in row), ends=f"{len(cells)}x{len(cells[0])}")
    )


def _both_signs(text: str) -> list[str]:
    r"""`a \pm b` is two answers."""
    before, sign, after = text.partition("\\pm")
    if not sign or "\\pm" in after or not after.strip() or structure_depth(before) < 0:
        return [text]
    return [f"{before}{after}" if not before or before.rstrip()[-1:] in "=({" else f"{before}+{after}", f"{before}-{after}"]


def structure_depth(text: str) -> int:
    """Returns how many more brackets a text opens than it closes."""
    return sum(map(text.count, _OPENING)) - sum(map(text.count, _CLOSING))


def sides(text: str) -> list[str]:
    """Returns the members of an equation or a chain of equations: `x=3=4` has three."""
    return [side.strip() for side in _EQUALS.split(text)]


def as_interval(text: str) -> Structure | None:
    r"""Returns the interval that bounds of one variable describe: `0 \le x < 1` is `[0,1)`, `x > 3` is `(3,\infty)`; None for others."""
    if match := _BOTH_BOUNDS.match(text):
        low, low_sign, high_sign, high = match.groups()
    elif match := _ONE_BOUND.match(text):
        sign, bound = match[1], match[2]
        is_lower = sign in (">", "\\ge")
        low, high = (bound, "\\infty") if is_lower else ("-\\infty", bound)
        low_sign, high_sign = (sign, "<") if is_lower else ("<", sign)
    else:
        return None
    ends = ("[" if low_sign in ("\\le", "\\ge") else "(") + ("]" if high_sign == "\\le" else ")")
    return Structure(kind="pair", parts=(low.strip(), high.strip()), ends=ends)


def vector_parts(found: Structure) -> tuple[str, ...] | None:
    """Returns the entries of a tuple or of a matrix with one row or column: a vector in whichever way it is written."""
    if found.kind == "tuple" or (found.kind == "pair" and found.ends == "()"):
        return found.parts
    if found.kind == "matrix" and (found.ends.startswith("1x") or found.ends.endswith("x1")):
        return found.parts
    return None
