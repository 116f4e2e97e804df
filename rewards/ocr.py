"""Verifier of transcriptions: how close a text is to the example's, by edit distance.

    value = 1 - distance / max(length of the response, length of the answer)

The distance (Levenshtein) counts characters inserted, deleted and replaced. It is computed bit-parallel (Myers, J. ACM 46(3), 1999, in
Hyyrö's form for whole texts) on Python's long integers: memory linear in the texts, and two texts of 10,000 characters take well under a
tenth of a second. Before it, both texts are normalised: Unicode NFC, full-width forms as ASCII, runs of white space as one space, and no
space beside a Chinese, Japanese or Korean character, where line breaks and spacing carry no meaning.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping

from ..model.config import Share
from ..model.records import DataError, Example, Rollout
from .answers import final_answer, normalise_spaces
from .built_in import BuiltInReward
from .result import RewardResult, Unavailable

MAX_RESPONSE_CHARS = 100_000
"""Longest response that is searched for an answer, characters."""
MAX_TEXT_CHARS = 10_000
"""Longest transcription, characters; a longer one is malformed."""

# Kana, CJK punctuation, ideographs with their extensions, Hangul.
_CJK = "\u3001-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7a3\uf900-\ufaff\U00020000-\U0003ffff"
_CJK_SPACE = re.compile(f" (?=[{_CJK}])|(?<=[{_CJK}]) ")
_FENCE = re.compile(r"```[a-z]{0,12}\n(.*)\n```", re.DOTALL)


def edit_distance(first: str, second: str) -> int:
    """Returns the Levenshtein distance in characters; symmetric; time len(first) x len(second) / word size, memory linear."""
    if first == second:
        return 0
    # A common start and end cost nothing, and most predictions that are almost right have them.
    start, shortest = 0, min(len(first), len(second))
    while start < shortest and first[start] == second[start]:
        start += 1
    end = 0
    while end < shortest - start and first[-1 - end] == second[-1 - end]:
        end += 1
    first, second = first[start : len(first) - end], second[start : len(second) - end]
    # The longer text lies in the bits, so that the loop in Python runs over the shorter.
    pattern, text = (first, second) if len(first) >= len(second) else (second, first)
    if not text:
        return len(pattern)
    places: dict[str, int] = {}
    for index, character in enumerate(pattern):
        places[character] = places.get(character, 0) | 1 << index
    mask, highest = (1 << len(pattern)) - 1, 1 << (len(pattern) - 1)
    plus, minus, distance = mask, 0, len(pattern)
    for character in text:
        equal = places.get(character, 0)
        vertical = equal | minus
        horizontal = ((((equal & plus) + plus) ^ plus) | equal) & mask
        up = minus | (mask ^ (horizontal | plus))
        down = plus & horizontal
        if up & highest:
            distance += 1
        elif down & highest:
            distance -= 1
        up = (up << 1 | 1) & mask
        plus = (down << 1 & mask) | (mask ^ (vertical | up))
        minus = up & vertical
    return distance


def similarity(first: str, second: str) -> float:
    """Returns 1 - edit distance / length of the longer text, in [0, 1]; 1.0 exactly for equal texts, two empty ones too."""
    longest = max(len(first), len(second))
    return 1.0 - edit_distance(first, second) / longest if longest else 1.0


def transcription(text: str) -> str:
    """Returns the text as it is compared: NFC, half width, single spaces, none beside a CJK character, no code fence around it."""
    stripped = text.strip()
    fenced = _FENCE.fullmatch(stripped)
    return _CJK_SPACE.sub("", normalise_spaces(unicodedata.normalize("NFC", fenced.group(1) if fenced else stripped)))


def check_ocr_answer(example: Example) -> None:
    """Raises a `DataError` if the example's answer is empty or too long."""
    if not 0 < len(example.answer) <= MAX_TEXT_CHARS or not transcription(example.answer):
        raise DataError(
            f"example {example.id!r}: an answer of {len(example.answer)} characters; "
            f"`ocr` compares with 1 to {MAX_TEXT_CHARS} that are not all white space"
        )


def ocr(example: Example, rollout: Rollout, *, ignore_case: bool = False, min_similarity: Share = 0.0) -> RewardResult | Unavailable:
    """Returns 1 - normalised edit distance of the final answer from the example's text, in [0, 1]; 0.0 below `min_similarity`."""
    try:
        check_ocr_answer(example)
    except DataError as error:
        return Unavailable(reason=str(error))
    if len(rollout.text) > MAX_RESPONSE_CHARS:
        return RewardResult(value=0.0, note=f"a response of {len(rollout.text)} characters; at most {MAX_RESPONSE_CHARS} are read")
    prediction = final_answer(rollout.text, prompt_suffix=rollout.prompt_suffix)
    if prediction is None:
        return RewardResult(value=0.0, note="no final answer, or several that differ")
    if len(prediction) > MAX_TEXT_CHARS:
        return RewardResult(value=0.0, note=f"a transcription of {len(prediction)} characters; at most {MAX_TEXT_CHARS} are read")
    texts = [transcription(prediction), transcription(example.answer)]
    found = similarity(*(text.casefold() for text in texts)) if ignore_case else similarity(*texts)
    return RewardResult(value=found if found >= min_similarity else 0.0, metrics={"similarity": found})


REWARDS: Mapping[str, BuiltInReward] = {
    "ocr": BuiltInReward(
        summary="1 - normalised edit distance from the example's text",
        value_range=(0.0, 1.0),
        check_answer=check_ocr_answer,
        function=ocr,
    ),
}
