"""The step `image_necessity` of `vlpost curate`: drops rows that every model solves without their image.

Text stays as it is, image and video parts are taken out, each model tries k times, and the reward manager judges each try by the row's
own answer. Who guesses is right now and then: how many rows luck alone would drop is counted beside those that were dropped.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace

from ..model.records import DataError, Example, Group, Message, Rollout, TextPart
from ..model.sampler import request_seed
from ..rewards.manager import RewardManager
from .curate_chance import chance_levels, describe_chance, num_choices
from .curate_engine_config import ImageNecessityConfig
from .curate_generate import Asked, Engines, OpenEngine, draw, open_engine
from .curate_query import as_query, query_messages, unavailable
from .curate_step import CuratedRow, StepContext, StepResult

BARS = "Tries right without the image"
"""Title of the histogram of rows, before the model's name."""


def without_media(messages: Sequence[Message]) -> tuple[Message, ...]:
    """Returns the messages with their text alone."""
    return tuple(replace(message, parts=tuple(part for part in message.parts if isinstance(part, TextPart))) for message in messages)


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
            engines = opened.enter_context(Engines(self._config.models, open_engine=self._open_engine))
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
        """Returns the rows that need their image, or have none, in order; `blind_tries` and `blind_solved/<model>` are among their notes.

        A query that cannot be asked without its image, too long say, or whose answer is not of the kind that its verifier compares with,
        is dropped by name. Raises `RewardUnavailableError` when a try could not be judged, `DataError` when no component judges the task.
        """
        shown = [index for index, row in enumerate(rows) if as_query(row.example).media]
        if not shown:
            return StepResult(rows=tuple(rows), metrics={"without_image": len(rows)})
        problems = {index: problem for index in shown if (problem := self._answer_problem(rows[index].example)) is not None}
        asked = [index for index in shown if index not in problems]
        solved: dict[int, dict[str, int]] = {index: {} for index in asked}
        for model in self._config.models:
            left = [index for index in asked if index not in problems]
            drawn = self._draw(model, [rows[index].example for index in left])
            tried = {index: rollouts for index, rollouts in zip(left, drawn, strict=True) if not isinstance(rollouts, str)}
            problems |= {index: reason for index, reason in zip(left, drawn, strict=True) if isinstance(reason, str)}
            counts = self._num_solved([rows[index].example for index in tried], list(tried.values()))
            for index, count in zip(tried, counts, strict=True):
                solved[index][model] = count
        solved = {index: counts for index, counts in solved.items() if index not in problems}
        kept, dropped, tries = [], [], self._config.tries
        for index, row in enumerate(rows):
            if index in problems:
                dropped.append((row.example.id, problems[index]))
            elif index in solved and self._is_solved(solved[index]):
                counts = ", ".join(f"{model} {count} of {tries} tries" for model, count in solved[index].items())
                dropped.append((row.example.id, f"solved without the image: {counts}"))
            elif index in solved:
                noted = {f"blind_solved/{model}": count for model, count in solved[index].items()}
                kept.append(replace(row, notes={**row.notes, "blind_tries": tries, **noted}))
            else:
                kept.append(row)
        metrics: dict[str, float] = {"without_image": len(rows) - len(shown)}
        metrics |= self._metrics([rows[index].example for index in solved], list(solved.values()))
        for name, value in metrics.items():
            self.totals[name] = self.totals.get(name, 0.0) + value
        histogram = {}
        for model in self._config.models:
            bars = Counter(f"{counts[model]}/{tries}" for counts in solved.values())
            histogram[f"{BARS}, {model}"] = {**self._empty_bars(), **bars}
        return StepResult(rows=tuple(kept), dropped=tuple(dropped), metrics=metrics, histogram=histogram)

    def _is_solved(self, counts: Mapping[str, int]) -> bool:
        """Returns whether every model was right often enough."""
        return min(counts.values()) >= self._config.num_needed

    def _answer_problem(self, example: Example) -> str | None:
        """Returns why no response could ever be found right, or None."""
        for component in self._rewards.components:
            if component.config.judges(example):
                try:
                    component.reward.check_answer(example)
                except DataError as error:
                    return f"answer cannot be verified: {error}"
        return None

    def _draw(self, model: str, examples: Sequence[Example]) -> list[tuple[Rollout, ...] | str]:
        if not examples:
            return []
        asked = [
            Asked(
                place=example.id,
                messages=without_media(query_messages(example)),
                seeds=tuple(request_seed(self._seed, "image_necessity", model, example.id, number) for number in range(self._config.tries)),
            )
            for example in examples
        ]
        return draw(self._engines.use(model), asked)

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

    def _metrics(self, examples: Sequence[Example], solved: Sequence[Mapping[str, int]]) -> dict[str, float]:
        """Returns sums over the rows that were tried; see `describe_chance` for what they say."""
        config = self._config
        levels = chance_levels([as_query(example) for example in examples], tries=config.tries, needed=config.num_needed)
        known = [level for level in levels if level is not None]
        num_by_choices = sum(num_choices(example.metadata) > 0 for example in examples)
        return {
            "tried": len(examples),
            "tries": len(examples) * config.tries * len(config.models),
            "tries_solved": sum(sum(counts.values()) for counts in solved),
            "rows_solved": sum(map(self._is_solved, solved)),
            "chance/rows_known": len(known),
            "chance/rows_by_choices": num_by_choices,
            "chance/tries_solved": config.tries * len(config.models) * math.fsum(level.of_try for level in known),
            "chance/rows_solved": math.fsum(level.of_drop ** len(config.models) for level in known),
            "chance/rows_repeated": math.fsum(level.of_try ** len(config.models) for level in known),
        }
