"""The steps `dedupe` and `decontaminate` of `vlpost curate`: rows that stood before, and rows that stand in an evaluation set."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

from ..model.records import Example, Part, TextPart
from .curate_alike import Hash, bands, chunks, distance, jaccard, ngrams, picture_hashes, plain_words
from .curate_config import DecontaminateConfig, DedupeConfig
from .curate_query import as_query, given_answer
from .curate_source import finite_examples
from .curate_step import CuratedRow, StepContext, StepResult


def asked_text(example: Example) -> str:
    """Returns what a row asks: the texts of its user's and tools' turns before the assistant's last, a line each."""
    return "\n".join(message.text for message in as_query(example).messages if message.role in ("user", "tool"))


# ---------------------------------------------------------------- dedupe


@dataclass(frozen=True, kw_only=True, slots=True)
class _Seen:
    """What is remembered of a row that was kept."""

    id: str
    same: bytes
    """Hash of what near duplicates have exactly alike: answer, system message, tools."""
    grams: Hash
    pictures: tuple[Hash, ...]


class DedupeStep:
    """Opens `dedupe`."""

    def __init__(self, config: DedupeConfig) -> None:
        self._config = config

    def open(self, context: StepContext) -> nullcontext[OpenDedupe]:
        """Returns the step, which has seen no row."""
        return nullcontext(OpenDedupe(self._config))


class OpenDedupe:
    """Knows the rows that were kept so far: their hashes, n-grams and pictures' hashes, some hundred bytes and 8 a word for each."""

    def __init__(self, config: DedupeConfig) -> None:
        self._config = config
        self._exact: dict[bytes, tuple[str, bytes]] = {}
        self._near: dict[bytes, list[_Seen]] = {}

    def observe(self, kept: Sequence[CuratedRow]) -> None:
        """Takes in what was kept of a shard that an earlier process finished."""
        for row in kept:
            self._take_in(row, *self._near_keys(row))

    def run(self, rows: Sequence[CuratedRow], *, shard: int) -> StepResult:
        """Returns the rows that no kept row before them equals."""
        kept, dropped = [], []
        metrics: Counter[str] = Counter()
        for row in rows:
            found = self._exact.get(_exact_key(row.example))
            if found is not None:
                same_answer = found[1] == _same(row.example)
                head = "duplicate" if same_answer else "duplicate with another answer"
                dropped.append((row.example.id, f"{head}: of row {found[0]}, same text and images"))
                continue
            seen, keys = self._near_keys(row)
            near = self._find_near(seen, keys)
            if near is not None:
                dropped.append((row.example.id, f"near duplicate: of row {near[0]}, {near[1]}"))
                continue
            self._take_in(row, seen, keys)
            kept.append(row)
        metrics["compared"] = len(rows)
        return StepResult(rows=tuple(kept), dropped=tuple(dropped), metrics=dict(metrics))

    def _near_keys(self, row: CuratedRow) -> tuple[_Seen, tuple[bytes, ...]]:
        """Returns what is compared of a row, and keys of which two near duplicates share at least one, texts with high probability."""
        config, example = self._config, as_query(row.example)
        pictures = tuple(picture_hashes(part) for part in example.media) if config.near else ()
        grams = ngrams(plain_words(asked_text(example)), config.ngram_words)
        seen = _Seen(id=example.id, same=_same(row.example), grams=grams, pictures=pictures)
        if not config.near:
            return seen, ()
        # Rows with images go by those: a thousand rows may ask the same of a thousand images.
        pieces = chunks(pictures[0], max_distance=config.max_image_distance) if pictures else bands(grams)
        return seen, tuple(seen.same + piece for piece in pieces)

    def _find_near(self, row: _Seen, keys: Sequence[bytes]) -> tuple[str, str] | None:
        """Returns the first kept row that nearly equals this one, and how near it is."""
        compared: set[str] = set()
        for key in keys:
            for other in self._near.get(key, ()):
                if other.id in compared:
                    continue
                compared.add(other.id)
                if len(other.pictures) != len(row.pictures):
                    continue
                apart = max((distance(a, b) for a, b in zip(row.pictures, other.pictures, strict=True)), default=0)
                if apart > self._config.max_image_distance:
                    continue
                similarity = jaccard(row.grams, other.grams)
                if similarity >= self._config.min_similarity:
                    images = f", images {apart} of 256 bits apart" if row.pictures else ""
                    return other.id, f"texts {similarity:.2f} alike{images}"
        return None

    def _take_in(self, row: CuratedRow, seen: _Seen, keys: Sequence[bytes]) -> None:
        self._exact[_exact_key(row.example)] = (row.example.id, seen.same)
        for key in keys:
            self._near.setdefault(key, []).append(seen)


def _same(example: Example) -> bytes:
    """Returns a hash of the answer (of a conversation without one: what is visible of its last turn), the system message and the tools.

    Without the last turn all questions about one long text would be near duplicates in a set that is made for SFT.
    """
    system = [(message.text, message.tools) for message in example.messages if message.role == "system"]
    described = [" ".join(given_answer(example).split()).casefold(), system]
    return hashlib.blake2b(json.dumps(described, ensure_ascii=False).encode(), digest_size=16).digest()


def _exact_key(example: Example) -> bytes:
    """Returns a hash of what a row asks: roles, texts and the places of its images, up to the assistant's last turn."""
    described = [
        [
            message.role,
            [_described(part) for part in message.parts],
            [[call.name, call.arguments] for call in message.tool_calls],
            message.tools,
        ]
        for message in as_query(example).messages
    ]
    return hashlib.sha256(json.dumps(described, ensure_ascii=False).encode()).digest()


def _described(part: Part) -> list[str]:
    return ["text", " ".join(part.text.split())] if isinstance(part, TextPart) else ["media", part.digest]


# ---------------------------------------------------------------- decontaminate


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationSets:
    """What is looked for: by n-gram, by whole text, by digest and by piece of a picture's hash -> set and row."""

    grams: Mapping[int, str]
    texts: Mapping[tuple[str, ...], str]
    digests: Mapping[str, str]
    pictures: Mapping[bytes, Sequence[tuple[Hash, str]]]


class DecontaminateStep:
    """Opens `decontaminate`."""

    def __init__(self, config: DecontaminateConfig) -> None:
        self._config = config

    @contextmanager
    def open(self, context: StepContext) -> Iterator[OpenDecontaminate]:
        """Yields the step with the evaluation sets read."""
        yield OpenDecontaminate(self._config, read_evaluation_sets(self._config, seed=context.seed))


def read_evaluation_sets(config: DecontaminateConfig, *, seed: int) -> EvaluationSets:
    """Returns the index of all evaluation sets of a recipe; a row that two sets hold is named after the first."""
    grams: dict[int, str] = {}
    texts: dict[tuple[str, ...], str] = {}
    digests: dict[str, str] = {}
    pictures: dict[bytes, list[tuple[Hash, str]]] = {}
    for name, data in config.against.items():
        for example in finite_examples(data, conversations=False, seed=seed, place=f"against.{name}"):
            place = f"row {example.id} of {name}"
            asked = plain_words(asked_text(example))
            if len(asked) < config.ngram_words:
                if asked:  # two questions without a word, by image alone, have no words in common
                    texts.setdefault(asked, place)
            else:
                for gram in ngrams(asked, config.ngram_words).tolist():
                    grams.setdefault(gram, place)
            for part in example.media:
                if part.digest in digests:
                    continue
                digests[part.digest] = place
                picture = picture_hashes(part)
                for key in chunks(picture, max_distance=config.max_image_distance):
                    pictures.setdefault(key, []).append((picture, place))
    return EvaluationSets(grams=grams, texts=texts, digests=digests, pictures=pictures)


class OpenDecontaminate:
    """Looks for rows of evaluation sets."""

    def __init__(self, config: DecontaminateConfig, sets: EvaluationSets) -> None:
        self._config = config
        self._sets = sets

    def run(self, rows: Sequence[CuratedRow], *, shard: int) -> StepResult:
        """Returns the rows that share neither image nor words with an evaluation set."""
        kept, dropped = [], []
        for row in rows:
            problem = self._problem(row.example)
            if problem is None:
                kept.append(row)
            else:
                dropped.append((row.example.id, problem))
        return StepResult(rows=tuple(kept), dropped=tuple(dropped))

    def _problem(self, example: Example) -> str | None:
        for part in example.media:
            place = self._sets.digests.get(part.digest)
            if place is not None:
                return f"image of an evaluation set: {place} has it"
            near = self._near_picture(picture_hashes(part))
            if near is not None:
                return f"image like one of an evaluation set: {near}"
        if example.media and self._config.rows_with_images == "by_image":
            return None
        asked = plain_words(asked_text(example))
        if asked in self._sets.texts:
            return f"text of an evaluation set: {self._sets.texts[asked]} asks the same"
        if len(asked) < self._config.ngram_words:
            return None
        for start in range(len(asked) - self._config.ngram_words + 1):
            gram = asked[start : start + self._config.ngram_words]
            place = self._sets.grams.get(int(ngrams(gram, self._config.ngram_words)[0]))
            if place is not None:
                return f"words of an evaluation set: {place} has `{' '.join(gram)}`"
        return None

    def _near_picture(self, picture: Hash) -> str | None:
        limit = self._config.max_image_distance
        for key in chunks(picture, max_distance=limit):
            for other, place in self._sets.pictures.get(key, ()):
                apart = distance(picture, other)
                if apart <= limit:
                    return f"{place}, {apart} of 256 bits apart"
        return None
