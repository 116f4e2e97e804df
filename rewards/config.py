"""Settings of the rewards: which components judge a response, how they add up, and what follows when one is unavailable."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field, model_validator

from ..model.config import Settings
from ..model.records import Example, VlpostError
from .judge_config import JudgeConfig
from .sandbox_config import SandboxConfig

CompletionForm: TypeAlias = Literal["conversational", "text"]
"""How a function with trl's signature gets prompts and completions: as lists of messages, or as plain text."""
Names: TypeAlias = Annotated[tuple[str, ...], Field(min_length=1)]
Seconds: TypeAlias = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]


class RewardConfigError(VlpostError, ValueError):
    """A reward setting that cannot be used; the message names the component, the value, what is allowed and what to do."""


class ComponentConfig(Settings):
    """One part of the reward: `ComponentConfig(use="count", weight=1.0, tasks=("count",))`."""

    use: Annotated[str, Field(min_length=1)]
    """A built-in name (`vlpost rewards list`), the name of an installed entry point of group `vlpost.rewards`,
    `package.module:function` or `file.py:function`."""
    weight: Annotated[float, Field(allow_inf_nan=False)] = 1.0
    """Factor of the value in the sum; negative for a penalty, 0 for a component that is only logged."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the function, checked against its annotations at start."""
    tasks: Names | None = None
    """Values of `example.task` that it judges; none: all of them."""
    sources: Names | None = None
    """Values of `example.source` (the data set) that it judges; none: all of them. A row is judged when both keys match."""
    when: str | None = None
    """Another component: where its value is not above 0, this one's counts as 0. A bonus for a right answer, as DeepEyes pays for the use
    of a tool. Absent: the value counts always."""
    timeout_s: Seconds | None = None
    """Seconds of work that one judgement of this component may take; none: `rewards.timeout_s`."""
    isolate: bool | None = None
    """For a plug-in that is a plain function: run it in a killable process of its own, with a deadline (the default), or, when
    false, in the trainer's process, where nothing can end it."""
    max_memory_mib: Annotated[int, Field(ge=64)] | None = None
    """For an isolated plug-in: resident memory of its process in MiB, above which the process is replaced; none: 4096."""
    completions: CompletionForm | None = None
    """For a function with trl's signature: the form of its prompts and completions; none: conversational."""

    def judges(self, example: Example) -> bool:
        """True when the component judges this example."""
        return (self.tasks is None or example.task in self.tasks) and (self.sources is None or example.source in self.sources)


class RewardsConfig(Settings):
    """All components of the reward, by name: `reward = sum of weight x value`."""

    components: Annotated[dict[str, ComponentConfig], Field(min_length=1)]
    """The name appears in logs as `reward/<name>/...`."""
    on_unavailable: Literal["drop_rollout", "drop_group", "stop"] = "drop_rollout"
    """What follows when a judgement could not be made: leave out that rollout, leave out its whole group, or stop the run."""
    max_unavailable_frac: Annotated[float, Field(ge=0.0, le=1.0)] = 0.2
    """Largest share of the rollouts of one scored batch that may be unavailable; above it the run stops."""
    num_workers: Annotated[int, Field(ge=1)] = 1
    """Killable worker processes for each reward that needs one."""
    timeout_s: Seconds = 5.0
    """Seconds of work that one judgement may take in a worker process or in an async function; waiting for a free worker does
    not count. A function that judges a whole group has as many times this as the group has rollouts."""
    sandbox: SandboxConfig = SandboxConfig()
    """The jail of components that run programs."""
    judge: JudgeConfig | None = None
    """The judge model's server, for components that use one."""
    cache: bool = True
    """Look up verdicts of rewards that say they are cacheable in a file of the output folder, and keep new ones there."""

    @model_validator(mode="after")
    def _conditions_are_judged(self) -> RewardsConfig:
        for name, component in self.components.items():
            if component.when is None:
                continue
            other = self.components.get(component.when)
            place = f"components.{name}.when = {component.when!r}"
            if other is None or component.when == name or other.when is not None:
                free = [key for key, of in self.components.items() if of.when is None and key != name]
                raise ValueError(f"{place}: must be another component that has no `when` of its own, one of {', '.join(free) or 'none'}")
            for key in ("tasks", "sources"):
                here, there = getattr(component, key), getattr(other, key)
                if there is not None and (here is None or not set(here) <= set(there)):
                    raise ValueError(f"{place}: {component.when} judges only the {key} {', '.join(there)}; give {name} no others")
        return self
