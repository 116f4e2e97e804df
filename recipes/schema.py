"""What a recipe may say. No torch: `vlpost check` answers in well under a second.

A recipe is one stage (`method: sft | rl | evaluate`) or a chain of them (`method: chain`). Unknown keys are errors.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from ..model.config import DType, LearnerConfig, NanoConfig, ParityConfig, SamplerConfig, Settings
from ..rewards.config import RewardsConfig
from ..rl.config import RlConfig
from ..sft.config import SftConfig

Split = Literal["train", "validation", "test"]
TaskKind = Literal["read", "add", "count", "compare", "arithmetic"]
Language = Literal["en", "zh"]


class ModelConfig(Settings):
    """Where the weights come from: exactly one of the three."""

    path: str | None = None
    """A hub name (`org/name`) or a folder in Hugging Face format."""
    nano: NanoConfig | None = None
    """A tiny random model, built when the run starts."""
    stage: str | None = None
    """The export of an earlier stage of the same chain."""

    @model_validator(mode="after")
    def _exactly_one(self) -> ModelConfig:
        given = [name for name in ("path", "nano", "stage") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"model names {given or 'nothing'}: give exactly one of path, nano, stage")
        return self

    @field_validator("path")
    @classmethod
    def _no_bare_folder_name(cls, value: str | None) -> str | None:
        # A local folder of that name would win over the hub: "model" is a folder of every checkout of this library.
        if value is not None and "/" not in value:
            raise ValueError(f"{value!r} is neither a hub name (org/name) nor a path: write ./{value} for a folder here")
        return value


class HandwritingData(Settings):
    """The bundled track: questions about real handwritten digits."""

    use: Literal["handwriting"]
    split: Split = "train"
    tasks: dict[TaskKind, Annotated[float, Field(gt=0)]] = Field(min_length=1)
    """Task kind -> share; shares are relative, and constant in every window of examples that are not shuffled (no `num_examples`)."""
    languages: tuple[Language, ...] = Field(default=("en", "zh"), min_length=1)
    num_examples: int | None = Field(default=None, ge=1)
    """Distinct examples, repeated in a new order every epoch; absent: never repeated."""
    seed: int = 0
    """Which examples: independent of the run's seed, so that runs with several seeds are judged on the same rows."""


class JsonlData(Settings):
    """Rows in a JSON-lines file: {id, messages: [{role, content}], answer, task}; images are paths relative to the file."""

    use: Literal["jsonl"]
    path: Path
    source: str = ""
    """Name of the data set in logs; empty: the file's name."""


DataConfig = Annotated[HandwritingData | JsonlData, Field(discriminator="use")]


class EvaluateConfig(Settings):
    """How a model is measured."""

    num_examples: int = Field(default=200, ge=1)
    num_samples: int = Field(default=8, ge=1)
    """Responses to each example; accuracy is their mean, pass@k counts an example as solved when one of them is right."""
    temperatures: tuple[Annotated[float, Field(gt=0)], ...] = (1.0,)
    """Accuracy and pass@k at each."""
    greedy: bool = True

    @model_validator(mode="after")
    def _something_to_draw(self) -> EvaluateConfig:
        if not self.temperatures and not self.greedy:
            raise ValueError("temperatures is empty and greedy is false: nothing would be drawn; give a temperature or greedy: true")
        if len({f"{temperature:g}" for temperature in self.temperatures}) < len(self.temperatures):
            raise ValueError(f"temperatures = {list(self.temperatures)}: each may stand once, to 6 digits: results are named after them")
        return self


class ValidationConfig(EvaluateConfig):
    """Measuring during training."""

    data: DataConfig
    every: int = Field(ge=1)
    """Steps between validations."""


class CheckpointConfig(Settings):
    """When a run saves; it always saves at its end and on Ctrl-C."""

    every: int = Field(default=50, ge=1)
    """Steps between saves. One that fails is logged, and the next is tried."""
    keep: int = Field(default=2, ge=1)
    """Whole checkpoints kept, beside those that an alarm may roll back to."""
    max_tries: int = Field(default=5, ge=1)
    """How often the last save (end of the stage, Ctrl-C, error) and the export are tried before the run ends with an error."""
    retry_s: float = Field(default=15.0, ge=0)
    """Seconds between these tries: time to free some disk space."""


class WatchdogConfig(Settings):
    """Seconds that a phase may take. Longer is a hang: the stacks of all threads are written and the process ends; null: no limit."""

    start_s: float | None = Field(default=3600.0, gt=0)
    """Loading the model, starting the engine, resuming, first publish and parity gate."""
    rollout_s: float | None = Field(default=7200.0, gt=0)
    """Drawing all responses of a step."""
    reward_s: float | None = Field(default=3600.0, gt=0)
    """Judging all responses of a step."""
    update_s: float | None = Field(default=7200.0, gt=0)
    """All updates of a step; in SFT the whole step."""
    publish_s: float | None = Field(default=1800.0, gt=0)
    """Handing the weights to the engine."""
    save_s: float | None = Field(default=3600.0, gt=0)
    """Writing a checkpoint or an export."""
    validation_s: float | None = Field(default=7200.0, gt=0)
    """A validation, a parity gate, or an evaluate stage's measuring."""


class AlarmConfig(Settings):
    """A metric that must stay within bounds: `{metric: entropy, below: 0.05, steps: 3, action: stop}`."""

    metric: str = Field(min_length=1)
    """Its name in metrics.jsonl; one that no step reports is an error after the first step with an update."""
    below: float | None = None
    """Out of bounds when the metric is below this."""
    above: float | None = None
    """Out of bounds when the metric is above this. A metric that is not finite is always out of bounds."""
    steps: int = Field(default=3, ge=1)
    """Reports in a row out of bounds that ring the alarm; it rings once, until the metric has been back."""
    baseline_steps: int = Field(default=0, ge=0)
    """0: the bounds are values. N: they are factors of the metric's mean over its first N reports above 0, and nothing is out of
    bounds before."""
    action: Literal["warn", "stop", "roll_back"] = "warn"
    """Say it; save and end the run; or load the newest checkpoint from before the fault and go on with the next examples."""

    @model_validator(mode="after")
    def _has_a_bound(self) -> AlarmConfig:
        if self.below is None and self.above is None:
            raise ValueError(f"the alarm on {self.metric!r} has no bound: give below, above or both")
        if self.below is not None and self.above is not None and self.below >= self.above:
            raise ValueError(f"the alarm on {self.metric!r} has below = {self.below} and above = {self.above}: nothing is within bounds")
        return self


SFT_ALARMS = (
    AlarmConfig(metric="loss", above=2.0, baseline_steps=10),
    AlarmConfig(metric="grad_norm", above=10.0, baseline_steps=10),
)
"""Warnings of supervised fine-tuning: the loss doubles, the gradient grows tenfold."""

RL_ALARMS = (
    AlarmConfig(metric="entropy", below=0.1, above=3.0, baseline_steps=10),
    AlarmConfig(metric="old_kl_k3", above=0.1),
    AlarmConfig(metric="engine_kl_k3", above=0.05),
    AlarmConfig(metric="response_tokens", below=0.3, above=3.0, baseline_steps=10),
    AlarmConfig(metric="groups_without_signal_frac", above=0.9, steps=5),
    AlarmConfig(metric="reward_std", below=0.1, baseline_steps=10, steps=5),
    AlarmConfig(metric="truncated_frac", above=0.5, steps=5),
    AlarmConfig(metric="unavailable_frac", above=0.1),
    AlarmConfig(metric="grad_norm", above=10.0, baseline_steps=10),
)
"""Warnings of reinforcement learning, our choice: what runs that collapsed show before their reward falls."""


Trackers = tuple[str, ...]
"""Names of Accelerate's trackers that get the metrics beside metrics.jsonl."""


class StageConfig(Settings):
    """What every stage has."""

    name: str = ""
    """Name of the stage in logs; in a chain the stage's key."""
    seed: int = Field(default=0, ge=0)
    output: Path
    """The run folder."""
    trackers: Trackers = ("tensorboard",)
    model: ModelConfig
    sampler: SamplerConfig
    rewards: RewardsConfig
    parity: ParityConfig = ParityConfig()
    watchdog: WatchdogConfig = WatchdogConfig()


class TrainStageConfig(StageConfig):
    """What every training stage has."""

    data: DataConfig
    learner: LearnerConfig
    checkpoint: CheckpointConfig = CheckpointConfig()
    validation: ValidationConfig | None = None
    alarms: tuple[AlarmConfig, ...] = ()
    """What rings when a metric leaves its bounds; a recipe's own list replaces the method's warnings."""
    max_roll_backs: int = Field(default=2, ge=0)
    """Roll-backs of a stage; the alarm after the last one ends the run."""
    max_nonfinite_updates: int = Field(default=3, ge=1)
    """Updates in a row that may be dropped because their loss or gradient was not finite; then the run saves and ends."""
    export: Literal["merged", "adapter"] = "merged"
    """With `learner.lora`: the whole model with the adapter added, or the adapter alone, as peft and vLLM load it."""

    @model_validator(mode="after")
    def _adapter_is_there(self) -> TrainStageConfig:
        if self.export == "adapter" and self.learner.lora is None:
            raise ValueError("export: adapter needs learner.lora: without it there is no adapter")
        return self

    @model_validator(mode="after")
    def _alarms_can_ring(self) -> TrainStageConfig:
        for alarm in self.alarms:
            if alarm.metric.startswith("validation/") and self.validation is None:
                raise ValueError(f"the alarm on {alarm.metric!r} needs validation: nothing else reports it")
        return self


class SftRecipe(TrainStageConfig):
    """Supervised fine-tuning."""

    method: Literal["sft"]
    sft: SftConfig
    alarms: tuple[AlarmConfig, ...] = SFT_ALARMS

    @model_validator(mode="after")
    def _plateau_needs_validation(self) -> SftRecipe:
        if self.sft.plateau is not None and self.validation is None:
            raise ValueError("sft.plateau needs validation: it watches the validation accuracy")
        if self.sft.plateau is not None and self.validation is not None and not self.validation.temperatures:
            raise ValueError("sft.plateau needs a temperature in validation.temperatures: it watches the accuracy at the first")
        return self


class RlRecipe(TrainStageConfig):
    """Reinforcement learning."""

    method: Literal["rl"]
    rl: RlConfig
    alarms: tuple[AlarmConfig, ...] = RL_ALARMS

    @model_validator(mode="after")
    def _rollouts_fit_a_batch(self) -> RlRecipe:
        if self.sampler.max_model_len > self.learner.token_budget:
            raise ValueError(
                f"sampler.max_model_len = {self.sampler.max_model_len} is above learner.token_budget = {self.learner.token_budget}: "
                "a rollout of that length could not be trained on"
            )
        return self


class EvaluateRecipe(StageConfig):
    """Measuring a model on held-out data."""

    method: Literal["evaluate"]
    data: DataConfig
    evaluate: EvaluateConfig = EvaluateConfig()
    dtype: DType = "auto"
    """Of the engine's weights and arithmetic."""


LeafRecipe = Annotated[SftRecipe | RlRecipe | EvaluateRecipe, Field(discriminator="method")]


class ChainRecipe(Settings):
    """Stages in order; each may start from the export of an earlier one."""

    method: Literal["chain"]
    output: Path
    trackers: Trackers = ("tensorboard",)
    stages: dict[str, LeafRecipe] = Field(min_length=1)

    @model_validator(mode="after")
    def _stages_exist(self) -> ChainRecipe:
        earlier: list[str] = []
        for name, stage in self.stages.items():
            wanted = stage.model.stage
            if wanted is not None and wanted not in earlier:
                raise ValueError(f"stages.{name}.model.stage = {wanted!r}: must be an earlier training stage, one of {earlier}")
            source = self.stages.get(wanted or "")
            if isinstance(source, SftRecipe | RlRecipe) and source.export == "adapter":
                raise ValueError(f"stages.{name}.model.stage = {wanted!r}: exports an adapter alone, no model: set its export to merged")
            if not isinstance(stage, EvaluateRecipe):
                earlier.append(name)
        return self


Recipe = Annotated[SftRecipe | RlRecipe | EvaluateRecipe | ChainRecipe, Field(discriminator="method")]
