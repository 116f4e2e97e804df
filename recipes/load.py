"""YAML text -> a checked recipe, with the origin of every value. No torch."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from ..model.records import VlpostError
from .curate_config import CurateRecipe
from .schema import (
    SAMPLING_PRESETS,
    ChainRecipe,
    EvaluateRecipe,
    OffPolicyDistillRecipe,
    OnPolicyDistillRecipe,
    Recipe,
    RlRecipe,
    SftRecipe,
    StageRecipe,
    models_of,
)

_STAGE_CLASSES: dict[str, type[BaseModel]] = {
    "sft": SftRecipe,
    "rl": RlRecipe,
    "off_policy_distill": OffPolicyDistillRecipe,
    "on_policy_distill": OnPolicyDistillRecipe,
    "evaluate": EvaluateRecipe,
}
_CHAIN_KEYS = ("method", "output", "trackers", "common", "evaluate_after_each", "stages")
_MEASURED_METHODS = ("sft", "rl", "off_policy_distill", "on_policy_distill")
_ROOT = Annotated[Recipe | CurateRecipe, Field(discriminator="method")]
_SET_BY_CHAIN = ("name", "output", "trackers")
_MAX_RECIPE_BYTES = 256 * 1024


class RecipeError(VlpostError, ValueError):
    """A recipe that cannot be used; the message names file, key, value and what is allowed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedRecipe:
    """A checked recipe and where each of its values comes from."""

    path: Path
    recipe: StageRecipe | ChainRecipe | CurateRecipe
    origins: Mapping[str, str]
    """Dotted key -> `recipe`, `common`, `command line`, `chain`, `preset`; a key that is absent here has its default."""

    @property
    def stages(self) -> list[tuple[str, StageRecipe]]:
        """(name, stage) of a chain in order, or the one stage; a `RecipeError` for what makes data and trains nothing."""
        if isinstance(self.recipe, CurateRecipe):
            raise RecipeError(f"{self.path}: method is 'curate', which has steps and no stages; `vlpost curate` runs it")
        return list(self.recipe.stages.items()) if isinstance(self.recipe, ChainRecipe) else [(self.recipe.method, self.recipe)]


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
    is not handed to it. `evaluate_after_each` puts a stage `evaluate_<name>` of these settings behind each that trains, except those
    in its `skip`. Raises `RecipeError`.
    """
    values, origins = _read(path)
    for override in overrides:
        _apply_override(values, origins, override)
    if values.get("method") == "chain":
        values, origins = _expand_chain(values, origins, path)
    try:
        recipe = TypeAdapter(_ROOT).validate_python(values)
    except ValidationError as error:
        raise RecipeError("\n".join(_explain(path, problem, values) for problem in error.errors())) from error
    if not isinstance(recipe, ChainRecipe | CurateRecipe):
        for key, model in models_of(recipe).items():
            if model.stage is not None:
                raise RecipeError(f"{path}: {key}.stage = {model.stage!r}: only a stage of a chain has an earlier stage; give {key}.path")
    return LoadedRecipe(path=path, recipe=recipe, origins={**_preset_origins(recipe), **origins})


def _preset_origins(recipe: StageRecipe | ChainRecipe | CurateRecipe) -> dict[str, str]:
    """Returns the origin of the values that a sampling preset sets."""
    named = recipe.stages if isinstance(recipe, ChainRecipe) else {"": recipe}
    return {
        f"stages.{name}.evaluate.{key}" if name else f"evaluate.{key}": "preset"
        for name, stage in named.items()
        if isinstance(stage, EvaluateRecipe) and stage.evaluate.preset is not None
        for key in SAMPLING_PRESETS[stage.evaluate.preset]
    }


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
    if not isinstance(values, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of keys, this is {type(values).__name__}")
    return values, dict.fromkeys(_leaves(values), "recipe")


def _parse(text: str | bytes) -> Any:  # noqa: ANN401
    try:
        loader = _StrictLoader(text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except RecipeError:
        raise
    # Beside its own errors PyYAML lets through what its constructors meet: month 13, `!!bool maybe`, `!!timestamp x`, deep nesting.
    except (yaml.YAMLError, ValueError, KeyError, AttributeError, RecursionError) as error:
        raise RecipeError(f"not YAML that a recipe may hold: {error}") from error


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
    except RecipeError as error:
        raise RecipeError(f"{override!r} on the command line: {error}") from error
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
    """Adds the measurements, lays `common` under every stage and gives each its name and folder."""
    values, origins = _add_measurements(values, origins, path)
    common, stages = _chain_parts(values, path)
    used: set[str] = set()
    expanded: dict[str, Any] = {}
    for name, stage in stages.items():
        fields = _fields_of_method(stage)
        inherited = {key: value for key, value in common.items() if key in fields}
        used |= set(inherited)
        if "model" in stage:  # one source of weights replaces the other, they do not merge
            inherited.pop("model", None)
        merged = _merge(inherited, stage)
        for key in _leaves(inherited):
            origin = origins.get(f"common.{key}")
            origins.setdefault(f"stages.{name}.{key}", "common" if origin == "recipe" else "command line")
        from_chain = {"name": name, "output": str(Path(str(values.get("output", ""))) / name)}
        if "trackers" in values:
            from_chain["trackers"] = values["trackers"]
        for key, value in from_chain.items():
            merged[key] = value
            origins[f"stages.{name}.{key}"] = "chain"
        expanded[name] = merged
    unused = sorted(set(common) - used)
    if unused and all(_fields_of_method(stage) for stage in stages.values()):
        allowed = sorted({field for stage in stages.values() for field in _fields_of_method(stage)} - {"method", *_SET_BY_CHAIN})
        raise RecipeError(f"{path}: common.{unused[0]} is read by no stage; remove it{_nearest(unused[0], allowed)}")
    kept = {key: origin for key, origin in origins.items() if not key.startswith("common.")}
    return {**{key: value for key, value in values.items() if key != "common"}, "stages": expanded}, kept


def _add_measurements(values: dict[str, Any], origins: dict[str, str], path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Returns the chain with what `evaluate_after_each` asks for as stages of their own."""
    key = "evaluate_after_each"
    if key not in values:
        return values, origins
    settings, stages = values[key], values.get("stages")
    if not isinstance(settings, dict) or not isinstance(stages, dict):
        raise RecipeError(f"{path}: `{key}` is a mapping of what an evaluate stage has, and `stages` maps names to stages")
    body = {name: value for name, value in settings.items() if name != "skip"}
    skip = settings.get("skip", [])
    trained = [name for name, stage in stages.items() if isinstance(stage, dict) and stage.get("method") in _MEASURED_METHODS]
    if not isinstance(skip, list) or any(name not in trained for name in skip):
        raise RecipeError(f"{path}: {key}.skip = {skip!r}: must be a list of stages that train: {', '.join(map(str, trained))}")
    for name in ("method", "model"):
        if name in body:
            raise RecipeError(f"{path}: {key}.{name} is set by the chain; remove it")
    expanded, kept = {}, {name: origin for name, origin in origins.items() if not name.startswith(f"{key}.")}
    for name, stage in stages.items():
        expanded[name] = stage
        if name not in trained or name in skip:
            continue
        measured = f"evaluate_{name}"
        if measured in stages:
            raise RecipeError(f"{path}: stages.{measured} is what {key} would add; remove it, or add {name!r} to {key}.skip")
        expanded[measured] = {"method": "evaluate", "model": {"stage": name}, **body}
        kept |= {f"stages.{measured}.{leaf}": origins[f"{key}.{leaf}"] for leaf in _leaves(body)}
        kept |= {f"stages.{measured}.{leaf}": "chain" for leaf in ("method", "model.stage")}
    return {**{name: value for name, value in values.items() if name != key}, "stages": expanded}, kept


def _chain_parts(values: Mapping[str, Any], path: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Returns `common` and `stages` of a chain, in whose keys nothing is wrong."""
    unknown = [key for key in values if key not in _CHAIN_KEYS]
    if unknown:
        raise RecipeError(f"{path}: {unknown[0]}: unknown key{_nearest(str(unknown[0]), _CHAIN_KEYS)}")
    common = values.get("common", {})
    stages = values.get("stages", {})
    if not isinstance(common, dict) or not isinstance(stages, dict) or not all(isinstance(stage, dict) for stage in stages.values()):
        raise RecipeError(f"{path}: `common` is a mapping and `stages` maps names to stages")
    if not all(isinstance(key, str) for key in common):
        raise RecipeError(f"{path}: common: {next(key for key in common if not isinstance(key, str))!r} is no key; keys are words")
    for name, stage in stages.items():
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            raise RecipeError(f"{path}: stages: {name!r}: a stage's name is its folder's too; use letters, digits, _ and -")
        for key in _SET_BY_CHAIN:
            if key in stage:
                raise RecipeError(f"{path}: stages.{name}.{key} is set by the chain; remove it")
    for key in ("method", *_SET_BY_CHAIN):
        if key in common:
            raise RecipeError(f"{path}: common.{key}: every stage has its own; remove it")
    return common, stages


def _fields_of_method(stage: Mapping[str, Any]) -> set[str]:
    """Returns the keys of the stage's method, none when the recipe names no known one."""
    known = _STAGE_CLASSES.get(str(stage.get("method")))
    return set(known.model_fields) if known else set()


def _merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `above` laid over `below`; settings of another kind (another `use` or `name`) replace what is below them whole."""
    if any(tag in below and tag in above and below[tag] != above[tag] for tag in _DISCRIMINATORS):
        return dict(above)
    merged = dict(below)
    for key, value in above.items():
        under = merged.get(key)
        merged[key] = _merge(under, value) if isinstance(under, dict) and isinstance(value, dict) else value
    return merged


def _explain(path: Path, problem: Any, values: Mapping[str, Any]) -> str:  # noqa: ANN401
    """Returns one line for a pydantic problem: file, dotted key, value, what is allowed, nearest name."""
    key, siblings, discriminator = _place(problem["loc"], values)
    place = f"{path}: {key}" if key else str(path)
    if problem["type"] == "extra_forbidden":
        return f"{place}: unknown key{_nearest(str(problem['loc'][-1]), siblings)}"
    if problem["type"] == "missing":
        return f"{place}: missing; add it"
    if problem["type"] == "union_tag_not_found":
        unknown = [str(name) for name in problem["input"] if name not in siblings] if isinstance(problem["input"], dict) else []
        listed = "".join(f"; unknown key {name}{_nearest(name, siblings)}" for name in unknown)
        return f"{place}: {discriminator} is missing; it says which keys there are{listed}"
    if problem["type"] == "union_tag_invalid":
        context = problem["ctx"]
        return f"{place}: {discriminator} = {context['tag']!r}: must be one of {context['expected_tags']}"
    shown = "" if isinstance(problem["input"], dict) else f" = {problem['input']!r}"
    return f"{place}{shown}: {problem['msg'].removeprefix('Value error, ')}"


_DISCRIMINATORS = ("method", "use", "name", "in")


def _place(location: Sequence[Any], values: Mapping[str, Any]) -> tuple[str, list[str], str]:
    """Returns the user's dotted key of a problem, the keys allowed beside it, and the key that tells the members of its union apart.

    Pydantic also lists, on entering a union of settings, which member it took.
    """
    kept: list[str] = []
    annotation: Any = ChainRecipe if values.get("method") == "chain" else _STAGE_UNION
    siblings = _models(annotation)
    parts = list(location[1:] if values.get("method") == "chain" else location)
    while parts:
        part = parts.pop(0)
        members = _models(annotation)
        chosen = [model for model in members if part in _tags(model)] if len(members) > 1 else members
        if len(members) > 1 and chosen:
            annotation = chosen[0]
            siblings = chosen
            continue
        if part == "[key]":  # pydantic's mark for a key of a mapping that is not allowed
            break
        kept.append(str(part))
        siblings = members
        annotation = _below(annotation, part)
    if _models(annotation):  # the problem is of these settings, not of one of their keys
        siblings = _models(annotation)
    tag = next((name for name in _DISCRIMINATORS if siblings and all(name in _keys(model) for model in siblings)), "")
    return ".".join(kept), sorted({key for model in siblings for key in _keys(model)}), tag


_STAGE_UNION: Any = StageRecipe | ChainRecipe | CurateRecipe


def _members(annotation: Any) -> list[Any]:  # noqa: ANN401
    """Returns the alternatives of a union, or the annotation alone."""
    if get_origin(annotation) is Annotated:
        return _members(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [member for argument in get_args(annotation) for member in _members(argument)]
    return [annotation]


def _models(annotation: Any) -> list[type[BaseModel]]:  # noqa: ANN401
    return [member for member in _members(annotation) if isinstance(member, type) and issubclass(member, BaseModel)]


def _keys(model: type[BaseModel]) -> dict[str, Any]:
    """Returns what each key of the recipe may be; a key that Python cannot name (`in`) is a field's alias."""
    return {field.alias or name: field.annotation for name, field in model.model_fields.items()}


def _tags(model: type[BaseModel]) -> tuple[Any, ...]:
    """Returns the values of the key by which a recipe picks these settings in a union."""
    fields = [_keys(model)[name] for name in _DISCRIMINATORS if name in _keys(model)]
    return next((get_args(annotation) for annotation in fields if get_origin(annotation) is Literal), ())


def _below(annotation: Any, part: Any) -> Any:  # noqa: ANN401
    """Returns what the value under a key or index may be, None where the settings do not say."""
    for member in _members(annotation):
        if isinstance(member, type) and issubclass(member, BaseModel) and part in _keys(member):
            return _keys(member)[part]
        if get_origin(member) is dict:
            return get_args(member)[1]
    return None


def _nearest(name: str, allowed: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, allowed, n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else f"; allowed here: {', '.join(allowed)}"
