"""Settings of a step -> the step. What needs an engine is imported when a recipe names it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from .curate_config import (
    DecontaminateConfig,
    DedupeConfig,
    DifficultyConfig,
    MixConfig,
    ResponseFilterConfig,
    SplitConfig,
    StepConfig,
    ToolTargetConfig,
    VerifyConfig,
)
from .curate_difficulty import DifficultyStep, VerifyStep
from .curate_duplicates import DecontaminateStep, DedupeStep
from .curate_engine_config import GenerateConfig, ImageNecessityConfig, QueryFilterConfig, ResponseJudgeConfig
from .curate_rules import ResponseFilterStep
from .curate_shares import MixStep, SplitStep
from .curate_step import Step
from .curate_tool_target import ToolTargetStep

Order = Literal["any", "ordered", "whole"]
"""What a verdict depends on: the row's own shard, the shards before it too (`OrderedStep`), the whole data set (`WholeStep`)."""


OwnConfig: TypeAlias = (
    VerifyConfig | DifficultyConfig | ToolTargetConfig | ResponseFilterConfig | DedupeConfig | DecontaminateConfig | MixConfig | SplitConfig
)


@dataclass(frozen=True, kw_only=True, slots=True)
class BuiltStep:
    """A step and how it is run."""

    step: Step
    settings: Mapping[str, Any]
    order: Order
    decode: bool
    """Whether images are decoded before the step sees them; others look at few, or only at digests."""


def build_step(config: StepConfig) -> BuiltStep:
    """Returns the step of a recipe's settings."""
    if isinstance(config, GenerateConfig | ImageNecessityConfig | QueryFilterConfig | ResponseJudgeConfig):
        step, order, decode = _asking_step(config), "any", True
    else:
        step, order, decode = _own_step(config)
    return BuiltStep(step=step, settings=config.model_dump(mode="json"), order=order, decode=decode)


def _asking_step(config: GenerateConfig | ImageNecessityConfig | QueryFilterConfig | ResponseJudgeConfig) -> Step:
    """Returns a step that asks a model."""
    match config:
        case GenerateConfig():
            from .curate_generate import GenerateStep

            return GenerateStep(config)
        case ImageNecessityConfig():
            from .curate_necessity import ImageNecessityStep

            return ImageNecessityStep(config)
        case QueryFilterConfig():
            from .curate_judged import QueryFilterStep

            return QueryFilterStep(config)
        case ResponseJudgeConfig():
            from .curate_judged import ResponseJudgeStep

            return ResponseJudgeStep(config)


def _own_step(config: OwnConfig) -> tuple[Step, Order, bool]:
    """Returns a step that asks no model, what its verdicts depend on, and whether it wants images decoded."""
    match config:
        case VerifyConfig():
            return VerifyStep(config), "any", True
        case DifficultyConfig():
            return DifficultyStep(config), "any", False
        case ToolTargetConfig():
            return ToolTargetStep(config), "any", False
        case ResponseFilterConfig():
            return ResponseFilterStep(config), "any", False
        case DedupeConfig():
            return DedupeStep(config), "ordered", False
        case DecontaminateConfig():
            return DecontaminateStep(config), "any", False
        case MixConfig():
            return MixStep(config), "whole", False
        case SplitConfig():
            return SplitStep(config), "whole", False
