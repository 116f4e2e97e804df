"""What `vlpost check` says of the first half of off-policy distillation: prompts, teachers, filters and their rewards. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ..model.records import VlpostError
from ..rewards.manager import RewardManager
from .curate import check_curate
from .curate_config import VerifyConfig
from .data_config import JsonlData, ParquetData
from .example_stream import read_rows
from .schema import OffPolicyDistillRecipe
from .sft_phases import leaves


def check_off_policy(recipe: OffPolicyDistillRecipe, *, recipe_folder: Path, allow_code: bool) -> Iterator[str]:
    """Yields a line for the prompts, for each teacher, and for each filter with its rewards, after a look at what can be known.

    Raises `VlpostError` for a teacher's folder that is not there, a data set without an end, an answer that a `verify` filter cannot
    judge, and what `check_curate` refuses.
    """
    for name, teacher in recipe.teachers.items():
        if teacher.model.path is None:
            yield f"teacher {name}: the export of stage {teacher.model.stage}"
        else:
            yield f"teacher {name}: {_found(name, teacher.model.path)}"
    # Without the step in which teachers answer: building it would import the engine.
    first_half = recipe.as_curate(dict.fromkeys(recipe.teachers, "./not-opened")).model_copy(update={"steps": recipe.filters})
    yield from check_curate(first_half, recipe_folder=recipe_folder, allow_code=allow_code)
    for key, source in leaves("data", recipe.data):
        if not isinstance(source, JsonlData | ParquetData):
            continue
        rows = read_rows(source, with_solution=False)
        for step in recipe.filters.values():
            if isinstance(step, VerifyConfig):
                RewardManager(step.rewards, recipe_folder=recipe_folder, allow_code=allow_code).check_examples(rows)
        yield f"{key} {source.path}: {len(rows)} rows"


def _found(name: str, path: str) -> str:
    """Returns what a teacher's path is; raises `VlpostError` where it can only be a folder and is none that holds a model."""
    folder = Path(path)
    if folder.exists():
        if not (folder / "config.json").exists():
            raise VlpostError(f"teachers.{name}.model.path = {path!r}: holds no config.json; give a folder in Hugging Face format")
        return f"folder {path}"
    if path.startswith((".", "/", "~")) or path.count("/") != 1:
        raise VlpostError(f"teachers.{name}.model.path = {path!r}: there is no such folder; give one, or a hub name (org/name)")
    return f"{path} on the hub, not looked at"
