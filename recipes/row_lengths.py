"""`vlpost check RECIPE --lengths N`: how long the rows of supervised stages are and what a step is packed into, without training."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from ..model.chat import Chat
from ..model.layout import Ranks
from ..model.packing import pack, weigh
from ..model.records import Example, VlpostError
from ..sft.train import FittedRow, RowFitter, longest
from .build import Workshop
from .load import LoadedRecipe
from .schema import SftRecipe
from .sft_phases import PhasedStream, PhasePlan, open_phases, plan_phases
from .show_example import start_model


@dataclass(frozen=True, kw_only=True, slots=True)
class MeasuredRow:
    """A row as the run would take it, and the tokens that it has before it is dropped or split."""

    example: Example
    num_tokens: int
    """Of its longest sequence, images and videos expanded."""
    fitted: FittedRow


def length_lines(loaded: LoadedRecipe, num_rows: int) -> Iterator[str]:
    """Yields what the first rows of each phase of each supervised stage need: whole steps, `num_rows` rows at least or all of the phase's.

    Rows are encoded as the run encodes them, so a row that it refuses for another fault than its length is the same `DataError` here.
    """
    if num_rows < 1:
        raise VlpostError(f"--lengths {num_rows}: must be at least 1 row")
    stages = [(name, stage) for name, stage in loaded.stages if isinstance(stage, SftRecipe)]
    if not stages:
        raise VlpostError(f"{loaded.path}: --lengths {num_rows}: the recipe has no stage of method sft; leave it out")
    for name, stage in stages:
        with TemporaryDirectory() as folder, Workshop(Path(folder), exports={}, ranks=Ranks()) as workshop:
            chat = workshop.load_chat(start_model(loaded, stage), seed=stage.seed)
        plans = plan_phases(stage)
        stream = open_phases(plans, seed=stage.seed)
        for plan in plans:
            place = f"{name}, phase {plan.name}" if plan.name else name
            for line in phase_lines(plan, stream, chat=chat, token_budget=stage.learner.token_budget, num_rows=num_rows):
                yield f"{place}: {line}"


def phase_lines(plan: PhasePlan, stream: PhasedStream, *, chat: Chat, token_budget: int, num_rows: int) -> Iterator[str]:
    """Yields lines about the first steps of a phase: tokens, images, rows that are too long, and the micro-batches of one process."""
    # A row that would end the run is counted with the others, and left out of the packing.
    too_long = "split" if plan.config.too_long == "split" else "drop"
    fitter = RowFitter(plan.config.model_copy(update={"too_long": too_long}), chat=chat, token_budget=token_budget)
    endless = RowFitter(plan.config.model_copy(update={"max_length": None}), chat=chat, token_budget=sys.maxsize)
    count = plan.config.examples_per_step
    num_steps = min(plan.num_steps, -(-num_rows // count))
    rows: list[MeasuredRow] = []
    num_batches, num_trained, num_unique = [0] * num_steps, 0, 0
    for step in range(num_steps):
        of_step = [_measured(example, fitter, endless) for example in stream.examples(plan.first_example + step * count, count)]
        families = [family for row in of_step for family in row.fitted.families]
        rows += of_step
        if families:
            batches = pack(weigh(families, plan.config.weighting, unit="family"), media=chat, token_budget=token_budget)
            num_batches[step] = len(batches)
            num_trained += sum(len(batch.target_ids) for batch in batches)
            num_unique += sum(len(batch.token_ids) for batch in batches)
    yield f"the first {num_steps} of {plan.num_steps} steps, {len(rows)} rows: {_spread([row.num_tokens for row in rows])} tokens a row"
    num_media = [len(row.example.media) for row in rows]
    yield f"{sum(num_media)} images and videos, {num_media.count(0) / len(rows):.1%} of rows without any"
    yield _too_long_line(rows, plan=plan, limit=fitter.max_length)
    yield (
        f"a step of {count} rows is {num_unique / num_steps:.0f} tokens, {num_trained / max(1, num_unique):.1%} of them trained, in "
        f"{statistics.fmean(num_batches):.1f} micro-batches ({max(num_batches)} at most) of up to {token_budget}"
    )


def _measured(example: Example, fitter: RowFitter, endless: RowFitter) -> MeasuredRow:
    whole = endless.fit(example)
    num_tokens = longest(whole.families[0])
    return MeasuredRow(example=example, num_tokens=num_tokens, fitted=whole if num_tokens <= fitter.max_length else fitter.fit(example))


def _spread(lengths: Sequence[int]) -> str:
    """Returns smallest, median, 95th percentile (nearest rank) and largest as words."""
    ordered = sorted(lengths)
    p95 = ordered[-(-95 * len(ordered) // 100) - 1]
    return f"{ordered[0]} to {ordered[-1]}, median {statistics.median_high(ordered)}, 95 % at most {p95}"


def _too_long_line(rows: Sequence[MeasuredRow], *, plan: PhasePlan, limit: int) -> str:
    found = [row for row in rows if row.num_tokens > limit]
    if not found:
        return f"no row is above the limit of {limit} tokens"
    num_parts = sum(len(row.fitted.families) for row in found)
    num_left_out = sum(note.outcome == "exchange dropped" for row in found for note in row.fitted.notes)
    outcome = {
        "refuse": f"sft.too_long: refuse ends the run at {found[0].example.id} with {found[0].num_tokens}",
        "drop": "left out",
        "split": f"split into {num_parts} rows, {num_left_out} exchanges too long alone",
    }[plan.config.too_long]
    return f"{len(found)} rows ({len(found) / len(rows):.1%}) are above the limit of {limit} tokens: {outcome}"
