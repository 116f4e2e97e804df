"""What a recipe may say of the rows that it reads. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, field_validator

from ..model.config import Settings, Share

Split = Literal["train", "validation", "test"]
TaskKind = Literal[
    "read", "add", "count", "compare", "arithmetic", "find", "video", "multi_image", "multi_turn", "page", "sum2", "sum2_steps", "blind",
    "zoom", "zoom_calls", "ordered", "counter", "mixing", "program", "json", "constrained",
    "sum4", "sum4_steps",
]  # fmt: skip
Language = Literal["en", "zh"]
SolutionFault = Literal["code_switching", "repetition", "form"]
PageSide = Annotated[int, Field(ge=200, le=4000)]
RowFormat = Literal["messages", "sharegpt", "alpaca"]


def _lowest_first(bounds: tuple[float, float]) -> tuple[float, float]:
    if bounds[0] > bounds[1]:
        raise ValueError(f"{list(bounds)}: give the lowest first, then the highest")
    return bounds


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
    solution_faults: dict[SolutionFault, Annotated[float, Field(gt=0, le=1)]] = Field(default_factory=dict)
    """Share of the worked solutions that are bad examples, for a later stage to undo: `code_switching` and `repetition` spoil the sentences
    of `mixing`, `form` gives `constrained` a bare answer, whatever form it asks for. Only supervised stages see solutions."""
    page_pixels: Annotated[tuple[PageSide, PageSide], AfterValidator(_lowest_first)] = (200, 4000)
    """Smallest and largest side of a `page`, in pixels. A nano reads those that its `max_image_tokens` show whole: up to 256 pixels with
    64 tokens."""


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


class PassRateBand(Settings):
    """The rows of one part of a curriculum."""

    pass_rate: Annotated[tuple[Share, Share], AfterValidator(_lowest_first)]
    """Lowest and highest, both included."""
    num_examples: int | None = Field(default=None, ge=1)
    """How many examples are drawn from the band before the next one's turn, rows again in a new order where it has fewer. The last band,
    and it alone, has no number: it stays."""


class CurriculumConfig(Settings):
    """Bands of difficulty, one after another. Qwen3-VL's report names no curriculum in RL; this order and these bands are the user's."""

    model: str = Field(min_length=1)
    """Whose pass rate counts: a model of the step `difficulty` that the data set was made with."""
    bands: tuple[PassRateBand, ...] = Field(min_length=2)

    @field_validator("bands")
    @classmethod
    def _all_but_the_last_end(cls, bands: tuple[PassRateBand, ...]) -> tuple[PassRateBand, ...]:
        for number, band in enumerate(bands):
            if (band.num_examples is None) != (number == len(bands) - 1):
                raise ValueError(
                    f"bands[{number}].num_examples = {band.num_examples}: every band but the last says how many examples it has, and the "
                    "last one none"
                )
        return bands


class CuratedData(Settings):
    """A data set that `vlpost curate` wrote."""

    use: Literal["curated"]
    path: Path
    """The run folder of the curate recipe."""
    split: str = "train"
    """One of its splits; without a `split` step all rows are in `train`."""
    curriculum: CurriculumConfig | None = None
    """Rows by their pass rate, one band after another; absent: all rows in every epoch."""


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
