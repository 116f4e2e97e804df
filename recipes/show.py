"""The resolved recipe, line by line, with the origin of each value. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from .load import LoadedRecipe


def resolved_lines(loaded: LoadedRecipe) -> Iterator[str]:
    """Yields `key = value  # origin` for every value of the recipe: `recipe`, `common`, `chain`, `command line` or `default`."""
    for key, value in flat_values(loaded.recipe.model_dump(mode="json")):
        yield f"{key} = {value!r}  # {origin_of(key, loaded.origins)}"


def flat_values(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields (dotted key, value) of every leaf."""
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from flat_values(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def origin_of(key: str, origins: Mapping[str, str]) -> str:
    """Returns where the value at a dotted key comes from."""
    return origins.get(key, "default")
