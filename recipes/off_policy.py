"""The first half of off-policy distillation: teachers answer, filters choose, a teacher's distribution is read; each part once."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from transformers import AutoConfig, PreTrainedConfig

from ..distill.bucketed import bucketed_divergence
from ..distill.config import SoftLabelsConfig, TopKConfig
from ..distill.soft_labels import SoftLabels, have_soft_labels, write_soft_labels
from ..distill.support import states_of_support
from ..distill.teacher import Teacher, TeacherError, check_same_language, check_same_patches, check_sight, sight_rows
from ..model.chat import Chat
from ..model.layout import Ranks
from ..model.learner import Distribution
from ..model.packing import Batch
from ..model.records import DataError, Example, TrainSequence, VlpostError
from ..model.reference import SparseStates
from ..sft.train import NoTargets, RowFitter, SoftTargets
from .build import Workshop, vocabulary_size
from .changed_setting import first_change
from .curate import curate
from .curate_fingerprint import step_key
from .curate_output import MANIFEST_FILE
from .curate_process import curate_apart
from .curate_query import as_query
from .curate_reader import candidate_models, read_data_set
from .curate_step import StepContext
from .interrupt import StopRequestedError
from .run_log import RunLog
from .schema import OffPolicyDistillRecipe
from .training import ResumeError, phase_of

SETTINGS_FILE = "off_policy.json"
LABELS_FOLDER = "soft_labels"
_POLL_S = 1.0
_FIRST_HALF = ("seed", "data", "teachers", "agent", "filters", "max_per_prompt", "sampler", "soft_labels")
"""Keys that decide which rows are trained on, and on what of them."""


def make_responses(
    recipe: OffPolicyDistillRecipe,
    *,
    workshop: Workshop,
    recipe_folder: Path,
    allow_code: bool,
    log: RunLog,
    check_interrupt: Callable[[], None],
) -> None:
    """Runs the teachers and the filters, or what is left of that; the first rank does, the others wait.

    `check_interrupt` is called before each shard of a step; what it raises ends the run, and whole shards are kept. Raises `ResumeError`
    where a resumed run would train on other rows than it began with, `DataError` where no response is left.
    """
    folders = {name: workshop.source(teacher.model, seed=recipe.seed) for name, teacher in recipe.teachers.items()}
    _check_teachers(recipe, workshop)
    workshop.close_engine()  # the teachers need its memory

    def work() -> str:
        _check_unchanged(recipe)
        run = curate if workshop.ranks.size == 1 else curate_apart
        run(recipe.as_curate(folders), recipe_folder=recipe_folder, allow_code=allow_code, check_interrupt=check_interrupt)
        return _account(recipe)

    said = by_first_rank(work, ranks=workshop.ranks, folder=recipe.output)
    log.say(f"{phase_of(recipe)}: responses: {said}")
    log.event("responses", phase=phase_of(recipe), text=said)


def by_first_rank(work: Callable[[], str], *, ranks: Ranks, folder: Path) -> str:
    """Returns what `work` says on the first rank, on all of them; where it fails or is stopped, all raise.

    It may take days, and a collective gives up after minutes: until it is done the others look for a file, which `folder` shows to all.
    """
    done = folder / f".done-{ranks.gather(uuid4().hex)[0]}"
    said, problem = "", None
    if ranks.is_first:
        try:
            said = work()
        except (VlpostError, StopRequestedError) as error:
            problem = error
        if ranks.size > 1:
            done.touch()
    else:
        while not done.exists():
            time.sleep(_POLL_S)
    said, failed, is_stopped = ranks.gather((said, problem and str(problem), isinstance(problem, StopRequestedError)))[0]
    if ranks.is_first:
        done.unlink(missing_ok=True)
    if problem is not None:
        raise problem
    if is_stopped:
        raise StopRequestedError
    if failed is not None:
        raise DataError(failed)
    return said


def _check_unchanged(recipe: OffPolicyDistillRecipe) -> None:
    """Raises `ResumeError` unless the folder's rows were made by these settings, or none were."""
    path = recipe.output / SETTINGS_FILE
    now = json.loads(recipe.model_dump_json(include=set(_FIRST_HALF)))
    if not path.exists():
        partial_path = path.with_suffix(".partial")
        partial_path.write_text(json.dumps(now), encoding="utf-8")
        partial_path.replace(path)
        return
    change = first_change(json.loads(path.read_text(encoding="utf-8")), now)
    if change is not None:
        raise ResumeError(
            f"{recipe.output}: {change}: a resumed run would train on other rows than it began with; write it as it was, or give "
            "another folder with output=..."
        )


def _check_teachers(recipe: OffPolicyDistillRecipe, workshop: Workshop) -> None:
    """Raises `TeacherError` for a teacher whose tokens or image patches are not the student's, where its distribution is to be read."""
    if recipe.soft_labels is None:
        return
    student = workshop.load_chat(recipe.model, seed=recipe.seed)
    student_config = _config(workshop.source(recipe.model, seed=recipe.seed))
    for name, teacher in recipe.teachers.items():
        check_same_language(student, workshop.load_chat(teacher.model, seed=recipe.seed), name=name)
        check_same_patches(student_config, _config(workshop.source(teacher.model, seed=recipe.seed)), name=name)


def _config(source: str) -> PreTrainedConfig:
    return AutoConfig.from_pretrained(source, trust_remote_code=False)


def _account(recipe: OffPolicyDistillRecipe) -> str:
    """Returns what came out of each step; raises `DataError` with it where nothing did."""
    manifest = json.loads((recipe.responses / MANIFEST_FILE).read_text(encoding="utf-8"))
    passed = "; ".join(f"{step['name']} {step['rows_in']} -> {step['rows_out']}" for step in manifest["steps"])
    num_rows = sum(file["rows"] for file in manifest["files"].values())
    if not num_rows:
        raise DataError(f"{recipe.responses}: no response has passed the filters ({passed}); dropped.jsonl there names the reason of each")
    return f"{num_rows} to train on ({passed})"


def soft_targets(recipe: OffPolicyDistillRecipe, *, workshop: Workshop, chat: Chat, log: RunLog) -> SoftTargets | None:
    """Returns what the teachers say of the rows' tokens, read now or before; None where the recipe has no `soft_labels`. A collective."""
    config = recipe.soft_labels
    if config is None:
        return None
    folder = recipe.output / LABELS_FOLDER
    sources = {name: workshop.source(teacher.model, seed=recipe.seed) for name, teacher in recipe.teachers.items()}
    context = StepContext(recipe_folder=recipe.output, output=recipe.output, seed=recipe.seed)
    made_from = {
        "responses": json.loads((recipe.responses / MANIFEST_FILE).read_text(encoding="utf-8"))["content"],
        "teachers": step_key(sources, context),
        "sft": recipe.sft.model_dump(mode="json", include={"max_length", "too_long", "think_blocks", "empty_think", "mode_fusion"}),
        "token_budget": recipe.learner.token_budget,
        "top_k": config.top_k,
    }
    if not workshop.ranks.gather(have_soft_labels(folder, made_from=made_from))[0]:
        fitter = RowFitter(recipe.sft, chat=chat, token_budget=recipe.learner.token_budget)
        models = candidate_models(recipe.responses, split="train")
        rows = read_data_set(recipe.responses, split="train", with_solution=True)
        sequences: list[tuple[str, TrainSequence[NoTargets]]] = []
        for row in rows:
            sequences += [(models[row.id], sequence) for family in fitter.fit(row).families for sequence in family]
        with_image = {models[row.id]: as_query(row) for row in reversed(rows) if as_query(row).media}
        num_read = write_soft_labels(
            folder,
            sequences,
            states_of=partial(_open_teacher, recipe, config, workshop, chat, with_image, log),
            num_ids=1 + config.top_k,
            media=chat,
            token_budget=recipe.learner.token_budget,
            made_from=made_from,
            ranks=workshop.ranks,
        )
        _free_memory()
        num_tokens = sum(sequence.num_trained_tokens for _, sequence in sequences)
        log.say(f"{phase_of(recipe)}: soft labels: {config.top_k} ids at each of {num_tokens:,} tokens, {num_read} parts read now")
    divergence = partial(bucketed_divergence, divergence=config.divergence, beta=config.beta)
    return SoftTargets(states_of=SoftLabels(folder).states, divergence=divergence, weight=config.weight)


def _free_memory() -> None:
    """Gives back what teachers that are gone have left: their models lie in cycles, and an engine looks at what the device has free."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _open_teacher(
    recipe: OffPolicyDistillRecipe,
    config: SoftLabelsConfig,
    workshop: Workshop,
    chat: Chat,
    with_image: Mapping[str, Example],
    log: RunLog,
    name: str,
) -> Callable[[Batch[Any]], SparseStates]:
    """Returns what asks the teacher of that name, laid out as the student is; `with_image` has a prompt about an image for each teacher.

    Raises `TeacherError` where the images make no difference to it, and where it has fewer ids than are asked for.
    """
    _free_memory()  # of the one before
    loaded = workshop.load(recipe.teachers[name].model, dtype=recipe.learner.dtype, seed=recipe.seed)
    num_ids = vocabulary_size(loaded.model)
    student_ids = _config(workshop.source(recipe.model, seed=recipe.seed)).get_text_config().vocab_size
    if config.top_k > min(num_ids, student_ids):
        raise TeacherError(
            f"teacher {name}: soft_labels.top_k = {config.top_k}: it and the student share {min(num_ids, student_ids)} ids; give fewer"
        )
    # A head may be padded beyond the student's: what the student has no row for has no share.
    allowed = None if num_ids <= student_ids else torch.arange(num_ids) < student_ids
    distribution = Distribution(temperature=1.0, allowed=allowed)
    teacher = Teacher(loaded.model, name=name, config=recipe.learner)
    if name in with_image:
        gap = check_sight(teacher, *sight_rows(with_image[name], chat), chat=chat, distribution=distribution)
        log.say(f"{phase_of(recipe)}: teacher {name} sees images: inverted, they move its log-probs by up to {gap:.2g}")
    support = TopKConfig(name="top_k", k=config.top_k)

    def ask(batch: Batch[Any]) -> SparseStates:
        with torch.no_grad():
            states = teacher.states(batch, distribution)
            return states_of_support(states, batch, support, student_ids=None, distribution=distribution)

    return ask
