"""`vlpost evaluate MODEL --like RECIPE` and `vlpost compare A B`. No torch."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from ..model.records import VlpostError
from .load import LoadedRecipe, RecipeError, load_recipe
from .schema import ChainRecipe, EvaluateRecipe


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options by which `vlpost evaluate` measures another model than the recipe's."""
    parser.add_argument("--like", type=Path, metavar="RECIPE", help="measure the MODEL given as this evaluate recipe does its own")
    parser.add_argument("--stage", metavar="NAME", help="with --like: the evaluate stage of a chain")


def add_compare(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds `vlpost compare`."""
    text = "compare two evaluations of the same examples, paired: difference, 95 percent interval and p value, by task"
    parser = commands.add_parser("compare", help=text, description=text)
    parser.add_argument("first", type=Path, metavar="A", help="folder of a finished evaluate stage")
    parser.add_argument("second", type=Path, metavar="B", help="another; differences are B - A")
    parser.set_defaults(command=_compare, name="compare", overrides=[])


def load_evaluation(subject: Path, *, like: Path | None, stage: str | None, overrides: Sequence[str]) -> LoadedRecipe:
    """Returns the evaluate recipe to run: `subject` itself or, with `like`, that recipe for the model that `subject` names.

    Raises `VlpostError` for a recipe that measures nothing.
    """
    if like is None:
        if stage is not None:
            raise VlpostError(f"--stage {stage}: says which stage of --like RECIPE measures; add --like")
        if subject.suffix not in (".yaml", ".yml"):
            raise VlpostError(
                f"{subject}: no recipe; to measure a model, name an evaluate recipe too: vlpost evaluate {subject} --like RECIPE"
            )
        return _checked(load_recipe(subject, overrides))
    model = json.dumps({"path": model_source(subject)}, ensure_ascii=False)
    if stage is None:
        _refuse_chain(like, overrides)
        return _checked(load_recipe(like, [*overrides, f"model={model}"]))
    stages = dict(load_recipe(like, overrides).stages)
    if stage not in stages:
        raise VlpostError(f"{like}: --stage {stage}: must be one of {', '.join(stages)}")
    loaded = load_recipe(like, [*overrides, f"stages.{stage}.model={model}"])
    prefix = f"stages.{stage}."
    origins = {key.removeprefix(prefix): origin for key, origin in loaded.origins.items() if key.startswith(prefix)}
    return _checked(LoadedRecipe(path=like, recipe=dict(loaded.stages)[stage], origins=origins))


def model_source(subject: Path) -> str:
    """Returns what a recipe's `model.path` has to be for a folder in Hugging Face format, a stage's folder, or a hub name.

    A folder that holds no whole model is a `VlpostError`.
    """
    if not subject.exists():
        if len(subject.parts) == 2 and not subject.is_absolute() and subject.parts[0] not in (".", ".."):
            return str(subject)
        raise VlpostError(f"{subject}: no such folder; give an export, the folder of a training stage, or a hub name (org/name)")
    folder = subject / "export" if (subject / "export").is_dir() else subject
    if (folder / "adapter_config.json").exists():
        raise VlpostError(f"{folder}: an adapter alone, no model: train with export: merged, or add the adapter to its base first")
    if not (folder / "config.json").is_file():
        exports = sorted(path.parent.name for path in folder.glob("*/export"))
        of_chain = f"; the stages below it: {', '.join(exports)}" if exports else ""
        raise VlpostError(f"{folder}: no config.json, so no model in Hugging Face format; give an export or a stage's folder{of_chain}")
    return str(folder.resolve())


def _refuse_chain(like: Path, overrides: Sequence[str]) -> None:
    try:
        recipe = load_recipe(like, overrides).recipe
    except RecipeError:
        return  # it may leave the model to the command line; what else is wrong with it, loading it with one says
    if isinstance(recipe, ChainRecipe):
        names = [name for name, stage in recipe.stages.items() if isinstance(stage, EvaluateRecipe)]
        raise VlpostError(f"{like}: a chain; say which of its evaluate stages measures: --stage {' | '.join(names) or '(it has none)'}")


def _checked(loaded: LoadedRecipe) -> LoadedRecipe:
    if not isinstance(loaded.recipe, EvaluateRecipe):
        raise VlpostError(
            f"{loaded.path}: method is {loaded.recipe.method!r}; `vlpost evaluate` takes a recipe of method evaluate, use `vlpost run`"
        )
    return loaded


def _compare(parsed: argparse.Namespace) -> int:
    from .compare import compare  # with numpy and scipy, which the other commands start without
    from .evaluation_record import read_evaluation
    from .evaluation_table import comparison_lines

    for line in comparison_lines(compare(read_evaluation(parsed.first), read_evaluation(parsed.second))):
        print(line)
    return 0
