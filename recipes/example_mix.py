"""Several example streams in exact shares: which example stands at a number is a function of that number alone."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from math import gcd, lcm

from ..model.records import DataError, Example
from .data_config import MixData
from .example_stream import ExampleStream, RowStream


class ShareOrder:
    """An order of parts in which each has had its share of the first n places to within less than one place, for every n.

    Tijdeman's algorithm (The chairman assignment problem, Discrete Mathematics 32, 1980): with k parts the deviation is at most
    1 - 1 / (2k - 2). Where a share of n places is a whole number, it is met exactly. The order repeats after the shares' common
    denominator; it is made as far as it is asked for and kept.
    """

    def __init__(self, shares: Sequence[float | Fraction]) -> None:
        exact = [share if isinstance(share, Fraction) else Fraction(str(share)) for share in shares]
        assert min(exact) > 0, f"shares {exact}: each must be above 0"
        scale = Fraction(lcm(*(share.denominator for share in exact)), gcd(*(share.numerator for share in exact)))
        self._weights = [int(share * scale) for share in exact]
        self.period = sum(self._weights)
        self._parts, self._numbers = array("L"), array("L")
        self._counts = [0] * len(exact)

    def at(self, place: int) -> tuple[int, int]:
        """Returns which part stands at a place, and how many times it stood before it."""
        rounds, within = divmod(place, self.period)
        while len(self._parts) <= within:
            self._append()
        part = self._parts[within]
        return part, rounds * self._weights[part] + self._numbers[within]

    def counts(self, num_places: int) -> list[int]:
        """Returns how often each part stands in the first places."""
        rounds, rest = divmod(num_places, self.period)
        counts = [rounds * weight for weight in self._weights]
        for place in range(rest):
            counts[self.at(place)[0]] += 1
        return counts

    def _append(self) -> None:
        """Gives the next place to the part that would overdraw its share the soonest, among those that are behind far enough."""
        margin = max(1, 2 * len(self._weights) - 2)
        place = len(self._parts) + 1
        # How much of a place each part is behind, times the period; `margin` is on both sides to stay with whole numbers.
        behind = [place * weight - self._counts[part] * self.period for part, weight in enumerate(self._weights)]
        due = [part for part, lag in enumerate(behind) if margin * lag >= self.period]
        chosen = min(due, key=lambda part: (Fraction((margin - 1) * self.period - margin * behind[part], self._weights[part]), part))
        self._parts.append(chosen)
        self._numbers.append(self._counts[chosen])
        self._counts[chosen] += 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """A stream inside a mix."""

    share: float | Fraction
    stream: ExampleStream
    start: int = 0
    """The number of its example that comes first."""


class MixStream:
    """Sources in exact shares, each in its own order."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self.sources = tuple(sources)
        self.order = ShareOrder([source.share for source in sources])
        self.num_rows: int | None = None

    def examples(self, start: int, count: int) -> list[Example]:
        """Returns examples number `start` to `start + count - 1`."""
        places = [self.order.at(place) for place in range(start, start + count)]
        drawn = {}
        for part, source in enumerate(self.sources):
            numbers = [number for other, number in places if other == part]
            if numbers:  # a part's numbers in a window have no gaps
                drawn[part] = iter(source.stream.examples(source.start + numbers[0], len(numbers)))
        return [next(drawn[part]) for part, _ in places]


class NamedStream:
    """A stream whose examples say which part of a mix they come from: ids get its name in front."""

    def __init__(self, name: str, stream: ExampleStream) -> None:
        self.name = name
        self.stream = stream
        self.num_rows = stream.num_rows

    def examples(self, start: int, count: int) -> list[Example]:
        """Returns examples number `start` to `start + count - 1`."""
        return [replace(example, id=f"{self.name}/{example.id}") for example in self.stream.examples(start, count)]


def mix(config: MixData, streams: Mapping[str, ExampleStream], *, seed: int) -> ExampleStream:
    """Returns the parts' streams in the shares of the settings; `seed` orders the rows of each kind where they are told apart.

    Raises `DataError` for `text_only_share` where a part has no end, or where no part has rows of one of the kinds.
    """
    named = {name: NamedStream(name, streams[name]) for name in config.parts}
    if config.text_only_share is None:
        return MixStream([Source(share=part.share, stream=named[name]) for name, part in config.parts.items()])
    text_share = Fraction(str(config.text_only_share))
    return MixStream(
        [
            Source(share=text_share, stream=_of_kind(config, named, is_text=True, seed=seed)),
            Source(share=1 - text_share, stream=_of_kind(config, named, is_text=False, seed=seed)),
        ]
    )


def _of_kind(config: MixData, streams: Mapping[str, ExampleStream], *, is_text: bool, seed: int) -> MixStream:
    sources = []
    for name, part in config.parts.items():
        stream = streams[name]
        if stream.num_rows is None:
            raise DataError(
                f"data.text_only_share: part {name!r} has no end, so its text-only rows cannot be told apart beforehand; give it "
                "num_examples, or leave text_only_share out and make text-only parts with shares of their own"
            )
        rows = stream.examples(0, stream.num_rows)
        chosen = [row for row in rows if (not row.media) == is_text]
        if chosen:
            share = Fraction(str(part.share)) * Fraction(len(chosen), len(rows))
            sources.append(Source(share=share, stream=RowStream(chosen, seed=seed)))
    if not sources:
        kind = "without image or video" if is_text else "with an image or a video"
        raise DataError(f"data.text_only_share = {config.text_only_share}: no part has a row {kind}; leave it out or add such a part")
    return MixStream(sources)
