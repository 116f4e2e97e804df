"""The steps `verify` and `difficulty` of `vlpost curate`: which candidates are right, and how often each model was."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from fractions import Fraction
from statistics import fmean

from ..model.records import DataError, Group, Rollout
from ..rewards.manager import RewardManager
from ..rewards.result import JudgedRollout, ScoredGroup
from .curate_config import DifficultyConfig, PassRateBand, VerifyConfig
from .curate_query import as_query
from .curate_step import Candidate, CuratedRow, StepContext, StepResult

# ---------------------------------------------------------------- verify


class VerifyStep:
    """Opens `verify`."""

    def __init__(self, config: VerifyConfig) -> None:
        self._config = config

    @contextmanager
    def open(self, context: StepContext) -> Iterator[OpenVerify]:
        """Yields the step with its rewards; verdicts of cacheable rewards are kept in the run folder."""
        with RewardManager(
            self._config.rewards, recipe_folder=context.recipe_folder, allow_code=context.allow_code, cache_folder=context.output
        ) as rewards:
            yield OpenVerify(self._config, rewards=rewards)


class OpenVerify:
    """Judges candidates by the reward manager."""

    def __init__(self, config: VerifyConfig, *, rewards: RewardManager) -> None:
        self._config = config
        self._rewards = rewards

    def run(self, rows: Sequence[CuratedRow], *, shard: int) -> StepResult:
        """Returns the rows with a value at each candidate; a conversation without candidates bears it in `notes["value"]`.

        Raises what `RewardManager.score` raises: an outage drops no row.
        """
        problems: dict[int, str] = {}
        judged: dict[int, CuratedRow] = {}
        for index, row in enumerate(rows):
            if not row.candidates and row.example.messages[-1].role != "assistant":
                problems[index] = "no response to verify: the row has neither candidates nor an assistant turn at its end"
                continue
            problem = self._answer_problem(row)
            if problem is not None:
                problems[index] = problem
                continue
            judged[index] = row
        groups = [Group(example=as_query(row.example), rollouts=response_rollouts(row)) for row in judged.values()]
        scored = dict(zip(judged, self._rewards.score(groups) if groups else (), strict=True))
        kept, dropped, changed = [], [], []
        metrics: Counter[str] = Counter()
        for index, row in enumerate(rows):
            if index in problems:
                dropped.append((row.example.id, problems[index]))
                continue
            metrics.update(responses=len(row.candidates) or 1, unavailable=len(scored[index].unjudged))
            outcome, removed = self._outcome(row, scored[index])
            if isinstance(outcome, str):
                dropped.append((row.example.id, outcome))
                continue
            kept.append(outcome)
            if removed:
                changed.append((row.example.id, removed))
        return StepResult(rows=tuple(kept), dropped=tuple(dropped), changed=tuple(changed), metrics=dict(metrics))

    def _answer_problem(self, row: CuratedRow) -> str | None:
        """Returns why no response could ever be found right, or None."""
        for component in self._rewards.components:
            if component.config.judges(row.example):
                try:
                    component.reward.check_answer(as_query(row.example))
                except DataError as error:
                    return f"answer cannot be verified: {error}"
        return None

    def _outcome(self, row: CuratedRow, scored: ScoredGroup) -> tuple[CuratedRow | str, str]:
        """Returns the row with its values, or why it goes; and what was taken out of it."""
        if not scored.judged:
            reasons = sorted({f"{name}: {reason}" for outcome in scored.unjudged for name, reason in outcome.reasons.items()})
            return f"could not be judged: {'; '.join(reasons) or 'another candidate of the row could not'}", ""
        floor = self._config.min_value
        if not row.candidates:
            value = scored.judged[0].score.reward
            if floor is not None and value < floor:
                return f"response is wrong: value {value:g}, at least {floor:g} is asked; {_notes(scored.judged[0])}", ""
            return replace(row, notes={**row.notes, "value": value}), ""
        values = _values(row, scored)
        kept = tuple(
            replace(candidate, value=value)
            for candidate, value in zip(row.candidates, values, strict=True)
            if value is not None and (floor is None or value >= floor)
        )
        if not kept:
            return f"no candidate is right: {len(row.candidates)} were tried, the best value is {max(judged_values(values)):g}", ""
        num_unjudged, num_wrong = values.count(None), len(row.candidates) - len(kept) - values.count(None)
        removed = [f"{num_wrong} wrong"] if num_wrong else []
        removed += [f"{num_unjudged} that could not be judged"] if num_unjudged else []
        return replace(row, candidates=kept), f"candidates taken out: {' and '.join(removed)} of {len(values)}" if removed else ""


def judged_values(values: Sequence[float | None]) -> list[float]:
    """Returns the values that are there."""
    return [value for value in values if value is not None]


def _values(row: CuratedRow, scored: ScoredGroup) -> list[float | None]:
    """Returns the value of each candidate in order, None where there is none."""
    values = {outcome.rollout.policy_version: outcome.score.reward for outcome in scored.judged}
    return [values.get(number) for number in range(len(row.candidates))]


def _notes(judged: JudgedRollout) -> str:
    return "; ".join(f"{name}: {result.note}" for name, result in judged.score.results.items() if result.note) or "no note"


def response_rollouts(row: CuratedRow) -> tuple[Rollout, ...]:
    """Returns the candidates, else the last turn, as the record that rewards read; `policy_version` is the candidate's number."""
    if not row.candidates:
        last = row.example.messages[-1].text
        return (_rollout(last, row, prompt_suffix="", finish_reason="stop", num_tokens=1, number=0),)
    return tuple(
        _rollout(
            candidate.text, row, prompt_suffix=candidate.prompt_suffix, finish_reason=candidate.finish_reason,
            num_tokens=candidate.num_tokens, number=number, conversation=candidate,
        )
        for number, candidate in enumerate(row.candidates)
    )  # fmt: skip


def _rollout(
    text: str,
    row: CuratedRow,
    *,
    prompt_suffix: str,
    finish_reason: str,
    num_tokens: int,
    number: int,
    conversation: Candidate | None = None,
) -> Rollout:
    return Rollout(
        token_ids=(0,) * num_tokens,  # rewards may count them; nobody reads which they are
        sampled=(True,) * num_tokens,
        sampler_logprobs=(0.0,) * num_tokens,
        media=as_query(row.example).media + (conversation.media if conversation else ()),
        text=text,
        prompt_suffix=prompt_suffix,
        finish_reason="length" if finish_reason == "length" else "stop",
        policy_version=number,
        turns=conversation.turns if conversation else (),
        ending=conversation.ending if conversation else "one_turn",
    )


# ---------------------------------------------------------------- difficulty


class DifficultyStep:
    """Opens `difficulty`, which needs nothing."""

    def __init__(self, config: DifficultyConfig) -> None:
        self._config = config

    def open(self, context: StepContext) -> nullcontext[OpenDifficulty]:
        """Returns the step."""
        return nullcontext(OpenDifficulty(self._config))


class OpenDifficulty:
    """Drops what is too easy or out of reach."""

    def __init__(self, config: DifficultyConfig) -> None:
        self._config = config

    def run(self, rows: Sequence[CuratedRow], *, shard: int) -> StepResult:
        """Returns the rows for which every model's band holds, with `pass_rate/<model>` and `mean_tokens/<model>` in their notes.

        The histogram counts all rows that came in, by right responses of all. Raises `DataError` where a candidate has no value.
        """
        kept, dropped = [], []
        metrics: Counter[str] = Counter()
        histogram: dict[str, Counter[str]] = {f"pass rate of {name}": Counter() for name in self._config.models}
        for row in rows:
            problems: list[str] = []
            notes = dict(row.notes)
            for name, band in self._config.models.items():
                candidates = [candidate for candidate in row.candidates if candidate.model == name and candidate.with_image]
                if not candidates:
                    problems.append(f"no candidate of {name}: its pass rate is unknown")
                    continue
                solved, tokens = self._num_solved(row, candidates), fmean(candidate.num_tokens for candidate in candidates)
                notes |= {f"pass_rate/{name}": solved / len(candidates), f"mean_tokens/{name}": tokens}
                histogram[f"pass rate of {name}"][f"{solved}/{len(candidates)}"] += 1
                problem, by_length = band_problem(solved, len(candidates), band=band, mean_tokens=tokens)
                if by_length:
                    metrics["kept_by_length"] += 1
                if problem is not None:
                    problems.append(f"{problem[0]} for {name}: {problem[1]}")
            if problems:
                dropped.append((row.example.id, problems[0]))
            else:
                kept.append(replace(row, notes=notes))
        return StepResult(rows=tuple(kept), dropped=tuple(dropped), metrics=dict(metrics), histogram=histogram)

    def _num_solved(self, row: CuratedRow, candidates: Sequence[Candidate]) -> int:
        values = [candidate.value for candidate in candidates]
        if None in values:
            raise DataError(
                f"row {row.example.id!r}: candidate {values.index(None) + 1} of {len(values)} of {candidates[0].model} has no value; "
                "put a step with use: verify before difficulty"
            )
        return sum(value >= self._config.solved_reward for value in judged_values(values))


def band_problem(solved: int, num_responses: int, *, band: PassRateBand, mean_tokens: float) -> tuple[tuple[str, str] | None, bool]:
    """Returns why a query lies outside the band, as head and detail, or None; and whether the length of the responses alone kept it.

    Shares are compared as fractions: 14 of 16 is at most 0.9 and 15 of 16 is not, and 9 of 10 is, whatever floats make of 0.9.
    """
    if solved < band.min_solved:
        return ("too hard", f"{solved} of {num_responses} right, at least {band.min_solved} must be"), False
    if Fraction(solved, num_responses) <= Fraction(str(band.max_pass_rate)):
        return None, False
    if band.long_tokens is not None and mean_tokens >= band.long_tokens:
        return None, True
    return ("too easy", f"{solved} of {num_responses} right, at most {band.max_pass_rate:g} of them may be"), False


def in_order(bars: Mapping[str, int]) -> dict[str, int]:
    """Returns the bars of a pass rate, `3/16`, from none right to all right, ties by the number of responses."""

    def place(label: str) -> tuple[Fraction, int]:
        solved, _, total = label.partition("/")
        return Fraction(int(solved), int(total)), int(total)

    return {label: bars[label] for label in sorted(bars, key=place)}
