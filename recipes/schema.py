"""What a recipe may say. No torch: `vlpost check` answers in well under a second.

A recipe is one stage (`method: sft | rl | on_policy_distill | evaluate`) or a chain of them (`method: chain`). Unknown keys are errors.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from ..distill.config import OnPolicyDistillConfig
from ..model.config import DType, LearnerConfig, NanoConfig, ParityConfig, SamplerConfig, Settings
from ..rewards.config import RewardsConfig
from ..rl.config import RlConfig
from ..sft.config import SftConfig, TooLong

Split = Literal["train", "validation", "test"]
TaskKind = Literal[
    "read", "add", "count", "compare", "arithmetic", "find", "video", "multi_image", "multi_turn", "page", "sum2", "sum2_steps", "blind"
]
Language = Literal["en", "zh"]
RowFormat = Literal["messages", "sharegpt", "alpaca"]


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


class RowSettings(Settings):
    """How the rows of a data set are read, whatever file they come from."""

    source: str = ""
    """Name of the data set in logs; empty: the file's or the hub set's name."""
    format: RowFormat = "messages"
    """`messages`: {id, messages: [{role, content}], answer, task, metadata, tools}, as OpenAI and Qwen write them; `sharegpt`:
    {conversations: [{from, value}]} with `<image>` tags; `alpaca`: {instruction, input, output, history}."""
    bad_rows: Literal["refuse", "drop"] = "refuse"
    """What becomes of a row that cannot be used: an error that ends the run before it starts, or it is left out, counted and listed."""
    extra_keys: Literal["refuse", "metadata"] = "refuse"
    """Keys of a row that its format does not know: a fault, or kept under metadata as they are."""
    video_fps: float = Field(default=2.0, gt=0, le=60)
    """Frames a second taken from a video file; 2 is the default of Qwen3-VL's processor."""
    max_video_frames: int = Field(default=768, ge=1, le=4096)
    """Frames of one video; a longer file is taken at fewer a second. 768 is the default of Qwen3-VL's processor."""
    clock_times_share: float = Field(default=0.0, ge=0, le=1)
    """Share of rows whose video times are written h:mm:ss, `<0:00:03>`, not `<3.0 seconds>`; which ones is a function of the row's id.
    Qwen3-VL trains on both forms (arXiv:2511.21631, 2) and gives no share; 0 is our choice, as the engine writes seconds only. SFT only."""


class JsonlData(RowSettings):
    """Rows in a JSON-lines file, or in every .jsonl file below a folder; media are paths relative to their file, or data URLs."""

    use: Literal["jsonl"]
    path: Path


class ParquetData(RowSettings):
    """Rows in a parquet file, or in every .parquet file below a folder; media are paths relative to their file, bytes, or data URLs."""

    use: Literal["parquet"]
    path: Path


class HubData(RowSettings):
    """Rows of a data set on the Hugging Face hub, read by `datasets`; media are bytes in its columns."""

    use: Literal["hub"]
    path: str = Field(pattern=r"^[\w.-]+/[\w.-]+$")
    """org/name."""
    split: str = "train"
    subset: str | None = None
    """The configuration of the data set; absent: its only one."""
    revision: str | None = None
    """Branch, tag or commit; give a commit to train on the same rows tomorrow."""
    streaming: bool = False
    """Rows are fetched as they are needed, in their order, from the start again after the last; else all are read at the start and
    shuffled every epoch."""


class CuratedData(Settings):
    """A data set that `vlpost curate` wrote."""

    use: Literal["curated"]
    path: Path
    """The run folder of the curate recipe."""
    split: str = "train"
    """One of its splits; without a `split` step all rows are in `train`."""


class MixPart(Settings):
    """One data set of a mix."""

    share: float = Field(gt=0)
    """Relative to the other parts'."""
    data: DataConfig


class MixData(Settings):
    """Several data sets in exact shares: after any number of examples each part has given its share of them, to within one example.

    A step whose number of examples times the share is a whole number therefore gets exactly that many, whatever the step. Ids get the
    part's name in front (`text/row-17`), so that no two parts share one.
    """

    use: Literal["mix"]
    parts: dict[Annotated[str, Field(min_length=1)], MixPart] = Field(min_length=1)
    """Name -> share and data; a smaller part comes round sooner, each time in a new order."""
    text_only_share: float | None = Field(default=None, gt=0, lt=1)
    """Share of examples without image or video in every step, exact as the shares of parts are; absent: as the parts have it. Among
    text-only rows, and among the others, parts keep the shares that their rows of that kind have. Needs data sets with an end."""


DataConfig = Annotated[HandwritingData | JsonlData | ParquetData | HubData | CuratedData | MixData, Field(discriminator="use")]
MixPart.model_rebuild()


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
    """Judging all responses of a step; in distillation, the teachers' pass."""
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

DISTILL_ALARMS = (
    AlarmConfig(metric="entropy", below=0.1, above=3.0, baseline_steps=10),
    AlarmConfig(metric="engine_kl_k3", above=0.05),
    AlarmConfig(metric="response_tokens", below=0.3, above=3.0, baseline_steps=10),
    AlarmConfig(metric="teacher_kl_k1", above=2.0, baseline_steps=10),
    AlarmConfig(metric="truncated_frac", above=0.5, steps=5),
    AlarmConfig(metric="grad_norm", above=10.0, baseline_steps=10),
)
"""Warnings of on-policy distillation, our choice."""


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


class InterleaveConfig(Settings):
    """Examples of an earlier phase's data among those of this one."""

    phase: str
    """The earlier phase; its data goes on where it was left."""
    share: float = Field(default=0.5, gt=0, lt=1)
    """Their share of every step's examples. Qwen3-VL's second epoch interleaves long inputs with samples of 32K length (arXiv:2511.21631,
    4.2.1); it gives no ratio, and half and half is our choice."""


class SftPhase(Settings):
    """A stretch of a supervised stage with data or lengths of its own. Optimizer and learning-rate schedule run through all phases."""

    num_steps: int = Field(ge=1)
    """Optimizer updates of this phase."""
    data: DataConfig | None = None
    """Absent: the recipe's own. Phases that name equal data share it: the later one goes on where the earlier one stopped."""
    examples_per_step: int | None = Field(default=None, ge=1)
    """Absent: `sft.examples_per_step`."""
    max_length: int | None = Field(default=None, ge=16)
    """Tokens of a row, images and videos expanded; absent: `sft.max_length`."""
    too_long: TooLong | None = None
    """What becomes of a longer row; absent: `sft.too_long`."""
    interleave: InterleaveConfig | None = None
    """Absent: this phase's own data only."""


class SftRecipe(TrainStageConfig):
    """Supervised fine-tuning."""

    method: Literal["sft"]
    sft: SftConfig
    data: DataConfig | None = None
    """May be absent where every phase has its own."""
    phases: dict[Annotated[str, Field(min_length=1)], SftPhase] = Field(default_factory=dict)
    """Name -> phase, in order; empty: one phase of `sft.num_steps`."""
    alarms: tuple[AlarmConfig, ...] = SFT_ALARMS

    @model_validator(mode="after")
    def _plateau_needs_validation(self) -> SftRecipe:
        if self.sft.plateau is not None and self.validation is None:
            raise ValueError("sft.plateau needs validation: it watches the validation accuracy")
        if self.sft.plateau is not None and self.validation is not None and not self.validation.temperatures:
            raise ValueError("sft.plateau needs a temperature in validation.temperatures: it watches the accuracy at the first")
        return self

    @model_validator(mode="after")
    def _steps_are_told_once(self) -> SftRecipe:
        if not self.phases and self.sft.num_steps is None:
            raise ValueError("sft.num_steps is missing: give it, or phases with num_steps of their own")
        if self.phases and self.sft.num_steps is not None:
            raise ValueError(f"sft.num_steps = {self.sft.num_steps}: the phases say how many steps there are; take it out")
        if self.phases and self.sft.plateau is not None:
            raise ValueError(
                "sft.plateau would end the first phase it is met in and all that follow: take it out, or make stages of phases"
            )
        return self

    @model_validator(mode="after")
    def _data_is_there_and_used(self) -> SftRecipe:
        without = [name for name, phase in self.phases.items() if phase.data is None]
        if self.data is None and not self.phases:
            raise ValueError("data is missing: name what is trained on")
        if self.data is None and without:
            raise ValueError(f"phases.{without[0]}.data is missing, and the recipe has no data of its own: give one of them")
        if self.data is not None and self.phases and not without:
            raise ValueError("data is used by no phase, each has its own: take it out (under a chain's common, write data: null here)")
        return self

    @model_validator(mode="after")
    def _lengths_fit_a_batch(self) -> SftRecipe:
        budget = self.learner.token_budget
        named = [("sft", self.sft.max_length), *((f"phases.{name}", phase.max_length) for name, phase in self.phases.items())]
        for place, length in named:
            if length is not None and length > budget:
                raise ValueError(
                    f"{place}.max_length = {length} is above learner.token_budget = {budget}: a row of that length could not be trained on"
                )
        return self

    @model_validator(mode="after")
    def _interleaved_phases_came_before(self) -> SftRecipe:
        earlier: dict[str, DataConfig | None] = {}
        for name, phase in self.phases.items():
            data = phase.data or self.data
            if phase.interleave is not None:
                wanted = phase.interleave.phase
                place = f"phases.{name}.interleave.phase = {wanted!r}"
                if wanted not in earlier:
                    raise ValueError(f"{place}: must be an earlier phase, one of {list(earlier)}")
                if earlier[wanted] == data:
                    raise ValueError(f"{place}: has the same data as {name!r} itself: there is nothing to interleave")
            earlier[name] = data
        return self


class RolloutStageConfig(TrainStageConfig):
    """What every stage has that trains on responses it draws itself."""

    data: DataConfig

    @property
    def rounds(self) -> RlConfig | OnPolicyDistillConfig:
        """The method's settings: steps, prompts a step, mini-batches."""
        raise NotImplementedError

    @model_validator(mode="after")
    def _rollouts_fit_a_batch(self) -> Self:
        if self.sampler.max_model_len > self.learner.token_budget:
            raise ValueError(
                f"sampler.max_model_len = {self.sampler.max_model_len} is above learner.token_budget = {self.learner.token_budget}: "
                "a rollout of that length could not be trained on"
            )
        return self


class RlRecipe(RolloutStageConfig):
    """Reinforcement learning."""

    method: Literal["rl"]
    rl: RlConfig
    alarms: tuple[AlarmConfig, ...] = RL_ALARMS

    @property
    def rounds(self) -> RlConfig:
        """The method's settings."""
        return self.rl


class TeacherConfig(Settings):
    """A model that is distilled, in this process, laid out over devices as the student is."""

    model: ModelConfig
    tasks: tuple[str, ...] = ()
    """Tasks whose rows it teaches; none: those that no other teacher names."""


class OnPolicyDistillRecipe(RolloutStageConfig):
    """On-policy distillation from larger models."""

    method: Literal["on_policy_distill"]
    distill: OnPolicyDistillConfig
    teachers: dict[Annotated[str, Field(min_length=1)], TeacherConfig] = Field(min_length=1)
    """Name in messages -> teacher."""
    alarms: tuple[AlarmConfig, ...] = DISTILL_ALARMS

    @property
    def rounds(self) -> OnPolicyDistillConfig:
        """The method's settings."""
        return self.distill

    @model_validator(mode="after")
    def _text_trains_the_language_model(self) -> OnPolicyDistillRecipe:
        missing = [part for part in ("vision", "merger") if part not in self.learner.freeze]
        if self.distill.prompts == "text" and missing and self.learner.lora is None:
            raise ValueError(
                f"distill.prompts is text, and learner.freeze leaves out {' and '.join(missing)}: text teaches them nothing. Write "
                "learner: {freeze: [vision, merger]}, or distill: {prompts: multimodal}"
            )
        return self

    @model_validator(mode="after")
    def _each_task_has_one_teacher(self) -> OnPolicyDistillRecipe:
        seen: dict[str, str] = {}
        for name, teacher in self.teachers.items():
            for task in teacher.tasks or ("",):
                if task in seen:
                    what = f"task {task!r}" if task else "the tasks that no other names"
                    raise ValueError(f"teachers {seen[task]!r} and {name!r} both teach {what}: give each its own tasks")
                seen[task] = name
        return self


class EvaluateRecipe(StageConfig):
    """Measuring a model on held-out data."""

    method: Literal["evaluate"]
    data: DataConfig
    evaluate: EvaluateConfig = EvaluateConfig()
    dtype: DType = "auto"
    """Of the engine's weights and arithmetic."""


TrainingRecipe = SftRecipe | RlRecipe | OnPolicyDistillRecipe
StageRecipe = TrainingRecipe | EvaluateRecipe
LeafRecipe = Annotated[StageRecipe, Field(discriminator="method")]


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
            models = {f"stages.{name}.model": stage.model}
            if isinstance(stage, OnPolicyDistillRecipe):
                models |= {f"stages.{name}.teachers.{teacher}.model": of.model for teacher, of in stage.teachers.items()}
            for place, model in models.items():
                wanted = model.stage
                if wanted is not None and wanted not in earlier:
                    raise ValueError(f"{place}.stage = {wanted!r}: must be an earlier training stage, one of {earlier}")
                source = self.stages.get(wanted or "")
                if isinstance(source, TrainStageConfig) and source.export == "adapter":
                    raise ValueError(f"{place}.stage = {wanted!r}: exports an adapter alone, no model: set its export to merged")
            if not isinstance(stage, EvaluateRecipe):
                earlier.append(name)
        return self


Recipe = Annotated[StageRecipe | ChainRecipe, Field(discriminator="method")]
