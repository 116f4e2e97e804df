"""Settings of model, learner and sampler. No torch: a recipe is checked with these in well under a second.

Every class forbids unknown keys; units and sources stand at the field.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Part = Literal["vision", "merger", "language"]
"""Parts of a Qwen3-VL that freeze on their own: the tower, its mergers (DeepStack's too), the language model with its head."""

DType = Literal["auto", "float32", "bfloat16"]
"""auto: bfloat16 on a GPU, float32 on the CPU."""

Layout = Literal["ddp", "fsdp2"]

Share = Annotated[float, Field(ge=0.0, le=1.0)]


class Settings(BaseModel):
    """Base of all settings: frozen; unknown keys are errors, and so are numbers that are infinite or nan."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


class NanoConfig(Settings):
    """A tiny random Qwen3-VL, built when the run starts."""

    size: Literal["s", "m", "moe-s"] = "s"
    """s: about 1 M parameters, m: about 4 M, moe-s: s as a mixture of eight experts, two a token, about 2 M."""
    tied: bool | None = None
    """Whether the head is the embedding (as in the 2B and 4B) or its own weight (as in all larger ones); absent: own for moe-s only."""
    vocab_size: int = Field(default=448, ge=384, le=1024)
    """Size of the byte-level BPE that is trained on the track's own text."""
    thinking: bool = False
    """True: the chat template of the Thinking variant, which opens the think block in the prompt."""
    max_image_tokens: int = Field(default=64, ge=1)
    """Largest image in merged tokens (32 x 32 pixels each); larger ones are resized by the image processor."""


class LoraConfig(Settings):
    """A low-rank adapter on frozen weights, without dropout: a policy ratio needs two forwards of one policy to be one function.

    Defaults of rank and alpha: Thinking Machines' "LoRA Without Regret" (2025) finds alpha 32 with a factor alpha / rank good over all
    ranks, small ranks enough for RL, and adapters on the MLP needed beside those on attention. The best learning rate was about ten
    times that of full training.
    """

    rank: int = Field(default=16, ge=1, le=512)
    """Inner width of each adapter; vLLM 0.32 serves at most 512."""
    alpha: float = Field(default=32.0, gt=0)
    """The adapter's output is multiplied by alpha / rank."""
    parts: tuple[Part, ...] = Field(default=("language",), min_length=1)
    """Whose linear layers (attention and MLP) get an adapter; embeddings, head, norms, routers and fused experts never do."""
    publish: Literal["adapter", "merged"] = "adapter"
    """How the engine gets a new version: the adapter alone, or base plus adapter as whole weights, for what an engine cannot adapt."""
    seed: int = Field(default=0, ge=0)
    """Of A's initial values; B starts at 0."""

    @model_validator(mode="after")
    def _parts_once(self) -> LoraConfig:
        if len(set(self.parts)) != len(self.parts):
            raise ValueError(f"learner.lora.parts = {list(self.parts)}: names a part twice; name each once")
        return self


class LearnerConfig(Settings):
    """The optimizer and how a step is computed."""

    learning_rate: float = Field(gt=0)
    """Peak, per optimizer step."""
    part_learning_rates: dict[Part, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    """Peaks of parts that learn at another rate, e.g. {vision: 1e-6}; they follow the same schedule."""
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
    activation_offload: bool = False
    """On a GPU: keeps what backward needs in the host's memory until it does. Slower than gradient checkpointing where both would do."""
    freeze: tuple[Part, ...] = ()
    """Parts that are not trained."""
    lora: LoraConfig | None = None
    """Trains an adapter instead of the weights; absent: the weights."""
    dtype: DType = "auto"
    """Of the arithmetic; trained weights, gradients, the optimizer's state and log-probs are float32 in both."""
    router_loss_coef: float = Field(default=0.0, ge=0)
    """Mixtures of experts: factor of the load-balancing loss of the whole step (1 when experts are used evenly). transformers' 0.001 is
    0.001 x experts per token here. Off by default: in RL it pulls the policy away from the one that drew the responses."""
    layout: Layout = "fsdp2"
    """How several processes share the model: sharded weights, gradients and optimizer, or a whole copy each. Unused with one process."""

    @model_validator(mode="after")
    def _something_is_trained(self) -> LearnerConfig:
        if set(self.freeze) == set(get_args(Part)):
            raise ValueError("learner.freeze names every part of the model: nothing is left to train")
        return self

    @model_validator(mode="after")
    def _one_way_to_save_memory(self) -> LearnerConfig:
        if self.activation_offload and self.gradient_checkpointing:
            raise ValueError(
                "learner.activation_offload and learner.gradient_checkpointing are both on: what checkpointing keeps would not be "
                "offloaded; choose one"
            )
        return self

    @model_validator(mode="after")
    def _rates_are_used(self) -> LearnerConfig:
        unused = [part for part in self.part_learning_rates if part in self.freeze or (self.lora and part not in self.lora.parts)]
        if unused:
            raise ValueError(f"learner.part_learning_rates names {', '.join(unused)}, which is not trained: take it out")
        return self

    @model_validator(mode="after")
    def _adapted_or_frozen(self) -> LearnerConfig:
        both = [part for part in self.freeze if self.lora is not None and part in self.lora.parts]
        if both:
            raise ValueError(
                f"learner.freeze and learner.lora.parts both name {', '.join(both)}: a part cannot be frozen and get an adapter; take it "
                "out of one (with an adapter the weights themselves never change)"
            )
        return self


class ServedConfig(Settings):
    """What every vLLM server has that a run starts: on this machine's loopback, behind a random key, gone with the run."""

    arguments: dict[str, str | int | float | bool] = Field(default_factory=dict)
    """Further arguments of vLLM's server by name, such as `tensor_parallel_size: 4`; `true` gives the bare flag."""
    start_timeout_s: float = Field(default=1800.0, gt=0)
    """Longest wait until the server answers, seconds."""
    max_restarts: int = Field(default=5, ge=0)
    """How often a server that ended is started again in a run."""

    @field_validator("arguments")
    @classmethod
    def _no_reserved_argument(cls, arguments: dict[str, str | int | float | bool]) -> dict[str, str | int | float | bool]:
        for name in arguments:
            flag = name.strip("-").replace("_", "-").split(".")[0]
            decided = [other for other in _DECIDED_ARGUMENTS if flag and (other.startswith(flag) or flag == f"no-{other}")]
            if decided or not flag.replace("-", "").isalnum():
                why = f"it stands for --{decided[0]}, which the run decides itself" if decided else "it is no name of an argument"
                raise ValueError(f"argument {name!r} is not passed on to the server: {why}; take it out")
        return arguments


_DECIDED_ARGUMENTS = (
    *("model", "host", "port", "uds", "api-key", "served-model-name", "max-model-len", "max-logprobs", "logprobs-mode", "dtype"),
    *("limit-mm-per-prompt", "gpu-memory-utilization", "trust-remote-code", "enable-scale-out", "config", "root-path", "middleware"),
    *("ssl-keyfile", "ssl-certfile", "enable-log-requests", "generation-config", "load-format", "tokenizer", "revision"),
    *("allowed-local-media-path", "log-config-file", "logits-processors", "tool-parser-plugin", "reasoning-parser-plugin"),
    *("io-processor-plugin", "worker-cls", "worker-extension-cls", "scheduler-cls", "kv-transfer-config", "ec-transfer-config"),
)
"""What the run sets, or what would move the server off loopback, away from its key, or to other code or another tokenizer."""


class SamplerServeConfig(ServedConfig):
    """Rollouts from vLLM servers beside the run in place of an engine inside it. All numbers are our choice."""

    servers: int = Field(default=1, ge=1)
    """Each holds the whole model; requests go to whichever is free."""
    devices: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """CUDA_VISIBLE_DEVICES of each server, such as ["6", "7"]; absent: all see the run's own, which fits one server or the CPU."""
    max_concurrent: int = Field(default=32, ge=1)
    """Requests in flight at each server, of each process; a request is a whole group."""
    max_tries: int = Field(default=3, ge=1)
    """Failures of one request, each while its server was well, before it ends the run."""
    hung_after_s: float = Field(default=20.0, gt=0)
    """Seconds without a sign of life after which a server is killed and started again. Its engine answers between two of its own steps:
    longer than the longest of those."""
    publish_timeout_s: float = Field(default=300.0, gt=0)
    """Longest that a server may take to read new weights, seconds; then it is killed and started again."""
    weights_folder: Path | None = None
    """Where weights lie for the servers to read, one version at a time; absent: in the run's folder. A folder in memory, such as one
    below /dev/shm, is faster."""

    @model_validator(mode="after")
    def _devices_of_each(self) -> SamplerServeConfig:
        if self.devices and len(self.devices) != self.servers:
            raise ValueError(f"serve.devices = {list(self.devices)} with serve.servers = {self.servers}: give one entry for each server")
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
    serve: SamplerServeConfig | None = None
    """Absent: the engine runs in this process, and in every other one of the run."""


class MeanParityConfig(Settings):
    """Limits over all sampled tokens together, for arithmetic whose rounding moves single tokens a lot; d = learner - engine, nats."""

    max_mean_gap: float = Field(gt=0)
    """Of |d|"""
    max_kl: float = Field(gt=0)
    """Of exp(d) - 1 - d, the k3 estimate of KL(engine || learner)"""
    max_beyond_2_frac: Share
    """Of the share of tokens with exp(|d|) above 2"""


class ParityConfig(Settings):
    """The gate between engine and learner: before step 1 and after the first publishes."""

    max_abs_gap: float = Field(default=1e-4, gt=0)
    """float32: largest |engine log-prob - learner log-prob| of a sampled token, in nats."""
    bfloat16: MeanParityConfig = MeanParityConfig(max_mean_gap=0.03, max_kl=2e-3, max_beyond_2_frac=2e-3)
    """bfloat16, dense models: a few times what rounding alone gives."""
    bfloat16_experts: MeanParityConfig = MeanParityConfig(max_mean_gap=0.06, max_kl=1e-2, max_beyond_2_frac=0.02)
    """bfloat16, mixtures of experts: rounding also flips routers that are nearly tied."""
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
