"""Settings of supervised fine-tuning. No torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from ..model.config import Settings, Share

TooLong = Literal["refuse", "drop", "split"]
"""A row above the limit ends the run (`refuse`), is left out and counted (`drop`), or is cut at turn boundaries into rows of their own,
each with the system message again (`split`); a part that alone is too long is left out and counted. Nothing is cut inside a turn."""


class PlateauConfig(Settings):
    """Stop when the validation accuracy no longer rises: it fixes the length of SFT before anything later is looked at."""

    patience: int = Field(default=2, ge=1)
    """Validations in a row without a new best that end the stage."""
    min_gain: float = Field(default=0.01, ge=0)
    """A new best must beat the old one by this much (accuracy, 0 to 1)."""


class ModeFusionConfig(Settings):
    """One model that thinks or answers at once, as the user asks (Qwen3, arXiv:2505.09388, 4.3): a user turn whose answer has no thinking
    gets ` /no_think`, and its answer an empty think block; one whose answer has thinking may get ` /think`.
    """

    think_flag_share: Share = 0.5
    """Share of the thinking turns that get the flag, decided by row id and turn. Qwen3 says only that some have none, so that thinking is
    the default; the number is our choice."""


class SftConfig(Settings):
    """One stage of supervised fine-tuning."""

    num_steps: int | None = Field(default=None, ge=1)
    """Optimizer updates, at most: `plateau` may end the stage earlier. Absent where `phases` say it."""
    examples_per_step: int = Field(ge=1)
    """Rows of one update over all ranks; a phase may have another number."""
    weighting: Literal["token", "sqrt", "sequence"] = "sqrt"
    """How trained tokens weigh: all alike, by 1 / sqrt(response length) (Qwen3-VL's choice, after InternVL2.5), or by 1 / length."""
    max_length: int | None = Field(default=None, ge=16)
    """Tokens of a row, images and videos expanded; absent: `learner.token_budget`. A phase may have another."""
    too_long: TooLong = "refuse"
    """What becomes of a row above `max_length`; which rows other steps see does not depend on it."""
    think_blocks: Literal["template", "keep", "strip"] = "template"
    """Think blocks of assistant turns: as the model's chat template has them, which is kept where it opens one (Thinking) and refused where
    it does not (Instruct would learn to write the tags as text); `keep`: trained as written; `strip`: the answers alone."""
    empty_think: Literal["train", "mask", "refuse"] = "train"
    """A turn without thinking where the template opens a think block, which such a turn closes at once: trained as the rest, left out of
    the loss (its answer teaches, its haste does not), or refused. The report is silent; `train` is what Qwen3 says of fusion."""
    mode_fusion: ModeFusionConfig | None = None
    """Flags for rows with and without thinking in one pool; absent: rows as they are."""
    plateau: PlateauConfig | None = None
    """Needs `validation`; absent: the stage runs `num_steps`."""

    @model_validator(mode="after")
    def _one_way_to_think(self) -> SftConfig:
        if self.mode_fusion is not None and self.think_blocks == "strip":
            raise ValueError("sft.mode_fusion needs think blocks and sft.think_blocks: strip removes them; take one out")
        if self.mode_fusion is not None and self.empty_think != "train":
            raise ValueError(
                f"sft.empty_think = {self.empty_think!r} and sft.mode_fusion: what /no_think asks for is the empty block itself; "
                "leave empty_think out"
            )
        return self
