"""The reward `llm_judge`: a model's verdict on what no rule can check, from any OpenAI-compatible server.

Scores on the axes of a rubric, against the example's answer or not, or the better one of two responses. Only the visible part of a
response is shown. What could not be judged is `Unavailable`; a response that thinks without end or says nothing gets 0.0 unasked.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import logging
import math
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

from PIL import Image as PILImage
from pydantic import Field

from ..model.config import Settings
from ..model.records import Example, ImagePart
from .answers import strip_thinking
from .built_in import BuiltInReward, Row, TimedVerdict, Verdict
from .cache import VerdictCache
from .config import RewardConfigError, RewardsConfig
from .judge_client import JudgeClient, JudgeError, Question, shared_client
from .judge_config import JudgeConfig
from .judge_prompt import PROMPT_VERSION, Data, Rubric, load_rubric, render, shorten, turns
from .judge_server import model_state
from .result import RewardResult, Unavailable

MAX_SHOWN_CANARIES = 10
MAX_NOTE_CHARS = 1000
OPENERS = frozenset(
    (
        *("thoughtprocess", "letssolvethisproblemstepbystep", "letssolvethisstepbystep", "letsthinkstepbystep", "letmethinkaboutit"),
        *("solution", "answer", "finalanswer", "theansweris", "hereistheanswer", "respuesta", "lösung", "解", "答案", "かいせつ"),
    )
)
"""Letters of responses that announce an answer and give none. As whole responses they win false positives from strong judges where an
answer is compared with (arXiv 2507.08794), so no judge is asked."""
_NO_WORK = 0.0
_LOG = logging.getLogger(__name__)


class JudgeDriftError(JudgeError):
    """The judge gets questions wrong whose verdict is known; the message says which, and how they were judged."""


class LlmJudgeOptions(Settings):
    """Options of `llm_judge`."""

    rubric: str = "correctness"
    """`correctness` (right or wrong against the answer), `general` (four axes against a reference response), `pairwise`, or a YAML
    file, its path relative to the recipe."""
    weights: dict[str, float] = Field(default_factory=dict)
    """Weights of axes in the value, in place of the rubric's."""
    reference: bool = True
    """Whether the example's answer is shown, where the rubric leaves that open."""
    images: bool = False
    """True: the example's images, and up to `max_frames` frames of its videos, are sent along as PNG."""
    max_frames: int = Field(default=8, ge=1)
    """Frames of one video, evenly spread."""
    opponents: Literal["reference", "group"] = "reference"
    """Pairwise: whom a response is compared with, the example's answer or other responses of its group."""
    max_opponents: int = Field(default=2, ge=1)
    """Pairwise in a group: each distinct response meets this many others as challenger, and as many as challenged; two requests each."""
    max_response_chars: int = Field(default=16_000, ge=200)
    """A longer response is shown by its beginning and end, characters; so is a longer answer or turn of the prompt."""


class Cache(Protocol):
    """Keeps JSON objects by a text key."""

    def get(self, key: str) -> dict[str, Any] | None:
        """Returns what was put under the key, or None."""
        ...

    def put(self, key: str, value: Mapping[str, Any]) -> None:
        """Keeps the value."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class _Case:
    """One question to the judge, by content."""

    field: Data
    images: tuple[str, ...]
    """Keys into the judge's pictures"""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Answered:
    verdict: dict[str, Any] | Unavailable
    seconds: float
    tokens: int


@dataclass(slots=True)
class _Contest:
    """What is asked about one row: nothing, one case, or pairs in both orders."""

    settled: Verdict | None = None
    case: str = ""
    pairs: list[tuple[str, str]] = field(default_factory=list)
    """Case keys with this response as `first` and as `second`"""
    unasked: list[float] = field(default_factory=list)
    """Outcomes against opponents that need no judge"""

    def case_keys(self) -> list[str]:
        """Returns the keys of the cases that its outcome rests on."""
        return [self.case] if self.case else [key for pair in self.pairs for key in pair]


class LlmJudge:
    """Judges rows by one rubric; not safe for several threads at once."""

    def __init__(
        self,
        options: LlmJudgeOptions,
        *,
        rubric: Rubric,
        client: JudgeClient,
        config: JudgeConfig,
        model_state: str,
        cache: Cache | None,
    ) -> None:
        self._options = options
        self._rubric = rubric
        self._client = client
        self._config = config
        self._cache = cache
        self._shows_reference = rubric.reference == "required" or (rubric.reference == "optional" and options.reference)
        self._weights = _weights(rubric, options)
        # All that a verdict depends on beside the data field and the images.
        self._key_base = json.dumps(
            {
                "prompt": PROMPT_VERSION,
                "model": [client.model, model_state],
                "rubric": rubric.version,
                "sampling": [config.temperature, config.max_tokens, config.seed, config.extra_body],
            },
            sort_keys=True,
        )
        self._lock = threading.Lock()
        self._cases: dict[str, _Case] = {}
        self._pictures: dict[str, str] = {}
        self._until_canaries = 0
        self._uncertain_keys: list[str] = []
        self._canary_accuracy: float | None = None

    @property
    def is_unsafe(self) -> bool:
        """False: a judge reads, it runs nothing."""
        return False

    def describe(self) -> str:
        """Returns which model judges by which rubric."""
        return f"judge: model {self._client.model}, rubric {self._rubric.name} version {self._rubric.version[:12]}"

    def judge(self, rows: Sequence[Row]) -> list[TimedVerdict]:
        """Returns a verdict for each row, in order; rows of one example are a group.

        Raises a `JudgeBudgetError` when a cap is reached and a `JudgeDriftError` when canaries are judged wrong: both end the run.
        """
        with self._lock:
            self._cases, self._pictures = {}, {}
            contests = self._contests(rows)
            answered = self._answer(list(self._cases))
            num_users = Counter(key for contest in contests for key in contest.case_keys())
            return [self._outcome(contest, answered, num_users) for contest in contests]

    def check_canaries(self) -> bool:
        """Asks all canaries of the rubric; returns whether at least half of them got a verdict, without which nothing follows.

        Below `min_canary_accuracy` of those with a verdict it raises a `JudgeDriftError`.
        """
        asked = []
        for canary in self._rubric.canaries:
            prompt = [{"role": "user", "text": canary.prompt}]
            reference = {"reference": canary.reference} if self._shows_reference and canary.reference else {}
            if self._rubric.kind == "axes":
                asked.append([{"prompt": prompt, **reference, "response": canary.response}])
            else:
                both = (canary.response, canary.opponent), (canary.opponent, canary.response)
                asked.append([{"prompt": prompt, **reference, "first": first, "second": second} for first, second in both])
        replies = iter(self._client.ask([self._question(case) for cases in asked for case in cases]))
        results = [[next(replies).verdict for _ in cases] for cases in asked]
        shown, num_right, num_judged = [], 0, 0
        for canary, verdicts in zip(self._rubric.canaries, results, strict=True):
            judged = [verdict for verdict in verdicts if not isinstance(verdict, Unavailable)]
            if len(judged) < len(verdicts):
                continue
            num_judged += 1
            if self._rubric.kind == "axes":
                value = self._rubric.value(judged[0], weights=self._weights)
            else:
                value = pair_outcome(judged[0]["winner"], judged[1]["winner"])
            is_right = value > 0.5 if canary.expected == "good" else value < 0.5
            num_right += is_right
            if not is_right:
                shown.append(
                    f"  {canary.name}: {canary.response[:80]!r} is {canary.expected}, judged {value:.3g}: {json.dumps(judged)[:400]}"
                )
        if 2 * num_judged < len(self._rubric.canaries):
            return False
        self._canary_accuracy = num_right / num_judged
        if self._canary_accuracy < self._config.min_canary_accuracy:
            self._withdraw()
            raise JudgeDriftError(
                f"judge {self._client.model!r} with rubric {self._rubric.name!r} got {num_right} of {num_judged} canaries right, below "
                f"rewards.judge.min_canary_accuracy = {self._config.min_canary_accuracy:g}; verdicts since the last good round were taken "
                "out of the cache. Use a stronger judge or a clearer rubric, and resume from before:\n"
                + "\n".join(shown[:MAX_SHOWN_CANARIES])
            )
        self._uncertain_keys = []
        return True

    def _withdraw(self) -> None:
        """Voids the verdicts that were cached since canaries were last judged right."""
        if self._cache is not None:
            for key in self._uncertain_keys:
                self._cache.put(key, {"void": "the judge failed its canaries after this verdict"})
        self._uncertain_keys = []

    def _contests(self, rows: Sequence[Row]) -> list[_Contest]:
        visible = [strip_thinking(rollout.text, prompt_suffix=rollout.prompt_suffix) for _example, rollout in rows]
        contests = []
        for (example, _rollout), text in zip(rows, visible, strict=True):
            contests.append(_Contest(settled=self._settled(example, text)))
        groups: dict[str, list[int]] = {}
        for index, (example, _rollout) in enumerate(rows):
            groups.setdefault(_group_key(example), []).append(index)
        for indices in groups.values():
            example = rows[indices[0]][0]
            texts = {index: visible[index] or "" for index in indices if contests[index].settled is None}
            if self._rubric.kind == "axes":
                for index, text in texts.items():
                    contests[index].case = self._add(example, {"response": text})
            elif self._options.opponents == "reference":
                for index, text in texts.items():
                    self._add_pair(example, contests[index], text, example.answer)
            else:
                self._add_group(example, {index: contests[index] for index in texts}, texts, num_silent=len(indices) - len(texts))
        return contests

    def _settled(self, example: Example, text: str | None) -> Verdict | None:
        """Returns the verdict on a row that no judge needs to see, or None."""
        needs_answer = self._rubric.reference == "required" or (self._rubric.kind == "pairwise" and self._options.opponents == "reference")
        if needs_answer and not example.answer.strip():
            return Unavailable(reason=f"example {example.id!r}: no answer, which rubric {self._rubric.name!r} compares with")
        if text is None:
            return RewardResult(value=0.0, note="no visible response: the thinking part is not closed, or a tag stands in the answer")
        if not text:
            return RewardResult(value=0.0, note="an empty response")
        if self._shows_reference and _is_opener(text) and not _is_opener(example.answer):
            return RewardResult(value=0.0, note="an opening phrase or punctuation in place of an answer")
        return None

    def _add_pair(self, example: Example, contest: _Contest, text: str, opponent: str) -> None:
        if text == opponent:
            contest.unasked.append(0.5)
            return
        contest.pairs.append(
            (self._add(example, {"first": text, "second": opponent}), self._add(example, {"first": opponent, "second": text}))
        )

    def _add_group(self, example: Example, contests: Mapping[int, _Contest], texts: Mapping[int, str], *, num_silent: int) -> None:
        """Pairs distinct responses on a ring ordered by their hash: who meets whom does not depend on the order of the rollouts."""
        ring = sorted(set(texts.values()), key=lambda text: hashlib.sha256(text.encode(errors="surrogatepass")).digest())
        reach = min(self._options.max_opponents, len(ring) // 2)
        for index, contest in contests.items():
            place = ring.index(texts[index])
            opponents = dict.fromkeys(ring[(place + step) % len(ring)] for step in (*range(1, reach + 1), *range(-reach, 0)))
            for opponent in opponents:
                self._add_pair(example, contest, texts[index], opponent)
            if not opponents:
                # All say the same, or are silent: better than silence, equal among each other.
                contest.unasked.append(1.0 if num_silent else 0.5)

    def _add(self, example: Example, responses: Mapping[str, str]) -> str:
        """Notes a case and returns its key."""
        limit = self._options.max_response_chars
        prompt = [{**turn, "text": shorten(turn["text"], max_chars=limit)} for turn in turns(example.messages)]
        reference = {"reference": shorten(example.answer, max_chars=limit)} if self._shows_reference and example.answer.strip() else {}
        shown = {name: shorten(text, max_chars=limit) for name, text in responses.items()}
        case = _Case(field={"prompt": prompt, **reference, **shown}, images=self._images(example) if self._options.images else ())
        # The delimiter is no part of the key: it follows from the data and the seed.
        described = json.dumps([self._key_base, case.field, case.images], sort_keys=True)
        key = hashlib.sha256(described.encode()).hexdigest()
        self._cases[key] = case
        return key

    def _images(self, example: Example) -> tuple[str, ...]:
        """Returns keys of the example's pictures, in the order of their marks in the prompt."""
        keys = []
        for part in example.media:
            frames = [part.image] if isinstance(part, ImagePart) else _spread(part.frames, self._options.max_frames)
            for number, frame in enumerate(frames):
                key = f"{part.digest} {number} of {len(frames)}"
                if key not in self._pictures:
                    self._pictures[key] = data_url(frame)
                keys.append(key)
        return tuple(keys)

    def _question(self, field: Data, images: Sequence[str] = (), *, key: str | None = None) -> Question:
        return Question(
            messages=partial(_messages, self._rubric, field, [self._pictures[image] for image in images], self._config.seed),
            schema=self._rubric.schema(),
            read=self._rubric.read_verdict,
            keep=None if key is None else partial(self._keep, key),
        )

    def _answer(self, keys: Sequence[str]) -> dict[str, _Answered]:
        """Returns the verdicts by key: from the cache, or by the judge, with a round of canaries before every `canary_every` of them."""
        answered, pending = {}, []
        for key in keys:
            verdict = self._cached(key)
            if verdict is None:
                pending.append(key)
            else:
                answered[key] = _Answered(verdict=verdict, seconds=_NO_WORK, tokens=0)
        has_canaries = bool(self._config.canary_every and self._rubric.canaries)
        while pending:
            # A round without verdicts settles nothing: the next batch begins with another.
            if has_canaries and self._until_canaries <= 0 and self.check_canaries():
                self._until_canaries = self._config.canary_every
            num_now = self._until_canaries if self._until_canaries > 0 else len(pending)
            now, pending = pending[:num_now], pending[num_now:]
            self._until_canaries -= len(now)
            answered |= self._ask(now)
        return answered

    def _ask(self, keys: Sequence[str]) -> dict[str, _Answered]:
        answered = {}
        questions = [self._question(self._cases[key].field, self._cases[key].images, key=key) for key in keys]
        for key, reply in zip(keys, self._client.ask(questions), strict=True):
            answered[key] = _Answered(verdict=reply.verdict, seconds=reply.seconds, tokens=reply.tokens)
        return answered

    def _keep(self, key: str, verdict: Mapping[str, Any]) -> None:
        """Puts a verdict into the cache as soon as it is there: a cap or a kill does not lose what was paid for."""
        if self._cache is not None:
            self._cache.put(key, {"verdict": dict(verdict)})
            self._uncertain_keys.append(key)

    def _cached(self, key: str) -> dict[str, Any] | None:
        kept = self._cache.get(key) if self._cache is not None else None
        if kept is None or "verdict" not in kept:
            return None
        try:
            return self._rubric.read_verdict(json.dumps(kept["verdict"]))
        except ValueError:
            return None

    def _outcome(self, contest: _Contest, answered: Mapping[str, _Answered], num_users: Mapping[str, int]) -> TimedVerdict:
        if contest.settled is not None:
            return contest.settled, _NO_WORK
        # What several rows share is charged to each by its share: sums over rows are what was spent.
        seconds = sum(answered[key].seconds / num_users[key] for key in contest.case_keys())
        metrics = {"tokens": sum(answered[key].tokens / num_users[key] for key in contest.case_keys())}
        if self._canary_accuracy is not None:
            metrics["canary_accuracy"] = self._canary_accuracy
        if contest.case:
            return self._scored(answered[contest.case].verdict, metrics), seconds
        return _compared(contest, answered, metrics), seconds

    def _scored(self, verdict: dict[str, Any] | Unavailable, metrics: dict[str, float]) -> Verdict:
        if isinstance(verdict, Unavailable):
            return verdict
        metrics |= {name: float(verdict[name]) for name in self._rubric.axes}
        return RewardResult(
            value=self._rubric.value(verdict, weights=self._weights), note=_printable(verdict.get("reason", "")), metrics=metrics
        )


def pair_outcome(winner_as_first: str, winner_as_second: str) -> float:
    """Returns 1.0, 0.5 or 0.0 for the response that stood first and then second: it must win or lose in both places, all else is a tie."""
    match winner_as_first, winner_as_second:
        case "first", "second":
            return 1.0
        case "second", "first":
            return 0.0
        case _:
            return 0.5


def data_url(image: PILImage.Image) -> str:
    """Returns the image as a data URL in PNG, without loss."""
    encoded = io.BytesIO()
    image.save(encoded, format="PNG", compress_level=1)
    return f"data:image/png;base64,{base64.b64encode(encoded.getvalue()).decode()}"


def _compared(contest: _Contest, answered: Mapping[str, _Answered], metrics: dict[str, float]) -> Verdict:
    """Returns the mean outcome over the opponents; a pair without two verdicts is left out, all of them make it unavailable."""
    outcomes, reasons, num_swayed = list(contest.unasked), [], 0
    for as_first, as_second in contest.pairs:
        first, second = answered[as_first].verdict, answered[as_second].verdict
        if isinstance(first, Unavailable) or isinstance(second, Unavailable):
            reasons += [verdict.reason for verdict in (first, second) if isinstance(verdict, Unavailable)]
            continue
        outcomes.append(pair_outcome(first["winner"], second["winner"]))
        num_swayed += first["winner"] == second["winner"] != "tie"
    if not outcomes:
        return Unavailable(reason=reasons[0])
    metrics |= {"order_bias": num_swayed / len(outcomes)}
    return RewardResult(value=sum(outcomes) / len(outcomes), note=f"{len(outcomes)} comparisons", metrics=metrics)


def _messages(rubric: Rubric, field: Data, urls: Sequence[str], seed: int, attempt: int) -> list[dict[str, Any]]:
    return render(rubric, field, image_urls=urls, seed=seed, attempt=attempt)


def _printable(reason: str) -> str:
    """Returns a judge's words as a log can hold them: no half surrogates, which no file takes, and no control characters."""
    return "".join(character if character.isprintable() else " " for character in reason[:MAX_NOTE_CHARS])


def _group_key(example: Example) -> str:
    """Returns what makes rows one group: the id, and all that the judge sees, since two data sets may use one id."""
    digests = [part.digest for part in example.media]
    return json.dumps([example.id, example.source, example.task, turns(example.messages), digests, example.answer])


def _is_opener(text: str) -> bool:
    letters = "".join(character for character in text if character.isalnum()).lower()
    return not letters or letters in OPENERS


def _spread(frames: Sequence[PILImage.Image], most: int) -> list[PILImage.Image]:
    """Returns at most so many frames, evenly spread, the first and the last among them."""
    if len(frames) <= most:
        return list(frames)
    if most == 1:
        return [frames[len(frames) // 2]]
    return [frames[round(number * (len(frames) - 1) / (most - 1))] for number in range(most)]


def _weights(rubric: Rubric, options: LlmJudgeOptions) -> dict[str, float]:
    unknown = [name for name in options.weights if name not in rubric.axes]
    if unknown:
        raise RewardConfigError(f"llm_judge: weights name {unknown[0]!r}; the axes of rubric {rubric.name!r} are {', '.join(rubric.axes)}")
    weights = {name: options.weights.get(name, axis.weight) for name, axis in rubric.axes.items()}
    if rubric.axes and not (all(0.0 <= weight < math.inf for weight in weights.values()) and sum(weights.values()) > 0.0):
        raise RewardConfigError(f"llm_judge: weights = {weights}: none below 0 and one above 0, so that values stay within 0 to 1")
    return weights


def check_options(options: LlmJudgeOptions, rubric: Rubric) -> None:
    """Raises a `RewardConfigError` for an option that would have no effect with this rubric."""
    given = options.model_fields_set
    if rubric.kind == "axes" and given & {"opponents", "max_opponents"}:
        raise RewardConfigError(f"llm_judge: opponents are compared by a pairwise rubric; {rubric.name!r} scores each response by itself")
    if rubric.kind == "pairwise" and options.opponents == "reference" and "max_opponents" in given:
        raise RewardConfigError("llm_judge: max_opponents counts rivals in a group; write opponents: group, or take it out")
    if rubric.reference != "optional" and "reference" in given:
        raise RewardConfigError(
            f"llm_judge: rubric {rubric.name!r} says itself whether the answer is shown ({rubric.reference}); take `reference` out"
        )
    if "max_frames" in given and not options.images:
        raise RewardConfigError("llm_judge: max_frames has no effect without images: true")


@contextmanager
def open_llm_judge(options: LlmJudgeOptions, config: RewardsConfig, recipe_folder: Path | None) -> Iterator[LlmJudge]:
    """Yields a judge for one component; components with equal `rewards.judge` share one server and client."""
    if config.judge is None:
        raise RewardConfigError("llm_judge needs a judge: give rewards.judge a `url` and `model`, or `serve` to start a server")
    rubric = load_rubric(options.rubric, recipe_folder=recipe_folder)
    check_options(options, rubric)
    _weights(rubric, options)
    with ExitStack() as opened:
        client = opened.enter_context(shared_client(config.judge, recipe_folder=recipe_folder))
        cache = None
        if config.judge.cache is not None:
            cache = opened.enter_context(VerdictCache((recipe_folder or Path()) / config.judge.cache))
        _LOG.info("llm_judge: model %s, rubric %s version %s", client.model, rubric.name, rubric.version[:12])
        state = model_state(config.judge, recipe_folder=recipe_folder)
        yield LlmJudge(options, rubric=rubric, client=client, config=config.judge, model_state=state, cache=cache)
        _LOG.info("llm_judge: %s", client.usage)


def _open(options: Any, config: RewardsConfig, recipe_folder: Path | None) -> AbstractContextManager[LlmJudge]:  # noqa: ANN401
    return open_llm_judge(options, config, recipe_folder)


REWARDS: Mapping[str, BuiltInReward] = {
    "llm_judge": BuiltInReward(
        summary="verdict of a judge model by a rubric: right or wrong, several axes against a reference, or pairwise",
        value_range=(0.0, 1.0),
        gold_response=None,
        service=_open,
        options=LlmJudgeOptions,
    ),
}
