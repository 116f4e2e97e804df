r"""Equality of two mathematical answers: exact where it can be, structure by structure, and by math-verify for what needs a parser.

`equal` runs in a killable worker only: the parser may not end. `known_equal` is the part that is proved by text and whole numbers alone and
may run anywhere.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TypeAlias

from .math_quantity import read_quantity, same_quantity, same_unit, split_unit
from .math_structure import Structure, as_interval, sides, structure, vector_parts, without_name

MAX_DEPTH = 8
"""Structures within structures that are taken apart."""
_WORDS = re.compile(r"\\(?:text|textnormal|mathrm|mbox|textbf)\s?\{[^{}]+\}|[A-Za-z][A-Za-z ]*|\\ldots")
_QUANTIFIER = re.compile(r"\\forall|\\exists|\\nexists")
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{3,}")
_COMMAND_TEXT = re.compile(r"\\(?:text|textnormal|mathrm|mbox|textbf|operatorname|textit|mathbf)\s?\{\s?([^{}]*?)\s?\}")
_MATH_WORDS = frozenset(
    [
        "sin",
        "cos",
        "tan",
        "cot",
        "sec",
        "csc",
        "log",
        "exp",
        "sqrt",
        "frac",
        "arcsin",
        "arccos",
        "arctan",
        "sinh",
        "cosh",
        "tanh",
        "max",
        "min",
        "gcd",
        "lcm",
        "mod",
        "deg",
        "det",
        "dim",
        "ker",
        "begin",
        "end",
        "matrix",
        "pmatrix",
        "bmatrix",
        "vmatrix",
        "cases",
        "array",
        "aligned",
        "and",
        "mathbb",
        "mathrm",
        "text",
        "operatorname",
        "theta",
        "alpha",
        "beta",
    ]
)
# What makes a value an approximation, an alternative or a denial.
_VAGUE = re.compile(
    r"\\(?:approx|sim|simeq|cong|vee|lor|neg|lnot|to|Rightarrow|rightarrow|implies|ne|not|equiv|ldots|mid|nmid|mod|bmod|pmod|parallel|perp|land|wedge)(?![A-Za-z])|[≈~?→⇒#@&|;]|\d\s+\d"
)
_APPROXIMATE = re.compile(r"^(?:[A-Za-z](?:_\{?\w{1,8}\}?)?\s?)?(?:\\approx(?![A-Za-z])|≈)\s?")
_DECIMAL_COMMA = re.compile(r"^[+-]?\d+,\d+$")


Same: TypeAlias = Callable[[str, str], bool]


class UnreadableAnswerError(ValueError):
    """The example's answer cannot be read as mathematics; no response could be right."""


def compact(text: str) -> str:
    """Returns the text without white space: two answers with one compact form are the same answer."""
    return "".join(text.split())


def known_equal(answer: str, prediction: str, *, decimal_places: int) -> bool | None:
    """Returns the verdict where text and exact numbers alone decide it, else None; microseconds, for any process."""
    if compact(answer) == compact(prediction):
        return True
    answer_quantity = read_quantity(answer)
    if answer_quantity is None:
        return None
    prediction_quantity = read_quantity(prediction)
    if prediction_quantity is None:
        return None
    if answer_quantity.has_pi != prediction_quantity.has_pi and (answer_quantity.places or prediction_quantity.places):
        return None  # whether a decimal is pi to enough places, more digits of pi must tell
    return same_quantity(answer_quantity, prediction_quantity, decimal_places=decimal_places)


def equal(answer: str, prediction: str, *, decimal_places: int, depth: int = 0) -> bool:
    """Returns whether two normalised answers are equal as mathematics; `UnreadableAnswerError` names an answer that cannot be read."""
    if (known := known_equal(answer, prediction, decimal_places=decimal_places)) is not None:
        return known
    if bool(_QUANTIFIER.search(answer)) != bool(_QUANTIFIER.search(prediction)):
        return False
    prediction = _APPROXIMATE.sub("", prediction)
    if _VAGUE.search(prediction) and not _VAGUE.search(answer):
        return False
    if depth < MAX_DEPTH:
        if (members := _chain(answer, prediction)) is not None:
            return all(equal(without_name(answer)[1], member, decimal_places=decimal_places, depth=depth + 1) for member in members)
        unnamed = _unnamed(answer, prediction)
        if unnamed is None:
            return False
        if unnamed != (answer, prediction):
            return equal(*unnamed, decimal_places=decimal_places, depth=depth + 1)
        by_structure = _equal_structures(answer, prediction, decimal_places=decimal_places, depth=depth)
        if by_structure is not None:
            return by_structure
    if (as_text := _equal_words(answer, prediction)) is not None:
        return as_text
    return _equal_expressions(answer, prediction, decimal_places=decimal_places)


def _chain(answer: str, prediction: str) -> list[str] | None:
    """Returns the members of a chain of equations, all of which must be right: `x=6/2=3` may be, `x=3=4` never; None for others."""
    members = sides(prediction)
    if len(members) <= max(1, len(sides(answer))) or "," in prediction:
        return None
    # What is only letters is a name for the value; a number on the left is one more claim.
    is_named = without_name(prediction)[0] or (not re.search(r"\d", members[0]) and re.search(r"[A-Za-z]", members[0]))
    rest = members[1:] if is_named else members
    return rest if len(rest) > 1 or not without_name(prediction)[0] else None


def _unnamed(answer: str, prediction: str) -> tuple[str, str] | None:
    """Returns both without the name that they are given to (`x = 4`), or None where the names cannot match."""
    answer_sides, prediction_sides = len(sides(answer)), len(sides(prediction))
    answer_name, answer_rest = without_name(answer)
    prediction_name, prediction_rest = without_name(prediction)
    if answer_name and prediction_name:
        if answer_name == prediction_name:
            return answer_rest, prediction_rest
        has_letters = re.search(r"(?<!\\)\b[A-Za-z]\b", answer_rest + " " + prediction_rest)
        return (answer, prediction) if has_letters else None
    if prediction_name and answer_sides == 1:
        return answer, prediction_rest
    if answer_name and prediction_sides == 1:
        return answer_rest, prediction
    return answer, prediction


def _equal_structures(answer: str, prediction: str, *, decimal_places: int, depth: int) -> bool | None:
    """Returns the verdict by the parts, or None where the parser must look at the whole."""
    wanted, given = structure(answer), structure(prediction)

    def same(one: str, other: str) -> bool:
        return bool(one) and bool(other) and equal(one, other, decimal_places=decimal_places, depth=depth + 1)

    if wanted is None or given is None:
        return _single_against_structure(answer, prediction, wanted, given, same=same, decimal_places=decimal_places)
    if {wanted.kind, given.kind} <= {"list", "set"}:
        if any("\\ldots" in part for part in (*wanted.parts, *given.parts)):
            return _in_order(wanted.parts, given.parts, same=same)
        return _in_any_order(wanted.parts, given.parts, same=same)
    if wanted.kind == given.kind == "ratio":
        return _equal_ratios(wanted, given, same=same)
    if wanted.kind == given.kind == "union":
        return _in_any_order(wanted.parts, given.parts, same=same) or None
    if wanted.kind == given.kind:
        return wanted.ends == given.ends and _in_order(wanted.parts, given.parts, same=same)
    wanted_vector = wanted.parts if wanted.kind == "list" else vector_parts(wanted)
    given_vector = given.parts if given.kind == "list" else vector_parts(given)
    if wanted_vector is not None and given_vector is not None:
        return _in_order(wanted_vector, given_vector, same=same)
    return None if "union" in (wanted.kind, given.kind) else False


def _single_against_structure(
    answer: str, prediction: str, wanted: Structure | None, given: Structure | None, *, same: Same, decimal_places: int
) -> bool | None:
    """Returns the verdict where at most one side has parts, or None for the parser: two single ones, an interval against an inequality."""
    found, text, other = (wanted, answer, prediction) if wanted is not None else (given, prediction, answer)
    if found is None:
        return None
    if given is not None and given.kind == "pair" and (bounds := as_interval(answer)) is not None:
        return bounds.ends == given.ends and _in_order(bounds.parts, given.parts, same=same)
    if found.kind == "set" and len(found.parts) == 1:
        return same(*((found.parts[0], other) if wanted is not None else (other, found.parts[0])))
    if found.kind == "ratio":
        return None if len(found.parts) == 2 and not found.ends and found.parts[1] != "0" and "/" in other + "\\frac" else False
    if found.kind == "list":
        if _DECIMAL_COMMA.match(text) and (number := read_quantity(other)) is not None and number.places is not None:
            reading = read_quantity(text.replace(",", "."))
            return reading is not None and same_quantity(number, reading, decimal_places=decimal_places)
        # A list of equations or inequalities against one relation may be the same; a list of values never is one value.
        return None if re.search(r"[<>]|\\[lg]e(?![a-z])|\\in(?![a-z])", text) and len(found.parts) <= 3 else False
    if found.kind in ("matrix", "tuple"):
        return None if "matrix" in other or "\\begin" in other or "vec" in other else False
    # An interval may equal an inequality, and never a number.
    return None if read_quantity(other) is None else False


def _in_order(wanted: Sequence[str], given: Sequence[str], *, same: Same) -> bool:
    return len(wanted) == len(given) and all(same(one, other) for one, other in zip(wanted, given, strict=True))


def _in_any_order(wanted: Sequence[str], given: Sequence[str], *, same: Same) -> bool:
    """Each wanted part is matched with a given part of its own; what is given twice and wanted once counts once."""
    remaining = list(given)
    if len({compact(part) for part in wanted}) == len(wanted):
        remaining = list({compact(part): part for part in given}.values())
    if len(wanted) != len(remaining):
        return False
    for part in wanted:
        index = next((index for index, other in enumerate(remaining) if compact(part) == compact(other)), None)
        if index is None:
            index = next((index for index, other in enumerate(remaining) if same(part, other)), None)
        if index is None:
            return False
        del remaining[index]
    return True


def _equal_ratios(wanted: Structure, given: Structure, *, same: Same) -> bool:
    r"""Times of day as they stand; `1:2` and `2:4` are one ratio; with `\ldots` part by part."""
    if wanted.ends or given.ends:
        return wanted.ends == given.ends and _in_order(
            [part.lstrip("0") or "0" for part in wanted.parts],
            [part.lstrip("0") or "0" for part in given.parts],
            same=lambda one, other: compact(one).lower() == compact(other).lower(),
        )
    numbers = [[read_quantity(part) for part in side.parts] for side in (wanted, given)]
    if any(number is None for side in numbers for number in side) or len(numbers[0]) != len(numbers[1]):
        return _in_order(wanted.parts, given.parts, same=same)
    values = [[number.value for number in side if number is not None] for side in numbers]
    return all(one * values[1][0] == other * values[0][0] for one, other in zip(*values, strict=True)) and all(map(any, values))


def _equal_words(answer: str, prediction: str) -> bool | None:
    """Returns the verdict where an answer is words (a name, a choice) or a prediction holds words that the answer does not; else None."""
    plain_answer, plain_prediction = (_COMMAND_TEXT.sub(r" \1 ", side).strip(" ().") for side in (answer, prediction))
    are_letters = [re.fullmatch(r"[A-Za-z][A-Za-z .'-]*", side) is not None for side in (plain_answer, plain_prediction)]
    if are_letters[0] and len(plain_answer) == 1 and are_letters[1]:
        return plain_answer == plain_prediction
    if are_letters[0] and (len(plain_answer) > 3 or ("\\text" in answer and len(plain_answer) > 1)):
        return plain_answer.casefold().split() == plain_prediction.casefold().split()
    known = set(_WORD.findall(plain_answer)) | _MATH_WORDS
    bare_prediction, unit, _ = split_unit(prediction)
    return (
        False
        if any(word not in known for word in _WORD.findall(_COMMAND_TEXT.sub(r" \1 ", bare_prediction if unit else prediction)))
        else None
    )


def _equal_expressions(answer: str, prediction: str, *, decimal_places: int) -> bool:
    from .math_symbolic import same_expression

    answer_text, answer_unit, answer_power = split_unit(answer)
    prediction_text, prediction_unit, prediction_power = split_unit(prediction)
    if answer_unit or prediction_unit:
        if not same_unit((answer_unit, answer_power), (prediction_unit, prediction_power)):
            return False
        answer, prediction = answer_text, prediction_text
        if (known := known_equal(answer, prediction, decimal_places=decimal_places)) is not None:
            return known
    if not can_be_read(answer):
        raise UnreadableAnswerError(f"the example's answer {answer[:80]!r} cannot be read as mathematics; write it in LaTeX or use `exact`")
    return same_expression(answer, prediction, decimal_places=decimal_places)


@lru_cache(maxsize=1024)
def can_be_read(answer: str) -> bool:
    """Returns whether an answer is a number, words, or an expression or structure whose every part can be read."""
    from .math_symbolic import parse

    if read_quantity(answer) is not None or _QUANTIFIER.search(answer) or _WORDS.fullmatch(answer):
        return True
    found = structure(answer)
    if found is not None and all(found.parts) and all(part != answer for part in found.parts):
        return all(map(can_be_read, found.parts))
    name, rest = without_name(answer)
    if name:
        return can_be_read(rest)
    bare, unit, _power = split_unit(answer)
    return bool(parse(bare if unit else answer))
