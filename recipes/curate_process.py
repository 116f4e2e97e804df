"""`vlpost curate` in a process of its own, for a run of several processes.

An engine joins whatever process group it finds, and forms groups of its own in it, which takes every rank: the first rank alone would wait
for the others for ever. What is asked for comes as JSON on standard input.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from ..model.records import VlpostError
from .curate_config import CurateRecipe

_POLL_S = 0.5
_LAUNCHER_VARIABLES = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "GROUP_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)
_LAUNCHER_PREFIXES = ("ROLE_", "TORCHELASTIC_", "ACCELERATE_")
EXIT_STOPPED = 130


def curate_apart(recipe: CurateRecipe, *, recipe_folder: Path, allow_code: bool, check_interrupt: Callable[[], None]) -> None:
    """Runs the recipe in a process of its own and returns when it is done.

    `check_interrupt` is called all the while; what it raises ends that process, and whole shards are kept. Raises `VlpostError` with what
    the process said where it failed.
    """
    # Only what was written: settings refuse some keys beside others even where they have their defaults.
    asked = {
        "recipe": recipe.model_dump(mode="json", by_alias=True, exclude_unset=True),
        "recipe_folder": str(recipe_folder),
        "allow_code": allow_code,
    }
    command = [sys.executable, "-P", "-m", __name__]
    with subprocess.Popen(command, env=_own_environment(), stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        words: str | None = json.dumps(asked)
        try:
            said = ""
            while True:
                try:
                    _, said = process.communicate(words, timeout=_POLL_S)
                    break
                except subprocess.TimeoutExpired:
                    words = None  # it has them
                    check_interrupt()
        except BaseException:
            process.kill()
            raise
    if process.returncode == EXIT_STOPPED:
        check_interrupt()
    if process.returncode:
        raise VlpostError(
            f"{recipe.output}: the process that asks the teachers has ended with {process.returncode}: {said.strip()[-2000:]}"
        )


def _own_environment() -> dict[str, str]:
    """Returns the environment without what a launcher has put there."""
    return {
        name: value for name, value in os.environ.items() if name not in _LAUNCHER_VARIABLES and not name.startswith(_LAUNCHER_PREFIXES)
    }


def main() -> int:
    """Runs what standard input asks for and returns the exit status."""
    from .run import set_environment

    set_environment()
    from .curate import curate

    asked = json.load(sys.stdin)
    try:
        recipe = CurateRecipe.model_validate(asked["recipe"])
        curate(recipe, recipe_folder=Path(asked["recipe_folder"]), allow_code=asked["allow_code"])
    except VlpostError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return EXIT_STOPPED
    return 0


if __name__ == "__main__":
    sys.exit(main())
