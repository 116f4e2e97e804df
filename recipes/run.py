"""The command line: `vlpost run | check | show | evaluate | curate RECIPE [key=value ...]`, `vlpost compare A B`, `vlpost rewards ...`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..model.config import ENGINE_ENVIRONMENT
from ..model.records import VlpostError
from .curate_config import CurateRecipe
from .data_config import JsonlData, ParquetData
from .evaluate_command import add_compare, add_model_options, load_evaluation
from .example_stream import read_rows
from .load import LoadedRecipe, load_recipe
from .reward_commands import add_commands, refuse_faults
from .schema import EvaluateRecipe, OffPolicyDistillRecipe, StageRecipe, agents_of
from .sft_phases import leaves, training_data

if TYPE_CHECKING:
    from ..rewards.manager import RewardManager


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status: 0 done, 1 refused with a message, 130 stopped by Ctrl-C and saved."""
    parsed = _parse(arguments)
    try:
        status = parsed.command(parsed)
    except VlpostError as error:
        print(f"vlpost: {error}", file=sys.stderr)
        status = 1
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # Without tearing down: torch 2.13 joins a thread of the gloo group while it holds the interpreter's lock, which that thread may
        # be waiting for to give back the tensors of the last collective. The process then never ends.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Returns the parsed words; overrides may stand before and after options, which argparse alone does not allow."""
    parser = _parser()
    parsed, rest = parser.parse_known_args(arguments)
    wrong = [word for word in rest if word.startswith("-") or "=" not in word]
    if wrong:
        parser.error(f"unrecognized arguments: {' '.join(wrong)}")
    parsed.overrides += rest
    return parsed


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vlpost", description="Post-train a vision-language model from a YAML recipe.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, command, text in (
        ("run", _run, "run a recipe, or a chain of them"),
        ("check", _check, "check a recipe without training; with --engine, engine against learner too"),
        ("show", _show, "print the recipe with every value and where it comes from"),
        ("evaluate", _evaluate, "run a recipe of method evaluate, with --like for any model"),
    ):
        sub = commands.add_parser(name, help=text, description=text)
        what = "path of the YAML recipe" + ("; with --like a folder, a stage's folder or a hub name" if name == "evaluate" else "")
        sub.add_argument("recipe", type=Path, help=what)
        sub.add_argument("overrides", nargs="*", metavar="key=value", help="values that replace the recipe's, e.g. seed=1")
        sub.add_argument("--allow-code", action="store_true", help="allow reward plug-ins from files outside the recipe's folder")
        if name == "evaluate":
            add_model_options(sub)
        if name in ("run", "evaluate"):
            sub.add_argument("--resume", action="store_true", help="go on from the newest whole checkpoint in the output folder")
        if name == "check":
            sub.add_argument("--engine", action="store_true", help="start the engine and compare it with the learner on the start model")
            sub.add_argument("--devices", type=int, metavar="N", help="estimate memory for N devices instead of this machine's")
            sub.add_argument("--device-memory", type=float, metavar="GIB", help="estimate memory for GPUs of so many GiB each")
            sub.add_argument(
                "--lengths", type=int, metavar="N", help="encode the first N rows of each SFT phase: tokens, too long, packing"
            )
        if name == "show":
            sub.add_argument(
                "--example", type=int, metavar="N", help="print training example number N (from 0): trained tokens, images, positions"
            )
            sub.add_argument("--stage", metavar="NAME", help="with --example: the stage of a chain; by default its first training stage")
        sub.set_defaults(command=command, name=name)
    text = "make a data set by the steps of a recipe of method curate; the same command again goes on where it was"
    sub = commands.add_parser("curate", help=text, description=text)
    sub.add_argument("recipe", type=Path, help="path of the YAML recipe")
    sub.add_argument("overrides", nargs="*", metavar="key=value", help="values that replace the recipe's, e.g. seed=1")
    sub.add_argument("--allow-code", action="store_true", help="allow reward plug-ins from files outside the recipe's folder")
    sub.set_defaults(command=_curate, name="curate")
    add_commands(commands)
    add_compare(commands)
    return parser


def _show(parsed: argparse.Namespace) -> int:
    from .show import resolved_lines

    if parsed.example is not None:
        set_environment()
        from .show_example import print_example

        print_example(load_recipe(parsed.recipe, parsed.overrides), parsed.example, stage_name=parsed.stage)
        return 0
    if parsed.stage is not None:
        raise VlpostError(f"--stage {parsed.stage}: says whose example to show; add --example N")
    _print_lines(resolved_lines(load_recipe(parsed.recipe, parsed.overrides)))
    return 0


def _print_lines(lines: Iterable[str]) -> None:
    """Prints the lines, as many as the reader of standard output wants."""
    try:
        for line in lines:
            print(line)
        sys.stdout.flush()
    except BrokenPipeError:
        # `| head` has read enough. What is still buffered has to go somewhere at exit: not into the closed pipe.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _check(parsed: argparse.Namespace) -> int:
    loaded = load_recipe(parsed.recipe, parsed.overrides)
    if isinstance(loaded.recipe, CurateRecipe):
        from .curate import check_curate

        if parsed.lengths is not None:
            raise VlpostError(f"--lengths {parsed.lengths}: measures the rows of SFT stages, and this recipe makes rows; leave it out")
        lines = check_curate(loaded.recipe, recipe_folder=parsed.recipe.resolve().parent, allow_code=parsed.allow_code)
        _print_lines([*lines, f"{parsed.recipe}: fine"])
        return 0
    from ..rewards.manager import RewardManager
    from ..rl.tools import open_tools
    from .check_memory import check_memory, find_devices

    lines: list[str] = []
    recipe_folder = parsed.recipe.resolve().parent
    for name, stage in loaded.stages:
        manager = RewardManager(stage.rewards, recipe_folder=recipe_folder, allow_code=parsed.allow_code)
        lines += [f"{name}: reward {line}" for line in manager.describe()]
        lines += [f"{name}: {line}" for line in _check_rows(stage, manager, recipe_folder=recipe_folder, allow_code=parsed.allow_code)]
        for key, agent in agents_of(stage).items():
            with open_tools(agent.tools, recipe_folder=recipe_folder, allow_code=parsed.allow_code) as tools:
                lines.append(f"{name}: {key}: tools {', '.join(tools)}, at most {agent.max_turns} turns")
        if isinstance(stage, OffPolicyDistillRecipe):
            from .off_policy_check import check_off_policy

            found = check_off_policy(stage, recipe_folder=recipe_folder, allow_code=parsed.allow_code)
            lines += [f"{name}: {line}" for line in found]
    lines += check_memory(loaded, find_devices(count=parsed.devices, device_gib=parsed.device_memory))
    if parsed.lengths is not None:
        set_environment()
        from .row_lengths import length_lines

        lines += length_lines(loaded, parsed.lengths)
    _print_lines([*lines, f"{parsed.recipe}: fine"])
    if parsed.engine:
        set_environment()
        from .runner import check_engine

        print(check_engine(loaded, allow_code=parsed.allow_code))
    return 0


def _check_rows(stage: StageRecipe, manager: RewardManager, *, recipe_folder: Path, allow_code: bool) -> Iterator[str]:
    """Yields a line for each data file of the stage, every row of which has been read, its answer checked, and the rewards tried on it."""
    from ..rewards.lint import lint_rewards

    validation = None if isinstance(stage, EvaluateRecipe) else stage.validation
    # The prompts of off-policy distillation are judged by its filters, not by these rewards.
    trained = () if isinstance(stage, OffPolicyDistillRecipe) else training_data(stage)
    sources = list(trained)
    sources += [(key, source, False) for key, source in (leaves("validation.data", validation.data) if validation else ())]
    for key, source, has_solution in sources:
        if not isinstance(source, JsonlData | ParquetData):
            continue
        rows = read_rows(source, with_solution=has_solution)
        if not has_solution:
            manager.check_examples(rows)
            report = lint_rewards(stage.rewards, rows, recipe_folder=recipe_folder, allow_code=allow_code)
            refuse_faults(report, place=f"{key} {source.path}")
        yield f"{key} {source.path}: {len(rows)} rows"


def _curate(parsed: argparse.Namespace) -> int:
    loaded = load_recipe(parsed.recipe, parsed.overrides)
    if not isinstance(loaded.recipe, CurateRecipe):
        raise VlpostError(
            f"{parsed.recipe}: method is {loaded.recipe.method!r}; `vlpost curate` takes a recipe of method curate, use `vlpost run`"
        )
    set_environment()
    from .curate import curate

    try:
        curate(loaded.recipe, recipe_folder=parsed.recipe.resolve().parent, allow_code=parsed.allow_code)
    except KeyboardInterrupt:
        print("vlpost: stopped; whole shards are kept, the same command goes on from here", file=sys.stderr)
        return 130
    return 0


def _run(parsed: argparse.Namespace) -> int:
    loaded = load_recipe(parsed.recipe, parsed.overrides)
    if isinstance(loaded.recipe, CurateRecipe):
        raise VlpostError(f"{parsed.recipe}: method is 'curate'; use `vlpost curate`")
    return _run_loaded(loaded, parsed)


def _evaluate(parsed: argparse.Namespace) -> int:
    return _run_loaded(load_evaluation(parsed.recipe, like=parsed.like, stage=parsed.stage, overrides=parsed.overrides), parsed)


def _run_loaded(loaded: LoadedRecipe, parsed: argparse.Namespace) -> int:
    set_environment()
    from .runner import run_recipe

    return run_recipe(loaded, resume=parsed.resume, allow_code=parsed.allow_code)


def set_environment() -> None:
    """Sets what the engine needs before torch or vllm is imported."""
    os.environ.update(ENGINE_ENVIRONMENT)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    # Bars of others would tear the live view.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # Spinning OpenMP threads make a run ten times slower as soon as something else wants one of its cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


if __name__ == "__main__":
    sys.exit(main())
