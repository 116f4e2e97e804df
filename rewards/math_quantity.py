r"""Numbers read exactly, with their unit: decimals, fractions, repeating decimals, per cent, degrees, multiples of pi, bases, money.

A `Quantity` is compared in whole numbers (`fractions.Fraction`), never in floating point, so `same_quantity` is provably right and costs
microseconds. What it cannot read it leaves to the parser.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

MAX_NUMBER_CHARS = 400
"""Longest text that is read as a number; a longer one is left to the worker."""
_NUMBER = re.compile(r"^[+-]?(?:\d+(?:\.\d*)?|\.\d+)$")
_REPEATING = re.compile(r"^([+-]?)(\d*)\.(\d*)\\(?:overline|bar|dot)\{(\d+)\}$")
_FRACTION = re.compile(r"^([+-]?)\s?(\d+)?\s?\\frac\s?(?:\{\s?([+-]?[\d.]+)\s?\}|(\d))\s?(?:\{\s?([+-]?[\d.]+)\s?\}|(\d))$")
_SLASH = re.compile(r"^([+-]?\d+(?:\.\d+)?)\s?/\s?(\d+(?:\.\d+)?)$")
_SCIENTIFIC = re.compile(r"^([+-]?\d+(?:\.\d+)?)\s?(?:\\times|\\cdot|\*|x)\s?10\s?\^\s?(?:\{\s?([+-]?\d{1,3})\s?\}|(\d))$")
_PI = re.compile(r"^([+-]?)(?:(\d+|\d+\.\d+)\s?\*?\s?)?(?:\\pi|pi)(?:\s?/\s?(\d+))?$")
_PI_FRACTION = re.compile(r"^([+-]?)(?:\\frac\{\s?(?:(\d+)\s?)?\\pi\s?\}\{\s?(\d+)\s?\}|\\frac\{(\d+)\}\{(\d+)\}\s?\\pi)$")
_BASE = re.compile(r"^(\d[\dA-Fa-f]*)_(?:\{(\d{1,2})\}|(\d{1,2}))$")
_UNIT = re.compile(
    r"^(?P<number>.*?[\d}.)i])(?P<gap>\s*)"
    r"(?:\\(?:text|textnormal|mathrm|textbf|mbox|rm|textit|operatorname)\s?\{\s?(?P<dressed>[A-Za-zµ/ .%^\d]{1,40}?)\s?\}|"
    r"(?P<plain>[A-Za-zµ]{1,20}(?:\s?/\s?[a-z]{1,6})?))\s?(?P<power>\^\s?\{?\s?[23]\s?\}?)?$"
)
_MONEY = re.compile(r"^(?:[€£¥₹]|\\(?:euro|pounds?)(?![a-z]))\s?(.+)$")
_LENGTHS = {
    "mm": "1/1000",
    "cm": "1/100",
    "dm": "1/10",
    "m": "1",
    "km": "1000",
    "in": "127/5000",
    "inch": "127/5000",
    "ft": "381/1250",
    "yd": "1143/1250",
    "mile": "201168/125",
    "mi": "201168/125",
    "foot": "381/1250",
    "feet": "381/1250",
    "yard": "1143/1250",
    "inches": "127/5000",
    "nm": "1/1000000000",
    "millimeter": "1/1000",
    "centimeter": "1/100",
    "meter": "1",
    "kilometer": "1000",
    "metre": "1",
    "centimetre": "1/100",
    "kilometre": "1000",
    "millimetre": "1/1000",
}
_OTHERS = {
    "mass": {
        "mg": "1/1000",
        "g": "1",
        "kg": "1000",
        "gram": "1",
        "kilogram": "1000",
        "t": "1000000",
        "tonne": "1000000",
        "milligram": "1/1000",
    },
    "time": {
        "ms": "1/1000",
        "s": "1",
        "sec": "1",
        "second": "1",
        "min": "60",
        "minute": "60",
        "h": "3600",
        "hr": "3600",
        "hour": "3600",
        "day": "86400",
        "week": "604800",
    },
    "volume": {
        "ml": "1/1000",
        "mL": "1/1000",
        "cl": "1/100",
        "dl": "1/10",
        "l": "1",
        "L": "1",
        "liter": "1",
        "litre": "1",
        "milliliter": "1/1000",
    },
    "speed": {"m/s": "1", "km/h": "5/18", "kmh": "5/18", "miles per hour": "1397/3125", "mph": "1397/3125", "kph": "5/18"},
    "money": {"dollar": "1", "cent": "1/100", "usd": "1"},
    "force": {"N": "1", "kN": "1000"},
    "energy": {"J": "1", "kJ": "1000"},
    "power": {"W": "1", "kW": "1000"},
    "voltage": {"V": "1", "kV": "1000"},
    "current": {"A": "1", "mA": "1/1000"},
    "frequency": {"Hz": "1", "kHz": "1000"},
}
_UNITS: dict[str, tuple[str, Fraction]] = {
    **{name: ("length", Fraction(factor)) for name, factor in _LENGTHS.items()},
    **{name: (dimension, Fraction(factor)) for dimension, names in _OTHERS.items() for name, factor in names.items()},
}
_COUNTED = frozenset({"people", "children", "men", "women", "unit", "units", "students", "ways", "times"})
_NO_NOUNS = frozenset(
    {"less", "plus", "minus", "thus", "unless", "perhaps", "always", "guess", "versus", "whereas", "sometimes", "false", "cos"}
)
_POWER_WORDS = {"square": 2, "sq": 2, "cubic": 3, "cu": 3}


@dataclass(frozen=True, kw_only=True, slots=True)
class Quantity:
    r"""An exact number with its unit.

    `50 mm` is `Quantity(value=50, dimension="length", factor=1/1000)`, `10\%` is `Quantity(value=10, unit="%")`.
    """

    value: Fraction
    places: int | None = None
    """Digits written after the decimal point; none where the number is exact by its form."""
    has_pi: bool = False
    """The value is a multiple of pi."""
    unit: str = ""
    """`%`, `deg`, or a word that is no known unit."""
    dimension: str = ""
    """What a known unit measures, with its power; empty without one."""
    factor: Fraction = Fraction(1)
    """Size of the known unit in the base unit of its dimension."""
    base: int = 10


def read_number(text: str) -> Quantity | None:
    """Returns a number without a unit, or None when the text is none that is read here."""
    if len(text) > MAX_NUMBER_CHARS or not text:
        return None
    compact = text[1:-1].strip() if text[0] == "(" and text[-1] == ")" and "(" not in text[1:] else text
    if (compact.startswith("+") or compact.startswith("-")) and compact[1:2] == " ":
        compact = compact[0] + compact[1:].lstrip()
    return next((found for read in (_decimal, _fraction, _pi_multiple, _in_base) if (found := read(compact)) is not None), None)


def _decimal(text: str) -> Quantity | None:
    if _NUMBER.match(text):
        return Quantity(value=Fraction(text.rstrip(".")), places=len(text.partition(".")[2]) or None)
    if match := _SCIENTIFIC.match(text):
        return Quantity(value=Fraction(match[1]) * Fraction(10) ** int(match[2] or match[3]))
    match = _REPEATING.match(text)
    if match is None:
        return None
    sign, whole, fixed, repeated = match.groups()
    value = Fraction(int(whole or "0")) + Fraction(int(fixed or "0"), 10 ** len(fixed))
    value += Fraction(int(repeated), 10 ** len(fixed) * (10 ** len(repeated) - 1))
    return Quantity(value=-value if sign == "-" else value)


def _fraction(text: str) -> Quantity | None:
    if match := _SLASH.match(text):
        return Quantity(value=Fraction(match[1]) / Fraction(match[2])) if Fraction(match[2]) else None
    match = _FRACTION.match(text)
    if match is None:
        return None
    sign, whole, above_braced, above_digit, below_braced, below_digit = match.groups()
    above, below = _plain(above_braced or above_digit), _plain(below_braced or below_digit)
    if above is None or not below or (whole and above < 0):
        return None
    value = (Fraction(whole) if whole else 0) + above / below
    return Quantity(value=-value if sign == "-" else value)


def _pi_multiple(text: str) -> Quantity | None:
    if match := _PI.match(text):
        above, below = match[2] or "1", Fraction(match[3] or "1")
    elif match := _PI_FRACTION.match(text):
        above, below = match[2] or match[4] or "1", Fraction(match[3] or match[5])
    else:
        return None
    return Quantity(value=Fraction(f"{match[1]}{above}") / below, has_pi=True) if below else None


def _in_base(text: str) -> Quantity | None:
    match = _BASE.match(text)
    if match is None:
        return None
    base = int(match[2] or match[3])
    if not 2 <= base <= 16 or any(int(digit, 16) >= base for digit in match[1]):
        return None
    return Quantity(value=Fraction(int(match[1], base)), base=base)


def _plain(text: str) -> Fraction | None:
    return Fraction(text) if _NUMBER.match(text) and text.strip("+-") != "." else None


def read_quantity(text: str) -> Quantity | None:
    """Returns a number with its unit, or None; the text is normalised (`math_normalise.expression`)."""
    if len(text) > MAX_NUMBER_CHARS:
        return None
    if (number := read_number(text)) is not None:
        return number
    if match := _MONEY.match(text):
        text = match[1]
    for mark, unit in (("%", "%"), ("^{\\circ}", "deg")):
        if text.endswith(mark):
            return _with_unit(read_number(text.removesuffix(mark).strip()), unit=unit)
    number_text, unit, power = split_unit(text)
    number = read_number(number_text)
    if not unit or number is None:
        return number if unit == "" and number_text != text else None
    return _with_unit(number, unit=unit, power=power)


def split_unit(text: str) -> tuple[str, str, int]:
    r"""Returns what stands before a unit, the unit, and its power: `3\sqrt{2} \text{ cm}^2` is `("3\sqrt{2}", "cm", 2)`; no unit: `""`."""
    match = _UNIT.match(text[-120:]) if text else None
    if match is None:
        return text, "", 1
    unit = (match["dressed"] or match["plain"] or "").strip(" .")
    # A letter that touches a number is a variable, not a unit; so is whatever belongs to a command.
    if match["plain"] and (
        (not match["gap"] and unit not in _UNITS) or (len(unit) == 1 and not match["gap"]) or (len(unit) == 1 and unit not in _UNITS)
    ):
        return text, "", 1
    power = int(re.sub(r"\D", "", match["power"])) if match["power"] else 1
    if (inner := re.match(r"^(.*?)\^?([23])$", unit)) is not None:
        unit, power = inner[1].strip(), int(inner[2])
    first, _, rest = unit.partition(" ")
    if first.lower() in _POWER_WORDS and rest:
        unit, power = rest.strip(), _POWER_WORDS[first.lower()]
    if not _is_unit(unit):
        return text, "", 1
    before = text[: len(text) - len(text[-120:])] + match["number"]
    return before.strip(), unit, power


def _is_unit(unit: str) -> bool:
    """A known unit, or a noun that counts things; not a word that takes an answer back, such as `or`, `not`, `wrong`."""
    if unit in _UNITS or _singular(unit) in _UNITS or unit in _COUNTED:
        return True
    return unit.isalpha() and unit.lower() not in _NO_NOUNS and len(unit) > 3 and unit.islower() and unit.endswith("s")


def _with_unit(number: Quantity | None, *, unit: str, power: int = 1) -> Quantity | None:
    if number is None or number.base != 10:
        return None
    known = _UNITS.get(unit) or _UNITS.get(_singular(unit))
    if known is None:
        name = _singular(unit)
        return Quantity(value=number.value, places=number.places, has_pi=number.has_pi, unit=name if power == 1 else f"{name}^{power}")
    dimension, factor = known
    return Quantity(
        value=number.value,
        places=number.places,
        has_pi=number.has_pi,
        dimension=f"{dimension}^{power}" if power > 1 else dimension,
        factor=factor**power,
    )


def _singular(unit: str) -> str:
    lower = unit.lower()
    return lower[:-1] if len(lower) > 2 and lower.endswith("s") and not lower.endswith("ss") else lower


def same_unit(answer: tuple[str, int], prediction: tuple[str, int]) -> bool:
    """Returns whether two units with their powers are one, or one of them is missing; units of other sizes are for `same_quantity`."""
    if not answer[0] or not prediction[0]:
        return True
    return _singular(answer[0]) == _singular(prediction[0]) and answer[1] == prediction[1]


def same_quantity(answer: Quantity, prediction: Quantity, *, decimal_places: int) -> bool:
    r"""Returns whether two quantities are equal.

    Units of one dimension are converted: `50 mm` is `5 cm`, `5 m` is not `5 cm`. A unit that only one side has is taken as meant by the
    other. Per cent: `10%` is `0.1`; the prediction `10` is right when the answer is `10%` (the question asked for per cent), the
    prediction `10%` is wrong when the answer is `10`. Degrees against a multiple of pi are converted. A number in another base than ten
    equals only the same digits in that base.
    """
    if answer.base != prediction.base:
        return False
    if {answer.unit, prediction.unit} == {"deg", ""} and answer.has_pi != prediction.has_pi:
        in_degrees, other = (answer, prediction) if answer.unit == "deg" else (prediction, answer)
        return other.has_pi and in_degrees.value == other.value * 180
    if answer.has_pi != prediction.has_pi:
        return False
    if "%" in (answer.unit, prediction.unit) and answer.unit != prediction.unit:
        if (
            answer.unit == "%"
            and not prediction.unit
            and not prediction.dimension
            and _close(answer, prediction, decimal_places=decimal_places)
        ):
            return True
        return not (answer.dimension or prediction.dimension) and _close(_share(answer), _share(prediction), decimal_places=decimal_places)
    if answer.dimension and prediction.dimension:
        if answer.dimension != prediction.dimension:
            return False
        if answer.factor != prediction.factor:
            return answer.value * answer.factor == prediction.value * prediction.factor
    elif answer.unit != prediction.unit and (
        (answer.unit and prediction.unit) or ((answer.unit or answer.dimension) and (prediction.unit or prediction.dimension))
    ):
        return False
    return _close(answer, prediction, decimal_places=decimal_places)


def _share(quantity: Quantity) -> Quantity:
    if quantity.unit != "%":
        return quantity
    return Quantity(value=quantity.value / 100, places=None if quantity.places is None else quantity.places + 2)


def _close(answer: Quantity, prediction: Quantity, *, decimal_places: int) -> bool:
    if answer.value == prediction.value:
        return True
    return any(
        stands_for(one.value, one.places, other.value, decimal_places=decimal_places)
        for one, other in ((answer, prediction), (prediction, answer))
    )


def stands_for(decimal: Fraction, places: int | None, exact: Fraction, *, decimal_places: int) -> bool:
    """Returns whether a decimal is the exact number rounded or cut to the places written: enough of them, and three digits that count."""
    if places is None or places < decimal_places or abs(decimal) * 10**places < 100:
        return False
    return abs(decimal - exact) < Fraction(1, 10**places)
