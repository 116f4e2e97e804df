r"""One way of writing for mathematical answers: text in, text out, linear time, nothing evaluated.

`expression` undoes what is only dress (dollars, bold marks, `\left`, `\dfrac`, spacing commands), and writes signs and numerals of other
scripts as LaTeX and ASCII digits: full-width, Arabic-Indic and Devanagari digits, Chinese numerals, English number words.
"""

from __future__ import annotations

import re

from .answers import bare, half_width

_DIGIT_ZEROS = ("٠", "۰", "०", "০")
_DIGITS = {ord(zero) + number: str(number) for zero in _DIGIT_ZEROS for number in range(10)}
_SIGNS = {
    **{"−": "-", "–": "-", "—": "-", "‐": "-", "\u2011": "-", "﹣": "-", "×": r"\times ", "⋅": r"\cdot ", "·": r"\cdot ", "÷": r"\div "},
    **{"π": r"\pi ", "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ", "⩽": r"\le ", "⩾": r"\ge ", "≠": r"\ne ", "±": r"\pm "},
    **{
        "∪": r"\cup ",
        "∩": r"\cap ",
        "∈": r"\in ",
        "∀": r"\forall ",
        "∃": r"\exists ",
        "…": r"\ldots ",
        "θ": r"\theta ",
        "∅": r"\emptyset ",
    },
    **{"°": r"^{\circ}", "º": r"^{\circ}", "²": "^{2}", "³": "^{3}", "½": r"\frac{1}{2}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}"},
    **{
        "⅓": r"\frac{1}{3}",
        "⅔": r"\frac{2}{3}",
        "٫": ".",
        "٬": ",",
        "٪": "%",
        "،": ",",
        "、": ",",
        "：": ":",
        "⟨": r"\langle ",
        "⟩": r"\rangle ",
    },
    **{"\u200b": "", "\u200c": "", "\u200d": "", "\ufeff": "", "\u2060": "", "\u2212": "-", "\u202f": " ", "′": "'"},
}
_TRANSLATION = str.maketrans({sign: latex for sign, latex in _SIGNS.items() if len(sign) == 1}) | _DIGITS
# What changes how a formula looks and not what it says.
_DRESS = re.compile(
    r"(?<!\\)\\(?:(?:left|right|displaystyle|textstyle|limits|bigl?|bigr|Bigl?|Bigr|quad|qquad)(?![A-Za-z])\.?|[,;:!\s$])|~"
)
_NEGATIVE_SPACE = re.compile(r"(?<!\\)\\! ?")
# Rows that were escaped twice on their way into a data file.
_ESCAPED_TWICE = re.compile(r"\\\\(?=(?:left|right|[dtc]?frac|sqrt|pi|le|ge|leq|geq|in|cup|infty|text|pm)(?![a-z]))")
_COMMANDS = (
    (re.compile(r"\\[dtc]frac(?![a-z])"), r"\\frac"),
    (re.compile(r"\\(?:leq|leqslant)(?![a-z])"), r"\\le "),
    (re.compile(r"\\(?:geq|geqslant)(?![a-z])"), r"\\ge "),
    (re.compile(r"\\neq(?![a-z])|!="), r"\\ne "),
    (re.compile(r"<="), r"\\le "),
    (re.compile(r">="), r"\\ge "),
    (re.compile(r"\\lt(?![a-z])"), "<"),
    (re.compile(r"\\gt(?![a-z])"), ">"),
    (re.compile(r"\\(?:dots|cdots|dotsc|dotsb)(?![a-z])|\.\.\."), r"\\ldots "),
    (re.compile(r"\\lbrace(?![a-z])"), r"\\{"),
    (re.compile(r"\\rbrace(?![a-z])"), r"\\}"),
    (re.compile(r"\\sqrt\s{0,4}\(([^()]{1,200})\)"), r"\\sqrt{\1}"),
    (re.compile(r"√\s?(\d{1,20}|[a-z])"), r"\\sqrt{\1}"),
    (re.compile(r"√\s?\(([^()]{1,200})\)"), r"\\sqrt{\1}"),
    (re.compile(r"\\(?:mathrm|text|textrm|operatorname)\s?\{\s?e\s?\}"), "e "),
    (re.compile(r"\^\s?\{?\s?\\circ(?![a-z])\s?\}?|\\degree(?![a-z])|(?<=\d)\s?degrees?(?![a-z])"), r"^{\\circ}"),
    (re.compile(r"\\%|(?<![a-z])(?:percent|pct|per cent|percentage)(?![a-z])", re.IGNORECASE), "%"),
    (re.compile(r"\\(?:text|textnormal|mathrm|textbf|mathbf|mbox|textit)\s?\{\s?(-?\d[\d.,]{0,40}|%)\s?\}"), r"\1"),
    (re.compile(r"\\(?:text|mathrm|mbox)\s?\{\s{0,4},?\s{0,4}(and|or)\s{0,4}\}"), r" \1 "),
    (re.compile(r"(?<=\d)\{,\}(?=\d)"), ","),
)
_SPACE_IN_THOUSANDS = re.compile(r"(?<![\d.,])(\d{1,3})((?: \d{3})+)(?![\d])")
# Beside a bracket they are the entries of a pair, `(12,102)`, and not a number.
_COMMA_IN_THOUSANDS = re.compile(r"(?<![\d.,(\[])(?<!\\\{)(?<!, )([1-9]\d{0,2})((?:,\d{3})+)(?![\d,)\]]|\\\}|\.\d+,|, )")
_CHINESE_DIGITS = {"零": 0, "〇": 0, "一": 1, "二": 2, "两": 2, "三": 3, "四": 4, "五": 5, "六": 6, "七": 7, "八": 8, "九": 9}
_CHINESE_UNITS = {"十": 10, "百": 100, "千": 1000, "万": 10_000, "亿": 100_000_000}
_CHINESE_NUMBER = re.compile(f"^[{''.join(_CHINESE_DIGITS)}{''.join(_CHINESE_UNITS)}]{{1,24}}$")
_WORDS = {
    **{
        word: number
        for number, word in enumerate(
            ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
        )
    },
    **{word: number for number, word in enumerate(["thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"], 13)},
    **{word: 10 * number for number, word in enumerate(["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"], 2)},
}
_SCALES = {"hundred": 100, "thousand": 1000, "million": 1_000_000, "billion": 1_000_000_000}
_PARTS = {"half": 2, "third": 3, "quarter": 4, "fourth": 4, "fifth": 5, "sixth": 6, "seventh": 7, "eighth": 8, "ninth": 9, "tenth": 10}
MAX_NUMERAL_CHARS = 80
"""Longest text that is read as a numeral in words."""


def expression(text: str) -> str:
    r"""Returns the text in the one form that both sides are compared in.

    One line of ASCII and LaTeX commands, without dollars, bold marks, `\left`, spacing commands, outer `\text{}` and a final full stop;
    `**` is a power, thousands separators are gone, a numeral in words or in Chinese is its number.
    """
    plain = half_width(text).translate(_TRANSLATION)
    if "\\begin" not in plain:
        plain = _ESCAPED_TWICE.sub(lambda _match: "\\", plain)
    for delimiter in ("$$", "\\(", "\\)", "\\[", "\\]"):
        # `\\[` is a line break inside a matrix followed by a bracket: not a delimiter.
        plain = re.sub(r"(?<!\\)" + re.escape(delimiter), " ", plain)
    plain = _DRESS.sub(" ", _NEGATIVE_SPACE.sub("", plain)).replace("$", " ")
    stripped = bare(" ".join(plain.split()))
    for pattern, replacement in _COMMANDS:
        stripped = pattern.sub(replacement, stripped)
    stripped = bare(stripped.replace("**", "^").strip(" ,;"))
    stripped = _COMMA_IN_THOUSANDS.sub(lambda match: match[1] + match[2].replace(",", ""), stripped)
    stripped = _SPACE_IN_THOUSANDS.sub(lambda match: match[1] + match[2].replace(" ", ""), stripped)
    return numeral(" ".join(stripped.split()))


def numeral(text: str) -> str:
    r"""Returns a numeral in words or Chinese as digits, and any other text as it is.

    `负三` is `-3`, `三分之一` is `\frac{1}{3}`, `百分之五` is `5%`, `twenty-one` is `21`, `two thirds` is `\frac{2}{3}`.
    """
    if len(text) > MAX_NUMERAL_CHARS:
        return text
    return _english(text) if text.isascii() else _chinese(text)


def _chinese(text: str) -> str:
    sign, rest = ("-", text[1:]) if text.startswith("负") else ("", text)
    if rest.startswith("百分之"):
        part = _chinese_number(rest.removeprefix("百分之"))
        return f"{sign}{part}%" if part is not None else text
    denominator, slash, numerator = rest.partition("分之")
    if slash:
        below, above = _chinese_number(denominator), _chinese_number(numerator)
        return f"{sign}\\frac{{{above}}}{{{below}}}" if below is not None and above is not None else text
    number = _chinese_number(rest)
    return f"{sign}{number}" if number is not None else text


def _chinese_number(text: str) -> str | None:
    whole, point, decimals = text.partition("点")
    if point:
        left = _chinese_number(whole)
        if left is None or not decimals or not all(character in _CHINESE_DIGITS for character in decimals):
            return None
        return f"{left}.{''.join(str(_CHINESE_DIGITS[character]) for character in decimals)}"
    if text.isdecimal() and text.isascii():
        return text
    if not _CHINESE_NUMBER.match(text):
        return None
    if len(text) > 1 and all(character in _CHINESE_DIGITS for character in text):
        return str(int("".join(str(_CHINESE_DIGITS[character]) for character in text)))
    total, section, digit = 0, 0, 0
    for character in text:
        if character in _CHINESE_DIGITS:
            digit = _CHINESE_DIGITS[character]
        elif _CHINESE_UNITS[character] >= 10_000:
            total, section, digit = total + (section + digit) * _CHINESE_UNITS[character], 0, 0
        else:
            section, digit = section + (digit or 1) * _CHINESE_UNITS[character], 0
    return str(total + section + digit)


def _english(text: str) -> str:
    words = text.lower().replace("-", " ").split()
    if not words or not all(word.isalpha() for word in words):
        return text
    sign, words = ("-", words[1:]) if words[0] in ("minus", "negative") else ("", words)
    if not words:
        return text
    last = "half" if words[-1] == "halves" else words[-1].removesuffix("s")
    if last in _PARTS:
        above = 1 if words[:-1] in ([], ["a"]) else _english_number(words[:-1])
        return f"{sign}\\frac{{{above}}}{{{_PARTS[last]}}}" if above is not None else text
    number = _english_number(words)
    return f"{sign}{number}" if number is not None else text


def _english_number(words: list[str]) -> int | None:
    total, section, last = 0, 0, 0
    for word in words:
        if word == "and":
            if last != 100:
                return None
            continue
        if word in _SCALES:
            if not section:
                return None
            last = _SCALES[word]
            total, section = (total, section * 100) if last == 100 else (total + section * last, 0)
            continue
        number = _WORDS.get(word)
        # `twenty one` is a number; `one two` and `one twenty` are lists.
        if number is None or (0 < last < 20) or (20 <= last < 100 and not 1 <= number <= 9):
            return None
        section, last = section + number, number or 20
    return total + section
