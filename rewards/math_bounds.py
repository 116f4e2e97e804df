"""What no honest answer holds and no verifier can compute: refused by its text, before anything is parsed.

The bounds are far beyond what a data set asks for, and the caller refuses a response only when the example's own answer is within
them. They make most hostile answers cost nothing; the killable worker stays behind them for those that pass.
"""

from __future__ import annotations

import math
import re

MAX_NESTING = 40
"""Brackets within brackets."""
MAX_POWER_BITS = 4_000_000
"""Bits of a power of numbers that is written out: 2^4000000 has a million digits."""
MAX_FACTORIAL = 50_000
"""Largest number whose factorial (or binomial coefficient's upper entry) is computed."""
_NUMBER = r"(\d+)(?:\s?\^\s?\{?\s?(\d+)\s?\}?)?"
_POWER = re.compile(r"(?<![\d.])(\d+)\s?\^\s?\{?\s?\(?\s?(\d+)(?:\s?\^\s?\{?\s?\(?\s?(\d+))?(?=[\s}^)*+\-=,]|$)")
_SYMBOL_TOWER = re.compile(r"\^\s?\{?[^{}^]{1,8}\^\s?\{?[^{}^]{1,8}\^\s?\{?[^{}^]{1,8}\^")
_FACTORIAL = re.compile(rf"(?<![\d^.]){_NUMBER}\s?\)?\s?\}}?\s?!")
_BINOMIAL = re.compile(rf"\\[dt]?binom\s?\{{\s?{_NUMBER}\s?\}}")
_BRACKETS = re.compile(r"[(\[{]|[)\]}]")


def beyond_bounds(text: str) -> str:
    """Returns what no verifier could compute in a normalised answer, in words, or an empty text; linear in the length."""
    depth = deepest = 0
    for bracket in _BRACKETS.finditer(text):
        depth = depth + 1 if bracket.group() in "([{" else max(0, depth - 1)
        deepest = max(deepest, depth)
    if deepest > MAX_NESTING:
        return f"brackets nested {deepest} deep"
    if _SYMBOL_TOWER.search(text):
        return "a tower of powers"
    if any(_power_bits(*match.groups()) > MAX_POWER_BITS for match in _POWER.finditer(text)):
        return "a power of millions of digits"
    if any(_magnitude(*match.groups()) > MAX_FACTORIAL for match in _FACTORIAL.finditer(text)) or "!!!" in text.replace(" ", ""):
        return "the factorial of a huge number"
    if any(_magnitude(*match.groups()) > MAX_FACTORIAL for match in _BINOMIAL.finditer(text)):
        return "a binomial coefficient of huge numbers"
    return ""


def _magnitude(base: str, power: str | None) -> float:
    """Returns base^power, or infinity where that is past all bounds."""
    if len(base) > 12:
        return math.inf
    if power is None:
        return float(base)
    return math.inf if len(power) > 3 or int(power) * math.log10(int(base) + 1) > 12 else float(int(base) ** int(power))


def _power_bits(base: str, power: str, top: str | None) -> float:
    if int(base[:20]) < 2:
        return 0.0
    exponent = _magnitude(power, top)
    return math.inf if exponent == math.inf else exponent * len(base) * math.log2(10)
