"""The constraints that `format` checks: one settings class a kind, each with a `check` that reads a visible response and the prompt.

The kinds follow IFEval (arXiv:2311.07911, section 2 and table 4) where it has them; deviations stand at the class. All hold for English
and Chinese. Every check is linear in the response and no text makes it raise.
"""

from __future__ import annotations

import difflib
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping
from functools import cache, lru_cache
from typing import Annotated, Literal, TypeAlias, get_args

from pydantic import Field, TypeAdapter, ValidationError, model_validator
from pydantic_core import ErrorDetails

from ..model.config import Settings
from ..model.records import DataError, Example
from . import text_units
from .json_answer import JsonError, read_json

MAX_CONSTRAINTS = 50
MIN_KANA_FRAC = 0.05
"""Share of kana above which a text of Chinese characters is Japanese."""

Phrase = Annotated[str, Field(min_length=1, max_length=200, pattern=r"\S")]
Phrases = Annotated[tuple[Phrase, ...], Field(min_length=1, max_length=100)]


class Bounds(Settings):
    """How often something may be there: from `at_least` to `at_most`, or `exactly`."""

    at_least: int | None = Field(default=None, ge=0)
    at_most: int | None = Field(default=None, ge=0)
    exactly: int | None = Field(default=None, ge=0)

    @model_validator(mode="after")
    def _some_bound(self) -> Bounds:
        if self.exactly is None and self.at_least is None and self.at_most is None:
            raise ValueError("no bound: write at_least, at_most or exactly")
        if self.exactly is not None and (self.at_least is not None or self.at_most is not None):
            raise ValueError("exactly stands alone: leave at_least and at_most out")
        if self.at_least is not None and self.at_most is not None and self.at_least > self.at_most:
            raise ValueError(f"at_least = {self.at_least} is more than at_most = {self.at_most}: no response could meet it")
        if self.at_most is None and self.at_least == 0:
            raise ValueError("at_least = 0 is met by everything: leave the constraint out")
        return self

    def holds(self, count: int) -> bool:
        """Returns whether the count is within the bounds."""
        if self.exactly is not None:
            return count == self.exactly
        return (self.at_least is None or count >= self.at_least) and (self.at_most is None or count <= self.at_most)


_COUNTERS: Mapping[str, Callable[[str], int]] = {
    "words": text_units.num_words,
    "sentences": text_units.num_sentences,
    "paragraphs": lambda text: len(text_units.paragraphs(text)),
    "divided_parts": lambda text: len(text_units.divided_parts(text)),
    "characters": text_units.num_characters,
    "bullets": text_units.num_bullets,
    "numbered_items": text_units.num_numbered_items,
    "highlights": text_units.num_highlights,
    "placeholders": text_units.num_placeholders,
    "capital_words": text_units.num_capital_words,
}


class Amount(Bounds):
    """How many of one unit the response has; `text_units` says what counts as one.

    `paragraphs` are separated by blank lines, `divided_parts` by lines of `***` (IFEval's own separator of paragraphs).
    """

    kind: Literal[
        "words",
        "sentences",
        "paragraphs",
        "divided_parts",
        "characters",
        "bullets",
        "numbered_items",
        "highlights",
        "placeholders",
        "capital_words",
    ]

    def check(self, response: str, _prompt: str) -> bool:
        """Returns whether the amount is within the bounds."""
        return self.holds(_COUNTERS[self.kind](response))


class Keywords(Settings):
    """Phrases that all occur, as whole words and in any case. IFEval takes any part of a word, so that `art` is found in `start`."""

    kind: Literal["keywords"]
    words: Phrases

    def check(self, response: str, _prompt: str) -> bool:
        """Returns whether every phrase occurs."""
        return all(text_units.num_occurrences(response, phrase=phrase) for phrase in self.words)


class ForbiddenWords(Settings):
    """Phrases none of which occurs, as whole words and in any case; Chinese ones anywhere."""

    kind: Literal["forbidden_words"]
    words: Phrases

    def check(self, response: str, _prompt: str) -> bool:
        """Returns whether no phrase occurs."""
        return text_units.phrase_pattern(self.words).search(response) is None


class KeywordCount(Bounds):
    """How often one phrase occurs, as whole words and in any case."""

    kind: Literal["keyword_count"]
    word: Phrase

    def check(self, response: str, _prompt: str) -> bool:
        """Returns whether the number of occurrences is within the bounds."""
        return self.holds(text_units.num_occurrences(response, phrase=self.word))


class LetterCount(Bounds):
    """How often one letter (or Chinese character) occurs, in any case."""

    kind: Literal["letter_count"]
    letter: str = Field(min_length=1, max_length=1, pattern=r"\S")

    def check(self, response: str, _prompt: str) -> bool:
        """Returns whether the number of occurrences is within the bounds."""
        return self.holds(response.lower().count(self.letter.lower()))


class Sections(Bounds):
    """How many sections have a heading of the marker and a number (`Section 1`, `第一章` for `章`), each number counted once."""

    kind: Literal["sections"]
    marker: Phrase = "Section"

    def check(self, response: str, _prompt: str) -> bool:
        """Returns whether the number of sections is within the bounds."""
        return self.holds(text_units.num_sections(response, marker=self.marker))


class Title(Settings):
    """A title in double angle brackets, `<<...>>` or `《...》`."""

    kind: Literal["title"]

    def check(self, response: str, _prompt: str) -> bool:
        """Returns whether there is a title that is not blank."""
        return bool(text_units.titles(response))


class Postscript(Settings):
    """A last paragraph that begins with the marker, after something else. IFEval takes the marker anywhere in a line."""

    kind: Literal["postscript"]
    marker: Phrase = "P.S."
    """`P.P.S` or `附言` as well; white space in the response's marker does not count."""

    def check(self, response: str, _prompt: str) -> bool:
        """Returns whether a postscript with a text of its own ends the response."""
        blocks = text_units.paragraphs(response)
        if not blocks:
            return False
        lines = blocks[-1].splitlines()
        marker = "".join(self.marker.split()).lower()
        for number, line in enumerate(lines):
            if "".join(line[: 4 * len(marker)].split()).lower().startswith(marker):
                rest = "".join("\n".join(lines[number:]).split())[len(marker) :]
                return (number > 0 or len(blocks) > 1) and bool(text_units.words(rest))
        return False


class Quotation(Settings):
    """The whole response stands in one pair of quotation marks: `"..."`, `“...”`, `「...」`, `『...』` or `«...»`."""

    kind: Literal["quotation"]

    def check(self, response: str, _prompt: str) -> bool:
        """Returns whether the response is wrapped and not blank inside."""
        return len(response) > 2 and response[0] + response[-1] in ('""', "“”", "「」", "『』", "«»") and bool(response[1:-1].strip())


class Edge(Settings):
    """The response starts (or ends) with a text, case and outer quotation marks aside, as IFEval."""

    kind: Literal["starts_with", "ends_with"]
    text: str = Field(min_length=1, max_length=1000, pattern=r"\S")

    def check(self, response: str, _prompt: str) -> bool:
        """Returns whether the text stands there; white space in it matches any."""
        wanted = " ".join(self.text.lower().split())
        for candidate in (response, response.strip('"“”「」')):
            folded = " ".join(candidate.lower().split())
            if folded.startswith(wanted) if self.kind == "starts_with" else folded.endswith(wanted):
                return True
        return False


class ParagraphStart(Settings):
    """One paragraph begins with a phrase, in any case; paragraphs are counted from 1."""

    kind: Literal["paragraph_start"]
    number: int = Field(ge=1, le=1000)
    word: Phrase

    def check(self, response: str, _prompt: str) -> bool:
        """Returns whether the paragraph is there and its first words, quotation marks and marks of Markdown aside, are the phrase."""
        blocks = text_units.paragraphs(response)
        if len(blocks) < self.number:
            return False
        return text_units.phrase_pattern((self.word,)).match(blocks[self.number - 1].lstrip("#*>-_\"'“‘「 \t")) is not None


class Case(Settings):
    """All letters are capital, or none is. IFEval also asks a detector for English; here text without such letters fails."""

    kind: Literal["case"]
    form: Literal["upper", "lower"]

    def check(self, response: str, _prompt: str) -> bool:
        """Returns whether the response has letters of that case and none of the other."""
        return response.isupper() if self.form == "upper" else response.islower()


class NoCommas(Settings):
    """No comma: neither `,` nor the full-width `，`, nor the Arabic `،`; the Chinese `、` is none."""

    kind: Literal["no_commas"]

    def check(self, response: str, _prompt: str) -> bool:
        """Returns whether there is no comma."""
        return not any(mark in response for mark in ",，،﹐")


class JsonFormat(Settings):
    """The response is JSON, an object or a list, as `json_answer.read_json` reads it: the whole text or its one fenced block."""

    kind: Literal["json_format"]

    def check(self, response: str, _prompt: str) -> bool:
        """Returns whether it is."""
        try:
            return isinstance(read_json(response), (dict, list))
        except JsonError:
            return False


ScriptLanguage = Literal["zh", "ja", "ko", "ru", "ar", "el", "he", "hi", "bn", "pa", "gu", "ta", "te", "kn", "th"]  # codespell:ignore te
LatinLanguage = Literal["en", "de", "fr", "es", "it", "pt"]
LanguageCode = Literal[ScriptLanguage, LatinLanguage]

_SCRIPTS: Mapping[str, str] = {
    "zh": "\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f",
    "ja": "\u3005-\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uff66-\uff9f",
    "ko": "\u1100-\u11ff\u3130-\u318f\uac00-\ud7af",
    "ru": "\u0400-\u04ff",
    "ar": "\u0600-\u06ff\u0750-\u077f\ufb50-\ufdff\ufe70-\ufeff",
    "el": "\u0370-\u03ff\u1f00-\u1fff",
    "he": "\u0590-\u05ff",
    "hi": "\u0900-\u097f",
    "bn": "\u0980-\u09ff",
    "pa": "\u0a00-\u0a7f",
    "gu": "\u0a80-\u0aff",
    "ta": "\u0b80-\u0bff",
    "te": "\u0c00-\u0c7f",  # codespell:ignore te
    "kn": "\u0c80-\u0cff",
    "th": "\u0e00-\u0e7f",
}
_LATIN = "A-Za-z\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u024f"
# The commonest words that few of the other five have; ours, from general knowledge of the languages.
_STOP_WORDS: Mapping[str, frozenset[str]] = {
    code: frozenset(text_units.words(listed))
    for code, listed in {
        "en": "the of and to is that it for was with as are this be have from or by not but what all were you at an which",
        "de": "der die das und ist nicht ein eine zu mit den von im für auf sich des auch wird sind ich es wie",  # codespell:ignore ist
        "fr": "le la les et est des une un du dans que qui pour pas au sur avec ce il elle sont nous vous plus ou aux",
        "es": "el la los las y es en un una del que por con para no se su al lo como más pero son está muy o",
        "it": "il la gli le e è di che un una per non con del della nel sono si da più anche come ma lo alla dei",
        "pt": "o a os as e é em um uma do da que não com para por se no na dos das mais são ao como seu sua",
    }.items()
}


class Language(Settings):
    """The language of the response, by the share of its words that are of the language's script; a Chinese character or kana is a word.

    Languages of one script are not told apart (`ru` is any Cyrillic, `ar` any Arabic, `hi` any Devanagari text), except that Chinese has
    no kana and Japanese has some, and that of the six Latin ones the language whose commonest words are the most is the response's.
    IFEval asks a statistical detector.
    """

    kind: Literal["language"]
    code: LanguageCode
    min_words_frac: float = Field(default=0.8, gt=0.0, le=1.0)
    """Smallest share of the words that begin in the script; numbers are no words here."""

    def check(self, response: str, _prompt: str) -> bool:
        """Returns whether the response is in the language; without words it is in none."""
        initials = "".join(word[0] for word in text_units.words(response) if word[0].isalpha())
        num_own = len(re.findall(f"[{_SCRIPTS.get(self.code, _LATIN)}]", initials))
        if not initials or num_own < self.min_words_frac * len(initials):
            return False
        if self.code in _STOP_WORDS:
            return _commonest_language(response) == self.code
        num_kana = len(re.findall("[\u3041-\u30fa\uff66-\uff9d]", initials))
        if self.code == "ja":
            return num_kana > MIN_KANA_FRAC * len(initials)
        return num_kana <= MIN_KANA_FRAC * len(initials)


def _commonest_language(text: str) -> str | None:
    """Returns the Latin language whose stop words are the most, or None when two tie or fewer than one word in twelve is any's."""
    counts = Counter(word.lower() for word in text_units.words(text))
    scores = {code: sum(counts[word] for word in words) for code, words in _STOP_WORDS.items()}
    best, second = sorted(scores, key=lambda code: -scores[code])[:2]
    return best if scores[best] > scores[second] and 12 * scores[best] >= counts.total() else None


class TwoResponses(Settings):
    """Two different responses, separated by six stars, as IFEval; white space does not make them different."""

    kind: Literal["two_responses"]

    def check(self, response: str, _prompt: str) -> bool:
        """Returns whether there are two that differ and are not blank; a separator before or after both is allowed."""
        parts = [" ".join(part.split()) for part in response.split("******")]
        inner = parts[(not parts[0]) : len(parts) - (not parts[-1])]
        return len(inner) == 2 and all(map(text_units.words, inner)) and inner[0] != inner[1]


class RepeatPrompt(Settings):
    """The response repeats the prompt first, word for word, and goes on; IFEval does not ask it to go on."""

    kind: Literal["repeat_prompt"]
    prompt: str | None = Field(default=None, min_length=1, max_length=20_000, pattern=r"\S")
    """What is to be repeated; absent: the text of the example's last user message."""

    def check(self, response: str, prompt: str) -> bool:
        """Returns whether it does, case and white space aside."""
        wanted = " ".join((self.prompt or prompt).lower().split())
        given = " ".join(response.lower().split())
        return bool(wanted) and given.startswith(wanted) and bool(text_units.words(given[len(wanted) :]))


class ChooseOne(Settings):
    """Exactly one of the options occurs, as whole words; one inside a longer one does not count. IFEval takes any, or all."""

    kind: Literal["choose_one"]
    options: Annotated[tuple[Phrase, ...], Field(min_length=2, max_length=100)]

    def check(self, response: str, _prompt: str) -> bool:
        """Returns whether one option occurs and no other."""
        found = text_units.phrase_pattern(self.options).finditer(response)
        return len({" ".join(match.group().lower().split()) for match in found}) == 1


Constraint: TypeAlias = (
    Amount
    | Keywords
    | ForbiddenWords
    | KeywordCount
    | LetterCount
    | Sections
    | Title
    | Postscript
    | Quotation
    | Edge
    | ParagraphStart
    | Case
    | NoCommas
    | JsonFormat
    | Language
    | TwoResponses
    | RepeatPrompt
    | ChooseOne
)
Constraints: TypeAlias = Annotated[
    tuple[Annotated[Constraint, Field(discriminator="kind")], ...], Field(min_length=1, max_length=MAX_CONSTRAINTS)
]


@cache
def _adapter() -> TypeAdapter[Constraints]:
    """Returns the reader of a list of constraints, built when it is first needed."""
    return TypeAdapter(Constraints)


@lru_cache(maxsize=4096)
def _read(text: str) -> tuple[Constraint, ...]:
    return _adapter().validate_json(text, strict=True)


@cache
def kinds() -> tuple[str, ...]:
    """Returns the names of all kinds."""
    return tuple(name for constraint in get_args(Constraint) for name in get_args(constraint.model_fields["kind"].annotation))


def constraints_of(example: Example) -> tuple[Constraint, ...]:
    """Returns the constraints in `metadata["constraints"]`; a `DataError` names the example, the place, the value and what is allowed."""
    place = f"example {example.id!r}: metadata.constraints"
    given = example.metadata.get("constraints")
    if given is None:
        raise DataError(f"{place} is missing; `format` checks a list such as [{{kind: words, at_most: 50}}]")
    try:
        # Through JSON: strict about numbers and strings, while lists may become tuples.
        return _read(json.dumps(given, allow_nan=False))
    except ValidationError as error:
        first = error.errors()[0]
        raise DataError(f"{place}{_described(first)}") from None
    except (TypeError, ValueError, RecursionError) as error:
        raise DataError(f"{place} is no plain JSON ({error}); write a list of {{kind: ...}}") from None


def _described(error: ErrorDetails) -> str:
    """Returns what is wrong in one constraint, from its place on: `[0].at_least = -1: ...`."""
    # The kind that the reader took stands in its place too; the user wrote no such key.
    place = [part for number, part in enumerate(error["loc"]) if number != 1]
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place)
    if error["type"] == "union_tag_invalid":
        name = str(error["ctx"]["tag"]) if "ctx" in error else ""
        close = difflib.get_close_matches(name, kinds(), n=1)
        nearest = f" (did you mean {close[0]!r}?)" if close else ""
        return f"{path}.kind = {name[:40]!r}: no such kind{nearest}; there are {', '.join(kinds())}"
    if error["type"] == "union_tag_not_found":
        return f"{path}.kind is missing; there are {', '.join(kinds())}"
    given = "" if error["type"] == "missing" else f" = {str(error['input'])[:80]!r}"
    return f"{path}{given}: {error['msg']}"
