r"""Blanking what says nothing about the language of a text: code, mathematics, addresses, tags, quotations, what the prompt wrote.

Each blanked character becomes a space (line breaks stay), so positions keep their meaning. Time is linear in the text: each kind of
closing mark is looked for once behind any position.

Blanked: fenced code (an open fence runs to the end of the text), inline code, `$..$`, `$$..$$`, `\(..\)`, `\[..\]`, LaTeX environments
and commands, URLs, e-mail addresses, file paths and names, tags, identifiers (`snake_case`, `camelCase`, `call()`), quotations of at
most 300 characters in one line, a short gloss in brackets in another script (`Beijing (北京)`), and spans of four words (or characters of
Chinese or Japanese) that stand in the prompt as well.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from typing import TYPE_CHECKING

from .language_scripts import Word, words

if TYPE_CHECKING:
    import regex

COPIED_WORDS = 4
"""Words in a row, as in the prompt, that make a copied span."""
MAX_QUOTE_CHARS = 300
MAX_FORMULA_CHARS = 4000
MAX_GLOSS_CHARS = 24
MAX_QUOTED_FRAC = 0.5
MAX_QUOTED_WORDS = 40.0
"""Where quotations are more than this many words and more than that share of the text, they are its prose and stay."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Bracket:
    closing: str
    max_chars: int
    one_line: bool
    tight: bool = False
    """No space just inside: `$5 and $6` are prices."""


_CODE_AND_MATHS = {
    "`": _Bracket(closing="`", max_chars=MAX_QUOTE_CHARS, one_line=True),
    "$$": _Bracket(closing="$$", max_chars=MAX_FORMULA_CHARS, one_line=False),
    "$": _Bracket(closing="$", max_chars=MAX_QUOTE_CHARS, one_line=True, tight=True),
    "\\(": _Bracket(closing="\\)", max_chars=MAX_FORMULA_CHARS, one_line=False),
    "\\[": _Bracket(closing="\\]", max_chars=MAX_FORMULA_CHARS, one_line=False),
}
_QUOTES = {
    opening: _Bracket(closing=closing, max_chars=MAX_QUOTE_CHARS, one_line=True)
    for opening, closing in (
        *(('"', '"'), ("“", "”"), ("‘", "’"), ("„", "“"), ("«", "»"), ("‹", "›")),
        *(("「", "」"), ("『", "』"), ("《", "》"), ("〈", "〉"), ("〝", "〞")),
    )
}


@cache
def _patterns() -> dict[str, regex.Pattern[str]]:
    import regex

    # ASCII, and other letters behind a slash alone: an address in Chinese text ends where the Chinese goes on.
    address = r"(?:https?://|ftp://|www\.)[!-~]++(?:(?<=/)\p{L}{1,30}+[!-~]*+){0,8}+"
    address += r"|(?<![\w.+-])[A-Za-z0-9._+-]{1,64}+@[A-Za-z0-9-]{1,63}+(?:\.[A-Za-z0-9-]{1,63}+){1,8}+"
    path = r"(?<![A-Za-z0-9_./\\~])(?:[A-Za-z]:\\|~/|\.{1,2}/|/(?=[A-Za-z0-9_.-]+/))[A-Za-z0-9_./\\-]++"
    identifier = (
        r"(?<![A-Za-z0-9_.])(?=[A-Za-z])(?:[A-Za-z0-9]*+(?:_[A-Za-z0-9_]*+)++|[A-Za-z0-9_]++(?:\.[A-Za-z0-9_]++)++\b|[A-Za-z0-9_]++(?=\())"
        r"(?:\(\))?+"
    )
    return {
        "fence": regex.compile(r"^[ \t]*+(```|~~~)", regex.MULTILINE),
        "bare": regex.compile(rf"{address}|{path}|{identifier}|</?[A-Za-z][^<>\n]{{0,80}}+>|\\[A-Za-z]++(?:\{{[^{{}}\n]{{0,300}}+\}})?+"),
        "camel": regex.compile(r"(?<![A-Za-z])[a-z]++[A-Z][A-Za-z]*+|(?<![A-Za-z])(?:[A-Z][a-z]++){2,}+"),
        "environment": regex.compile(r"\\(begin|end)\{([A-Za-z*]{1,30})\}"),
        "gloss": regex.compile(rf"[(（][^()（）\n]{{1,{MAX_GLOSS_CHARS}}}+[)）]"),
        "single": regex.compile(r"(?<!\w)'[^'\n]{1,100}+'(?!\w)"),
        "latin": regex.compile(r"\p{Latin}"),
    }


class _Blanker:
    """A text whose spans are blanked one after another and written out once."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._spans: list[tuple[int, int]] = []

    def blank(self, start: int, end: int) -> None:
        self._spans.append((start, end))

    def text(self) -> str:
        kept: list[str] = []
        position = 0
        for start, end in sorted(self._spans):
            start = max(start, position)
            if start < end:
                kept += (self._text[position:start], _blank(self._text[start:end]))
                position = end
        return "".join((*kept, self._text[position:]))


def _blank(span: str) -> str:
    return "\n".join(" " * len(line) for line in span.split("\n"))


def _without_fences(text: str) -> str:
    blanker = _Blanker(text)
    opened: tuple[int, str] | None = None
    for match in _patterns()["fence"].finditer(text):
        if opened is None:
            opened = match.start(), match[1]
        elif match[1] == opened[1]:
            line_end = text.find("\n", match.end())
            blanker.blank(opened[0], len(text) if line_end < 0 else line_end)
            opened = None
    if opened is not None:
        blanker.blank(opened[0], len(text))
    return blanker.text()


def _without_environments(text: str) -> str:
    blanker = _Blanker(text)
    opened: tuple[int, str] | None = None
    for match in _patterns()["environment"].finditer(text):
        if match[1] == "begin" and opened is None:
            opened = match.start(), match[2]
        elif match[1] == "end" and opened is not None and match[2] == opened[1]:
            if match.end() - opened[0] <= MAX_FORMULA_CHARS:
                blanker.blank(opened[0], match.end())
            opened = None
    return blanker.text()


def _bracketed(text: str, brackets: dict[str, _Bracket]) -> list[tuple[int, int]]:
    """Returns the outermost bracketed spans, marks included."""
    spans: list[tuple[int, int]] = []
    next_closing: dict[str, int] = {}
    next_break = -1
    position = 0
    for start, opening in _openings(text, brackets):
        if start < position:
            continue
        bracket = brackets[opening]
        inside = start + len(opening)
        # Each closing mark is searched forward from where it was last found: linear in all.
        if next_closing.get(bracket.closing, -1) < inside:
            found = text.find(bracket.closing, inside)
            next_closing[bracket.closing] = len(text) if found < 0 else found
        if next_break < inside:
            found = text.find("\n", inside)
            next_break = len(text) if found < 0 else found
        end = next_closing[bracket.closing]
        if end >= len(text) or end == inside or end - inside > bracket.max_chars or (bracket.one_line and end > next_break):
            continue
        if bracket.tight and (text[inside].isspace() or text[end - 1].isspace()):
            continue
        position = end + len(bracket.closing)
        spans.append((start, position))
    return spans


@cache
def _opening_pattern(openings: tuple[str, ...]) -> regex.Pattern[str]:
    import regex

    return regex.compile("|".join(regex.escape(opening) for opening in sorted(openings, key=len, reverse=True)))


def _openings(text: str, brackets: dict[str, _Bracket]) -> list[tuple[int, str]]:
    return [(match.start(), match.group()) for match in _opening_pattern(tuple(brackets)).finditer(text)]


def _without_quotes(text: str) -> str:
    spans = _bracketed(text, _QUOTES) + [match.span() for match in _patterns()["single"].finditer(text)]
    blanker = _Blanker(text)
    for start, end in spans:
        blanker.blank(start, end)
    blanked = blanker.text()
    total = sum(word.weight for word in words(text))
    quoted = total - sum(word.weight for word in words(blanked))
    return text if quoted > MAX_QUOTED_WORDS and quoted > MAX_QUOTED_FRAC * total else blanked


def _without_glosses(text: str) -> str:
    """Blanks a short bracket in another script than the letter before it: a name's other form."""
    latin = _patterns()["latin"]
    blanker = _Blanker(text)
    for match in _patterns()["gloss"].finditer(text):
        before = next((c for c in reversed(text[max(0, match.start() - 3) : match.start()]) if c.isalpha()), None)
        letters = [c for c in match.group() if c.isalpha()]
        if before and letters and (latin.match(before) is None) != (latin.match(letters[0]) is None):
            blanker.blank(*match.span())
    return blanker.text()


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptSpans:
    """What a response may copy from its prompt: word n-grams, and short runs in scripts other than Latin."""

    grams: Collection[tuple[str, ...]]
    runs: Collection[tuple[str, ...]]


def prompt_spans(text: str) -> PromptSpans:
    """Returns what a response may copy from a prompt."""
    tokens = [word.text.lower() for word in words(text)]
    grams = {tuple(tokens[start : start + COPIED_WORDS]) for start in range(len(tokens) - COPIED_WORDS + 1)}
    runs: set[tuple[str, ...]] = set()
    for run in _foreign_runs(list(words(text))):
        pieces = [word.text.lower() for word in run]
        for length in range(1, COPIED_WORDS):
            runs.update(tuple(pieces[start : start + length]) for start in range(len(pieces) - length + 1))
    return PromptSpans(grams=grams, runs=runs)


def _foreign_runs(sequence: Sequence[Word]) -> list[list[Word]]:
    """Returns the runs of neighbouring words that are all of scripts other than Latin."""
    return [list(run) for latin, run in groupby(sequence, key=lambda word: word.script == "Latin") if not latin]


def _without_copies(text: str, spans: PromptSpans) -> str:
    sequence = list(words(text))
    tokens = [word.text.lower() for word in sequence]
    blanker = _Blanker(text)
    for start in range(len(tokens) - COPIED_WORDS + 1):
        if tuple(tokens[start : start + COPIED_WORDS]) in spans.grams:
            blanker.blank(sequence[start].start, sequence[start + COPIED_WORDS - 1].end)
    for run in _foreign_runs(sequence):
        if len(run) < COPIED_WORDS and tuple(word.text.lower() for word in run) in spans.runs:
            blanker.blank(run[0].start, run[-1].end)
    return blanker.text()


def _without_terms(text: str, terms: Collection[str]) -> str:
    import regex

    escaped = [regex.escape(term) for term in sorted(terms, key=len, reverse=True) if term.strip()]
    if not escaped:
        return text
    return regex.sub("|".join(escaped), lambda match: _blank(match.group()), text, flags=regex.IGNORECASE)


def masked(text: str, *, copied: PromptSpans | None, allowed_terms: Collection[str] = (), quotes: bool = True) -> str:
    """Returns the text with everything blanked that the module names, at its old length; `quotes`: quotations and glosses too."""
    text = _without_environments(_without_fences(text))
    blanker = _Blanker(text)
    for span in _bracketed(text, _CODE_AND_MATHS):
        blanker.blank(*span)
    text = blanker.text()
    text = _patterns()["bare"].sub(lambda match: _blank(match.group()), text)
    text = _patterns()["camel"].sub(lambda match: _blank(match.group()), text)
    text = _without_terms(text, allowed_terms)
    if quotes:
        text = _without_glosses(_without_quotes(text))
    return _without_copies(text, copied) if copied else text
