"""A penalty for texts that go round in circles, over the thinking and the visible part; Chinese is read by character, not as one word.

The text is cut into units: a word, a Chinese character or kana, or one mark of punctuation; a word of more than 32 letters is cut into
its characters, so that `hahaha...` is seen too. A unit is *repeated* when it lies in an n-gram that stood before, at most `window` units
back (its first occurrence is not repeated). Two lengths of n-gram count:

* n units, at least half of them words: prose that comes again, from a stuttered word to a copied paragraph;
* 16 n units of any kind: endless figures and marks. Tables, code and lists repeat short runs of those and are left alone.

    share = repeated units / units                  of one part
    value = max(0, share - tolerated_frac) / (1 - tolerated_frac)        for the part with the larger share

The parts are judged apart: an answer that says again what the thinking found is no repetition, and a long clean thinking part does not
water down an answer that loops. The value is 0.0 for none and 1.0 at most: give the component a negative weight. Penalising n-grams
has no one source; a share of repeated n-grams is what Welleck et al. measure (arXiv:1908.04319, seq-rep-n).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Annotated

from pydantic import Field

from ..model.records import Example, Rollout
from .answers import THINK_CLOSE, THINK_OPEN
from .built_in import BuiltInReward
from .result import RewardResult
from .text_units import CJK

MAX_RESPONSE_CHARS = 400_000
"""Characters of a response that are read; whatever comes after is not."""
MAX_WORD_CHARS = 32
"""A longer run of letters is read by character."""
LONG_FACTOR = 16
"""Times n: length of the n-grams in which figures and marks count as well."""

_UNIT = re.compile(rf"[{CJK}]|[^\W{CJK}]{{1,{MAX_WORD_CHARS}}}(?![^\W{CJK}])|\w|[^\w\s]")


def units(text: str) -> list[str]:
    """Returns the units of a text in order, in lower case."""
    return _UNIT.findall(text.lower())


def repeated_frac(text: str, *, n: int = 12, window: int = 4000) -> float:
    """Returns the share of the text's units that are repeated, as the module says; 0.0 for a text of fewer than n + 1 units."""
    sequence = units(text)
    if len(sequence) <= n:
        return 0.0
    is_word = [any(map(str.isalpha, unit)) for unit in sequence]
    repeated = bytearray(len(sequence))
    _mark_repeated(sequence, repeated, n=n, window=window, is_word=is_word)
    _mark_repeated(sequence, repeated, n=LONG_FACTOR * n, window=window, is_word=None)
    return sum(repeated) / len(sequence)


def _mark_repeated(sequence: Sequence[str], repeated: bytearray, *, n: int, window: int, is_word: Sequence[bool] | None) -> None:
    """Marks the units in n-grams that stood before; with `is_word`, only n-grams of which at least half are words."""
    num_words = sum(is_word[: n - 1]) if is_word else 0
    last_seen: dict[int, int] = {}
    marked_to = 0
    for start, gram in enumerate(_gram_ids(sequence, n)):
        if is_word:
            num_words += is_word[start + n - 1]
            counts = 2 * num_words >= n
            num_words -= is_word[start]
        else:
            counts = True
        if counts and start - last_seen.get(gram, -window - 1) <= window:
            begin = max(start, marked_to)
            marked_to = start + n
            repeated[begin:marked_to] = b"\1" * (marked_to - begin)
        last_seen[gram] = start


def _gram_ids(sequence: Sequence[str], n: int) -> list[int]:
    """Returns a number for each n-gram, equal exactly where the n-grams are; in n log n steps by doubling, whatever n is."""
    numbers: dict[object, int] = {}
    ids = [numbers.setdefault(unit, len(numbers)) for unit in sequence]
    length = 1
    while length < n:
        step = min(length, n - length)
        pairs: dict[object, int] = {}
        ids = [pairs.setdefault(pair, len(pairs)) for pair in zip(ids, ids[step:], strict=False)]
        length += step
    return ids


def parts(text: str) -> tuple[str, ...]:
    """Returns thinking and visible part, or the one part that there is; further think tags divide nothing."""
    thinking, _close, visible = text.partition(THINK_CLOSE)
    return tuple(part for part in (thinking.strip().removeprefix(THINK_OPEN), visible) if part.strip())


def repetition(
    _example: Example,
    rollout: Rollout,
    *,
    n: Annotated[int, Field(ge=4, le=64)] = 12,
    window: Annotated[int, Field(ge=100, le=100_000)] = 4000,
    tolerated_frac: Annotated[float, Field(ge=0.0, le=0.9)] = 0.05,
) -> RewardResult:
    """Returns how much of the response is repeated, from 0.0 (nothing) to 1.0; the module has the formula.

    `n`: units of an n-gram. `window`: how far back a repetition is looked for, units. `tolerated_frac`: share that costs nothing.
    """
    shares = [repeated_frac(part, n=n, window=window) for part in parts(rollout.text[:MAX_RESPONSE_CHARS])]
    share = max(shares, default=0.0)
    value = max(0.0, share - tolerated_frac) / (1.0 - tolerated_frac)
    note = f"{share:.0%} of a part is repeated" if value > 0.0 else ""
    return RewardResult(value=value, note=note, metrics={"repeated_frac": share})


REWARDS: Mapping[str, BuiltInReward] = {
    "repetition": BuiltInReward(
        summary="penalty: share of thinking or answer that repeats itself (n-grams of words and Chinese characters); use a negative weight",
        value_range=(0.0, 1.0),
        gold_value=0.0,
        function=repetition,
    ),
}
