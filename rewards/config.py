"""Settings of the rewards: which components judge a response, how they add up, and what follows when one is unavailable."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from ..model.config import Settings
from ..model.records import VlpostError


class RewardConfigError(VlpostError, ValueError):
    """A reward setting that cannot be used; the message names the component, the value, what is allowed and what to do."""


class ComponentConfig(Settings):
    """One part of the reward: `ComponentConfig(use="count", weight=1.0, tasks=("count",))`."""

    use: Annotated[str, Field(min_length=1)]
    """A built-in name (`math_answer`, `count`, `choice`, `exact`), `package.module:function` or `file.py:function`."""
    weight: Annotated[float, Field(allow_inf_nan=False)] = 1.0
    """Factor of the value in the sum; negative for a penalty, 0 for a component that is only logged."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the function, checked against its annotations at start."""
    tasks: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    """Values of `example.task` that it judges; none: all of them."""

    def judges(self, task: str) -> bool:
        """True when the component judges examples of this task."""
        return self.tasks is None or task in self.tasks


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
    timeout_s: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] = 5.0
    """Seconds of work that one judgement may take in a worker process or in an async function; waiting for a free worker does
    not count. A plain function runs in the trainer's own process and cannot be interrupted."""
