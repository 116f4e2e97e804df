"""What a recipe of `vlpost curate` may say. No torch.

The reports describe these filters and state few numbers; a default that no source is named for is our choice.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from ..model.config import Settings, Share
from ..rewards.config import RewardsConfig
from .curate_engine_config import GenerateConfig, ImageNecessityConfig, QueryFilterConfig, ResponseJudgeConfig
from .data_config import DataConfig

PlainName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$")]
"""Letters, digits, _ and -: names of steps and splits are names of files too."""
PERCEPTUAL_BITS = 256
"""Length of the perceptual hash of an image."""


class VerifyConfig(Settings):
    """`verify`: the reward manager judges every candidate, or, of a row without any, the conversation's last assistant turn.

    A judgement that cannot be had follows `rewards.on_unavailable`: `drop_rollout` takes the candidate out, `drop_group` drops the row,
    `stop` ends the run, as does a share above `rewards.max_unavailable_frac` of one shard; a resumed run asks again.
    """

    use: Literal["verify"]
    rewards: RewardsConfig
    min_value: float | None = None
    """Candidates below it are taken out, and rows whose last one goes are dropped. Absent: all stay, as `difficulty` needs."""


class PassRateBand(Settings):
    """What a model must make of a query for the row to stay."""

    min_solved: int = Field(default=0, ge=0)
    """Responses that must be right. 1 drops what the model never solves, as Qwen3-VL does with its strongest model's 16 (4.4.1)."""
    max_pass_rate: Share = 1.0
    """Largest share of right responses, itself allowed. Qwen3-VL drops above 0.9 of 16 under the model to be trained (4.4.1)."""
    long_tokens: float | None = Field(default=None, gt=0)
    """A row above `max_pass_rate` stays all the same when the model's responses have at least so many tokens on average: low pass rate
    *or* long responses, as in Qwen3-VL's cold start (4.2.2), which states no number. Absent: the pass rate alone decides."""

    @model_validator(mode="after")
    def _drops_something(self) -> PassRateBand:
        if self.min_solved == 0 and self.max_pass_rate == 1.0:
            raise ValueError("min_solved is 0 and max_pass_rate 1.0: no row could ever be dropped; give one of them")
        if self.long_tokens is not None and self.max_pass_rate == 1.0:
            raise ValueError("long_tokens has no effect with max_pass_rate: 1.0; lower max_pass_rate or take it out")
        return self


class DifficultyConfig(Settings):
    """`difficulty`: drops rows by the pass rate of models that have written candidates for them, which `verify` has judged.

    A row stays when every named model's band holds. Whole groups: candidates are never taken out one by one.
    """

    use: Literal["difficulty"]
    models: dict[str, PassRateBand] = Field(min_length=1)
    """By the name that the candidates bear."""
    solved_reward: float = 1.0
    """A candidate with at least this value counts as right; 1.0 is a verifier's full value at weight 1."""


class ToolTargetConfig(Settings):
    """`tool_target`: writes `metadata.target_calls`, the fewest tool calls with which a model's conversations, judged by `verify`, solved
    the row. The reports say that a target is estimated offline, not how: this, and the defaults, are our choice.
    """

    use: Literal["tool_target"]
    model: str
    """The name that the conversations bear."""
    solved_reward: float = 1.0
    """A conversation with at least this value counts as right."""
    min_solved: int = Field(default=1, ge=1)
    """Right conversations that a row must have; with fewer it is dropped."""
    quantile: Share = 0.0
    """Which of the right conversations, ordered by calls, sets the target: 0 the one with the fewest, 0.5 the median, 1 the most."""


class ResponseFilterConfig(Settings):
    """`response_filter`: rules for responses. A candidate that breaks one goes; a row that had candidates and has none left is dropped.

    Of a row without candidates the conversation's last assistant turn is judged. The rules are those of Qwen3-VL's report (4.2.1, 4.2.2);
    it states no number. `response_judge` is the second half, by a model.
    """

    use: Literal["response_filter"]
    max_repeated_frac: Share | None = 0.2
    """Largest share of repeated units (`rewards/repetition.py`) of thinking and of answer, each apart; null: not looked at."""
    truncated: Literal["drop", "keep"] = "drop"
    """What becomes of a response that the token budget cut off."""
    answer_form: Literal["any", "tagged", "boxed"] = "any"
    """How the final answer must be marked: not at all, `<answer>...</answer>`, or `\\boxed{...}`."""
    thinking: Literal["any", "required", "forbidden"] = "any"
    """Whether a response must have, or must not have, a thinking part; unbalanced think tags are a wrong format in any case."""
    max_foreign_frac: Share | None = 0.01
    """Largest share of words in a language that the query neither uses nor asks for (`rewards/code_switching.py`); null: not looked at."""
    min_reasoning_words: int = Field(default=0, ge=0)
    """Words before the final answer, thinking included: fewer is guessing without steps. 0: not looked at, for answer-only data."""
    guesses: Literal["drop", "keep"] = "drop"
    """What becomes of a response whose last steps say that its answer is a guess."""
    disagreeing: Literal["drop", "keep"] = "drop"
    """What becomes of a response whose thinking ends with another answer than it then gives."""

    @model_validator(mode="after")
    def _share_of_words(self) -> ResponseFilterConfig:
        if self.max_foreign_frac == 1.0:
            raise ValueError("max_foreign_frac is 1.0: no response could break it; write null to leave languages alone")
        return self


class DedupeConfig(Settings):
    """`dedupe`: drops a row when an earlier one asks the same: equal text and equal images, or both nearly equal.

    Near duplicates have similar words, images that look alike, in number and order, and the same answer (a conversation without one: the
    same last turn), system message and tools: what looks alike to a perceptual hash may still be another page or another number.
    """

    use: Literal["dedupe"]
    near: bool = True
    """False: only equal rows are dropped."""
    min_similarity: float = Field(default=0.8, gt=0.0, le=1.0)
    """Jaccard similarity of the sets of word n-grams from which two texts are nearly equal."""
    ngram_words: int = Field(default=3, ge=1)
    """Length of these n-grams; a Chinese character is a word."""
    max_image_distance: int = Field(default=8, ge=0, lt=64)
    """Bits in which the perceptual hashes (256 bits) of two images that look alike may differ."""

    @model_validator(mode="after")
    def _options_have_an_effect(self) -> DedupeConfig:
        unused = [name for name in ("min_similarity", "ngram_words", "max_image_distance") if name in self.model_fields_set]
        if not self.near and unused:
            raise ValueError(f"{unused[0]} has no effect with near: false; take it out, or write near: true")
        return self


class DecontaminateConfig(Settings):
    """`decontaminate`: drops rows that stand in an evaluation set, by word n-grams and by images."""

    use: Literal["decontaminate"]
    against: dict[PlainName, DataConfig] = Field(min_length=1)
    """Evaluation sets by name; rows that end before the assistant's turn."""
    ngram_words: int = Field(default=13, ge=2)
    """Length of an n-gram that two texts must share; a text of fewer words must be equal as a whole. GPT-3 took 8 to 13
    (arXiv:2005.14165, appendix C)."""
    max_image_distance: int = Field(default=8, ge=0, lt=64)
    """Bits in which the perceptual hashes (256 bits) of two images that look alike may differ; 0: the hashes must be equal."""
    rows_with_images: Literal["by_image", "by_image_or_text"] = "by_image"
    """What decides on a row with images. Its words alone are often a template that a whole benchmark shares (`How many are there?`);
    rows without images always go by their words."""


class SplitConfig(Settings):
    """`split`: names a split for every row; the output has files for each."""

    use: Literal["split"]
    shares: dict[PlainName, Annotated[float, Field(gt=0.0, le=1.0)]] = Field(min_length=2)
    """Split -> share of the rows; they add up to 1."""
    by: Literal["image", "row"] = "image"
    """`image`: rows that share an image, also through a third row, stand on one side. `row`: by row id alone."""

    @model_validator(mode="after")
    def _add_up(self) -> SplitConfig:
        total = sum(self.shares.values())
        if abs(total - 1.0) > 1e-6:
            raise ValueError(f"shares add up to {total:g}, must be 1")
        return self


class MixConfig(Settings):
    """`mix`: keeps rows of each source, or task, so that the shares hold up to rounding; a hash of seed and row id picks them."""

    use: Literal["mix"]
    shares: dict[str, Annotated[float, Field(gt=0.0)]] = Field(min_length=1)
    """Name -> share; relative. Rows of others are dropped."""
    by: Literal["source", "task"] = "source"
    num_rows: int | None = Field(default=None, ge=1)
    """Rows in all; more than there are is an error. Absent: as many as the shares allow, no row twice."""


StepConfig = Annotated[
    QueryFilterConfig
    | GenerateConfig
    | VerifyConfig
    | DifficultyConfig
    | ToolTargetConfig
    | ImageNecessityConfig
    | ResponseFilterConfig
    | ResponseJudgeConfig
    | DedupeConfig
    | DecontaminateConfig
    | SplitConfig
    | MixConfig,
    Field(discriminator="use"),
]


class CurateRecipe(Settings):
    """From a data set to a filtered one, by steps in order."""

    method: Literal["curate"]
    seed: int = Field(default=0, ge=0)
    output: Path
    """The run folder: the data set, its card, and what each step made of each shard."""
    data: dict[PlainName, DataConfig] = Field(min_length=1)
    """Data sets by name, read one after another. With several, a row's id is `name/id`."""
    rows: Literal["queries", "conversations"] = "queries"
    """Whether rows end before the assistant's turn, or with it."""
    shard_rows: int = Field(default=1000, ge=1)
    """Rows read into one shard: the unit that a step finishes whole, and that a killed run loses at most."""
    steps: dict[PlainName, StepConfig] = Field(min_length=1)
    """By a name of your choice, run in this order."""
    write: Literal["rows", "conversations"] = "rows"
    """`rows`: what is left, candidates aside. `conversations`: each query with a candidate as its assistant turn, for SFT."""
    max_per_query: int | None = Field(default=None, ge=1)
    """With `write: conversations`: the first so many candidates of a query. Absent: all of them."""

    @field_validator("steps")
    @classmethod
    def _no_step_is_called_read(cls, steps: dict[str, StepConfig]) -> dict[str, StepConfig]:
        if "read" in steps:
            raise ValueError("a step is called 'read': that is the name of the reading; choose another")
        return steps

    @model_validator(mode="after")
    def _options_have_an_effect(self) -> CurateRecipe:
        if self.write == "rows" and self.max_per_query is not None:
            raise ValueError("max_per_query has no effect with write: rows; take it out, or write write: conversations")
        named: set[str] = set()
        if self.write == "conversations":
            _refuse_wrong_conversations(self.steps)
        for name, step in self.steps.items():
            if isinstance(step, GenerateConfig):
                named |= set(step.models)
            if isinstance(step, DifficultyConfig) and not set(step.models) <= named:
                unknown = sorted(set(step.models) - named)[0]
                raise ValueError(f"steps.{name}.models names {unknown!r}: no `generate` step before it has it; there are {sorted(named)}")
            if isinstance(step, ToolTargetConfig) and step.model not in named:
                raise ValueError(f"steps.{name}.model = {step.model!r}: no `generate` step before it has it; there are {sorted(named)}")
            splits = [key for key, earlier in self.steps.items() if isinstance(earlier, SplitConfig)]
            if len(splits) > 1:
                raise ValueError(f"steps {splits[0]} and {splits[1]} both split: the second would undo the first; take one out")
        return self


def _refuse_wrong_conversations(steps: Mapping[str, StepConfig]) -> None:
    """Raises `ValueError` where no row has a candidate to write, or where those that were found wrong are written all the same."""
    if not any(isinstance(step, GenerateConfig) for step in steps.values()):
        raise ValueError("write: conversations writes candidates, and no step generates any; add one, or write write: rows")
    verifying = {name: step.min_value for name, step in steps.items() if isinstance(step, VerifyConfig)}
    if verifying and all(floor is None for floor in verifying.values()):
        raise ValueError(
            f"write: conversations would write the candidates that {next(reversed(verifying))!r} finds wrong, for SFT to learn; give it "
            "min_value, or where `difficulty` needs all of them a second `verify` behind it"
        )


STEP_FOLDER = re.compile(r"(\d{2,})-([A-Za-z0-9][A-Za-z0-9_-]*)")
"""Name of a step's folder: its number and its name."""
