"""Settings of the steps of `vlpost curate` that ask a model: candidates, tries without the image, and a judge's verdicts. No torch."""

from __future__ import annotations

from typing import Annotated, Literal, TypeVar

from pydantic import Field, field_validator, model_validator

from ..model.config import DType, SamplerConfig, Settings
from ..rewards.config import RewardsConfig
from ..rewards.judge_config import JudgeConfig
from ..rl.tools_config import AgentConfig

ResponseAxis = Literal["correctness", "completeness", "clarity", "helpfulness", "visual_evidence"]
"""What a response is scored on, 1 to 5 each (Qwen3-VL report, section 4.2.1; the scale is our choice)."""
Score = Annotated[int, Field(ge=1, le=5)]


class EngineModel(Settings):
    """A model that answers through vLLM: `EngineModel(path="Qwen/Qwen3-VL-8B-Instruct", sampler={...})`."""

    path: str
    """A hub name (`org/name`) or a folder in Hugging Face format, its path relative to the working directory."""
    sampler: SamplerConfig
    dtype: DType = "auto"
    """Of the engine's weights and arithmetic."""
    thinking: bool | None = None
    """Whether the model's chat template must open a think block in the prompt; another one is refused. Absent: whatever it does."""

    @field_validator("path")
    @classmethod
    def _no_bare_folder_name(cls, path: str) -> str:
        # A local folder of that name would win over the hub: "model" is a folder of every checkout of this library.
        if "/" not in path:
            raise ValueError(f"{path!r} is neither a hub name (org/name) nor a path: write ./{path} for a folder here")
        return path

    @field_validator("sampler")
    @classmethod
    def _in_this_process(cls, sampler: SamplerConfig) -> SamplerConfig:
        if sampler.serve is not None:
            raise ValueError("sampler.serve is of stages that train or evaluate; here the engine runs in this process: take serve out")
        return sampler


class CandidateModel(EngineModel):
    """A model that writes candidates."""

    num_candidates: int = Field(default=4, ge=1)
    """Responses to each query. The reports state no number (Qwen3-VL, section 4.2.2: "several"); 4 is our choice."""


class GenerateConfig(Settings):
    """`generate`: candidates for every query, by one model after another; they stand behind those that a row already has."""

    use: Literal["generate"]
    models: dict[str, CandidateModel] = Field(min_length=1)
    """By the name that the candidates bear; only one is in memory at a time."""
    agent: AgentConfig | None = None
    """Conversations with tools in place of one response, of all models. What a tool broke in is left out."""

    @model_validator(mode="after")
    def _agent_fits_the_engines(self) -> GenerateConfig:
        for name, model in self.models.items():
            room = model.sampler.max_images_per_prompt
            if self.agent is not None and self.agent.max_images > room:
                raise ValueError(
                    f"agent.max_images = {self.agent.max_images} is above models.{name}.sampler.max_images_per_prompt = {room}, which "
                    "counts those of the query too: raise the latter, or lower the former"
                )
        return self


class ImageNecessityConfig(Settings):
    """`image_necessity`: drops what models solve without the image; rows that show none pass untouched.

    Qwen3-VL's report (4.2.2) drops items of vision-language mathematics that a model solves without the image. It states neither the
    number of tries nor how many must succeed: both are our choice, and so are several models.
    """

    use: Literal["image_necessity"]
    models: dict[str, EngineModel] = Field(min_length=1)
    """Name -> model, one after another in memory. A row is dropped when each of them solves it: one alone that guesses, and makes the same
    guess in all of its tries, is right as often as with one try."""
    rewards: RewardsConfig
    """What finds a try right; `unavailable` judgements stop the shard whatever `on_unavailable` says."""
    tries: int = Field(default=4, ge=1)
    """k: responses of each model to each query without its images and videos."""
    min_solved: int | None = Field(default=None, ge=1)
    """m: a model solves a row when at least so many of its tries are right. Absent: all of them."""
    solved_reward: float = 1.0
    """A try with at least this reward counts as right; 1.0 is a verifier's full value at weight 1."""

    @model_validator(mode="after")
    def _can_be_solved(self) -> ImageNecessityConfig:
        if self.min_solved is not None and self.min_solved > self.tries:
            raise ValueError(f"min_solved = {self.min_solved} is above tries = {self.tries}: no row could ever be dropped")
        return self

    @property
    def num_needed(self) -> int:
        """m, with its default filled in."""
        return self.tries if self.min_solved is None else self.min_solved


class QueryFilterConfig(Settings):
    """`query_filter`: a judge drops queries that cannot be verified, have no substance or do not fit their image, and rewrites ambiguous
    ones with as little change as it can; after Qwen3-VL's report (4.2.1), which states no scale and no threshold: those are ours.
    """

    use: Literal["query_filter"]
    judge: JudgeConfig
    rubric: str = "query"
    """`query`, or a YAML file with the same axes, its path relative to the recipe."""
    images: bool = True
    """Whether the judge is shown the images, and up to `max_frames` frames of each video."""
    max_frames: int = Field(default=8, ge=1)
    """Frames of one video, evenly spread."""
    keep_unverifiable: bool = False
    """True: a query without a verifiable answer is kept, and only its note says so."""
    ambiguous: Literal["rewrite", "drop", "keep"] = "rewrite"
    """What becomes of an ambiguous query. A rewritten one is judged again and dropped if it is no better."""
    max_change: float = Field(default=0.5, ge=0.0, le=1.0)
    """Largest share of a rewritten query that may differ from the original: 1 - 2 M / T, M matching and T all characters."""
    max_rewrite_chars: int = Field(default=4000, ge=1)
    """Longest rewritten query, characters."""
    min_substance: Score = 2
    """1 to 5; 1 is a query that asks for nothing."""
    min_relevance: Score = 2
    """1 to 5: how well query and image fit each other; not looked at where there is no image."""
    min_complexity: Score = 1
    """1 to 5; the default keeps the easy ones, which `difficulty` measures better than a judge can guess."""

    @model_validator(mode="after")
    def _options_have_an_effect(self) -> QueryFilterConfig:
        unused = [name for name in ("max_change", "max_rewrite_chars") if name in self.model_fields_set]
        if self.ambiguous != "rewrite" and unused:
            raise ValueError(f"{unused[0]} has no effect with ambiguous: {self.ambiguous}; take it out, or write ambiguous: rewrite")
        return _frames_need_images(self)


class ResponseJudgeConfig(Settings):
    """`response_judge`: the judge's half of the response filter. A candidate below a threshold goes; a row that had candidates and has
    none left is dropped. Of a row without candidates the conversation's own last assistant turn is judged.

    Axes after Qwen3-VL's report (4.2.1), which weighs visual evidence higher for vision tasks; scale, weights (in the rubric) and
    thresholds are our choice.
    """

    use: Literal["response_judge"]
    judge: JudgeConfig
    rubric: str = "response"
    """`response`, or a YAML file with the same axes, its path relative to the recipe."""
    images: bool = True
    """Whether the judge is shown the images, and up to `max_frames` frames of each video."""
    max_frames: int = Field(default=8, ge=1)
    """Frames of one video, evenly spread."""
    min_scores: dict[ResponseAxis, Score] = Field(
        default_factory=lambda: {"correctness": 4, "completeness": 3, "clarity": 3, "helpfulness": 3, "visual_evidence": 3}
    )
    """Lowest score of each axis, 1 to 5; an axis that is left out has none. `visual_evidence` is not looked at where there is no image."""
    min_value: float = Field(default=0.6, ge=0.0, le=1.0)
    """Lowest weighted mean of the axes, each scaled to 0 to 1."""

    @model_validator(mode="after")
    def _options_have_an_effect(self) -> ResponseJudgeConfig:
        return _frames_need_images(self)


JudgedConfig = TypeVar("JudgedConfig", QueryFilterConfig, ResponseJudgeConfig)


def _frames_need_images(config: JudgedConfig) -> JudgedConfig:
    if not config.images and "max_frames" in config.model_fields_set:
        raise ValueError("max_frames has no effect with images: false; take one of them out")
    return config
