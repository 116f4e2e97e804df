"""The languages that `code_switching` tells apart, their scripts, and counting words in texts of any script.

Counts are in *words*. Scripts that write no spaces are counted in word-equivalents, so that shares are fair between scripts: a
Chinese character or a kana is half a word, a Thai letter a fifth. A run of Hangul is one word, as is a run of any other script.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

if TYPE_CHECKING:
    import regex

Language: TypeAlias = Literal["ar", "de", "en", "es", "fr", "hi", "it", "ja", "ko", "pt", "ru", "th", "vi", "zh"]
"""The closed list, as ISO 639-1 codes."""
SCRIPTS: dict[Language, frozenset[str]] = {
    **{language: frozenset({"Latin"}) for language in ("de", "en", "es", "fr", "it", "pt", "vi")},
    **{"zh": frozenset({"Han"}), "ja": frozenset({"Han", "Kana"}), "ko": frozenset({"Hangul"}), "ru": frozenset({"Cyrillic"})},
    **{"ar": frozenset({"Arabic"}), "hi": frozenset({"Devanagari"}), "th": frozenset({"Thai"})},
}  # pyright: ignore[reportAssignmentType]
"""Scripts that each language is written in; Latin letters stand in texts of every language."""
LATIN_LANGUAGES: tuple[Language, ...] = ("de", "en", "es", "fr", "it", "pt", "vi")
SCRIPT_LANGUAGE: dict[str, Language] = {
    **{"Han": "zh", "Kana": "ja", "Hangul": "ko", "Cyrillic": "ru", "Arabic": "ar", "Devanagari": "hi", "Thai": "th"}
}
"""The language that a script other than Latin stands for in this list."""
_WEIGHTS = {"Han": 0.5, "Kana": 0.5, "Thai": 0.2}
"""Words a character, in scripts without spaces."""


class Word(NamedTuple):
    """A run of letters of one script; one character where the script is Han or kana."""

    start: int
    end: int
    text: str
    script: str
    """`Latin`, `Han`, `Kana`, ..., or `Other`."""
    weight: float
    """Words that it counts for."""


@cache
def _word_pattern() -> regex.Pattern[str]:
    import regex

    # Marks belong to the letter before them: Arabic and Devanagari vowels, accents in decomposed form, the Thai tone marks.
    spaced = ("Latin", "Hangul", "Cyrillic", "Arabic", "Devanagari", "Thai")
    groups = [
        r"(?P<Han>[\p{Han}])",
        r"(?P<Kana>[\p{Hiragana}\p{Katakana}ー])",
        *(rf"(?P<{script}>\p{{{script}}}(?:[\p{{{script}}}\p{{M}}]|['’](?=\p{{{script}}}))*+)" for script in spaced),
        r"(?P<Other>[^\W\d_][\p{L}\p{M}--\p{Latin}--\p{Han}--\p{Hiragana}--\p{Katakana}--\p{Hangul}--\p{Cyrillic}]*+)",
    ]
    return regex.compile("|".join(groups), regex.VERSION1)


@cache
def _invisible() -> regex.Pattern[str]:
    import regex

    return regex.compile(r"[\p{Cf}\p{Cc}\p{Cs}\p{Variation_Selector}--\n\t]", regex.VERSION1)


def words(text: str) -> Iterator[Word]:
    """Yields the words in order; digits, marks of punctuation and single letters of other scripts (`α`) are none."""
    for match in _word_pattern().finditer(text):
        script = match.lastgroup or "Other"
        piece = match.group()
        if script == "Other" and len(piece) == 1:
            continue  # Greek letters are mathematics in every language.
        weight = _WEIGHTS.get(script, 1.0) * (len(piece) if script == "Thai" else 1)
        start, end = match.span()
        yield Word(start, end, piece, script, weight)


def visible_characters(text: str) -> str:
    """Returns the text without characters that cannot be seen (zero-width joiners, directions, controls); line breaks stay."""
    return _invisible().sub("", text.replace("\r\n", "\n").replace("\r", "\n"))
