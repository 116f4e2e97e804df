"""Equality of two expressions by math-verify and sympy, with checks of our own before and after. Runs in a killable worker only.

math-verify 0.9 compares after rounding, so that 1/2004! equals 1/2006!; here both sides are first evaluated to 40 digits, at rational
points where they have variables, and what differs there is not equal whatever it says. What it rejects is accepted when both agree at
points of both signs wherever both are real, and simplify to the same under positive variables: sqrt(1/n) is 1/sqrt(n).
"""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sympy import Basic, Expr
    from sympy.core.relational import Relational

from .math_quantity import read_number, read_quantity, stands_for

DIGITS = 40
"""Significant digits that values are compared in."""
_TOLERANCE = Fraction(1, 10**25)
# Rational points without a pattern that an expression could be written for, of both signs.
_POINTS = ((37, 23), (59, 41), (-31, 17), (113, 29), (-83, 57), (7, 61))


@lru_cache(maxsize=512)
def parse(text: str) -> tuple[Any, ...]:
    """Returns what math-verify reads in a text, at most one expression; empty when it cannot be read. A number is read without it."""
    from math_verify import LatexExtractionConfig
    from math_verify import parse as parse_text
    from sympy import Rational, pi

    number = read_number(text)
    if number is not None and number.base == 10:
        return (Rational(number.value.numerator, number.value.denominator) * (pi if number.has_pi else 1),)
    # Units have been read before; math-verify would drop them, and with them the variable of `5m`.
    normalization = replace(LatexExtractionConfig().normalization_config, units=False)
    latex_only = [LatexExtractionConfig(boxed_match_priority=-1, normalization_config=normalization)]
    return tuple(parse_text(f"${text}$", latex_only, fallback_mode="no_fallback", parsing_timeout=None))  # pyright: ignore[reportArgumentType] None is documented


def same_expression(answer: str, prediction: str, *, decimal_places: int) -> bool:
    """Returns whether two texts are the same expression, relation or set; a text that cannot be read equals nothing."""
    from math_verify import verify
    from sympy import Eq, Expr
    from sympy.logic.boolalg import BooleanAtom

    wanted, given = parse(answer), parse(prediction)
    if not wanted or not given or any(isinstance(one, BooleanAtom) for one in (*wanted, *given)):
        return False
    if isinstance(wanted[0], Expr) and isinstance(given[0], Expr):
        exact = _exact_verdict(wanted[0], given[0], answer, prediction, decimal_places=decimal_places)
        if exact is not None:
            return exact
        wanted, given = (_without_floats(wanted[0]),), (_without_floats(given[0]),)
    if isinstance(wanted[0], Eq) and isinstance(given[0], Eq):
        is_multiple = _is_multiple(wanted[0], given[0])
        if is_multiple is not None:
            return is_multiple
    if verify(list(wanted), list(given), float_rounding=decimal_places, timeout_seconds=None):
        return True
    if isinstance(wanted[0], Expr) and isinstance(given[0], Expr):
        return _same_where_both_are_real(wanted[0], given[0])
    return False


def _exact_verdict(wanted: Expr, given: Expr, answer: str, prediction: str, *, decimal_places: int) -> bool | None:
    """Returns the verdict of exact arithmetic on constants, False where values differ at some point, None where that proves nothing."""
    wanted, given = _without_floats(wanted), _without_floats(given)
    symbols = sorted(wanted.free_symbols | given.free_symbols, key=str)
    if symbols:
        points = [_at(symbols, *point) for point in _POINTS[:2]]
        values = [(_value(wanted, point), _value(given, point)) for point in points]
        if any(one is not None and other is not None and not _agree(one, other) for one, other in values):
            return False
        return True if _is_zero(wanted - given) else None
    constants: list[Any] = [wanted.doit(), given.doit()]
    are_rational = all(constant.is_Rational for constant in constants)
    if are_rational and constants[0] == constants[1]:
        return True
    one, other = map(_value, constants)
    if one is None or other is None:
        return None
    for text, exact in ((answer, other), (prediction, one)):
        number = read_quantity(text)
        if number is not None and number.places is not None and not number.unit:
            return not exact[1] and stands_for(number.value, number.places, exact[0], decimal_places=decimal_places)
    if are_rational or not _agree(one, other):
        return False
    return True if _is_zero(constants[0] - constants[1]) else None


def _is_zero(difference: Expr) -> bool:
    """Returns whether multiplying out alone shows a difference to be nothing: the cheap half of `simplify`."""
    from sympy import expand

    return expand(difference) == 0


def _is_multiple(wanted: Relational, given: Relational) -> bool | None:
    """Returns True for one equation up to a factor (`2x=4` is `x=2`), False for different linear ones, None for the solver to say."""
    from sympy import Poly, expand

    members: list[Any] = [wanted.lhs, wanted.rhs, given.lhs, given.rhs]
    sides = [_without_floats(members[0] - members[1]), _without_floats(members[2] - members[3])]
    symbols = sorted(sides[0].free_symbols | sides[1].free_symbols, key=str)
    if not symbols or any(side.is_zero or not side.is_polynomial(*symbols) for side in sides):
        return None
    values = [side.subs(_at(symbols, *_POINTS[0])) for side in sides]
    if 0 not in values and expand(sides[0] * values[1] - sides[1] * values[0]) == 0:
        return True
    return False if all(Poly(side, *symbols).total_degree() == 1 for side in sides) else None


def _without_floats(expression: Expr) -> Expr:
    """Returns the expression with each decimal as the exact fraction that was written."""
    from sympy import Float, Rational

    floats = expression.atoms(Float)
    exact: Any = expression.xreplace({number: Rational(str(number)) for number in floats}) if floats else expression
    return exact


def _at(symbols: list[Basic], number: int, denominator: int) -> list[tuple[Basic, Basic]]:
    from sympy import Rational

    step = 2 if number > 0 else -2
    return [(symbol, Rational(number + step * index, denominator)) for index, symbol in enumerate(symbols)]


def _value(side: Expr, point: list[tuple[Basic, Basic]] | None = None) -> tuple[Fraction, Fraction] | None:
    """Returns real and imaginary part to 40 digits, or None where the expression has no finite number there."""
    constant: Any = side.subs(point).doit() if point else side
    value = constant.evalf(DIGITS)
    real, imaginary = value.as_real_imag()
    if not (real.is_Number and imaginary.is_Number and real.is_finite and imaginary.is_finite):
        return None
    return Fraction(str(real)), Fraction(str(imaginary))


def _agree(one: tuple[Fraction, Fraction], other: tuple[Fraction, Fraction]) -> bool:
    size = max(map(abs, (*one, *other)))
    return all(abs(a - b) <= _TOLERANCE * size for a, b in zip(one, other, strict=True))


def _same_where_both_are_real(wanted: Expr, given: Expr) -> bool:
    from sympy import Symbol, simplify

    symbols = sorted(wanted.free_symbols | given.free_symbols, key=str)
    if not symbols or wanted.free_symbols != given.free_symbols:
        return False
    num_agreed = 0
    for number, denominator in _POINTS:
        point = _at(symbols, number, denominator)
        values = [_value(side, point) for side in (wanted, given)]
        if values[0] is None or values[1] is None or values[0][1] or values[1][1]:
            continue
        if not _agree(values[0], values[1]):
            return False
        num_agreed += 1
    positive = [(symbol, Symbol(str(symbol), positive=True)) for symbol in symbols]
    return num_agreed >= 3 and bool(simplify(wanted.subs(positive) - given.subs(positive)) == 0)
