"""What a recipe may say. No torch: `vlpost check` answers in well under a second.

A recipe is one stage (`method: sft | off_policy_distill | on_policy_distill | rl | evaluate`) or a chain of them (`method: chain`).
Unknown keys are errors.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from ..distill.config import OnPolicyDistillConfig, RequestsConfig, ServerConfig, SoftLabelsConfig
from ..model.config import DType, LearnerConfig, NanoConfig, ParityConfig, SamplerConfig, Settings
from ..rewards.config import RewardsConfig
from ..rl.config import RlConfig
from ..rl.tools_config import AgentConfig
from ..sft.config import SftConfig, TooLong
from .curate_config import CurateRecipe, GenerateConfig, PlainName, SplitConfig, StepConfig
from .curate_engine_config import CandidateModel
from .data_config import CuratedData, DataConfig


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


Preset = Literal["qwen3_vl_instruct", "qwen3_vl_thinking"]

SAMPLING_PRESETS: dict[Preset, dict[str, Any]] = {
    "qwen3_vl_instruct": {"temperatures": [0.7], "top_p": 0.8, "top_k": 20, "presence_penalty": 1.5},
    "qwen3_vl_thinking": {"temperatures": [0.6], "top_p": 0.95, "top_k": 20, "presence_penalty": 0.0},
}
"""What the README of QwenLM/Qwen3-VL recommends for images and video. The report's tables of text tasks (arXiv:2511.21631, 5.11) use others
for the small dense models: Instruct 1.0, 1.0, 40, 2.0 and Thinking 1.0, 0.95, 20, 1.5."""


class EvaluateConfig(Settings):
    """How a model is measured."""

    num_examples: int = Field(default=200, ge=1)
    """An evaluate stage asks a data set that has fewer once, a validation again from the start."""
    num_samples: int = Field(default=8, ge=1)
    """Responses to each example; accuracy is their mean, pass@k counts an example as solved when one of them is right."""
    pass_at: tuple[Annotated[int, Field(ge=1)], ...] = ()
    """Further k of pass@k, below num_samples, which has one anyway: the chance that k of an example's responses hold a right one."""
    temperatures: tuple[Annotated[float, Field(gt=0)], ...] = (1.0,)
    """Accuracy and pass@k at each."""
    greedy: bool = True
    """One more response to each example, at temperature 0 and with none of the four keys below."""
    preset: Preset | None = None
    """Sets `temperatures` and the three keys below to `SAMPLING_PRESETS`. Lengths stay the sampler's: the README gives an Instruct response
    32,768 tokens, a Thinking one 40,960."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Only the likeliest tokens that have this probability together are drawn from; 1: all. Evaluate stages only, as the next two."""
    top_k: int = Field(default=0, ge=0)
    """Only so many of the likeliest tokens are drawn from; 0: all."""
    presence_penalty: float = Field(default=0.0, ge=-2, le=2)
    """Taken from the logit of every token that the response, or the turn of a conversation, already has; nats."""

    @model_validator(mode="before")
    @classmethod
    def _resolve_preset(cls, values: Any) -> Any:  # noqa: ANN401
        if not isinstance(values, dict) or values.get("preset") not in SAMPLING_PRESETS:
            return values
        resolved = SAMPLING_PRESETS[values["preset"]]
        for key, value in resolved.items():
            given = values.get(key, value)
            if (list(given) if isinstance(given, list | tuple) else given) != value:
                raise ValueError(f"preset: {values['preset']} means {key}: {value}, and {key} = {given!r} is given: take one of them out")
        return {**values, **resolved}

    @property
    def is_narrowed(self) -> bool:
        """True where responses are drawn from another distribution than the policy's at a temperature."""
        return self.top_p < 1 or self.top_k > 0 or self.presence_penalty != 0

    @model_validator(mode="after")
    def _something_to_draw(self) -> EvaluateConfig:
        if not self.temperatures and not self.greedy:
            raise ValueError("temperatures is empty and greedy is false: nothing would be drawn; give a temperature or greedy: true")
        if len({f"{temperature:g}" for temperature in self.temperatures}) < len(self.temperatures):
            raise ValueError(f"temperatures = {list(self.temperatures)}: each may stand once, to 6 digits: results are named after them")
        return self

    @model_validator(mode="after")
    def _pass_at_can_be_told(self) -> EvaluateConfig:
        if self.pass_at and not self.temperatures:
            raise ValueError(f"pass_at = {list(self.pass_at)} without temperatures: greedy has one response; give a temperature")
        if any(k >= self.num_samples for k in self.pass_at):
            raise ValueError(
                f"pass_at = {list(self.pass_at)} with num_samples = {self.num_samples}: each must be below, pass@{self.num_samples} is "
                "always there; raise num_samples"
            )
        return self


class ValidationConfig(EvaluateConfig):
    """Measuring during training."""

    data: DataConfig
    every: int = Field(ge=1)
    """Steps between validations."""
    agent: AgentConfig | None = None
    """Conversations with tools; absent: as the stage draws, with its own agent where it has one."""

    @model_validator(mode="after")
    def _draws_as_training_does(self) -> ValidationConfig:
        given = [name for name in ("preset", "top_p", "top_k", "presence_penalty") if name in self.model_fields_set]
        if given and (self.is_narrowed or self.preset is not None):
            raise ValueError(
                f"{given[0]}: a validation follows the policy that is trained, which none of preset, top_p, top_k and "
                "presence_penalty is about: take it out, and measure in a stage of method evaluate"
            )
        return self


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


def _check_agent(agent: AgentConfig | None, sampler: SamplerConfig, place: str) -> None:
    """Raises `ValueError` for tools that could show more images than the engine takes."""
    if agent is not None and agent.max_images > sampler.max_images_per_prompt:
        raise ValueError(
            f"{place}.max_images = {agent.max_images} is above sampler.max_images_per_prompt = {sampler.max_images_per_prompt}, which "
            "counts those of the prompt too: raise the latter, or lower the former"
        )


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
    def _servers_have_their_time(self) -> TrainStageConfig:
        serve, limit_s = self.sampler.serve, self.watchdog.publish_s
        if serve is not None and limit_s is not None and limit_s <= serve.publish_timeout_s:
            raise ValueError(
                f"sampler.serve.publish_timeout_s = {serve.publish_timeout_s:g} and watchdog.publish_s = {limit_s:g}: the watchdog would "
                "end the run before a hung server is started again; raise the latter"
            )
        return self

    @model_validator(mode="after")
    def _servers_take_whole_weights(self) -> TrainStageConfig:
        if self.sampler.serve is not None and self.learner.lora is not None and self.learner.lora.publish == "adapter":
            raise ValueError(
                "sampler.serve with learner.lora.publish = 'adapter': servers take whole weights; write learner: {lora: {publish: "
                "merged}}, or leave sampler.serve out"
            )
        return self

    @model_validator(mode="after")
    def _validation_agent_fits_the_engine(self) -> TrainStageConfig:
        if self.validation is not None:
            _check_agent(self.validation.agent, self.sampler, "validation.agent")
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

    @model_validator(mode="after")
    def _servers_draw_whole_groups(self) -> Self:
        if self.sampler.serve is not None and self.rounds.group_size > self.sampler.max_num_seqs:
            raise ValueError(
                f"sampler.max_num_seqs = {self.sampler.max_num_seqs} is below the group_size = {self.rounds.group_size}: with "
                "sampler.serve a server draws a whole group at once; raise it"
            )
        return self


class RlRecipe(RolloutStageConfig):
    """Reinforcement learning."""

    method: Literal["rl"]
    rl: RlConfig
    agent: AgentConfig | None = None
    """Conversations with tools in place of one response; of a validation too that names no agent of its own."""
    alarms: tuple[AlarmConfig, ...] = RL_ALARMS

    @property
    def rounds(self) -> RlConfig:
        """The method's settings."""
        return self.rl

    @model_validator(mode="after")
    def _somebody_draws_ahead(self) -> RlRecipe:
        if self.rl.staleness and self.sampler.serve is None:
            raise ValueError(
                "rl.staleness = 1 needs sampler.serve: the engine in this process cannot draw while the learner updates; write sampler: "
                "{serve: {servers: 1}}, or staleness: 0"
            )
        if self.rl.staleness and self.agent is not None:
            raise ValueError(
                "rl.staleness = 1 with agent: conversations with tools are not drawn ahead, a checkpoint could not hold their images; "
                "write staleness: 0"
            )
        return self

    @model_validator(mode="after")
    def _agent_fits_the_engine(self) -> RlRecipe:
        _check_agent(self.agent, self.sampler, "agent")
        return self


class TeacherServeConfig(ServerConfig):
    """A teacher that the run serves itself: `{model: {path: org/name}, devices: "6,7"}`."""

    model: ModelConfig


class TeacherConfig(Settings):
    """A model that is distilled: exactly one of `model`, `serve` and `url`."""

    model: ModelConfig | None = None
    """In this process, laid out over devices as the student is."""
    serve: TeacherServeConfig | None = None
    """In a vLLM server that the run starts, on loopback, and stops with itself."""
    url: str | None = Field(default=None, pattern=r"^https?://[^/@?#]+$")
    """A vLLM server that is there, as `http://127.0.0.1:8123`, started with --enable-scale-out: token ids and images go to it."""
    served_as: str | None = None
    """Of `url`: the name that the server gives to the model."""
    api_key_env: str | None = None
    """Of `url`: the environment variable that holds the key; absent: the server wants none."""
    requests: RequestsConfig = RequestsConfig()
    """Of `serve` and `url`."""
    tasks: tuple[str, ...] = ()
    """Tasks whose rows it teaches; none: those that no other teacher names."""

    @model_validator(mode="after")
    def _exactly_one_place(self) -> TeacherConfig:
        given = [name for name in ("model", "serve", "url") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"a teacher names {' and '.join(given) or 'nothing'}: give exactly one of model, serve, url")
        if self.url is not None and self.served_as is None:
            raise ValueError(f"url = {self.url!r} needs served_as, the name that the server gives to the model (--served-model-name)")
        idle = {"served_as": self.url, "api_key_env": self.url, "requests": self.url or self.serve}
        for name, place in idle.items():
            if name in self.model_fields_set and place is None:
                where = "url or serve" if name == "requests" else "url"
                raise ValueError(f"{name} is of a teacher with {where}, this one has {given[0]}: take it out")
        return self

    @property
    def is_served(self) -> bool:
        """True where a server scores."""
        return self.model is None

    @property
    def source(self) -> ModelConfig | None:
        """The weights that the run loads or serves; None behind a `url`."""
        return self.serve.model if self.serve is not None else self.model


class OnPolicyDistillRecipe(RolloutStageConfig):
    """On-policy distillation from larger models."""

    method: Literal["on_policy_distill"]
    distill: OnPolicyDistillConfig
    teachers: dict[PlainName, TeacherConfig] = Field(min_length=1)
    """Name in messages -> teacher."""
    off_policy_data: DataConfig | None = None
    """Conversations, as for supervised fine-tuning, of which every step takes `distill.off_policy_rows`."""
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
    def _served_teachers_can_score(self) -> OnPolicyDistillRecipe:
        for name, teacher in self.teachers.items():
            if not teacher.is_served:
                continue
            if self.distill.support.name == "exact":
                raise ValueError(
                    f"teachers.{name} is served, and distill.support is exact: a server tells a few log-probs at each token, not the whole "
                    "distribution. Write distill: {support: {name: top_k}}, or load the teacher in this process (model, not serve or url)"
                )
            if self.sampler.temperature != 1.0:
                raise ValueError(
                    f"sampler.temperature = {self.sampler.temperature} with the served teacher {name}: must be 1, an engine applies no "
                    "temperature to the log-probs of given tokens and the KL would be of two different distributions"
                )
            wait_s, limit_s = teacher.requests.max_wait_s, self.watchdog.reward_s
            if limit_s is not None and limit_s <= wait_s:
                raise ValueError(
                    f"teachers.{name}.requests.max_wait_s = {wait_s:g} and watchdog.reward_s = {limit_s:g}: the watchdog would take a step "
                    "that waits for its teacher for a hang; raise the latter"
                )
        return self

    @model_validator(mode="after")
    def _off_policy_rows_are_there(self) -> OnPolicyDistillRecipe:
        if (self.off_policy_data is None) != (self.distill.off_policy_rows == 0):
            given, other = ("off_policy_data", "distill.off_policy_rows")[:: -1 if self.off_policy_data is None else 1]
            raise ValueError(f"{given} needs {other}: the one says which conversations, the other how many in each step")
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


class ResponseTeacherConfig(Settings):
    """A model whose responses are learned."""

    model: ModelConfig
    num_candidates: int = Field(default=4, ge=1)
    """Responses to each prompt. The reports give no number; our choice."""
    sampler: SamplerConfig | None = None
    """How it draws; absent: as the recipe's sampler."""
    dtype: DType = "auto"
    """Of its weights and arithmetic in the engine."""
    thinking: bool | None = None
    """Whether its chat template must open a think block in the prompt; another one is refused. Absent: whatever it does."""

    @field_validator("model")
    @classmethod
    def _has_learned_something(cls, model: ModelConfig) -> ModelConfig:
        if model.nano is not None:
            raise ValueError("a nano starts from random weights, there is nothing to learn from it: name a path, or a stage")
        return model


class OffPolicyDistillRecipe(TrainStageConfig):
    """Off-policy distillation: teachers answer the prompts, what passes the filters is learned by supervised fine-tuning."""

    method: Literal["off_policy_distill"]
    data: DataConfig
    """The prompts, each of which is answered once by every teacher: a data set with an end."""
    teachers: dict[PlainName, ResponseTeacherConfig] = Field(min_length=1)
    """By the name that their responses bear; one after another is in memory."""
    agent: AgentConfig | None = None
    """Conversations with tools in place of one response, of all teachers; the student learns to call them."""
    filters: dict[PlainName, StepConfig] = Field(default_factory=dict)
    """Steps of `vlpost curate` by a name of your choice, run in this order on the responses."""
    max_per_prompt: int | None = Field(default=None, ge=1)
    """The first so many responses to a prompt that pass, in the order of the teachers. Absent: all of them."""
    shard_rows: int = Field(default=1000, ge=1)
    """Prompts that a teacher or a filter finishes at once: what a killed run loses at most."""
    sft: SftConfig
    soft_labels: SoftLabelsConfig | None = None
    """Absent: the responses alone are learned, as in the reports."""
    alarms: tuple[AlarmConfig, ...] = SFT_ALARMS

    @field_validator("filters")
    @classmethod
    def _filters_filter(cls, filters: dict[str, StepConfig]) -> dict[str, StepConfig]:
        for name, step in filters.items():
            if isinstance(step, GenerateConfig | SplitConfig):
                raise ValueError(f"filters.{name}: use = {step.use!r}: the teachers write, and all that is left is trained on")
            if name == "generate":
                raise ValueError("a filter is called 'generate': that is the name of the step in which teachers answer; choose another")
        return filters

    @model_validator(mode="after")
    def _soft_labels_are_of_one_turn(self) -> OffPolicyDistillRecipe:
        if self.agent is not None and self.soft_labels is not None:
            raise ValueError(
                "agent with soft_labels: the teacher's log-probs are kept of responses of one turn, not of conversations with tools; leave "
                "out one of them"
            )
        return self

    @model_validator(mode="after")
    def _halves_are_whole(self) -> OffPolicyDistillRecipe:
        self.as_sft()
        self.as_curate({name: f"./{name}" for name in self.teachers})
        return self

    @property
    def responses(self) -> Path:
        """The run folder of the first half: prompts with the responses that passed."""
        return self.output / "responses"

    def as_curate(self, folders: dict[str, str]) -> CurateRecipe:
        """Returns the first half as a recipe of `vlpost curate`; `folders` are those of the teachers, or their hub names."""
        models = {
            name: CandidateModel(
                path=folders[name],
                sampler=teacher.sampler or self.sampler,
                dtype=teacher.dtype,
                thinking=teacher.thinking,
                num_candidates=teacher.num_candidates,
            )
            for name, teacher in self.teachers.items()
        }
        return CurateRecipe(
            method="curate",
            seed=self.seed,
            output=self.responses,
            data={"prompts": self.data},
            shard_rows=self.shard_rows,
            steps={"generate": GenerateConfig(use="generate", models=models, agent=self.agent), **self.filters},
            write="conversations",
            max_per_query=self.max_per_prompt,
        )

    def as_sft(self) -> SftRecipe:
        """Returns the second half: supervised fine-tuning on what passed."""
        shared = {name: getattr(self, name) for name in TrainStageConfig.model_fields}
        shared["name"] = self.name or self.method
        return SftRecipe(method="sft", sft=self.sft, data=CuratedData(use="curated", path=self.responses), **shared)


class EvaluateRecipe(StageConfig):
    """Measuring a model on held-out data."""

    method: Literal["evaluate"]
    data: DataConfig
    evaluate: EvaluateConfig = EvaluateConfig()
    agent: AgentConfig | None = None
    """Conversations with tools in place of one response."""
    dtype: DType = "auto"
    """Of the engine's weights and arithmetic."""

    @model_validator(mode="after")
    def _agent_fits_the_engine(self) -> EvaluateRecipe:
        _check_agent(self.agent, self.sampler, "agent")
        return self


TrainingRecipe = SftRecipe | RlRecipe | OnPolicyDistillRecipe
StageRecipe = TrainingRecipe | OffPolicyDistillRecipe | EvaluateRecipe
LeafRecipe = Annotated[StageRecipe, Field(discriminator="method")]


def models_of(stage: StageRecipe) -> dict[str, ModelConfig]:
    """Returns the models that a stage loads or serves, its teachers' too, by dotted key."""
    models = {"model": stage.model}
    if isinstance(stage, OffPolicyDistillRecipe):
        models |= {f"teachers.{name}.model": teacher.model for name, teacher in stage.teachers.items()}
    if isinstance(stage, OnPolicyDistillRecipe):
        of_teachers = {f"{name}.serve.model" if of.serve else f"{name}.model": of.source for name, of in stage.teachers.items()}
        models |= {f"teachers.{key}": model for key, model in of_teachers.items() if model is not None}
    return models


def agents_of(stage: StageRecipe) -> dict[str, AgentConfig]:
    """Returns the agents of a stage by dotted key."""
    agents = {"agent": stage.agent if isinstance(stage, RlRecipe | EvaluateRecipe) else None}
    if isinstance(stage, TrainStageConfig) and stage.validation is not None:
        agents["validation.agent"] = stage.validation.agent
    return {key: agent for key, agent in agents.items() if agent is not None}


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
            models = {f"stages.{name}.{key}": model for key, model in models_of(stage).items()}
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
