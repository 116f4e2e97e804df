"""From the name of a reward function in a recipe to a function whose options are checked, before anything is trained.

Four kinds of name: a built-in (`count`), an installed entry point of group `vlpost.rewards`, an installed function
(`package.module:function`) and a file (`file.py:function`). What signatures a plug-in may have says `plugin`; its options are the
arguments after the star. A file is code that a recipe brings along, so it is loaded only if the command line allows it or the file
really lies in the folder of the recipe, and its hash is recorded.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.abc
import importlib.metadata
import importlib.util
import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import ValidationError

from ..model.config import Settings
from ..model.records import Example
from . import (
    code_execution,
    code_switching,
    coherence,
    grounding,
    json_answer,
    llm_judge,
    math_answer,
    ocr,
    puzzle,
    repetition,
    response_format,
    table,
    time_answer,
    tool_calls,
    visual_answer,
)
from .built_in import BuiltInReward, any_answer
from .config import RewardConfigError
from .plugin import Kind, PluginTraits, kind_of, traits_of
from .plugin_source import check_options, load_source, nearest
from .plugin_worker import PluginSource

ENTRY_POINTS = "vlpost.rewards"
"""Group under which an installed package lists its reward functions: `name = "package.module:function"`."""

_TABLES: tuple[Mapping[str, BuiltInReward], ...] = (
    math_answer.REWARDS,
    visual_answer.REWARDS,
    grounding.REWARDS,
    ocr.REWARDS,
    table.REWARDS,
    time_answer.REWARDS,
    puzzle.REWARDS,
    json_answer.REWARDS,
    response_format.REWARDS,
    repetition.REWARDS,
    code_switching.REWARDS,
    code_execution.REWARDS,
    llm_judge.REWARDS,
    coherence.REWARDS,
    tool_calls.REWARDS,
)
BUILT_IN_REWARDS: Mapping[str, BuiltInReward] = {name: entry for table in _TABLES for name, entry in table.items()}
assert len(BUILT_IN_REWARDS) == sum(map(len, _TABLES)), "two modules give one name to different rewards"


@dataclass(frozen=True, kw_only=True, slots=True)
class ResolvedReward:
    """A reward that is ready to be opened: exactly one of `built_in` and `kind` is given."""

    use: str
    options: Mapping[str, Any]
    """Only those that the recipe gave, converted to the annotated types; empty for a service."""
    built_in: BuiltInReward | None = None
    service_options: Settings | None = None
    """Options of a service, checked."""
    function: Callable[..., Any] | None = None
    """None for a service only."""
    kind: Kind | None = None
    """How a plug-in is called; None for a built-in."""
    traits: PluginTraits = field(default_factory=PluginTraits)
    """What a plug-in says of itself."""
    source: PluginSource | None = None
    """Where a plug-in comes from; None for a built-in."""

    @property
    def is_async(self) -> bool:
        """True for a plug-in whose calls are awaited."""
        return inspect.iscoroutinefunction(self.function)

    @property
    def path(self) -> Path | None:
        """Real path of the source of a plug-in; none for a built-in."""
        return self.source.path if self.source else None

    @property
    def sha256(self) -> str | None:
        """Of the source text that was loaded, 64 hexadecimal digits; none for a built-in."""
        return self.source.sha256 if self.source else None

    @property
    def check_answer(self) -> Callable[[Example], None]:
        """Raises a `DataError` for an example whose answer is not what a built-in compares with."""
        return self.built_in.check_answer if self.built_in else any_answer

    def __str__(self) -> str:
        return self.use if self.path is None else f"{self.use} ({self.path}, sha256 {self.sha256})"


def resolve(
    use: str, options: Mapping[str, Any], *, recipe_folder: Path | None, allow_code: bool, completions: str = "conversational"
) -> ResolvedReward:
    """Returns the reward that a recipe names, with its options checked; whatever is wrong is a `RewardConfigError`.

    `recipe_folder` is where relative paths start and whose files may be loaded; `allow_code` is the user's word on the command
    line that files elsewhere may be loaded too; `completions` is the form for functions with trl's signature.
    """
    if use in BUILT_IN_REWARDS:
        return _resolve_built_in(use, options)
    target, colon, function_name = (use if ":" in use else _entry_point(use)).rpartition(":")
    assert colon, "an entry point without a function is refused where it is read"
    source: bytes | None = None
    if target.endswith(".py"):
        path = permitted((recipe_folder or Path()) / target, use=use, recipe_folder=recipe_folder, allow_code=allow_code)
        source = read_source(path, use)
        module, sha256 = load_source(path, source, use=use)
    else:
        module = import_module(target, use=use, recipe_folder=recipe_folder, allow_code=allow_code)
        path, sha256 = Path(), ""
    # Not `vars`: packages such as trl load their parts when they are asked for.
    function = getattr(module, function_name, None)
    if not inspect.isfunction(function):
        functions = [name for name, member in vars(module).items() if inspect.isfunction(member)]
        raise RewardConfigError(
            f"reward {use!r}: {target} has no function {function_name!r}{nearest(function_name, functions)}; "
            f"it has {', '.join(sorted(functions)) or 'none'}"
        )
    if source is None:
        # The file of the function itself, which its module may only pass on.
        path = Path(inspect.getsourcefile(function) or "").resolve()
        if not path.is_file():
            raise RewardConfigError(f"reward {use!r}: {function_name} has no Python source to record the hash of; write it in a file")
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    kind = kind_of(use, function)
    return ResolvedReward(
        use=use,
        function=function,
        options=check_options(use, function, options, kind=kind),
        kind=kind,
        traits=traits_of(function),
        source=PluginSource(
            use=use,
            path=path,
            sha256=sha256,
            source=source,
            module="" if source is not None else target,
            function=function_name,
            options=options,
            completions=completions,
        ),
    )


def _resolve_built_in(use: str, options: Mapping[str, Any]) -> ResolvedReward:
    built_in = BUILT_IN_REWARDS[use]
    if built_in.options is not None:
        return ResolvedReward(use=use, options={}, built_in=built_in, service_options=_service_options(use, built_in.options, options))
    assert built_in.function is not None, "what is no service is a function"
    return ResolvedReward(
        use=use,
        function=built_in.function,
        options=check_options(use, built_in.function, options, kind="row"),
        built_in=built_in,
    )


def _service_options(use: str, settings: type[Settings], options: Mapping[str, Any]) -> Settings:
    """Returns the options of a service; an error begins with `options.KEY`, for the caller to put the component before."""
    try:
        return settings.model_validate_json(json.dumps(dict(options), allow_nan=False))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(["options", *map(str, first["loc"])])
        if first["type"] == "extra_forbidden":
            name = str(first["loc"][-1])
            allowed = ", ".join(settings.model_fields)
            raise RewardConfigError(f"{key}: {use} has no such option{nearest(name, settings.model_fields)}; it has {allowed}") from error
        given = "" if first["type"] == "missing" else f" = {first['input']!r}"
        raise RewardConfigError(f"{key}{given}: {first['msg']}") from error
    except (TypeError, ValueError) as error:
        raise RewardConfigError(f"options of {use} cannot be checked ({error}); options are plain JSON values") from error


def _entry_point(use: str) -> str:
    """Returns `module:function` of the installed entry point of that name."""
    found = {entry.value.replace(" ", "") for entry in importlib.metadata.entry_points(group=ENTRY_POINTS, name=use)}
    if not found:
        installed = sorted({entry.name for entry in importlib.metadata.entry_points(group=ENTRY_POINTS)})
        raise RewardConfigError(
            f"unknown reward {use!r}{nearest(use, [*BUILT_IN_REWARDS, *installed])}; built-in rewards are {', '.join(BUILT_IN_REWARDS)}; "
            + (f"installed are {', '.join(installed)}; " if installed else "")
            + "name your own as package.module:function or file.py:function"
        )
    if len(found) > 1:
        raise RewardConfigError(f"reward {use!r}: installed packages give the name to {' and to '.join(sorted(found))}; write one of these")
    (value,) = found
    if ":" not in value or value.partition(":")[0].endswith(".py"):
        raise RewardConfigError(f"reward {use!r}: its entry point is {value!r}; it must be package.module:function")
    return value


def permitted(path: Path, *, use: str, recipe_folder: Path | None, allow_code: bool) -> Path:
    """Returns the real path, links followed, if a recipe may bring code from there."""
    real = path.resolve()
    allowed = recipe_folder.resolve() if recipe_folder else "no folder, as there is no recipe file"
    inside = recipe_folder is not None and real.is_relative_to(recipe_folder.resolve())
    if not (inside or allow_code):
        raise RewardConfigError(
            f"reward {use!r}: {real} is code outside the recipe's folder ({allowed}); "
            "read it, then move it beside the recipe, install it as a package, or allow code on the command line (--allow-code)"
        )
    return real


def read_source(path: Path, use: str) -> bytes:
    """Returns what stands in a file of code; one that cannot be read is a `RewardConfigError`."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise RewardConfigError(
            f"reward {use!r}: {path} cannot be read ({error.strerror}); a relative path starts at the recipe's folder"
        ) from error


def import_module(target: str, *, use: str, recipe_folder: Path | None, allow_code: bool) -> ModuleType:
    """Returns an installed module; one that cannot be imported, or came along in the working directory, is a `RewardConfigError`."""
    package = target.partition(".")[0]
    try:
        spec = importlib.util.find_spec(package) if package else None
        if spec is not None:
            # A module found through the working directory is a file that came along, not an installed package.
            files = [spec.origin] if spec.origin and spec.has_location else []
            for location in map(Path, spec.submodule_search_locations or files):
                if location.resolve().parent == Path.cwd().resolve():
                    permitted(location, use=use, recipe_folder=recipe_folder, allow_code=allow_code)
        return importlib.import_module(target)
    except RewardConfigError:
        raise
    except (ImportError, SyntaxError, ValueError) as error:
        raise RewardConfigError(
            f"reward {use!r}: module {target!r} cannot be imported ({error}); install it, or write file.py:function"
        ) from error
