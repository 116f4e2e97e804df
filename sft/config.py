"""Settings of supervised fine-tuning. No torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ..model.config import Settings


class PlateauConfig(Settings):
    """Stop when the validation accuracy no longer rises: it fixes the length of SFT before anything later is looked at."""

    patience: int = Field(default=2, ge=1)
    """Validations in a row without a new best that end the stage."""
    min_gain: float = Field(default=0.01, ge=0)
    """A new best must beat the old one by this much (accuracy, 0 to 1)."""


class SftConfig(Settings):
    """One stage of supervised fine-tuning."""

    num_steps: int = Field(ge=1)
    """Optimizer updates, at most: `plateau` may end the stage earlier."""
    examples_per_step: int = Field(ge=1)
    weighting: Literal["token", "sqrt", "sequence"] = "sqrt"
    """How trained tokens weigh: all alike, by 1 / sqrt(response length) (Qwen3-VL's choice, after InternVL2.5), or by 1 / length."""
    plateau: PlateauConfig | None = None
    """Needs `validation`; absent: the stage runs `num_steps`."""
