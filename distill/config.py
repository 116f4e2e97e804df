"""Settings of on-policy distillation and of teachers behind a server. No torch."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from ..model.config import DType, ServedConfig, Settings
from ..rl.config import PolicyLossConfig, SapoConfig


class DivergenceConfig(Settings):
    """Which divergence of the student from the teacher."""

    divergence: Literal["forward", "reverse", "jsd"] = "reverse"
    """forward: KL(teacher, student), which covers the teacher's modes; reverse: KL(student, teacher), which seeks one of them; jsd:
    beta KL(teacher, mixture) + (1 - beta) KL(student, mixture) (GKD, arXiv:2306.13649). The Qwen3 reports say KL and not which; our
    choice is reverse, the one whose mean over the student's own tokens on-policy distillation minimises."""
    beta: float | None = Field(default=None, gt=0, lt=1)
    """Of jsd, and only of it: the teacher's share of the mixture."""

    @model_validator(mode="after")
    def _beta_is_of_jsd(self) -> Self:
        if self.divergence == "jsd" and self.beta is None:
            raise ValueError("divergence: jsd needs beta, strictly between 0 and 1 (GKD's recipes have 0.5)")
        if self.divergence != "jsd" and self.beta is not None:
            raise ValueError(f"beta = {self.beta} is of `divergence: jsd`; {self.divergence} has none: leave it out")
        return self


class ExactConfig(DivergenceConfig):
    """The divergence of the whole next-token distribution at every drawn position, without noise."""

    name: Literal["exact"] = "exact"


class TopKConfig(DivergenceConfig):
    """The divergence over the most likely ids and one bucket of all others: what a teacher behind a server can tell.

    Nothing is renormalised: student mass outside of the ids stands against the teacher's mass there. By the log-sum inequality the value
    is never above that of `exact`.
    """

    name: Literal["top_k"]
    k: int = Field(default=64, ge=1, le=1024)
    """Ids of each model at a position, beside the drawn token, which always counts. Our choice: neither Qwen report gives one."""
    ids: Literal["teacher", "student", "both"] = "teacher"
    """Whose most likely ids. Those of the student need an engine that scores given ids (vLLM's V2 model runner, which needs a GPU)."""


class SoftLabelsConfig(DivergenceConfig):
    """A teacher's distribution as targets of off-policy distillation, beside the tokens of its responses.

    It is read once, after the filters, for the `top_k` most likely ids at each token and one bucket of all others, and kept on disk in 16
    bits. The Qwen3 reports train on responses alone in this phase (arXiv:2505.09388, 4.5); all of it is our choice.
    """

    top_k: int = Field(default=32, ge=1, le=1024)
    """Ids at a position, beside the token that stands there, which always counts."""
    weight: float = Field(default=0.5, gt=0, le=1)
    """Share of the divergence in the loss; the rest is the cross entropy of the response."""
    divergence: Literal["forward", "reverse", "jsd"] = "forward"
    """As in `exact`; forward, as the responses are the teacher's own."""


class SampledTokenConfig(Settings):
    """The log-ratio of the drawn token, log teacher - log student, as its advantage in a policy-gradient loss.

    It needs the teacher's log-prob of one token a position and is noisier than `exact`. As a loss of its own it would do nothing: the
    mean of its gradient over the student's tokens is zero.
    """

    name: Literal["sampled_token"]
    policy_loss: PolicyLossConfig = SapoConfig()
    importance_cap: float = Field(default=2.0, ge=1.0)
    """Cap of the token-level weight pi_learner / pi_engine that corrects for the engine's arithmetic (truncated, detached)."""


SupportConfig = Annotated[ExactConfig | TopKConfig | SampledTokenConfig, Field(discriminator="name")]


class TaskRewardsConfig(Settings):
    """The recipe's rewards beside the teacher: a policy-gradient loss with group advantages, added to that of every drawn token."""

    weight: float = Field(gt=0)
    """Of the policy loss; the divergence has 1."""
    policy_loss: PolicyLossConfig = SapoConfig()
    importance_cap: float = Field(default=2.0, ge=1.0)
    """As in `sampled_token`."""


class RequestsConfig(Settings):
    """How a teacher behind a server is asked, and how long one that does not answer is waited for. All of it is our choice."""

    max_concurrent: int = Field(default=32, ge=1)
    """Requests in flight of each process; a request is one response."""
    request_timeout_s: float = Field(default=300.0, gt=0)
    """Longest wait for one reply, seconds."""
    max_tries: int = Field(default=5, ge=1)
    """Failures of one request, each while the server was there, before it is the request's own fault and ends the run."""
    backoff_s: float = Field(default=0.5, gt=0)
    """Longest pause before the second try, seconds; it doubles with every further one, up to 30, and is drawn from 0 up."""
    max_wait_s: float = Field(default=1800.0, gt=0)
    """How long the step pauses for a server that is away, seconds; then the run saves and ends. `watchdog.reward_s` must be longer."""


class ServerConfig(ServedConfig):
    """How a run serves a teacher: vLLM in a process of its own."""

    port: int = Field(default=0, ge=0, le=65535)
    """0: any free one."""
    devices: str | None = Field(default=None, min_length=1)
    """CUDA_VISIBLE_DEVICES of the server, such as "6,7"; absent: that of the run."""
    gpu_memory_utilization: float = Field(default=0.9, gt=0, le=1)
    """Share of each of its GPUs that the server takes."""
    dtype: DType = "auto"
    """Of its weights and arithmetic."""
    max_model_len: int | None = Field(default=None, ge=17)
    """Tokens of a response with its prompt, and one; absent: `sampler.max_model_len` + 1."""
    kv_cache_gib: int = Field(default=1, ge=1)
    """Memory for keys and values on the CPU."""
    max_images_per_prompt: int | None = Field(default=None, ge=0)
    """Absent: `sampler.max_images_per_prompt`, and none where distill.prompts is text."""


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
    task_rewards: TaskRewardsConfig | None = None
    """Absent: the teacher alone decides. Responses that cannot be judged have no part in this term."""
    off_policy_rows: int = Field(default=0, ge=0)
    """Conversations of the recipe's `off_policy_data` in each step, beside its prompts; the teacher scores what the assistant wrote there.
    GKD's lambda, the student's share of the rows (arXiv:2306.13649 algorithm 1), is drawn / (drawn + these), and here it is exact in
    every update. Absent, lambda is 1, with which GKD's students are best."""
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
        if self.off_policy_rows % self.num_mini_batches:
            raise ValueError(
                f"distill.off_policy_rows = {self.off_policy_rows} cannot be split into "
                f"distill.num_mini_batches = {self.num_mini_batches} equal parts"
            )
        return self

    @model_validator(mode="after")
    def _terms_fit(self) -> OnPolicyDistillConfig:
        if self.task_rewards is not None and self.group_size < 2:
            raise ValueError("distill.task_rewards compares the responses to one prompt, and distill.group_size is 1: give at least 2")
        if self.off_policy_rows and isinstance(self.support, SampledTokenConfig):
            raise ValueError(
                f"distill.off_policy_rows = {self.off_policy_rows} with support sampled_token: its gradient is right for tokens that the "
                "student drew alone; take support exact or top_k, or no such rows"
            )
        return self
