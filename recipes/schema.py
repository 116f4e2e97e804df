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
    """Steps between saves."""
    keep: int = Field(default=2, ge=1)
    """Whole checkpoints kept."""


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


class TrainStageConfig(StageConfig):
    """What every training stage has."""

    data: DataConfig
    learner: LearnerConfig
    checkpoint: CheckpointConfig = CheckpointConfig()
    validation: ValidationConfig | None = None


class SftRecipe(TrainStageConfig):
    """Supervised fine-tuning."""

    method: Literal["sft"]
    sft: SftConfig

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
    dtype: DType = "float32"
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
            if not isinstance(stage, EvaluateRecipe):
                earlier.append(name)
        return self


Recipe = Annotated[SftRecipe | RlRecipe | EvaluateRecipe | ChainRecipe, Field(discriminator="method")]
