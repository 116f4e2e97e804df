"""A penalty for thinking or answering in another language than the prompt's: whole foreign sentences, clauses and scattered words.

Thinking and answer are judged apart. In each, what says nothing about language is blanked (`language_masks`), then

    foreign_frac = foreign words / words          words of scripts without spaces in word-equivalents (`language_scripts`)

and the part is mixed where foreign_frac > max_foreign_frac and at least `MIN_FOREIGN_WORDS` words are foreign. Foreign are

* words in a script that no wanted language uses, also single ones;
* a sentence or clause in Latin letters in another language, where the wanted language is written in Latin letters;
* a clause of at least five words in Latin letters inside a text in another script, where it is clearly a language: English terms in
  Chinese (`用 Python 的 numpy 库`) are ordinary, a whole English clause is not;
* Japanese in Chinese (kana) and Chinese in Japanese (a clause without kana and with Chinese particles).

Wanted are: the languages of the user's turns (of the option `language`, where given, instead), every language that any turn of the
prompt names in English, in its own name or in Chinese (`answer in French`, `auf Deutsch`, `用英文回答`) unless a negation stands before
it, and `allowed_languages`. A prompt that speaks of translation and names no language allows all. A prompt without a language (only an
image, a formula) is answered in any one language: the part's own main one is then wanted.

The value is 0.0 for a clean response, `penalty` for a mixed one. What remains possible for a policy that hides: foreign text inside code,
formulas or short quotations is not seen. DeepSeek-R1 rewards the share of words in the target language (arXiv:2501.12948, 2.3.2).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from ..model.records import Example, Rollout
from .answers import THINK_CLOSE, THINK_OPEN, half_width
from .built_in import BuiltInReward
from .language_masks import PromptSpans, masked, prompt_spans
from .language_scripts import LATIN_LANGUAGES, SCRIPT_LANGUAGE, SCRIPTS, Language, Word, visible_characters, words
from .language_sentences import MIN_CLAUSE_WORDS, MIN_WORDS, clauses, guess_latin, is_chinese_run, is_title, label_latin, sentences
from .result import RewardResult

if TYPE_CHECKING:
    import regex

MAX_RESPONSE_CHARS = 400_000
"""Characters of a response that are read; whatever comes after is not."""
MAX_PROMPT_CHARS = 100_000
MIN_FOREIGN_WORDS = 3.0
"""Fewer foreign words in a part are not mixing: a name, a term, a slip."""
MIN_PROMPT_WORDS = 3.0
"""Words of a language that make it one of the prompt's."""
NUM_SPANS_SHOWN = 3
SPAN_CHARS = 60

_ALL: frozenset[Language] = frozenset(SCRIPTS)
_NAMES: dict[Language, str] = {
    "ar": "arabic|arabisch|arabe|árabe|العربية|阿拉伯[语文語]|アラビア語",
    "de": "german|deutsch|allemand|alemán|tedesco|alemão|德[语文語]|ドイツ語|немецк",
    "en": "english|englisch|anglais|inglés|inglese|inglês|英[语文語]|영어|английск|अंग्रेज़ी|الإنجليزية|ภาษาอังกฤษ",
    "es": "spanish|spanisch|espagnol|español|castellano|spagnolo|espanhol|西班牙[语文語]|スペイン語|испанск",
    "fr": "french|französisch|français|francés|francese|francês|法[语文語]|フランス語|французск",
    "hi": "hindi|हिन्दी|हिंदी|印地[语文語]|ヒンディー語",
    "it": "italian|italienisch|italien|italiano|意大利[语文語]|イタリア語|итальянск",
    "ja": "japanese|japanisch|japonais|japonés|giapponese|japonês|日[语文語]|日本語|일본어|японск",
    "ko": "korean|koreanisch|coréen|coreano|韩[语文]|韓[語文]|한국어|韩国语|корейск",
    "pt": "portuguese|portugiesisch|portugais|portugués|portoghese|português|葡萄牙[语文語]|ポルトガル語",
    "ru": "russian|russisch|russe|ruso|russo|俄[语文語]|ロシア語|русск|по-русски",
    "th": "thai|泰[语文語]|ภาษาไทย|タイ語",
    "vi": "vietnamese|vietnamesisch|vietnamien|tiếng việt|越南[语文語]|ベトナム語",
    "zh": "chinese|mandarin|chinesisch|chinois|chino|cinese|chinês|[中汉漢]文|[汉漢][语語]|普通话|中国語|중국어|китайск",
}
_NEGATION = r"(?:\b(?:not?|never|without|avoid|don['’]t|nicht|kein\w*|ohne|ne pas|sans|sin|non|senza|sem|não)\b|不|别|勿|禁止|нельзя)"
_TRANSLATION = r"translat|übersetz|tradui|traduc|traduz|traduç|翻译|翻譯|翻訳|번역|перевед|перевод|अनुवाद|ترجم|แปล|dịch sang"


@cache
def _patterns() -> dict[str, regex.Pattern[str]]:
    import regex

    named = "|".join(f"(?P<{language}>{names})" for language, names in _NAMES.items())
    return {
        "named": regex.compile(named, regex.IGNORECASE),
        "negated": regex.compile(rf"{_NEGATION}[^.!?;。！？，；\n]*+\Z", regex.IGNORECASE),
        "translation": regex.compile(_TRANSLATION, regex.IGNORECASE),
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class Mixing:
    """What was found in one part of a response."""

    words: float
    foreign_words: float
    spans: tuple[str, ...]
    """Foreign spans in order, as written (blanked parts are spaces)."""
    abstained: int
    """Sentences on which no verdict was reached."""

    @property
    def foreign_frac(self) -> float:
        """Share of the words that are foreign; 0.0 without words."""
        return self.foreign_words / self.words if self.words else 0.0


def named_languages(text: str) -> frozenset[Language]:
    """Returns the languages that a prompt names without a negation up to 24 characters before in the same sentence; all for translation."""
    patterns = _patterns()
    found: set[Language] = set()
    for match in patterns["named"].finditer(text):
        if match.lastgroup and not patterns["negated"].search(text, max(0, match.start() - 24), match.start()):
            found.add(match.lastgroup)  # pyright: ignore[reportArgumentType]  the groups are called after the languages
    if not found and patterns["translation"].search(text):
        return _ALL
    return frozenset(found)


def text_languages(text: str) -> frozenset[Language]:
    """Returns the languages that a text is written in, at least `MIN_PROMPT_WORDS` words or a third of each; empty when unclear."""
    text = masked(half_width(visible_characters(text)), copied=None, quotes=False)
    weights, total = _language_weights(text)
    found: frozenset[Language] = frozenset(name for name, weight in weights.items() if weight >= min(MIN_PROMPT_WORDS, total / 3))
    if not found.intersection(LATIN_LANGUAGES):
        # `How much?`, `What does 你好 mean?`: too short for a label; beside another script, one such word may be a term's.
        guess = guess_latin([word for word in words(text) if word.script == "Latin"], min_votes=2 if found else 1)
        found = found if guess is None else found.union((guess,))
    return found


def _language_weights(text: str) -> tuple[dict[Language, float], float]:
    """Returns the words of each language that was recognised, and all words; terms in Latin letters beside another script are neither."""
    weights: dict[Language, float] = {}
    total = 0.0
    for start, end in sentences(text):
        sequence = list(words(text[start:end]))
        has_kana = any(word.script == "Kana" for word in sequence)
        for word in sequence:
            language = "ja" if has_kana and word.script == "Han" else SCRIPT_LANGUAGE.get(word.script)
            if language is not None:
                weights[language] = weights.get(language, 0.0) + word.weight
                total += word.weight
        latin = [word for word in sequence if word.script == "Latin"]
        label = label_latin(latin, wanted=frozenset())
        if label is not None:
            weights[label] = weights.get(label, 0.0) + len(latin)
            total += len(latin)
    return weights, total


def wanted_languages(example: Example, *, language: Language | None, allowed: Sequence[Language]) -> frozenset[Language]:
    """Returns the languages that a response to the example may use, as the module says; empty when the prompt has none."""
    turns = [(message.role, message.text[:MAX_PROMPT_CHARS]) for message in example.messages]
    asked = frozenset[Language]().union(*(named_languages(text) for _role, text in turns))
    own: frozenset[Language] = (
        frozenset({language}) if language else text_languages("\n".join(text for role, text in turns if role == "user"))
    )
    return own.union(asked, allowed) if own else own


def find_mixing(text: str, *, wanted: frozenset[Language], copied: PromptSpans | None = None, allowed_terms: Sequence[str] = ()) -> Mixing:
    """Returns what is foreign in one part of a response; with no wanted language the part's own main one is wanted."""
    text = masked(half_width(visible_characters(text)), copied=copied, allowed_terms=allowed_terms)
    if not wanted:
        wanted = _main_language(text)
    total, foreign, abstained = 0.0, 0.0, 0
    spans: list[str] = []
    for start, end in sentences(text):
        piece = text[start:end]
        sequence = list(words(piece))
        found, unsure = _foreign_words(piece, sequence, wanted)
        total += sum(word.weight for word in sequence)
        foreign += sum(word.weight for word in found)
        abstained += unsure
        if found:
            spans.append(" ".join(piece[found[0].start : found[-1].end].split()))
    return Mixing(words=total, foreign_words=foreign, spans=tuple(spans), abstained=abstained)


def _main_language(text: str) -> frozenset[Language]:
    weights, _total = _language_weights(text)
    return frozenset({max(sorted(weights), key=weights.__getitem__)}) if weights else frozenset()


def _foreign_words(piece: str, sequence: Sequence[Word], wanted: frozenset[Language]) -> tuple[list[Word], bool]:
    """Returns the foreign words of one sentence in order, and whether the sentence was too short or too unclear to judge."""
    scripts = frozenset[str]().union(*(SCRIPTS[language] for language in wanted), {"Latin"})
    found = {word.start: word for word in sequence if word.script not in scripts} if wanted else {}
    if "zh" in wanted and "ja" not in wanted and sum(word.script == "Kana" for word in sequence) >= 2:
        found |= {word.start: word for word in sequence if word.script == "Han"}
    if "ja" in wanted and "zh" not in wanted:
        for start, end in clauses(piece, 0, len(piece)):
            inside = [word for word in sequence if start <= word.start < end and word.script in ("Han", "Kana")]
            if all(word.script == "Han" for word in inside) and is_chinese_run(inside):
                found |= {word.start: word for word in inside}
    latin, unsure = _foreign_latin(piece, [word for word in sequence if word.script == "Latin"], wanted)
    found |= {word.start: word for word in latin}
    return [found[start] for start in sorted(found)], unsure


def _foreign_latin(piece: str, latin: Sequence[Word], wanted: frozenset[Language]) -> tuple[list[Word], bool]:
    if not latin or not wanted:
        return [], bool(latin)
    if not wanted.intersection(LATIN_LANGUAGES):
        runs = [run for run in _runs(piece, latin) if len(run) >= MIN_CLAUSE_WORDS and not is_title(run)]
        return [word for run in runs if label_latin(run, wanted=wanted) is not None for word in run], False
    whole = label_latin(latin, wanted=wanted)
    if whole is not None and whole not in wanted:
        return list(latin), False
    found: list[Word] = []
    for start, end in clauses(piece, 0, len(piece)):
        inside = [word for word in latin if start <= word.start < end]
        if MIN_CLAUSE_WORDS <= len(inside) < len(latin):
            label = label_latin(inside, wanted=wanted)
            found += inside if label is not None and label not in wanted else []
    return found, len(latin) < MIN_WORDS or (whole is None and not found)


def _runs(piece: str, latin: Sequence[Word]) -> list[list[Word]]:
    """Returns runs of words with nothing but spaces, ASCII marks and digits between them."""
    runs: list[list[Word]] = []
    for word in latin:
        between = piece[runs[-1][-1].end : word.start] if runs else ""
        if runs and len(between) <= 4 and between.isascii():
            runs[-1].append(word)
        else:
            runs.append([word])
    return runs


def response_parts(rollout: Rollout) -> dict[str, str]:
    """Returns the thinking and the answer of a response by name; an unclosed thinking part is all thinking."""
    text = rollout.text[:MAX_RESPONSE_CHARS]
    before, close, after = text.partition(THINK_CLOSE)
    opened = rollout.prompt_suffix.rfind(THINK_OPEN) > rollout.prompt_suffix.rfind(THINK_CLOSE) or text.lstrip().startswith(THINK_OPEN)
    if close:
        return {"thinking": before, "answer": after}
    return {"thinking": text} if opened else {"answer": text}


def code_switching(
    example: Example,
    rollout: Rollout,
    *,
    penalty: Annotated[float, Field(ge=-1.0, le=0.0)] = -1.0,
    max_foreign_frac: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.01,
    judge: Literal["both", "thinking", "answer"] = "both",
    language: Language | None = None,
    allowed_languages: tuple[Language, ...] = (),
    allowed_terms: tuple[str, ...] = (),
) -> RewardResult:
    """Returns 0.0 for a response in the prompt's language and `penalty` for one that mixes in another; the module has the rules.

    `max_foreign_frac`: share of a part's words that may be foreign. `judge`: the parts that are looked at. `language`: wanted instead of
    the prompt's. `allowed_terms`: names that are blanked, in any case. Metrics: `foreign_frac` of the worse part, `num_spans` and
    `abstained` (sentences) of all judged parts.
    """
    wanted = wanted_languages(example, language=language, allowed=allowed_languages)
    copied = prompt_spans("\n".join(message.text[:MAX_PROMPT_CHARS] for message in example.messages))
    found = {
        name: find_mixing(part, wanted=wanted, copied=copied, allowed_terms=allowed_terms)
        for name, part in response_parts(rollout).items()
        if judge in ("both", name)
    }
    mixed = {
        name: mixing
        for name, mixing in found.items()
        if mixing.foreign_frac > max_foreign_frac and mixing.foreign_words >= MIN_FOREIGN_WORDS
    }
    notes = [
        f"{name}: {mixing.foreign_frac:.1%} of the words are foreign: "
        + "; ".join(f"`{span[:SPAN_CHARS]}`" for span in mixing.spans[:NUM_SPANS_SHOWN])
        for name, mixing in mixed.items()
    ]
    return RewardResult(
        value=penalty if mixed else 0.0,
        note=" | ".join(notes),
        metrics={
            "foreign_frac": max((mixing.foreign_frac for mixing in found.values()), default=0.0),
            "num_spans": float(sum(len(mixing.spans) for mixing in found.values())),
            "abstained": float(sum(mixing.abstained for mixing in found.values())),
        },
    )


REWARDS: Mapping[str, BuiltInReward] = {
    "code_switching": BuiltInReward(
        summary="penalty, -1 by default: thinking or answer mixes in a language that the prompt neither uses nor asks for",
        value_range=(-1.0, 0.0),
        gold_value=0.0,
        function=code_switching,
    ),
}
