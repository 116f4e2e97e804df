"""Runs a loaded recipe: one stage, or a chain of them with one engine and one log."""

from __future__ import annotations

import json
import os
import shlex
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console

from ..model.layout import Ranks
from ..model.learner import Learner
from ..model.parity import check_parity
from ..model.records import VlpostError
from ..model.weight_sync import publish
from .build import Workshop
from .chain_summary import TABLE_FILE, write_summary
from .curate_config import CurateRecipe
from .drawing import open_drawing
from .evaluation_table import figure_lines
from .example_stream import open_stream
from .interrupt import Interrupt, StopRequestedError
from .load import LoadedRecipe
from .report import draw_curves
from .run_log import EVENTS_FILE, RunLog
from .schema import ChainRecipe, EvaluateRecipe, OffPolicyDistillRecipe, RlRecipe, RolloutStageConfig, StageRecipe
from .stages import RunOptions, run_evaluation, run_off_policy, run_training
from .training import ResumeError, phase_of
from .watchdog import Watchdog

DONE_FILE = "done.json"
EXIT_INTERRUPTED = 130


def run_recipe(loaded: LoadedRecipe, *, resume: bool, allow_code: bool) -> int:
    """Runs the recipe in its output folder and returns the exit status."""
    recipe = loaded.recipe
    assert not isinstance(recipe, CurateRecipe), "the command line hands those to `curate`"
    folder = recipe.output
    ranks = Ranks()
    _check_folder(loaded, resume)
    ranks.wait()  # nobody writes before everybody has looked
    folder.mkdir(parents=True, exist_ok=True)
    options = RunOptions(recipe_folder=loaded.path.resolve().parent, resume=resume, allow_code=allow_code)
    console = Console(quiet=not ranks.is_first)
    exports: dict[str, Path] = {}
    # Every rank logs its own rollouts and events; metrics are those of all ranks together, and the first rank's log is the run's.
    log_folder, trackers = (folder, recipe.trackers) if ranks.is_first else (folder / f"rank-{ranks.rank}", ())
    with (
        RunLog(log_folder, console=console if ranks.is_first else None, trackers=trackers) as log,
        Workshop(folder, exports=exports, ranks=ranks, heed=partial(_heed, log)) as workshop,
        Interrupt(ranks) as interrupt,
        Watchdog(folder, rank=ranks.rank) as watchdog,
    ):
        log.write_recipe(recipe.model_dump(mode="json"), loaded.origins)
        try:
            for name, stage in loaded.stages:
                export = _run_stage(
                    stage, workshop=workshop, options=options, log=log, interrupt=interrupt, watchdog=watchdog, console=console
                )
                if export is not None:
                    exports[name] = export
                if ranks.is_first:
                    _draw(folder, log)
        except StopRequestedError:
            if ranks.is_first:
                _draw(folder, log)
            console.print(f"stopped and saved; go on with: vlpost run {shlex.quote(str(loaded.path))} --resume")
            ranks.wait()
            return EXIT_INTERRUPTED
        if ranks.is_first and isinstance(recipe, ChainRecipe):
            _summarize(loaded, log, console)
    ranks.wait()  # a rank that leaves early takes the others' connections with it
    console.print(f"done: {folder} (metrics.jsonl, rollouts.jsonl, curves.png)")
    return 0


def _heed(log: RunLog, what: str) -> None:
    """Says what befell a server that draws."""
    log.say(what)
    log.event("server", what=what)


def _check_folder(loaded: LoadedRecipe, resume: bool) -> None:
    """Raises unless a new run starts in an empty folder, and a resumed one in the folder of a run that is not finished."""
    folder = loaded.recipe.output
    if not resume:
        if folder.exists() and any(folder.iterdir()):
            raise VlpostError(f"{folder} is not empty: add --resume to go on, or give another folder with output=...")
    elif not (folder / EVENTS_FILE).exists():
        raise ResumeError(f"{folder}: nothing to resume, no run has been started there; leave out --resume, or mend output=...")
    elif all((stage.output / DONE_FILE).exists() for _, stage in loaded.stages) and not _lacks_summary(loaded):
        raise ResumeError(f"{folder}: nothing to resume, the run is finished; to train again give another folder with output=...")


def _lacks_summary(loaded: LoadedRecipe) -> bool:
    """Says whether a chain that measures something was ended before its summary was written."""
    measures = any(isinstance(stage, EvaluateRecipe) for _, stage in loaded.stages)
    return isinstance(loaded.recipe, ChainRecipe) and measures and not (loaded.recipe.output / TABLE_FILE).exists()


def _draw(folder: Path, log: RunLog) -> None:
    """Draws the curves; a full disk must not end a run whose numbers are safe."""
    try:
        draw_curves(folder)
    except OSError as error:
        log.say(f"{folder}: the curves could not be drawn ({error})")


def _summarize(loaded: LoadedRecipe, log: RunLog, console: Console) -> None:
    """Prints and draws what the chain's evaluations say together; a fault in it must not end a run whose numbers are safe."""
    try:
        lines = write_summary(loaded.recipe.output, loaded.stages)
    except (OSError, VlpostError) as error:
        log.say(f"{loaded.recipe.output}: the evaluations could not be summed up ({error})")
        return
    if lines:
        console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)


def _run_stage(
    stage: StageRecipe,
    *,
    workshop: Workshop,
    options: RunOptions,
    log: RunLog,
    interrupt: Interrupt,
    watchdog: Watchdog,
    console: Console,
) -> Path | None:
    """Runs one stage unless its folder says that it is done; returns the export of a training stage."""
    stage.output.mkdir(parents=True, exist_ok=True)
    done = stage.output / DONE_FILE
    if done.exists():
        outcome = json.loads(done.read_text(encoding="utf-8"))
        console.print(f"{phase_of(stage)}: done before")
        return Path(outcome["export"]) if outcome["export"] else None
    interrupt.check()
    export: Path | None = None
    if isinstance(stage, EvaluateRecipe):
        measured = run_evaluation(stage, workshop=workshop, options=options, log=log, watchdog=watchdog)
        lines = figure_lines(measured.figures, measured.metrics)
        console.print("\n".join([f"{phase_of(stage)}:", *lines]), markup=False, highlight=False, soft_wrap=True)
    elif isinstance(stage, OffPolicyDistillRecipe):
        export = run_off_policy(stage, workshop=workshop, options=options, log=log, interrupt=interrupt, watchdog=watchdog)
    else:
        export = run_training(stage, workshop=workshop, options=options, log=log, interrupt=interrupt, watchdog=watchdog)
    if workshop.ranks.is_first:
        partial = done.with_suffix(".partial")
        partial.write_text(json.dumps({"export": str(export) if export else None}), encoding="utf-8")
        os.replace(partial, done)
    return export


def check_engine(loaded: LoadedRecipe, *, allow_code: bool = False) -> str:
    """Runs the parity gate alone on the recipe's start model and returns its report; a chain checks its first RL stage."""
    stage = next((stage for _, stage in loaded.stages if isinstance(stage, RolloutStageConfig)), None)
    if stage is None:
        raise VlpostError(f"{loaded.path}: no stage draws rollouts: there is nothing that an engine and a learner must agree on")
    source = stage.model
    if source.stage is not None:  # the export does not exist yet: the chain's own start model stands in for it
        source = next(earlier.model for _, earlier in loaded.stages if earlier.model.stage is None)
    dtype = stage.learner.dtype
    with TemporaryDirectory() as folder, Workshop(Path(folder), exports={}, ranks=Ranks()) as workshop:
        model = workshop.load(source, dtype=dtype, seed=stage.seed)
        learner = Learner(model.model, config=stage.learner, num_steps=1)
        sampler = workshop.engine(model, stage.sampler, dtype=dtype, lora=stage.learner.lora)
        publish(learner, sampler)
        examples = open_stream(stage.data, seed=stage.seed, with_solution=False).examples(0, stage.parity.num_examples)
        agent = stage.agent if isinstance(stage, RlRecipe) else None
        with open_drawing(
            agent, sampler=sampler, chat=model.chat, limits=stage.sampler, recipe_folder=loaded.path.resolve().parent, allow_code=allow_code
        ) as draw:
            prompts, drawn = draw.parity_rows(examples, temperature=stage.sampler.temperature, seed=stage.seed)
        report = check_parity(
            prompts,
            drawn=drawn,
            sampler=sampler,
            learner=learner,
            chat=model.chat,
            distribution=model.distribution(stage.sampler.temperature),
            config=stage.parity,
            seed=stage.seed,
        )
    return f"{loaded.path}: engine and learner agree: {report}"
