"""Counting in texts of any language: words, sentences, paragraphs and the marks of Markdown. Each function is linear in the text.

A word is a run of letters, digits and underscores, as in IFEval (arXiv:2311.07911, `\\w+`), except that each Chinese character and each
Japanese kana is a word of its own. Languages that write no spaces in other scripts (Thai, Lao, Khmer) are counted by runs all the same.
"""

from __future__ import annotations

import re

CJK = "\u3005-\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003134f"
"""Characters that are words of their own, as the inside of a character class: Chinese characters and kana."""

# Vowel signs and other marks that stand on letters: Python does not count them among those.
_MARKS = "\u0300-\u036f\u0591-\u05bd\u064b-\u065f\u0900-\u0963\u0966-\u0dff\u0e31-\u0e4e"
_WORD = re.compile(rf"[{CJK}]|[^\W{CJK}](?:[^\W{CJK}]+|[{_MARKS}]+)*")
_CJK_CHARACTER = re.compile(rf"[{CJK}]")
# The possessive parts and the end that always matches keep each character from being looked at twice.
_SENTENCE_END = re.compile(r"(?P<wide>[。！？｡][。！？｡!?]*+[”’」』）)\"']*+)|(?P<mark>[.!?…]++)[\"'”’)\]*_]*+(?P<space>\s|\Z)?")
_ABBREVIATIONS = frozenset({"mr", "mrs", "ms", "dr", "prof", "st", "sr", "jr", "vs", "etc", "eg", "ie", "cf", "fig", "eq", "al", "approx"})
_LAST_TOKEN = re.compile(r"[^\s(\[\"'“‘]{1,20}\Z")
_LIST_NUMBER = re.compile(r"(?:\A|\n)[ \t]*[0-9]{1,3}\Z")
_BULLET = re.compile(r"[ \t]*[*+•·‣–-][ \t]+\S")
_NUMBER = r"(?:[0-9]{1,4}|[一二三四五六七八九十百]{1,6})"
_NUMBERED = re.compile(rf"[ \t]*(?:[(（]({_NUMBER})[)）]|([0-9]{{1,4}})[.):：．、]|([一二三四五六七八九十百]{{1,6}})、)[ \t]*(?=\S)")
_TITLE = re.compile(r"<<([^<>\n]{1,500})>>|《([^《》\n]{1,500})》")
_HIGHLIGHT = re.compile(r"\*\*(?!\s)[^*\n]+(?<!\s)\*\*|\*(?!\s)[^*\n]+(?<!\s)\*")
_PLACEHOLDER = re.compile(r"\[([^\[\]【】\n]{1,400})\](?!\()|【([^【】\[\]\n]{1,400})】")
_DIVIDER = re.compile(r"[ \t]*\*(?:[ \t]*\*){2,}[ \t]*")
_CHINESE_DIGITS = {character: number for number, character in enumerate("零一二三四五六七八九")}


def is_cjk(character: str) -> bool:
    """Returns whether the character is a word of its own."""
    return _CJK_CHARACTER.match(character) is not None


def words(text: str) -> list[str]:
    """Returns the words in order: `It's 3 猫们` has `It`, `s`, `3`, `猫`, `们`."""
    return _WORD.findall(text)


def num_words(text: str) -> int:
    """Returns how many words the text has."""
    return len(words(text))


def num_sentences(text: str) -> int:
    """Returns how many sentences the text has; at least one word each.

    A sentence ends at `.`, `!`, `?` or `…` before white space, at `。`, `！` or `？` anywhere, and with its paragraph. A full stop after a
    common abbreviation, one letter (`J. Smith`), a list's number or inside a number does not end it. IFEval asks NLTK's Punkt instead,
    which is a trained model and English.
    """
    count = 0
    for paragraph in paragraphs(text):
        start = 0
        for match in _SENTENCE_END.finditer(paragraph):
            ends = match["wide"] is not None or match["space"] is not None or match.end() == len(paragraph)
            if not ends or (match["mark"] == "." and _is_abbreviated(paragraph[max(start, match.start() - 20) : match.start()])):
                continue
            count += _WORD.search(paragraph, start, match.start()) is not None
            start = match.end()
        count += _WORD.search(paragraph, start) is not None
    return count


def _is_abbreviated(before: str) -> bool:
    if _LIST_NUMBER.search(before):
        return True
    token = _LAST_TOKEN.search(before)
    parts = token.group().lower().split(".") if token else []
    return ".".join(parts) in _ABBREVIATIONS or (parts not in ([], ["i"]) and all(re.fullmatch("[a-z]", part) for part in parts))


def paragraphs(text: str) -> list[str]:
    """Returns the paragraphs: runs of lines that are not blank, trimmed."""
    found: list[list[str]] = [[]]
    for line in text.splitlines():
        if line.strip():
            found[-1].append(line)
        elif found[-1]:
            found.append([])
    return ["\n".join(lines).strip() for lines in found if lines]


def divided_parts(text: str) -> list[str]:
    """Returns the parts between lines of three or more stars, trimmed; empty ones are left out."""
    parts: list[list[str]] = [[]]
    for line in text.splitlines():
        if _DIVIDER.fullmatch(line):
            parts.append([])
        else:
            parts[-1].append(line)
    return [part for lines in parts if (part := "\n".join(lines).strip())]


def num_characters(text: str) -> int:
    """Returns how many characters the text has, white space left out."""
    return sum(map(len, text.split()))


def num_bullets(text: str) -> int:
    """Returns how many lines begin with `*`, `-`, `+`, `•`, `·`, `‣` or `–`, white space, and something.

    IFEval wants no white space and no `+` or `•`, so that `-5` and a rule `---` are bullets to it.
    """
    return sum(_BULLET.match(line) is not None for line in text.splitlines())


def num_numbered_items(text: str) -> int:
    """Returns how many lines begin with the next number of a list: `1.`, `2)`, `(3)`, `4、`, `五、`; a list starts at 1, and may again."""
    expected = 1
    count = 0
    for line in text.splitlines():
        if match := _NUMBERED.match(line):
            number = numeral(next(group for group in match.groups() if group))
            if number in (expected, 1):
                count += 1
                expected = number + 1
    return count


def numeral(text: str) -> int:
    """Returns the number that Arabic or Chinese digits (up to 百) write."""
    if text.isascii():
        return int(text)
    total, digit = 0, 0
    for character in text:
        if character in "十百":
            total += max(1, digit) * (10 if character == "十" else 100)
            digit = 0
        else:
            digit = _CHINESE_DIGITS[character]
    return total + digit


def titles(text: str) -> list[str]:
    """Returns what stands in `<<...>>` or `《...》` on one line and is not blank."""
    return [title for match in _TITLE.finditer(text) if (title := (match[1] or match[2]).strip())]


def num_highlights(text: str) -> int:
    """Returns how many spans are `*emphasised*` or `**strong**` on one line; a bullet's star is none (in IFEval it may be)."""
    return len(_HIGHLIGHT.findall(text))


def num_placeholders(text: str) -> int:
    """Returns how many `[...]` or `【...】` there are on one line; the text of a Markdown link is none (in IFEval it is)."""
    return sum(bool((match[1] or match[2]).strip()) for match in _PLACEHOLDER.finditer(text))


def num_capital_words(text: str) -> int:
    """Returns how many words are in capital letters alone, as IFEval: `I` is one, `B2` too."""
    return sum(word.isupper() for word in words(text))


def num_sections(text: str, *, marker: str) -> int:
    """Returns how many lines begin with the marker and a number not seen before: `Section 2`, `## SECTION 3`, `第二章` for `章`."""
    literal = re.escape(marker)
    forms = rf"{literal}[ \t]{{0,4}}({_NUMBER})"
    if is_cjk(marker[:1]):
        forms = rf"第[ \t]{{0,4}}({_NUMBER})[ \t]{{0,4}}{literal}|{forms}"
    heading = re.compile(rf"[ \t#*>]{{0,12}}(?:{forms})(?![0-9A-Za-z])", re.IGNORECASE)
    found = (heading.match(line) for line in text.splitlines())
    return len({numeral(next(group for group in match.groups() if group)) for match in found if match})


def num_occurrences(text: str, *, phrase: str) -> int:
    """Returns how often the phrase stands in the text as whole words, case aside; Chinese has no word ends, so there any place counts."""
    return len(phrase_pattern((phrase,)).findall(text))


def phrase_pattern(phrases: tuple[str, ...]) -> re.Pattern[str]:
    """Returns a pattern that finds any of the phrases as whole words, the longest first; white space matches any run of it."""
    return re.compile("|".join(map(_phrase_source, sorted(phrases, key=len, reverse=True))), re.IGNORECASE)


def _phrase_source(phrase: str) -> str:
    inner = r"\s+".join(map(re.escape, phrase.split()))
    # A Chinese neighbour does not make an English word longer.
    edge = rf"[^\W{CJK}]"
    first, last = phrase.strip()[0], phrase.strip()[-1]
    before = rf"(?<!{edge})" if re.match(edge, first) else ""
    after = rf"(?!{edge})" if re.match(edge, last) else ""
    return f"{before}{inner}{after}"
