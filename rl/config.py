"""Settings of reinforcement learning. No torch."""

from __future__ import annotations

import warnings
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, field_validator, model_validator

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


class KlLossConfig(Settings):
    """KL(policy, reference) added to the loss of every trained token: `{in: loss, estimator: k2, coef: 0.001}`.

    It sees each position by itself; what a token does to the divergence of later ones is counted by `in: reward` only.
    """

    model_config = ConfigDict(serialize_by_alias=True)

    in_: Literal["loss"] = Field(alias="in")
    estimator: Literal["exact", "k2", "k3"]
    """exact: over the whole vocabulary, without noise, for which the reference's hidden states and head are at hand in each update.
    k2 and k3 need the reference's log-prob of the drawn token only. k2 has the gradient of KL(policy, reference); k3, GRPO's choice,
    that of KL(reference, policy), without bound where the policy gives up a token that the reference keeps."""
    coef: float = Field(gt=0)
    """Factor of the term, per nat. With k3 DeepSeekMath has 0.04 (arXiv:2402.03300 section 4.2), DeepSeek-R1 0.001
    (arXiv:2501.12948); DAPO and SAPO have no such term (arXiv:2503.14476, arXiv:2511.20347), hence none by default."""

    @field_validator("estimator", mode="before")
    @classmethod
    def _has_a_gradient(cls, estimator: Any) -> Any:  # noqa: ANN401
        if estimator == "k1":
            raise ValueError(
                "as a loss k1 does nothing, the mean of its gradient is zero (arXiv:2506.09477); use exact, k2 or k3 here, "
                "or k1 with `in: reward`"
            )
        return estimator


_WRONG_IN_REWARD = {
    "exact": "exact does not depend on the token that was drawn, so it says nothing about that token",
    "k2": "k2 charges a token for being likelier than in the reference and for being less likely alike",
    "k3": "k3 has that of KL(policy, reference) - KL(reference, policy), which is about zero near the reference",
}


class KlRewardConfig(Settings):
    """KL(policy, reference) taken from the reward of every response: `{in: reward, estimator: k1, coef: 0.02}`.

    reward - coef * sum over the response's tokens of (log policy - log reference), before advantages are taken.
    """

    model_config = ConfigDict(serialize_by_alias=True)

    in_: Literal["reward"] = Field(alias="in")
    estimator: Literal["k1"] = "k1"
    """The only one whose policy gradient is that of KL(policy, reference)."""
    coef: float = Field(gt=0)
    """Reward per nat; InstructGPT has 0.02 (arXiv:2203.02155 appendix C.4). The penalty is a sum over tokens, where a loss term is a
    mean: a coefficient of `in: loss` does not fit here."""

    @field_validator("estimator", mode="before")
    @classmethod
    def _has_the_right_policy_gradient(cls, estimator: Any) -> Any:  # noqa: ANN401
        if estimator in ("exact", "k2", "k3"):
            raise ValueError(
                f"in the reward only k1 has the policy gradient of KL(policy, reference): {_WRONG_IN_REWARD[estimator]}; "
                f"use k1 here, or {estimator} with `in: loss` (arXiv:2510.01555)"
            )
        return estimator


KlConfig = Annotated[KlLossConfig | KlRewardConfig, Field(discriminator="in_")]


class OverlongMaskConfig(Settings):
    """Responses that were cut off are left out, of their group's advantages as well as of the loss (DAPO's over-long filtering)."""

    use: Literal["mask"]


class OverlongPenaltyConfig(Settings):
    """Long responses lose reward, the more the nearer they come to a length (DAPO's soft over-long punishment, arXiv:2503.14476)."""

    use: Literal["penalty"]
    max_tokens: int = Field(ge=1)
    """Sampled tokens, of all turns, from which on the whole weight is taken; DAPO has 20,480."""
    buffer_tokens: int = Field(ge=1)
    """Over so many tokens before, the penalty grows from 0; DAPO has 4,096."""
    weight: float = Field(default=1.0, gt=0)
    """Reward that is taken at most."""

    @model_validator(mode="after")
    def _buffer_fits(self) -> OverlongPenaltyConfig:
        if self.buffer_tokens > self.max_tokens:
            raise ValueError(f"buffer_tokens = {self.buffer_tokens} is above max_tokens = {self.max_tokens}: the penalty would never be 0")
        return self


OverlongConfig = Annotated[OverlongMaskConfig | OverlongPenaltyConfig, Field(discriminator="use")]


class DynamicSamplingConfig(Settings):
    """Groups whose rewards are all equal, or of which fewer than two could be judged, are replaced by further ones (DAPO,
    arXiv:2503.14476)."""

    max_rounds: int = Field(default=3, ge=1, le=100)
    """Rounds of further groups in one step; then it goes on with what there is. DAPO's code has at most 10, each of three times a batch;
    ours draw only what is missing."""


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
    kl: KlConfig | None = None
    """A term that holds the policy near the model that the stage starts from; absent: none, as in SAPO (arXiv:2511.20347)."""
    dynamic_sampling: DynamicSamplingConfig | None = None
    """Absent: groups without a signal are left out of the update, which then has fewer. The reports of SAPO and Qwen3-VL filter prompts
    beforehand instead (`vlpost curate`, step difficulty) and say nothing of it."""
    overlong: OverlongConfig | None = None
    """What becomes of responses that are too long; absent: they count as they were judged, cut off or not. The reports of SAPO and
    Qwen3-VL say nothing of it, and masking has helped some runs and harmed others: hence none."""
    scale_advantages: Literal["std", "none"] = "std"
    normalize_by: Literal["planned", "signal"] = "planned"
    """Denominator of a mini-batch's mean over responses: all that were planned, or only those of groups with signal. `planned` keeps
    the step size from jumping as groups saturate."""
    importance_cap: float = Field(default=2.0, ge=1.0)
    """Cap of the token-level weight pi_learner / pi_engine that corrects for the engine's arithmetic, and for the age of responses that
    were drawn a step ahead (truncated, detached)."""
    staleness: Literal[0, 1] = 0
    """1: servers (`sampler.serve`) draw the next step's responses while this one's are learned from, with the weights from before its
    updates. The ratio's old log-probs are the learner's at the start of the updates either way. The papers draw with the newest weights."""

    @model_validator(mode="after")
    def _what_is_drawn_ahead_is_known(self) -> RlConfig:
        if self.staleness and self.dynamic_sampling is not None:
            raise ValueError(
                "rl.staleness = 1 with rl.dynamic_sampling: which examples the next step has is known only when this one is full; leave "
                "out one of them"
            )
        return self

    @model_validator(mode="after")
    def _check_split(self) -> RlConfig:
        if self.prompts_per_step % self.num_mini_batches:
            raise ValueError(
                f"rl.prompts_per_step = {self.prompts_per_step} cannot be split into "
                f"rl.num_mini_batches = {self.num_mini_batches} equal parts"
            )
        return self
