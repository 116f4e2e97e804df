"""The step `image_necessity` of `vlpost curate`: drops rows that a model solves without their image.

Text stays as it is, image and video parts are taken out, the model tries k times, and the reward manager judges each try by the row's
own answer. Who guesses is right now and then: how many rows luck alone would drop is counted beside those that were dropped.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

from ..model.records import DataError, Example, Group, Message, Rollout, TextPart
from ..model.sampler import request_seed
from ..rewards.manager import RewardManager
from .curate_engine_config import ImageNecessityConfig
from .curate_generate import Asked, Engines, OpenEngine, draw, open_engine
from .curate_query import as_query, query_messages, unavailable
from .curate_step import CuratedRow, StepContext, StepResult

MODEL = "blind"
"""The engine's name; there is only one."""
BARS = "Tries right without the image"
"""Title of the histogram of rows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Chance:
    """What luck would do with one row: probabilities."""

    of_try: float
    """That one guess is right."""
    of_drop: float
    """That at least m of k fresh guesses are right. A model that makes the same guess k times is right as often as with one try."""


def without_media(messages: Sequence[Message]) -> tuple[Message, ...]:
    """Returns the messages with their text alone."""
    return tuple(replace(message, parts=tuple(part for part in message.parts if isinstance(part, TextPart))) for message in messages)


def binomial_tail(probability: float, *, tries: int, needed: int) -> float:
    """Returns the probability of at least `needed` successes in `tries` independent tries: sum over j of C(k, j) p^j (1 - p)^(k - j)."""
    return math.fsum(
        math.comb(tries, right) * probability**right * (1.0 - probability) ** (tries - right) for right in range(needed, tries + 1)
    )


def hypergeometric_tail(matching: int, others: int, *, tries: int, needed: int) -> float:
    """Returns the probability that at least `needed` of `tries` draws without replacement from `others`, `matching` of them right, are."""
    ways = sum(math.comb(matching, right) * math.comb(others - matching, tries - right) for right in range(needed, tries + 1))
    return ways / math.comb(others, tries)


def chance_levels(examples: Sequence[Example], *, tries: int, needed: int) -> list[Chance | None]:
    """Returns for each example what guessing would achieve; None where neither choices nor enough other answers tell.

    A row with `choices` in its metadata: one guess is right with 1 / (number of choices), and guesses are independent. Any other
    row: somebody who knows the task and guesses from its answers. The k guesses are the answers of k other examples of the same task,
    drawn without replacement: averaged over rows this is an unbiased estimate of sum over a of p_a x P(at least m of k draws are a),
    whatever the number of examples, so that sums over shards add up. It needs k other examples of the task.
    """
    of_task: dict[str, Counter[str]] = {}
    for example in examples:
        of_task.setdefault(example.task, Counter())[_plain(example.answer)] += 1
    levels: list[Chance | None] = []
    for example in examples:
        answers = of_task[example.task]
        matching, others = answers[_plain(example.answer)] - 1, answers.total() - 1
        num_choices = _num_choices(example.metadata)
        if num_choices:
            share = 1.0 / num_choices
            levels.append(Chance(of_try=share, of_drop=binomial_tail(share, tries=tries, needed=needed)))
        elif others >= tries:
            levels.append(Chance(of_try=matching / others, of_drop=hypergeometric_tail(matching, others, tries=tries, needed=needed)))
        else:
            levels.append(None)
    return levels


def _plain(answer: str) -> str:
    return " ".join(answer.split()).casefold()


def _num_choices(metadata: Mapping[str, object]) -> int:
    choices = metadata.get("choices")
    return len(choices) if isinstance(choices, list | dict) else 0


class ImageNecessityStep:
    """Opens `image_necessity`."""

    def __init__(self, config: ImageNecessityConfig, *, open_engine: OpenEngine = open_engine) -> None:
        self._config = config
        self._open_engine = open_engine

    @contextmanager
    def open(self, context: StepContext) -> Iterator[OpenImageNecessity]:
        """Yields the step with its rewards; the engine starts when the first row with an image comes. Prints the chance level at the end,
        over the shards that this process has done (the manifests hold it for all of them).
        """
        with ExitStack() as opened:
            rewards = opened.enter_context(
                RewardManager(
                    self._config.rewards.model_copy(update={"on_unavailable": "drop_rollout", "max_unavailable_frac": 1.0}),
                    recipe_folder=context.recipe_folder,
                    allow_code=context.allow_code,
                    cache_folder=context.output,
                )
            )
            engines = opened.enter_context(Engines({MODEL: self._config.model}, open_engine=self._open_engine))
            step = OpenImageNecessity(self._config, engines=engines, rewards=rewards, seed=context.seed)
            yield step
        print(describe_chance(step.totals), flush=True)


class OpenImageNecessity:
    """Tries rows without their images."""

    def __init__(self, config: ImageNecessityConfig, *, engines: Engines, rewards: RewardManager, seed: int) -> None:
        self._config = config
        self._engines = engines
        self._rewards = rewards
        self._seed = seed
        self.totals: dict[str, float] = {}
        """Sums of the metrics of all shards so far."""

    def run(self, rows: Sequence[CuratedRow], *, shard: int) -> StepResult:
        """Returns the rows that need their image, or have none, in order; `blind_tries` and `blind_solved` are among their notes.

        A query that cannot be asked without its image, too long say, or whose answer is not of the kind that its verifier compares with,
        is dropped by name. Raises `RewardUnavailableError` when a try could not be judged, `DataError` when no component judges the task.
        """
        shown = [index for index, row in enumerate(rows) if as_query(row.example).media]
        if not shown:
            return StepResult(rows=tuple(rows), metrics={"without_image": len(rows)})
        problems = {index: problem for index in shown if (problem := self._answer_problem(rows[index].example)) is not None}
        asked = [index for index in shown if index not in problems]
        drawn = self._draw([rows[index].example for index in asked])
        tried = {index: rollouts for index, rollouts in zip(asked, drawn, strict=True) if not isinstance(rollouts, str)}
        problems |= {index: reason for index, reason in zip(asked, drawn, strict=True) if isinstance(reason, str)}
        solved = dict(zip(tried, self._num_solved([rows[index].example for index in tried], list(tried.values())), strict=True))
        kept, dropped = [], []
        for index, row in enumerate(rows):
            if index in problems:
                dropped.append((row.example.id, problems[index]))
            elif index in solved and solved[index] >= self._config.num_needed:
                dropped.append((row.example.id, f"solved without the image: {solved[index]} of {self._config.tries} tries"))
            elif index in solved:
                kept.append(replace(row, notes={**row.notes, "blind_tries": self._config.tries, "blind_solved": solved[index]}))
            else:
                kept.append(row)
        metrics: dict[str, float] = {"without_image": len(rows) - len(shown)}
        metrics |= self._metrics([rows[index].example for index in tried], list(solved.values()))
        for name, value in metrics.items():
            self.totals[name] = self.totals.get(name, 0.0) + value
        bars = Counter(f"{count}/{self._config.tries}" for count in sorted(solved.values()))
        return StepResult(rows=tuple(kept), dropped=tuple(dropped), metrics=metrics, histogram={BARS: {**self._empty_bars(), **bars}})

    def _answer_problem(self, example: Example) -> str | None:
        """Returns why no response could ever be found right, or None."""
        for component in self._rewards.components:
            if component.config.judges(example):
                try:
                    component.reward.check_answer(example)
                except DataError as error:
                    return f"answer cannot be verified: {error}"
        return None

    def _draw(self, examples: Sequence[Example]) -> list[tuple[Rollout, ...] | str]:
        if not examples:
            return []
        asked = [
            Asked(
                place=example.id,
                messages=without_media(query_messages(example)),
                seeds=tuple(request_seed(self._seed, "image_necessity", example.id, number) for number in range(self._config.tries)),
            )
            for example in examples
        ]
        return draw(self._engines.use(MODEL), asked)

    def _num_solved(self, examples: Sequence[Example], tries: Sequence[tuple[Rollout, ...]]) -> list[int]:
        """Returns how many tries of each example are right."""
        groups = [Group(example=as_query(example), rollouts=rollouts) for example, rollouts in zip(examples, tries, strict=True)]
        scored = self._rewards.score(groups)
        missing = [
            (group.example.id, "; ".join(f"{name}: {reason}" for name, reason in of_rollout.reasons.items()))
            for group in scored
            for of_rollout in group.unjudged
        ]
        if missing:
            raise unavailable(self._config.use, missing, num_asked=sum(map(len, tries)))
        return [sum(judged.score.reward >= self._config.solved_reward for judged in group.judged) for group in scored]

    def _empty_bars(self) -> dict[str, int]:
        return {f"{count}/{self._config.tries}": 0 for count in range(self._config.tries + 1)}

    def _metrics(self, examples: Sequence[Example], solved: Sequence[int]) -> dict[str, float]:
        """Returns sums over the rows that were tried; see `describe_chance` for what they say."""
        config = self._config
        levels = chance_levels([as_query(example) for example in examples], tries=config.tries, needed=config.num_needed)
        known = [level for level in levels if level is not None]
        num_by_choices = sum(_num_choices(example.metadata) > 0 for example in examples)
        return {
            "tried": len(examples),
            "tries": len(examples) * config.tries,
            "tries_solved": sum(solved),
            "rows_solved": sum(count >= config.num_needed for count in solved),
            "chance/rows_known": len(known),
            "chance/rows_by_choices": num_by_choices,
            "chance/tries_solved": config.tries * math.fsum(level.of_try for level in known),
            "chance/rows_solved": math.fsum(level.of_drop for level in known),
        }


def describe_chance(metrics: Mapping[str, float]) -> str:
    """Returns one line for a person: what was solved without images, what guessing would have solved, and where that number comes from."""
    tried, known = metrics.get("tried", 0.0), metrics.get("chance/rows_known", 0.0)
    if not tried:
        return "image_necessity: no row shows an image"
    line = (
        f"image_necessity: without images {metrics['tries_solved'] / metrics['tries']:.1%} of tries are right and "
        f"{metrics['rows_solved'] / tried:.1%} of {tried:g} rows are dropped"
    )
    if not known:
        return f"{line}; the chance level is unknown: no row names its choices, and no task has more rows in a shard than there are tries"
    by_choices = metrics["chance/rows_by_choices"]
    of_tries, of_rows = metrics["chance/tries_solved"] / (known * metrics["tries"] / tried), metrics["chance/rows_solved"] / known
    return (
        f"{line}; chance level: {of_tries:.1%} of tries; of rows {of_rows:.2%} if every try is a fresh guess, {of_tries:.1%} if the model "
        f"repeats one guess (by the given choices for {by_choices:g} rows, by the answers of other rows of the task for "
        f"{known - by_choices:g}, unknown for {tried - known:g})"
    )
