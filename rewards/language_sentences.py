"""Which language a sentence is in, over a closed list: by script where scripts differ, by py3langid where they are shared.

A sentence in Latin letters has to say it twice: the model's label, with a confidence of at least `MIN_CONFIDENCE`, and words that only
hold sentences together (`the`, `und`, `que`), more of the label's language than of the wanted one. Names and technical terms pass neither
vote together. Text that is too short or on which the votes differ is an abstention, not a verdict.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import TYPE_CHECKING, cast

from .language_scripts import LATIN_LANGUAGES, Language, Word

if TYPE_CHECKING:
    import regex
    from py3langid.langid import LanguageIdentifier

MIN_WORDS = 4
"""Shorter pieces in Latin letters are not judged."""
MIN_CLAUSE_WORDS = 5
"""Words in Latin letters in a row that make a clause inside a text of another script; fewer are terms."""
MIN_CONFIDENCE = 0.7
"""Of the label, over the Latin languages of the list."""
MIN_TIE_CONFIDENCE = 0.9
"""Of the label, where all words that hold the sentence together stand in both languages."""
MIN_LONE_CONFIDENCE = 0.97
"""Of the label, where no such word speaks for either language (`Talvez exista outra pessoa ali`)."""
MAX_TITLE_WORDS = 12
"""Longer runs of capitalised words are no title."""
MAX_PIECE_CHARS = 600
"""Longer sentences are cut."""

_FUNCTION_WORDS: dict[Language, str] = {
    "en": (
        "a an the is are was were be been it its this that these those of to in on at for with from by as and or but if so then "
        "we i you he she they my your our his her their not do does did has have had will would can could should may must what "
        "which who when where why how there here because than into about let also only just first now since after before no all "
        "one some any"
    ),
    "de": (
        "der die das den dem des ein eine einen einem einer eines ist sind war waren sein wird werden wurde hat haben hatte kann "
        "können muss müssen soll und oder aber wenn dann weil dass daß als wie so nicht kein keine auch nur noch schon wir ich du "
        "er sie es ihr man uns mir mich sich zu zum zur im in am an auf aus bei mit nach von vom vor für über unter durch um "
        "gegen also hier da wo was wer diese dieser dieses jetzt sehr mehr alle"
    ),
    "es": (
        "el la los las un una unos unas es son era fue ser está están hay ha han he tiene tienen puede y o pero si entonces "
        "porque que qué como cómo no ni también solo más muy ya yo tú él ella nosotros ellos se me te nos le les lo su sus mi "
        "este esta esto estos estas ese esa eso de del a al en con sin por para sobre entre desde hasta cuando donde así ahora "
        "todo todos cada"
    ),
    "fr": (
        "le la les l un une des du de d au aux est sont était être a ont avait peut doit fait et ou mais si donc car parce que qu "
        "qui quoi dont où ne n pas plus aussi très bien je j tu il elle on nous vous ils elles se s me m ce c cette ces cet son "
        "sa ses leur leurs mon ma mes notre en dans sur sous avec sans pour par entre depuis vers chez comme quand alors ainsi y "
        "tout tous chaque maintenant"
    ),
    "it": (
        "il lo la i gli le l un uno una è sono era erano essere ha hanno abbiamo può deve e o ma se quindi perché che chi cosa "
        "come non né anche solo più molto già io tu lui lei noi voi loro si mi ti ci vi ne questo questa questi queste quello "
        "quella di del della dei degli delle dal dalla a al alla ai alle da in nel nella nei con su sul sulla per tra fra quando "
        "dove così ora ogni tutti tutto dell nell sull all dall"
    ),
    "pt": (
        "o a os as um uma uns umas é são era foi ser está estão há tem têm pode deve e ou mas se então porque que quem qual como "
        "não nem também só mais muito já eu tu ele ela nós eles elas você se me nos lhe isso isto este esta esse essa aquele "
        "aquela de do da dos das em no na nos nas ao à aos às com sem por pelo pela para sobre entre desde até quando onde assim "
        "agora todo todos cada seu sua"
    ),
    "vi": (
        "là và của các những một được có không trong cho với này đó thì mà ở ra vào đến từ khi nếu nhưng cũng đã sẽ đang rất hơn "
        "như vì nên tôi chúng ta bạn họ nó anh người phải theo về lại"
    ),
}
_FUNCTION_SETS: dict[Language, frozenset[str]] = {language: frozenset(row.split()) for language, row in _FUNCTION_WORDS.items()}
# Characters that hold Chinese sentences together and are rare in Japanese.
_CHINESE_ONLY = frozenset("的是了这這那们們吗嗎呢吧你您她它么麼为說说还還没沒让让给給把被我很也就从從")
MIN_HAN_CLAUSE = 6
"""Chinese characters without kana that can be told from Japanese."""


@cache
def _identifier() -> LanguageIdentifier:
    """Returns py3langid's model, loaded once a process from the package's own file; nothing is fetched."""
    from py3langid.langid import _load_identifier  # the public functions share one model, and anyone may narrow it

    identifier = _load_identifier(norm_probs=True, langs=list(LATIN_LANGUAGES))
    # The narrowed tables suffice: the full ones, for a hundred languages, are most of the model's memory.
    identifier.nb_ptc = identifier.nb_ptc.copy()
    identifier._full_model = identifier.nb_ptc, identifier.nb_pc, identifier.nb_classes
    return identifier


@cache
def _ends() -> regex.Pattern[str]:
    import regex

    return regex.compile(r"[。！？｡؟।॥]++[”’」』）)\"']*+|[.!?…]++[\"'”’)\]*_]*+(?=\s|\Z)|\n++")


@cache
def _clause_ends() -> regex.Pattern[str]:
    import regex

    return regex.compile(r"[,;:，；：、—–()（）]++|\s-\s")


def sentences(text: str) -> Iterator[tuple[int, int]]:
    """Yields the spans of the sentences: up to an end mark or a line's end, cut at `MAX_PIECE_CHARS`."""
    yield from _cut(text, 0, len(text), _ends())


def clauses(text: str, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Yields the spans of the clauses of one sentence."""
    yield from _cut(text, start, end, _clause_ends())


def _cut(text: str, start: int, end: int, pattern: regex.Pattern[str]) -> Iterator[tuple[int, int]]:
    begin = start
    stops = [match.end() for match in pattern.finditer(text, start, end)]
    for stop in (*stops, end):
        while stop - begin > MAX_PIECE_CHARS:
            yield begin, begin + MAX_PIECE_CHARS
            begin += MAX_PIECE_CHARS
        if stop > begin:
            yield begin, stop
        begin = stop


def _votes(tokens: Sequence[str], language: Language) -> int:
    function_words = _FUNCTION_SETS[language]
    return sum(token in function_words for token in tokens)


def _tokens(latin: Sequence[Word]) -> list[str]:
    """Returns the words in lower case, `l'eau` as `l` and `eau`; contractions of English stay whole."""
    tokens: list[str] = []
    for word in latin:
        before, apostrophe, after = word.text.lower().replace("’", "'").partition("'")
        tokens += (before, after) if apostrophe and len(before) <= 5 and len(after) > 2 else (word.text.lower(),)
    return tokens


def label_latin(latin: Sequence[Word], *, wanted: frozenset[Language]) -> Language | None:
    """Returns the language of words in Latin letters, in favour of the wanted ones; None where it is unclear or too short.

    Capitalised words count only where too few others are left: German nouns and names look alike. Words that are all capitalised are
    judged where they are too many for a title.
    """
    lower = [word for word in latin if word.text[0].islower()]
    if len(latin) < MIN_WORDS or (len(latin) <= MAX_TITLE_WORDS and not any(len(word.text) > 1 for word in lower)):
        return None
    chosen = lower if len(lower) >= MIN_WORDS else latin
    code, confidence = _identifier().classify(" ".join(word.text.lower() for word in chosen))
    label = cast(Language, code)  # the model was narrowed to languages of the list
    if label in wanted:
        return label
    tokens = _tokens(latin)
    for_label = _votes(tokens, label)
    for_wanted = max((_votes(tokens, language) for language in wanted if language in _FUNCTION_SETS), default=0)
    # `a`, `as`, `do` and `no` are Portuguese and English: votes that the label has too say nothing for the wanted language.
    own = [token for token in tokens if token not in _FUNCTION_SETS[label]]
    none_against = not any(_votes(own, language) for language in wanted if language in _FUNCTION_SETS)
    tie = none_against and confidence >= (MIN_TIE_CONFIDENCE if for_label >= 2 else MIN_LONE_CONFIDENCE)
    sure = confidence >= MIN_CONFIDENCE and ((for_label >= 1 and for_label > for_wanted) or tie)
    return label if sure else None


def is_title(latin: Sequence[Word]) -> bool:
    """Returns whether words look like the English title of a work: not many, and only words like `of` and `the` in lower case."""
    lower = [word.text for word in latin if word.text[0].islower()]
    return len(latin) <= MAX_TITLE_WORDS and len(lower) < len(latin) and all(word in _FUNCTION_SETS["en"] for word in lower)


def guess_latin(latin: Sequence[Word], *, min_votes: int) -> Language | None:
    """Returns the one language that most words of a short text hold together in (`How much?`), None where there is no such one."""
    tokens = _tokens(latin)
    votes: dict[Language, int] = {language: _votes(tokens, language) for language in LATIN_LANGUAGES}
    best: list[Language] = [language for language in LATIN_LANGUAGES if votes[language] == max(votes.values()) >= min_votes]
    return best[0] if len(best) == 1 else None


def is_chinese_run(han: Sequence[Word]) -> bool:
    """Returns whether Chinese characters without kana among them are Chinese and not Japanese: enough, and with Chinese particles."""
    return len(han) >= MIN_HAN_CLAUSE and any(word.text in _CHINESE_ONLY for word in han)
