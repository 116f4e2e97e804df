"""A teacher behind a vLLM server: token ids and images go there as they are, log-probs of the drawn tokens and of the top ids come back.

The end point is `/inference/v1/generate`: it takes the compact ids and the images, expands them itself and returns the expanded ids,
which must equal the student's. An engine's log-probs of prompt tokens never have a temperature (vLLM 0.32, v1/worker/gpu_model_runner.py
`_get_prompt_logprobs_dict`), so it must be 1.
"""

from __future__ import annotations

import base64
import binascii
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..model.chat import Chat
from ..model.layout import Ranks
from ..model.learner import Distribution
from ..model.packing import Batch
from ..model.records import DataError, ImagePart, MediaPart, TrainSequence
from ..model.reference import SparseStates
from ..model.sampler import first_difference
from ..model.token_client import GENERATE_PATH, image_content
from .config import SampledTokenConfig, TopKConfig
from .support import first_of_each, scored_states
from .teacher import TeacherError
from .teacher_client import Question, TeacherClient, TeacherPausedError

_PROBE_TEXT = "A teacher scores what the student wrote: 3 + 4 = 7."
_DECODED_IDS = 8192
"""Ids of one request when tokenizers are compared."""
_MASS_TOLERANCE = 1e-3
_GIVEN_IDS = "prompt_logprob_token_ids"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Scores:
    """What the engine says of one response; n trained tokens."""

    drawn: np.ndarray
    """[n] nats"""
    ids: np.ndarray
    """[n, K] int64"""
    logprobs: np.ndarray
    """[n, K] nats"""
    given: np.ndarray
    """[n, K] bool"""


class ServedTeacher:
    """A teacher that a server scores for."""

    def __init__(
        self, client: TeacherClient, *, chat: Chat, support: TopKConfig | SampledTokenConfig, ranks: Ranks, tasks: Sequence[str] = ()
    ) -> None:
        """`chat` is the student's; `tasks` are those that it teaches, none: whatever no other teacher names."""
        self.name = client.name
        self.tasks = tuple(tasks)
        self._client = client
        self._chat = chat
        self._ranks = ranks
        self._top_k, self._student_k = (1, 0) if isinstance(support, SampledTokenConfig) else asked_of(support)

    def states_of(
        self, batches: Sequence[Batch[Any]], distribution: Distribution, student_ids: Sequence[Tensor] | None = None
    ) -> list[SparseStates]:
        """Returns its log-probs of each batch's targets and of the support; called by all ranks, each with its own batches.

        `student_ids`, [N, k] a batch, are the student's most likely ids where the support has them. Equal responses are scored once.
        Raises `TeacherError` on all ranks where any rank's scores cannot be had.
        """
        scored: list[list[_Scores]] = []
        problem: tuple[bool, str] | None = None
        try:
            scored = self._score(batches, student_ids)
        except TeacherError as error:
            problem = isinstance(error, TeacherPausedError), str(error)
        for told in self._ranks.gather(problem):
            if told is not None:
                is_pause, words = told
                raise (TeacherPausedError if is_pause else TeacherError)(words)
        return [self._joined(batch, scores, distribution) for batch, scores in zip(batches, scored, strict=True)]

    def check(self, student: Chat) -> None:
        """Raises `TeacherError` unless the server is there, has the student's tokens, and can be asked for what the support needs."""
        k, most = max(self._top_k, self._student_k), len(student.tokenizer)
        if k > most:  # vLLM 0.32's engine ends where more are asked for than its head has
            raise TeacherError(f"teacher {self.name}: distill.support.k = {k}: the tokenizer has {most} ids; give a smaller k")
        self._check_tokens(student)
        ids = (*student.tokenizer(_PROBE_TEXT, add_special_tokens=False)["input_ids"], student.end_of_turn_id)
        probe = TrainSequence(place="the probe text", token_ids=ids, trained=(False,) + (True,) * (len(ids) - 1), media=(), targets=None)
        rows = np.tile(np.arange(self._student_k), (len(ids) - 1, 1)) if self._student_k else None
        try:
            self._ask([(probe, rows)])
        except TeacherError as error:
            if rows is None or _GIVEN_IDS not in str(error):
                raise
            raise TeacherError(
                f"{error}; distill.support.ids = {'both' if self._top_k else 'student'} needs an engine that scores given ids: vLLM's V2 "
                "model runner, which needs a GPU. Write ids: teacher, or serve the teacher where VLLM_USE_V2_MODEL_RUNNER=1 works"
            ) from error

    def _check_tokens(self, student: Chat) -> None:
        count = len(student.tokenizer)
        starts = range(0, count, _DECODED_IDS)
        # The id between two others shows where one ends: "ab" "c" must not pass for "a" "bc".
        (between, *_) = student.tokenizer("\n", add_special_tokens=False)["input_ids"]
        asked = [[part for id_ in range(start, min(start + _DECODED_IDS, count)) for part in (id_, between)] for start in starts]
        self._client.ask(
            [
                Question(
                    place="the student's tokens",
                    path="/detokenize",
                    body=lambda ids=ids: {"model": self._client.endpoint.model, "tokens": ids},
                    read=lambda reply, ids=ids: self._check_text(reply, ids, student),
                )
                for ids in asked
            ]
        )

    def _check_text(self, reply: Mapping[str, Any], ids: Sequence[int], student: Chat) -> None:
        if reply.get("prompt") != student.tokenizer.decode(ids):
            raise TeacherError(
                f"teacher {self.name}: it reads the student's ids {ids[0]} to {ids[-2]} as another text: its tokenizer is not the "
                "student's, it cannot score the student's ids. Take a teacher of the same family"
            )

    def _score(self, batches: Sequence[Batch[Any]], student_ids: Sequence[Tensor] | None) -> list[list[_Scores]]:
        asked: dict[object, tuple[TrainSequence[Any], np.ndarray | None]] = {}
        for batch, ids in zip(batches, student_ids or [None] * len(batches), strict=True):
            rows = None if ids is None else ids.cpu().numpy()
            start = 0
            for sequence in batch.sequences:
                end = start + sequence.num_trained_tokens
                asked.setdefault(_key(sequence), (sequence, None if rows is None else rows[start:end]))
                start = end
        found = dict(zip(asked, self._ask(list(asked.values())), strict=True))
        return [[found[_key(sequence)] for sequence in batch.sequences] for batch in batches]

    def _ask(self, rows: Sequence[tuple[TrainSequence[Any], np.ndarray | None]]) -> list[_Scores]:
        images = {part.digest: image_content(_image(part, sequence.place)) for sequence, _ in rows for part in sequence.media}
        return self._client.ask(
            [
                Question(
                    place=sequence.place,
                    path=GENERATE_PATH,
                    # The ids here, on one thread: the chat's cache of processed images is made for one.
                    body=partial(self._body, sequence, compact_ids(sequence, self._chat), ids, images),
                    read=partial(self._read, sequence, ids),
                )
                for sequence, ids in rows
            ]
        )

    def _body(
        self, sequence: TrainSequence[Any], compact: Sequence[int], student_ids: np.ndarray | None, images: Mapping[str, Mapping[str, str]]
    ) -> dict[str, Any]:
        params: dict[str, Any] = {"max_tokens": 1, "temperature": 1.0, "detokenize": False}
        if self._top_k or student_ids is None:
            params["prompt_logprobs"] = max(self._top_k, 1)
        if student_ids is not None:
            drawn = np.array(sequence.token_ids)[1:, None]
            asked = np.concatenate([drawn, np.full((len(drawn), student_ids.shape[1]), -1)], axis=1)
            asked[np.flatnonzero(sequence.trained) - 1, 1:] = student_ids
            params[_GIVEN_IDS] = asked.tolist()
        return {
            "model": self._client.endpoint.model,
            "token_ids": compact,
            "content_parts": [images[part.digest] for part in sequence.media],
            "sampling_params": params,
            "return_token_ids": True,
        }

    def _read(self, sequence: TrainSequence[Any], student_ids: np.ndarray | None, reply: Mapping[str, Any]) -> _Scores:
        """Returns the scores in a reply; raises `TeacherError` for one that is not about these ids, or that leaves out a drawn token."""
        echoed = reply.get("prompt_token_ids")
        if not isinstance(echoed, list) or tuple(echoed) != sequence.token_ids:
            said = first_difference(echoed, sequence.token_ids) if isinstance(echoed, list) else "it does not say which ids it read"
            raise TeacherError(f"teacher {self.name}: {sequence.place}: {said}; it must read the student's ids and images as they are")
        try:
            places = [index for index, is_trained in enumerate(sequence.trained) if is_trained]
            parts: list[_Scores] = []
            if student_ids is not None:
                parts.append(_scores_of_given(reply["prompt_token_id_logprobs"], places, student_ids, length=len(echoed)))
            if self._top_k or student_ids is None:
                entries = reply["prompt_logprobs"]
                parts.insert(0, _scores_of_top([entries[place] for place in places], [echoed[place] for place in places], self._top_k))
        except (KeyError, IndexError, TypeError, ValueError, AttributeError, binascii.Error) as error:
            raise TeacherError(
                f"teacher {self.name}: {sequence.place}: its reply holds no log-probs of the drawn tokens ({type(error).__name__}: {error})"
            ) from error
        return self._checked(_merged(parts), sequence, places)

    def _checked(self, scores: _Scores, sequence: TrainSequence[Any], places: Sequence[int]) -> _Scores:
        missing = np.flatnonzero(np.isnan(scores.drawn))
        if len(missing):
            raise TeacherError(
                f"teacher {self.name}: {sequence.place}: its log-prob of drawn token {places[missing[0]]} is not a number; nothing is "
                "trained on missing scores. Look for a broken weight or an overflow in the teacher (dtype: float32 tells)"
            )
        with np.errstate(invalid="ignore"):
            masses = np.where(scores.given & ~np.isnan(scores.logprobs), np.exp(scores.logprobs), 0.0).sum(axis=1)
        most = max(masses.max(initial=0.0), np.exp(scores.drawn).max(initial=0.0))
        if most > 1.0 + _MASS_TOLERANCE:
            raise TeacherError(
                f"teacher {self.name}: {sequence.place}: the probabilities of a token add up to {most:.3g}: these are no log-probs. Start "
                "the server with --logprobs-mode raw_logprobs"
            )
        return scores

    def _joined(self, batch: Batch[Any], scores: Sequence[_Scores], distribution: Distribution) -> SparseStates:
        assert distribution.temperature == 1.0, "the settings check it: no engine applies a temperature to log-probs of prompt tokens"
        allowed = distribution.allowed
        assert allowed is not None, "a run's distribution says which ids may be drawn"
        scores = scores or [_NO_SCORES]  # a batch that only keeps this rank in step with the others
        ids, logprobs, given, drawn = (
            torch.from_numpy(np.concatenate(parts))
            for parts in zip(*((part.ids, part.logprobs, part.given, part.drawn) for part in scores), strict=True)
        )
        assert len(ids) == len(batch.target_ids), f"{len(ids)} scores for {len(batch.target_ids)} targets"
        return scored_states(
            ids,
            logprobs,
            given=given,
            drawn_ids=batch.target_ids.cpu(),
            drawn_logprobs=drawn,
            num_top=min(self._top_k, ids.shape[1]),
            allowed=allowed.cpu(),
        )


_NO_SCORES = _Scores(drawn=np.zeros(0), ids=np.zeros((0, 1), dtype=np.int64), logprobs=np.zeros((0, 1)), given=np.zeros((0, 1), dtype=bool))


def asked_of(support: TopKConfig) -> tuple[int, int]:
    """Returns how many of the teacher's own top ids and how many of the student's are scored at a position."""
    return 0 if support.ids == "student" else support.k, 0 if support.ids == "teacher" else support.k


def compact_ids(sequence: TrainSequence[Any], chat: Chat) -> list[int]:
    """Returns the sequence's ids with one placeholder an image, as the engine takes them."""
    found: list[int] = []
    unused, index = iter(sequence.media), 0
    while index < len(sequence.token_ids):
        found.append(sequence.token_ids[index])
        index += len(chat.processed(next(unused)).placeholder_ids) if found[-1] == chat.image_token_id else 1
    return found


def _key(sequence: TrainSequence[Any]) -> tuple[object, ...]:
    return sequence.token_ids, sequence.trained, tuple(part.digest for part in sequence.media)


def _image(part: MediaPart, place: str) -> ImagePart:
    if not isinstance(part, ImagePart):
        raise DataError(
            f"{place}: a served teacher takes images only, this row has a video: drop the row, or take the teacher in this process"
        )
    return part


def _scores_of_top(entries: Sequence[Mapping[str, Any]], drawn_ids: Sequence[int], top_k: int) -> _Scores:
    """Returns the scores in `prompt_logprobs`: at each position the top ids, and the drawn one besides where it is not among them."""
    count, width = len(entries), top_k + 1
    ids, logprobs = np.full((count, width), -1, dtype=np.int64), np.zeros((count, width))
    drawn = np.empty(count)
    for row, (entry, drawn_id) in enumerate(zip(entries, drawn_ids, strict=True)):
        scores = {int(id_): _number(said["logprob"]) for id_, said in entry.items()}
        if len(scores) < top_k:
            raise ValueError(f"{len(scores)} ids at a position, {top_k} were asked for")
        drawn[row] = scores[drawn_id]
        # Most likely first, so that the drawn one is the last where it is not among the top; what is no number is behind all.
        kept = sorted(scores, key=lambda id_: -math.inf if math.isnan(scores[id_]) else scores[id_], reverse=True)[:width]
        ids[row, : len(kept)], logprobs[row, : len(kept)] = kept, [scores[id_] for id_ in kept]
    return _Scores(drawn=drawn, ids=ids, logprobs=logprobs, given=ids >= 0)


def _number(said: object) -> float:
    """Returns a log-prob of a reply; null stands for NaN, which JSON has no word for."""
    if said is None:
        return math.nan
    if isinstance(said, bool) or not isinstance(said, int | float):
        raise TypeError(f"{said!r} as a log-prob")
    return float(said)


def _scores_of_given(encoded: str, places: Sequence[int], student_ids: np.ndarray, *, length: int) -> _Scores:
    """Returns the scores in `prompt_token_id_logprobs`: row i is about token i + 1, column 0 is the token itself."""
    table = np.load(io.BytesIO(base64.b64decode(encoded)), allow_pickle=False)
    if table.shape != (length - 1, 1 + student_ids.shape[1]):
        raise ValueError(f"a table of {table.shape}, {(length - 1, 1 + student_ids.shape[1])} was asked for")
    rows = table[np.array(places, dtype=np.int64) - 1].astype(np.float64)
    return _Scores(drawn=rows[:, 0], ids=student_ids.astype(np.int64), logprobs=rows[:, 1:], given=np.ones(student_ids.shape, dtype=bool))


def _merged(parts: Sequence[_Scores]) -> _Scores:
    """Returns the scores of all parts, each id once at a position."""
    ids = np.concatenate([part.ids for part in parts], axis=1)
    given = np.concatenate([part.given for part in parts], axis=1) & first_of_each(torch.from_numpy(ids)).numpy()
    return _Scores(drawn=parts[0].drawn, ids=ids, logprobs=np.concatenate([part.logprobs for part in parts], axis=1), given=given)
