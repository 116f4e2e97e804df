"""From the name of a reward function in a recipe to a function whose options are checked, before anything is trained.

Three kinds of name: a built-in (`count`), an installed function (`package.module:function`) and a file (`file.py:function`).
A plug-in is a plain or async function

    def my_reward(example: Example, rollout: Rollout, *, option: int = 3) -> float | RewardResult | Unavailable

whose options are the arguments after the star. A file is code that a recipe brings along, so it is loaded only if the command
line allows it or the file really lies in the folder of the recipe, and its hash is recorded.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.abc
import importlib.util
import inspect
import json
import sys
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import PydanticSchemaGenerationError, TypeAdapter, ValidationError

from ..model.records import Example
from .config import RewardConfigError
from .math_answer import check_math_answer, math_answer, self_check
from .visual_answer import check_choice_answer, check_count_answer, check_exact_answer, choice, count, exact
from .worker import WorkerRequest


def _any_answer(example: Example) -> None:
    """The check of a plug-in, which knows best what it compares with."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BuiltInReward:
    """What the library knows about a reward function of its own."""

    function: Callable[..., Any]
    check_answer: Callable[[Example], None]
    """Raises a `DataError` that names the example when its answer is of the wrong kind."""
    self_check: Callable[[Example], WorkerRequest] | None = None
    """Given: the function's verdict is reached in a killable worker, and this asks it to find the example's own answer right."""


BUILT_IN_REWARDS: Mapping[str, BuiltInReward] = {
    "math_answer": BuiltInReward(function=math_answer, check_answer=check_math_answer, self_check=self_check),
    "count": BuiltInReward(function=count, check_answer=check_count_answer),
    "choice": BuiltInReward(function=choice, check_answer=check_choice_answer),
    "exact": BuiltInReward(function=exact, check_answer=check_exact_answer),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class ResolvedReward:
    """A reward function that is ready to be called: `function(example, rollout, **options)`."""

    use: str
    function: Callable[..., Any]
    options: Mapping[str, Any]
    """Only those that the recipe gave, converted to the annotated types."""
    is_async: bool
    check_answer: Callable[[Example], None] = _any_answer
    self_check: Callable[[Example], WorkerRequest] | None = None
    path: Path | None = None
    """Real path of the source of a plug-in; none for a built-in."""
    sha256: str | None = None
    """Of the source text that was loaded, 64 hexadecimal digits; none for a built-in."""

    def __str__(self) -> str:
        return self.use if self.path is None else f"{self.use} ({self.path}, sha256 {self.sha256})"


def resolve(use: str, options: Mapping[str, Any], *, recipe_folder: Path | None, allow_code: bool) -> ResolvedReward:
    """Returns the function that a recipe names, with its options checked; whatever is wrong is a `RewardConfigError`.

    `recipe_folder` is where relative paths start and whose files may be loaded; `allow_code` is the user's word on the command
    line that files elsewhere may be loaded too.
    """
    target, colon, function_name = use.rpartition(":")
    if not colon:
        built_in = BUILT_IN_REWARDS.get(use)
        if built_in is None:
            raise RewardConfigError(
                f"unknown reward {use!r}{_nearest(use, BUILT_IN_REWARDS)}; built-in rewards are {', '.join(BUILT_IN_REWARDS)}; "
                "name your own as package.module:function or file.py:function"
            )
        return ResolvedReward(
            use=use,
            function=built_in.function,
            options=_check_options(use, built_in.function, options),
            is_async=False,
            check_answer=built_in.check_answer,
            self_check=built_in.self_check,
        )
    if target.endswith(".py"):
        path = _permitted((recipe_folder or Path()) / target, use=use, recipe_folder=recipe_folder, allow_code=allow_code)
        module, sha256 = _load_file(path, use)
    else:
        module = _import_module(target, use=use, recipe_folder=recipe_folder, allow_code=allow_code)
        path, sha256 = None, None
    function = vars(module).get(function_name)
    if not inspect.isfunction(function):
        functions = [name for name, member in vars(module).items() if inspect.isfunction(member)]
        raise RewardConfigError(
            f"reward {use!r}: {target} has no function {function_name!r}{_nearest(function_name, functions)}; "
            f"it has {', '.join(sorted(functions)) or 'none'}"
        )
    if path is None:
        # The file of the function itself, which its module may only pass on.
        path = Path(inspect.getsourcefile(function) or "").resolve()
        if not path.is_file():
            raise RewardConfigError(f"reward {use!r}: {function_name} has no Python source to record the hash of; write it in a file")
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    return ResolvedReward(
        use=use,
        function=function,
        options=_check_options(use, function, options),
        is_async=inspect.iscoroutinefunction(function),
        path=path,
        sha256=sha256,
    )


def _nearest(name: str, allowed: typing.Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(allowed), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _permitted(path: Path, *, use: str, recipe_folder: Path | None, allow_code: bool) -> Path:
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


class _SourceBytes(importlib.abc.SourceLoader):
    """Loads a module from the very bytes that were hashed, so that the file cannot change in between."""

    def __init__(self, path: Path, source: bytes) -> None:
        self._path = path
        self._source = source

    def get_filename(self, fullname: str) -> str:
        return str(self._path)

    def get_data(self, path: str) -> bytes:
        return self._source


def _load_file(path: Path, use: str) -> tuple[ModuleType, str]:
    try:
        source = path.read_bytes()
    except OSError as error:
        raise RewardConfigError(
            f"reward {use!r}: {path} cannot be read ({error.strerror}); a relative path starts at the recipe's folder"
        ) from error
    sha256 = hashlib.sha256(source).hexdigest()
    # The path is part of the name: two equal files are two modules, as they would be when imported.
    name = f"vlpost_recipe_code_{path.stem}_{hashlib.sha256(f'{path} {sha256}'.encode()).hexdigest()[:16]}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_loader(name, _SourceBytes(path, source), origin=str(path))
        assert spec is not None, "a spec is made from a loader"
        assert spec.loader is not None, "and has that loader"
        module = importlib.util.module_from_spec(spec)
        # Dataclasses and annotations in the file look their module up there.
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException as error:
            del sys.modules[name]
            if isinstance(error, (ImportError, SyntaxError)):
                raise RewardConfigError(
                    f"reward {use!r}: {path} cannot be loaded ({error}); its imports must be installed packages"
                ) from error
            raise
    return sys.modules[name], sha256


def _import_module(target: str, *, use: str, recipe_folder: Path | None, allow_code: bool) -> ModuleType:
    package = target.partition(".")[0]
    try:
        spec = importlib.util.find_spec(package) if package else None
        if spec is not None:
            # A module found through the working directory is a file that came along, not an installed package.
            files = [spec.origin] if spec.origin and spec.has_location else []
            for location in map(Path, spec.submodule_search_locations or files):
                if location.resolve().parent == Path.cwd().resolve():
                    _permitted(location, use=use, recipe_folder=recipe_folder, allow_code=allow_code)
        return importlib.import_module(target)
    except RewardConfigError:
        raise
    except (ImportError, SyntaxError, ValueError) as error:
        raise RewardConfigError(
            f"reward {use!r}: module {target!r} cannot be imported ({error}); install it, or write file.py:function"
        ) from error


def _check_options(use: str, function: Callable[..., Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the options converted to their annotated types; YAML's lists become tuples, nothing else is guessed."""
    parameters = list(inspect.signature(function).parameters.values())
    positional = [parameter for parameter in parameters if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)]
    allowed = {parameter.name: parameter for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}
    if len(positional) != 2 or len(positional) + len(allowed) != len(parameters):
        raise RewardConfigError(
            f"reward {use!r}: its signature is {inspect.signature(function)}; it must be "
            "(example, rollout, *, option: type = default, ...): options stand after the star, so that they can be checked"
        )
    listed = ", ".join(allowed) or "none"
    for name in options:
        if name not in allowed:
            raise RewardConfigError(f"reward {use!r}: unknown option {name!r}{_nearest(name, allowed)}; its options are: {listed}")
    missing = [name for name, parameter in allowed.items() if parameter.default is parameter.empty and name not in options]
    if missing:
        raise RewardConfigError(f"reward {use!r}: option {missing[0]!r} is required; its options are: {listed}")
    try:
        annotations = typing.get_type_hints(function, include_extras=True) if allowed else {}
    except NameError as error:
        raise RewardConfigError(f"reward {use!r}: an annotation cannot be resolved ({error}); import the type in the module") from error
    return {name: _convert(use, name, value, annotations) for name, value in options.items()}


def _convert(use: str, name: str, value: object, annotations: Mapping[str, Any]) -> object:
    if name not in annotations:
        raise RewardConfigError(f"reward {use!r}: option {name!r} has no annotation to check {value!r} against; give it a type")
    try:
        # Through JSON: strict about numbers and strings, while a list may still become a tuple and a text a path.
        return TypeAdapter(annotations[name]).validate_json(json.dumps(value, allow_nan=False), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        raise RewardConfigError(
            f"reward {use!r}: option {name} = {value!r}: {first['msg']}; it is annotated as {inspect.formatannotation(annotations[name])}"
        ) from error
    except (TypeError, ValueError, PydanticSchemaGenerationError) as error:
        raise RewardConfigError(
            f"reward {use!r}: option {name} = {value!r} cannot be checked ({error}); options are plain JSON values"
        ) from error
