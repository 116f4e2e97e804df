"""Settings of model, learner and sampler. No torch: a recipe is checked with these in well under a second.

Every class forbids unknown keys; units and sources stand at the field.
"""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

Part = Literal["vision", "merger", "language"]
"""Parts of a Qwen3-VL that freeze on their own: the tower, its mergers (DeepStack's too), the language model with its head."""

DType = Literal["float32", "bfloat16"]

Share = Annotated[float, Field(ge=0.0, le=1.0)]


class Settings(BaseModel):
    """Base of all settings: frozen; unknown keys are errors, and so are numbers that are infinite or nan."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


class NanoConfig(Settings):
    """A tiny random Qwen3-VL, built when the run starts."""

    size: Literal["s", "m"] = "s"
    """s: about 1 M parameters, m: about 4 M."""
    vocab_size: int = Field(default=448, ge=384, le=1024)
    """Size of the byte-level BPE that is trained on the track's own text."""
    thinking: bool = False
    """True: the chat template of the Thinking variant, which opens the think block in the prompt."""
    max_image_tokens: int = Field(default=64, ge=1)
    """Largest image in merged tokens (32 x 32 pixels each); larger ones are resized by the image processor."""


class LearnerConfig(Settings):
    """The optimizer and how a step is computed."""

    learning_rate: float = Field(gt=0)
    """Peak, per optimizer step."""
    weight_decay: float = Field(default=0.0, ge=0)
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.95, ge=0, lt=1)
    warmup_steps: int = Field(default=0, ge=0)
    """Optimizer steps of linear warm-up from 0."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the rate falls after the warm-up."""
    final_learning_rate_frac: Share = 0.1
    """Where `linear` and `cosine` end, as a share of the peak."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Global L2 norm the gradient is clipped to (papers: 1.0 in Qwen's fine-tuning scripts)."""
    token_budget: int = Field(default=4096, ge=64)
    """Unique tokens of one micro-batch, images expanded; bounds memory, never changes the gradient."""
    gradient_checkpointing: bool = False
    freeze: tuple[Part, ...] = ()
    """Parts that are not trained."""
    dtype: DType = "float32"

    @model_validator(mode="after")
    def _something_is_trained(self) -> LearnerConfig:
        if set(self.freeze) == set(get_args(Part)):
            raise ValueError("learner.freeze names every part of the model: nothing is left to train")
        return self


class SamplerConfig(Settings):
    """How responses are drawn. No top-p or top-k: they change the distribution that the learner's ratio is about."""

    temperature: float = Field(default=1.0, gt=0)
    """Engine and learner both divide the logits by it."""
    max_response_tokens: int = Field(ge=1)
    """A longer response ends with finish reason `length`."""
    max_model_len: int = Field(ge=16)
    """Prompt (images expanded) plus response, in tokens."""
    max_num_seqs: int = Field(default=256, ge=1)
    """Responses the engine decodes at a time."""
    kv_cache_gib: int = Field(default=1, ge=1)
    """Memory of the engine's cache on the CPU."""
    gpu_memory_utilization: Share = 0.4
    """Share of a GPU that the engine may take; unused on the CPU."""
    max_images_per_prompt: int = Field(default=4, ge=0)
    max_videos_per_prompt: int = Field(default=1, ge=0)


class ParityConfig(Settings):
    """The gate between engine and learner: before step 1 and after the first publishes."""

    max_abs_gap: float = Field(default=1e-4, gt=0)
    """Largest |engine log-prob - learner log-prob| of a sampled token, in nats (fp32)."""
    num_examples: int = Field(default=8, ge=1)
    num_publishes: int = Field(default=2, ge=0)
    """How many publishes are followed by a check."""


ENGINE_ENVIRONMENT = {
    # One process: weights are handed over by reference, and the engine dies with the run.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # Otherwise the engine pins the process's threads and the learner loses its cores.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
"""What the in-process engine needs in the environment before the first heavy import."""
