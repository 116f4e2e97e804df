"""From the source of a plug-in to its module, and from a recipe's options to those of the function: what its own process needs too.

Apart from the registry, so that a plug-in's process starts without the built-in verifiers.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.abc
import importlib.util
import inspect
import json
import sys
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import PydanticSchemaGenerationError, TypeAdapter, ValidationError

from .config import RewardConfigError
from .plugin import Kind


def nearest(name: str, allowed: typing.Iterable[str]) -> str:
    """Returns the words `did you mean` with the allowed name that is nearest, or nothing."""
    close = difflib.get_close_matches(name, list(allowed), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


class _SourceBytes(importlib.abc.SourceLoader):
    """Loads a module from the very bytes that were hashed, so that the file cannot change in between."""

    def __init__(self, path: Path, source: bytes) -> None:
        self._path = path
        self._source = source

    def get_filename(self, fullname: str) -> str:
        return str(self._path)

    def get_data(self, path: str) -> bytes:
        return self._source


def load_source(path: Path, source: bytes, *, use: str) -> tuple[ModuleType, str]:
    """Returns the module of a source text, loaded once, and the SHA-256 of the text; `path` is where it was read, for tracebacks."""
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


def check_options(use: str, function: Callable[..., Any], options: Mapping[str, Any], *, kind: Kind) -> dict[str, Any]:
    """Returns the options converted to their annotated types; YAML's lists become tuples, nothing else is guessed.

    Options are the arguments after the star; of a function with trl's signature, all arguments that have a default.
    """
    parameters = inspect.signature(function).parameters.values()
    if kind == "trl":
        allowed = {parameter.name: parameter for parameter in parameters if parameter.default is not parameter.empty}
    else:
        allowed = {parameter.name: parameter for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}
    listed = ", ".join(allowed) or "none"
    for name in options:
        if name not in allowed:
            raise RewardConfigError(f"reward {use!r}: unknown option {name!r}{nearest(name, allowed)}; its options are: {listed}")
    missing = [name for name, parameter in allowed.items() if parameter.default is parameter.empty and name not in options]
    if missing:
        raise RewardConfigError(f"reward {use!r}: option {missing[0]!r} is required; its options are: {listed}")
    try:
        # Of trl's own signature the other annotations are nobody's business here, and need not even resolve.
        annotations = typing.get_type_hints(function, include_extras=True) if (options if kind == "trl" else allowed) else {}
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
