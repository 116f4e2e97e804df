"""Dynamic sampling: groups that say nothing are replaced by further ones, so that every update learns from as many groups as planned."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..model.metrics import Metric, maximum, total
from ..model.records import Example
from ..rewards.result import ScoredGroup

ExampleSource = Callable[[], Sequence[Example]]
"""Returns this rank's part of the next examples, as many as a step has; called by all ranks together."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Refilled:
    """The groups of a step after refilling."""

    groups: list[ScoredGroup]
    """As many as before, in the same places; where no further group had a signal, the one that stood there."""
    further: list[ScoredGroup]
    """All that were drawn beside the first ones, with a signal or without."""
    metrics: dict[str, Metric]


def refill(
    groups: Sequence[ScoredGroup],
    *,
    max_rounds: int,
    next_examples: ExampleSource,
    draw: Callable[[Sequence[Example]], Sequence[ScoredGroup]],
    is_learned: Callable[[ScoredGroup], bool],
    over_ranks: Callable[[float], float] = float,
) -> Refilled:
    """Returns the groups, those without a signal replaced by further groups of the same task.

    A round asks for as many further examples of each task as are missing here, draws them as whole groups (`draw` also judges) and puts
    those that `is_learned` into the empty places; it ends when no rank misses a group, or after `max_rounds`. Examples that a round did not
    need are kept for the next one; `over_ranks` adds up a number over ranks, so that all of them go through the same rounds. DAPO
    (arXiv:2503.14476) refills without regard to tasks; the constant shares of Qwen3-VL's batches ask for the same task.
    """
    filled, further, left = list(groups), list[ScoredGroup](), list[Example]()
    num_rounds = 0
    for _ in range(max_rounds):
        holes = [place for place, group in enumerate(filled) if not is_learned(group)]
        if not over_ranks(len(holes)):
            break
        num_rounds += 1
        missing = Counter(filled[place].example.task for place in holes)
        if over_ranks((missing - Counter(example.task for example in left)).total()):
            left += next_examples()
        wanted, left = _split(left, missing)
        found = draw(wanted) if wanted else ()
        further += found
        for group in filter(is_learned, found):
            place = next(place for place in holes if filled[place].example.task == group.example.task)
            holes.remove(place)
            filled[place] = group
    num_missing = sum(not is_learned(group) for group in filled)
    return Refilled(
        groups=filled,
        further=further,
        metrics={"refill_rounds": maximum(num_rounds), "refill_groups": total(len(further)), "missing_groups": total(num_missing)},
    )


def _split(examples: Sequence[Example], missing: Counter[str]) -> tuple[list[Example], list[Example]]:
    """Returns the first so many examples of each task, and all others; both in order."""
    open_places, wanted, others = missing.copy(), list[Example](), list[Example]()
    for example in examples:
        (wanted if open_places[example.task] > 0 else others).append(example)
        open_places[example.task] -= 1
    return wanted, others
