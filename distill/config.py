"""Settings of on-policy distillation. No torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from ..model.config import Settings
from ..rl.config import PolicyLossConfig, SapoConfig


class ExactConfig(Settings):
    """The divergence of the whole next-token distribution at every drawn position, without noise."""

    name: Literal["exact"] = "exact"
    divergence: Literal["forward", "reverse", "jsd"] = "reverse"
    """forward: KL(teacher, student), which covers the teacher's modes; reverse: KL(student, teacher), which seeks one of them; jsd:
    beta KL(teacher, mixture) + (1 - beta) KL(student, mixture) (GKD, arXiv:2306.13649). The Qwen3 reports say KL and not which; our
    choice is reverse, the one whose mean over the student's own tokens on-policy distillation minimises."""
    beta: float | None = Field(default=None, gt=0, lt=1)
    """Of jsd, and only of it: the teacher's share of the mixture."""

    @model_validator(mode="after")
    def _beta_is_of_jsd(self) -> ExactConfig:
        if self.divergence == "jsd" and self.beta is None:
            raise ValueError("divergence: jsd needs beta, strictly between 0 and 1 (GKD's recipes have 0.5)")
        if self.divergence != "jsd" and self.beta is not None:
            raise ValueError(f"beta = {self.beta} is of `divergence: jsd`; {self.divergence} has none: leave it out")
        return self


class SampledTokenConfig(Settings):
    """The log-ratio of the drawn token, log teacher - log student, as its advantage in a policy-gradient loss.

    It needs the teacher's log-prob of one token a position and is noisier than `exact`. As a loss of its own it would do nothing: the
    mean of its gradient over the student's tokens is zero.
    """

    name: Literal["sampled_token"]
    policy_loss: PolicyLossConfig = SapoConfig()
    importance_cap: float = Field(default=2.0, ge=1.0)
    """Cap of the token-level weight pi_learner / pi_engine that corrects for the engine's arithmetic (truncated, detached)."""


SupportConfig = Annotated[ExactConfig | SampledTokenConfig, Field(discriminator="name")]


class OnPolicyDistillConfig(Settings):
    """One stage of on-policy distillation: the student draws, a teacher says what it would have, the student follows."""

    num_steps: int = Field(ge=1)
    """Rollout-and-update rounds; each has `num_mini_batches` optimizer updates."""
    prompts_per_step: int = Field(ge=1)
    group_size: int = Field(default=1, ge=1)
    """Responses to one prompt; they share its tokens in student and teacher."""
    num_mini_batches: int = Field(default=1, ge=1)
    """Optimizer updates a step. Only the first of them sees responses of the very student that it trains."""
    support: SupportConfig = ExactConfig()
    """What of the teacher's distribution is used."""
    weighting: Literal["token", "sequence"] = "token"
    """How drawn tokens weigh in the mean: all of a step alike (the KL of the batch a token), or each response alike."""
    prompts: Literal["text", "multimodal"] = "text"
    """text: a row with an image or a video is refused, and the recipe freezes vision tower and mergers, as in Qwen3-VL's strong-to-weak
    distillation (arXiv:2511.21631, section on post-training)."""

    @model_validator(mode="after")
    def _check_split(self) -> OnPolicyDistillConfig:
        if self.prompts_per_step % self.num_mini_batches:
            raise ValueError(
                f"distill.prompts_per_step = {self.prompts_per_step} cannot be split into "
                f"distill.num_mini_batches = {self.num_mini_batches} equal parts"
            )
        return self
