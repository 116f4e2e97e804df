"""The steps `split` and `mix` of `vlpost curate`: which side a row stands on, and how many rows of each source stay."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from fractions import Fraction
from itertools import accumulate

from ..model.records import DataError
from .curate_config import MixConfig, SplitConfig
from .curate_step import CuratedRow, RowKey, StepContext, StepResult

# ---------------------------------------------------------------- split


class SplitStep:
    """Opens `split`."""

    def __init__(self, config: SplitConfig) -> None:
        self._config = config

    def open(self, context: StepContext) -> nullcontext[OpenSplit]:
        """Returns the step."""
        return nullcontext(OpenSplit(self._config, seed=context.seed))


class OpenSplit:
    """Names a split for each row."""

    def __init__(self, config: SplitConfig, *, seed: int) -> None:
        self._config = config
        self._seed = seed
        self._sides: Mapping[str, str] = {}

    def survey(self, keys: Sequence[RowKey]) -> None:
        """Decides on all rows: rows that hang together by images are one draw."""
        families = image_families(keys) if self._config.by == "image" else {key.id: key.id for key in keys}
        self._sides = {row_id: side_of(family, self._config.shares, seed=self._seed) for row_id, family in families.items()}

    def run(self, rows: Sequence[CuratedRow], *, shard: int) -> StepResult:
        """Returns all rows with `notes["split"]`."""
        kept = tuple(replace(row, notes={**row.notes, "split": self._sides[row.example.id]}) for row in rows)
        return StepResult(rows=kept, metrics=dict(Counter(f"rows/{row.notes['split']}" for row in kept)))


def image_families(keys: Sequence[RowKey]) -> dict[str, str]:
    """Returns row id -> name of its family: rows that share an image, directly or through other rows.

    The name is the smallest digest of the family, so that it does not depend on the order of the rows; a row without images is its own.
    """
    above: dict[str, str] = {}

    def root(digest: str) -> str:
        while above[digest] != digest:
            above[digest] = digest = above[above[digest]]
        return digest

    for key in keys:
        for digest in key.digests:
            above.setdefault(digest, digest)
        for digest in key.digests[1:]:
            first, second = sorted((root(key.digests[0]), root(digest)))
            above[second] = first
    return {key.id: root(key.digests[0]) if key.digests else f"row {key.id}" for key in keys}


def side_of(family: str, shares: Mapping[str, float], *, seed: int) -> str:
    """Returns the split of a family: a number in [0, 1) from a hash of seed and family, looked up in the running sum of the shares."""
    number = _uniform(f"{seed}/split/{family}")
    return next((name for name, upper in zip(shares, accumulate(shares.values()), strict=True) if number < upper), list(shares)[-1])


def _uniform(text: str) -> float:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48


# ---------------------------------------------------------------- mix


class MixStep:
    """Opens `mix`."""

    def __init__(self, config: MixConfig) -> None:
        self._config = config

    def open(self, context: StepContext) -> nullcontext[OpenMix]:
        """Returns the step."""
        return nullcontext(OpenMix(self._config, seed=context.seed))


class OpenMix:
    """Keeps so many rows of each source, or task, that the shares hold."""

    def __init__(self, config: MixConfig, *, seed: int) -> None:
        self._config = config
        self._seed = seed
        self._kept: frozenset[str] = frozenset()

    def survey(self, keys: Sequence[RowKey]) -> None:
        """Decides how many rows of each name stay, and which: those with the smallest hash of seed and id."""
        by_name: dict[str, list[str]] = {}
        for key in keys:
            by_name.setdefault(key.source if self._config.by == "source" else key.task, []).append(key.id)
        quotas = mix_quotas(
            {name: len(ids) for name, ids in by_name.items()}, self._config.shares, num_rows=self._config.num_rows, by=self._config.by
        )
        self._kept = frozenset(
            row_id
            for name, quota in quotas.items()
            for row_id in sorted(by_name[name], key=lambda row_id: _uniform(f"{self._seed}/mix/{row_id}"))[:quota]
        )

    def run(self, rows: Sequence[CuratedRow], *, shard: int) -> StepResult:
        """Returns the rows that stay."""
        dropped, metrics = [], Counter[str]()
        for row in rows:
            name = row.example.source if self._config.by == "source" else row.example.task
            if row.example.id in self._kept:
                metrics[f"rows/{name}"] += 1
            elif name in self._config.shares:
                dropped.append((row.example.id, f"over the share of {self._config.by} {name!r}"))
            else:
                dropped.append((row.example.id, f"{self._config.by} {name!r} is not in the mix"))
        kept = tuple(row for row in rows if row.example.id in self._kept)
        return StepResult(rows=kept, dropped=tuple(dropped), metrics=dict(metrics))


def mix_quotas(there: Mapping[str, int], shares: Mapping[str, float], *, num_rows: int | None, by: str) -> dict[str, int]:
    """Returns how many rows of each name stay: `num_rows` times its share, by largest remainder, none repeated.

    Without `num_rows` as many as the scarcest name allows. Raises `DataError` for a name without rows, or when there are too few.
    """
    absent = [name for name in shares if not there.get(name)]
    if absent:
        listed = ", ".join(f"{name} ({count})" for name, count in there.items())
        raise DataError(f"mix: no row is of {by} {absent[0]!r}; there are {listed}")
    total = sum(Fraction(str(share)) for share in shares.values())
    exact = {name: Fraction(str(share)) / total for name, share in shares.items()}
    wanted = num_rows if num_rows is not None else int(min(there[name] / share for name, share in exact.items()))
    quotas = {name: int(wanted * share) for name, share in exact.items()}
    by_remainder = sorted(exact, key=lambda name: quotas[name] - wanted * exact[name])
    for name in by_remainder[: wanted - sum(quotas.values())]:
        quotas[name] += 1
    short = [name for name in quotas if quotas[name] > there[name]]
    if num_rows is not None and short:
        name = short[0]
        raise DataError(f"mix: num_rows = {num_rows} asks for {quotas[name]} rows of {by} {name!r}, there are {there[name]}; lower it")
    return {name: min(quota, there[name]) for name, quota in quotas.items()}
