"""What guessing would have solved: the chance level beside which the rows that `image_necessity` drops are printed. No torch."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..model.records import Example


@dataclass(frozen=True, kw_only=True, slots=True)
class Chance:
    """What luck would do with one row: probabilities."""

    of_try: float
    """That one guess is right."""
    of_drop: float
    """That at least m of k fresh guesses are right. A model that makes the same guess k times is right as often as with one try."""


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
        offered = num_choices(example.metadata)
        if offered:
            share = 1.0 / offered
            levels.append(Chance(of_try=share, of_drop=binomial_tail(share, tries=tries, needed=needed)))
        elif others >= tries:
            levels.append(Chance(of_try=matching / others, of_drop=hypergeometric_tail(matching, others, tries=tries, needed=needed)))
        else:
            levels.append(None)
    return levels


def _plain(answer: str) -> str:
    return " ".join(answer.split()).casefold()


def num_choices(metadata: Mapping[str, object]) -> int:
    """Returns how many answers the row offers to choose from; 0 where it offers none."""
    choices = metadata.get("choices")
    return len(choices) if isinstance(choices, list | dict) else 0


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
    of_tries = metrics["chance/tries_solved"] / (known * metrics["tries"] / tried)
    of_rows, of_repeated = metrics["chance/rows_solved"] / known, metrics["chance/rows_repeated"] / known
    return (
        f"{line}; chance level: {of_tries:.1%} of tries; of rows {of_rows:.2%} if every try is a fresh guess, {of_repeated:.1%} if every "
        f"model repeats one guess (by the given choices for {by_choices:g} rows, by the answers of other rows of the task for "
        f"{known - by_choices:g}, unknown for {tried - known:g})"
    )
