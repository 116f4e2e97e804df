"""A curriculum: the rows of a curated data set by the pass rate that was measured of them, one band after another."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from ..model.records import DataError, Example
from .curate_reader import read_notes
from .data_config import CuratedData
from .example_stream import RowStream


class BandStream:
    """Streams one after another: each has its number of examples, the last all that follow."""

    num_rows: int | None = None
    """The order is not that of epochs over all rows."""

    def __init__(self, streams: Sequence[RowStream], num_examples: Sequence[int]) -> None:
        """`num_examples` are those of all streams but the last."""
        self.streams = streams
        self.starts = [0, *accumulate(num_examples)]

    def examples(self, start: int, count: int) -> list[Example]:
        """Returns examples number `start` to `start + count - 1`."""
        found: list[Example] = []
        for stream, first, end in zip(self.streams, self.starts, [*self.starts[1:], start + count], strict=True):
            low, high = max(start, first), min(start + count, end)
            if low < high:
                found += stream.examples(low - first, high - low)
        return found


def by_pass_rate(rows: Sequence[Example], config: CuratedData, *, seed: int) -> BandStream:
    """Returns the rows in the order of the curriculum; a `DataError` where a row has no pass rate, or a band no rows."""
    curriculum = config.curriculum
    assert curriculum is not None
    notes = read_notes(config.path, split=config.split)
    key = f"pass_rate/{curriculum.model}"
    without = [row.id for row in rows if key not in notes[row.id]]
    if without:
        models = sorted({name.removeprefix("pass_rate/") for note in notes.values() for name in note if name.startswith("pass_rate/")})
        raise DataError(
            f"{config.path}: curriculum.model = {curriculum.model!r}: row {without[0]!r} and {len(without) - 1} more have no pass rate of "
            f"it; the step `difficulty` measured {', '.join(models) or 'none'}"
        )
    streams = []
    for number, band in enumerate(curriculum.bands):
        lowest, highest = band.pass_rate
        of_band = [row for row in rows if lowest <= notes[row.id][key] <= highest]
        if not of_band:
            rates = sorted({notes[row.id][key] for row in rows})
            raise DataError(
                f"{config.path}: curriculum.bands[{number}].pass_rate = {list(band.pass_rate)}: no row of split {config.split!r} lies "
                f"there; the rates are {rates[0]:g} to {rates[-1]:g}"
            )
        streams.append(RowStream(of_band, seed=seed))
    return BandStream(streams, [band.num_examples for band in curriculum.bands if band.num_examples is not None])
