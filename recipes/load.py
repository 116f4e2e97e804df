"""YAML text -> a checked recipe, with the origin of every value. No torch."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, TypeAdapter, ValidationError

from ..model.records import VlpostError
from .schema import ChainRecipe, EvaluateRecipe, Recipe, RlRecipe, SftRecipe

_STAGE_CLASSES: dict[str, type[BaseModel]] = {"sft": SftRecipe, "rl": RlRecipe, "evaluate": EvaluateRecipe}
_MAX_RECIPE_BYTES = 256 * 1024


class RecipeError(VlpostError, ValueError):
    """A recipe that cannot be used; the message names file, key, value and what is allowed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedRecipe:
    """A checked recipe and where each of its values comes from."""

    path: Path
    recipe: SftRecipe | RlRecipe | EvaluateRecipe | ChainRecipe
    origins: Mapping[str, str]
    """Dotted key -> `recipe`, `common`, `command line`, `chain`; a key that is absent here has its default."""


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice and aliases (an alias can blow a small file up to gigabytes)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            key = str(key_node.value)
            if key in seen:
                raise RecipeError(f"line {key_node.start_mark.line + 1}: key {key!r} is given twice; remove one")
            seen.add(key)
        return super().construct_mapping(node, deep=deep)

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise RecipeError(f"line {self.peek_event().start_mark.line + 1}: a YAML alias (*name) is not allowed; write the value out")
        return super().compose_node(parent, index)


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """Returns the checked recipe; `overrides` are `dotted.key=value` with YAML values.

    In a chain, `common` is laid under every stage: mappings merge, a stage's own value wins, and a block that a method does not have
    is not handed to it. Raises `RecipeError`.
    """
    values, origins = _read(path)
    for override in overrides:
        _apply_override(values, origins, override)
    if values.get("method") == "chain":
        values, origins = _expand_chain(values, origins, path)
    try:
        recipe = TypeAdapter(Recipe).validate_python(values)
    except ValidationError as error:
        raise RecipeError("\n".join(_explain(path, problem, values) for problem in error.errors())) from error
    return LoadedRecipe(path=path, recipe=recipe, origins=origins)


def _read(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise RecipeError(f"{path}: the recipe cannot be read ({error.strerror})") from error
    if len(content) > _MAX_RECIPE_BYTES:
        raise RecipeError(f"{path}: {len(content)} bytes, a recipe has at most {_MAX_RECIPE_BYTES}")
    try:
        values = _parse(content)
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: not YAML: {error}") from error
    if not isinstance(values, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of keys, this is {type(values).__name__}")
    return values, dict.fromkeys(_leaves(values), "recipe")


def _parse(text: str | bytes) -> Any:  # noqa: ANN401
    loader = _StrictLoader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def _apply_override(values: dict[str, Any], origins: dict[str, str], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise RecipeError(f"{override!r} on the command line: write key=value, e.g. seed=1 or stages.sapo.rl.num_steps=20")
    try:
        value = _parse(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"{override!r} on the command line: the value is not YAML: {error}") from error
    target = values
    *parents, last = key.split(".")
    for parent in parents:
        target = target.setdefault(parent, {})
        if not isinstance(target, dict):
            raise RecipeError(f"{override!r} on the command line: {parent!r} holds a value, not keys")
    target[last] = value
    for old in [origin for origin in origins if origin == key or origin.startswith(f"{key}.")]:
        del origins[old]
    origins.update(
        {f"{key}.{leaf}" if leaf else key: "command line" for leaf in (_leaves(value) if isinstance(value, dict) and value else [""])}
    )


def _expand_chain(values: dict[str, Any], origins: dict[str, str], path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Lays `common` under every stage and gives each its name and folder."""
    common = values.get("common", {})
    stages = values.get("stages", {})
    if not isinstance(common, dict) or not isinstance(stages, dict) or not all(isinstance(stage, dict) for stage in stages.values()):
        raise RecipeError(f"{path}: `common` is a mapping and `stages` maps names to stages")
    used: set[str] = set()
    expanded: dict[str, Any] = {}
    for name, stage in stages.items():
        known = _STAGE_CLASSES.get(str(stage.get("method")))
        fields = set(known.model_fields) if known else set()
        inherited = {key: value for key, value in common.items() if key in fields}
        used |= set(inherited)
        if "model" in stage:  # one source of weights replaces the other, they do not merge
            inherited.pop("model", None)
        merged = _merge(inherited, stage)
        for key in _leaves(inherited):
            origins.setdefault(f"stages.{name}.{key}", "common")
        for key, value in (("name", name), ("output", str(Path(str(values.get("output", ""))) / name))):
            if key in stage:
                raise RecipeError(f"{path}: stages.{name}.{key} is set by the chain; remove it")
            merged[key] = value
            origins[f"stages.{name}.{key}"] = "chain"
        expanded[name] = merged
    unused = sorted(set(common) - used)
    if unused:
        raise RecipeError(f"{path}: common.{unused[0]} is read by no stage; remove it{_nearest(unused[0], _stage_keys())}")
    kept = {key: origin for key, origin in origins.items() if not key.startswith("common.")}
    return {**{key: value for key, value in values.items() if key != "common"}, "stages": expanded}, kept


def _stage_keys() -> list[str]:
    return sorted({field for known in _STAGE_CLASSES.values() for field in known.model_fields})


def _merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        under = merged.get(key)
        merged[key] = _merge(under, value) if isinstance(under, dict) and isinstance(value, dict) else value
    return merged


def _explain(path: Path, problem: Any, values: Mapping[str, Any]) -> str:  # noqa: ANN401
    """Returns one line for a pydantic problem: file, dotted key, value, what is allowed, nearest name."""
    location = _without_union_tags(problem["loc"], values)
    key = ".".join(map(str, location))
    if problem["type"] == "extra_forbidden":
        siblings = _known_keys(location[:-1], values)
        return f"{path}: {key}: unknown key{_nearest(str(location[-1]), siblings)}"
    if problem["type"] == "missing":
        return f"{path}: {key}: missing; add it"
    shown = "" if isinstance(problem["input"], dict) else f" = {problem['input']!r}"
    return f"{path}: {key}{shown}: {problem['msg'].removeprefix('Value error, ')}"


_DISCRIMINATORS = ("method", "use", "name")


def _without_union_tags(location: Sequence[Any], values: Mapping[str, Any]) -> tuple[Any, ...]:
    """Returns the location as the user's keys; pydantic also lists, on entering a union, which member it took."""
    kept: list[Any] = []
    at: Any = values
    is_entered = True
    for part in location:
        if is_entered and isinstance(at, dict):
            is_entered = False
            tag = next((at[name] for name in _DISCRIMINATORS if name in at), None)
            if part == tag:
                continue
        kept.append(part)
        if isinstance(at, dict):
            at = at.get(part)
        elif isinstance(at, list) and isinstance(part, int) and part < len(at):
            at = at[part]
        is_entered = True
    return tuple(kept)


def _known_keys(location: Sequence[Any], values: Mapping[str, Any]) -> list[str]:
    """Returns the keys that the settings at `location` have, over all members of a union."""
    method = values.get("method")
    at: list[Any] = [ChainRecipe] if method == "chain" else [_STAGE_CLASSES.get(str(method), SftRecipe)]
    value: Any = values
    for part in location:
        value = value.get(part) if isinstance(value, dict) else None
        models = [model for candidate in at for model in _models(candidate)]
        if any(part in model.model_fields for model in models):
            at = [model.model_fields[part].annotation for model in models if part in model.model_fields]
        # otherwise `part` is a key of a mapping: its values' types are already among the models
    return sorted({field for candidate in at for model in _models(candidate) for field in model.model_fields})


def _models(annotation: Any) -> list[type[BaseModel]]:  # noqa: ANN401
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _models(argument)]


def _nearest(name: str, allowed: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, allowed, n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else f"; allowed here: {', '.join(allowed)}"
