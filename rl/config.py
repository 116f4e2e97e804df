"""Settings of reinforcement learning. No torch."""

from __future__ import annotations

import warnings
from typing import Annotated, Literal

from pydantic import Field, model_validator

from ..model.config import Settings


class SapoConfig(Settings):
    """Soft adaptive policy optimization (arXiv:2511.20347): a sigmoid gate in place of a clip."""

    name: Literal["sapo"] = "sapo"
    tau_pos: float = Field(default=1.0, gt=0)
    """Gate temperature where the advantage is above 0 (the paper's setting)."""
    tau_neg: float = Field(default=1.05, gt=0)
    """Gate temperature elsewhere; the paper finds 1.05 most stable and 0.95 unstable with tau_pos 1."""

    @model_validator(mode="after")
    def _warn_about_order(self) -> SapoConfig:
        if self.tau_neg < self.tau_pos:
            warnings.warn(
                f"policy_loss.tau_neg = {self.tau_neg} is below tau_pos = {self.tau_pos}: the paper's runs are unstable that way round",
                stacklevel=2,
            )
        return self


class GrpoConfig(Settings):
    """Token-level PPO clip with group advantages (arXiv:2402.03300)."""

    name: Literal["grpo"]
    clip_low: float = Field(default=0.2, gt=0, lt=1)
    clip_high: float = Field(default=0.2, gt=0)


class GspoConfig(Settings):
    """Sequence-level clip of the length-normalised ratio (arXiv:2507.18071)."""

    name: Literal["gspo"]
    clip_low: float = Field(default=3e-4, gt=0, lt=1)
    clip_high: float = Field(default=4e-4, gt=0)


class ReinforceConfig(Settings):
    """Plain policy gradient with group advantages, no ratio."""

    name: Literal["reinforce"]


PolicyLossConfig = Annotated[SapoConfig | GrpoConfig | GspoConfig | ReinforceConfig, Field(discriminator="name")]


class RlConfig(Settings):
    """One stage of reinforcement learning."""

    num_steps: int = Field(ge=1)
    """Rollout-and-update rounds; each has up to `num_mini_batches` optimizer updates."""
    prompts_per_step: int = Field(ge=1)
    group_size: int = Field(ge=2)
    """Rollouts of one example; advantages compare them, so one is not enough."""
    num_mini_batches: int = Field(default=2, ge=1)
    """Optimizer updates a step (2: Qwen3-VL's split, arXiv:2511.20347 section 5). With 1 the ratio is 1 and every gate is open."""
    policy_loss: PolicyLossConfig = SapoConfig()
    scale_advantages: Literal["std", "none"] = "std"
    normalize_by: Literal["planned", "signal"] = "planned"
    """Denominator of a mini-batch's mean over responses: all that were planned, or only those of groups with signal. `planned` keeps
    the step size from jumping as groups saturate."""
    importance_cap: float = Field(default=2.0, ge=1.0)
    """Cap of the token-level weight pi_learner / pi_engine that corrects for the engine's arithmetic (truncated, detached)."""

    @model_validator(mode="after")
    def _check_split(self) -> RlConfig:
        if self.prompts_per_step % self.num_mini_batches:
            raise ValueError(
                f"rl.prompts_per_step = {self.prompts_per_step} cannot be split into "
                f"rl.num_mini_batches = {self.num_mini_batches} equal parts"
            )
        return self
