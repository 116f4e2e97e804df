"""The phases of a supervised stage: which settings a step has, and which examples it sees. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

from ..model.records import Example, VideoPart
from ..sft.config import SftConfig
from .data_config import DataConfig, MixData
from .example_mix import MixStream, ShareOrder, Source
from .example_stream import ExampleStream, open_stream
from .schema import OnPolicyDistillRecipe, SftRecipe, StageRecipe


@dataclass(frozen=True, kw_only=True, slots=True)
class Draw:
    """How a phase draws from one data set: its share of the phase's examples and the number of the first."""

    data: DataConfig
    share: Fraction
    start: int


@dataclass(frozen=True, kw_only=True, slots=True)
class PhasePlan:
    """A phase with all its settings.

    Example: phases `short` (3 steps of 4) and `long` (2 steps of 2) have `first_step` 0 and 3, `first_example` 0 and 12.
    """

    name: str
    """Empty for the one phase of a recipe without phases."""
    first_step: int
    """Steps of the stage before it."""
    num_steps: int
    first_example: int
    """Examples of the stage before it."""
    config: SftConfig
    """The recipe's, with the phase's own steps, examples, lengths."""
    draws: tuple[Draw, ...]

    @property
    def num_examples(self) -> int:
        """Examples of all its steps."""
        return self.num_steps * self.config.examples_per_step


def plan_phases(recipe: SftRecipe) -> tuple[PhasePlan, ...]:
    """Returns the recipe's phases in order; a recipe without phases is one."""
    if not recipe.phases:
        assert recipe.data is not None, "a recipe without phases has data"
        assert recipe.sft.num_steps is not None, "a recipe without phases has sft.num_steps"
        only = Draw(data=recipe.data, share=Fraction(1), start=0)
        return (PhasePlan(name="", first_step=0, num_steps=recipe.sft.num_steps, first_example=0, config=recipe.sft, draws=(only,)),)
    plans: list[PhasePlan] = []
    drawn: dict[str, int] = {}
    for name, phase in recipe.phases.items():
        own = {key: getattr(phase, key) for key in ("examples_per_step", "max_length", "too_long") if getattr(phase, key) is not None}
        shares = _shares(recipe, name)
        plan = PhasePlan(
            name=name,
            first_step=plans[-1].first_step + plans[-1].num_steps if plans else 0,
            num_steps=phase.num_steps,
            first_example=plans[-1].first_example + plans[-1].num_examples if plans else 0,
            config=recipe.sft.model_copy(update={**own, "num_steps": phase.num_steps}),
            draws=tuple(Draw(data=data, share=share, start=drawn.get(key_of(data), 0)) for data, share in shares),
        )
        for (data, _), count in zip(shares, _counts(tuple(share for _, share in shares), plan.num_examples), strict=True):
            drawn[key_of(data)] = drawn.get(key_of(data), 0) + count
        plans.append(plan)
    return tuple(plans)


@lru_cache(maxsize=64)
def _counts(shares: tuple[Fraction, ...], num_examples: int) -> tuple[int, ...]:
    """Returns how many of the first examples each share has; kept: a run asks at every step, and 0.333333 has a period of a million."""
    return tuple(ShareOrder(shares).counts(num_examples))


def _shares(recipe: SftRecipe, name: str) -> list[tuple[DataConfig, Fraction]]:
    phase = recipe.phases[name]
    data = phase.data or recipe.data
    assert data is not None, "the recipe's check leaves no phase without data"
    if phase.interleave is None:
        return [(data, Fraction(1))]
    other = recipe.phases[phase.interleave.phase].data or recipe.data
    assert other is not None, "the recipe's check leaves no phase without data"
    share = Fraction(str(phase.interleave.share))  # as it is written: 1 - 0.9 in binary is not 0.1
    return [(data, 1 - share), (other, share)]


def training_data(stage: StageRecipe) -> Iterator[tuple[str, DataConfig, bool]]:
    """Yields (dotted key, settings, whether rows end with the assistant's turn) of each data set that the stage trains on or measures,
    those inside mixes too.
    """
    has_solution = isinstance(stage, SftRecipe)
    named = [("data", stage.data, has_solution)]
    if isinstance(stage, SftRecipe):
        named += [(f"phases.{name}.data", phase.data, True) for name, phase in stage.phases.items()]
    if isinstance(stage, OnPolicyDistillRecipe):
        named.append(("off_policy_data", stage.off_policy_data, True))
    for key, data, is_conversation in named:
        if data is not None:
            yield from ((leaf, settings, is_conversation) for leaf, settings in leaves(key, data))


def leaves(key: str, data: DataConfig) -> Iterator[tuple[str, DataConfig]]:
    """Yields (dotted key, settings) of the data sets that a mix is made of, or of the one data set."""
    if not isinstance(data, MixData):
        yield key, data
        return
    for name, part in data.parts.items():
        yield from leaves(f"{key}.parts.{name}.data", part.data)


def key_of(data: DataConfig) -> str:
    """Returns a text that is equal for equal settings."""
    return data.model_dump_json()


def plan_of_step(plans: Sequence[PhasePlan], step: int) -> PhasePlan:
    """Returns the phase of step number `step`, counted from 0."""
    return next(plan for plan in reversed(plans) if plan.first_step <= step)


def examples_of_step(plans: Sequence[PhasePlan], step: int) -> tuple[int, int]:
    """Returns the number of the step's first example in the stage, and how many it has."""
    plan = plan_of_step(plans, step)
    count = plan.config.examples_per_step
    return plan.first_example + (step - plan.first_step) * count, count


def dealt(examples: Sequence[Example], num_ranks: int) -> list[Example]:
    """Returns the examples of a step in an order in which every n-th has its fair part of the work: by size, there and back again.

    The order of a mix repeats, so that taken as it comes one rank could get all long rows. One rank keeps the order as it is.
    """
    if num_ranks == 1:
        return list(examples)
    by_size = sorted(examples, key=_size, reverse=True)
    rounds = [by_size[first : first + num_ranks] for first in range(0, len(by_size), num_ranks)]
    return [example for number, dealt_round in enumerate(rounds) for example in dealt_round[:: -1 if number % 2 else 1]]


def _size(example: Example) -> float:
    """Returns about how many tokens an example has: one for 3 characters, 32 x 32 pixels of an image or of two frames of a video."""
    pixels = 0.0
    for part in example.media:
        frames = part.frames if isinstance(part, VideoPart) else (part.image,)
        pixels += sum(frame.width * frame.height for frame in frames) / (2 if isinstance(part, VideoPart) else 1)
    return sum(len(message.text) for message in example.messages) / 3 + pixels / 1024


class PhasedStream:
    """The examples of a stage, one phase behind another; the last one has no end. Data that two phases name is read once."""

    def __init__(self, plans: Sequence[PhasePlan], streams: Mapping[str, ExampleStream]) -> None:
        self.plans = tuple(plans)
        self.num_rows: int | None = next(iter(streams.values())).num_rows if len(streams) == 1 else None
        self._phases = [
            MixStream([Source(share=draw.share, stream=streams[key_of(draw.data)], start=draw.start) for draw in plan.draws])
            for plan in plans
        ]

    def examples(self, start: int, count: int) -> list[Example]:
        """Returns examples number `start` to `start + count - 1` of the stage."""
        found: list[Example] = []
        for number, (plan, stream) in enumerate(zip(self.plans, self._phases, strict=True)):
            is_last = number == len(self.plans) - 1
            end = start + count if is_last else min(start + count, plan.first_example + plan.num_examples)
            first = max(start, plan.first_example)
            if first < end:
                found += stream.examples(first - plan.first_example, end - first)
        return found


def open_phases(plans: Sequence[PhasePlan], *, seed: int) -> PhasedStream:
    """Returns the examples of all phases, each data set opened once and its rows checked."""
    data = {key_of(draw.data): draw.data for plan in plans for draw in plan.draws}
    return PhasedStream(plans, {key: open_stream(config, seed=seed, with_solution=True) for key, config in data.items()})
