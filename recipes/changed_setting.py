"""The first setting in which two recipes, or two records of what a run was asked to do, differ. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final


class _Absent:
    """A key that is not there, which is not the same as a key without a value."""

    def __repr__(self) -> str:
        return "not there"


ABSENT: Final = _Absent()


@dataclass(frozen=True, kw_only=True, slots=True)
class ChangedSetting:
    """A setting that differs."""

    key: str
    """With those above it, by dots"""
    before: object
    """`ABSENT` where the key is new"""
    after: object
    """`ABSENT` where the key is gone"""

    def __str__(self) -> str:
        return f"{self.key} was {self.before!r}, is {self.after!r}"


def first_change(before: object, after: object, key: str = "") -> ChangedSetting | None:
    """Returns the first difference of two nested mappings in the order of the first, None where they are equal.

    A key that only one of them has is a difference whatever it holds: a program that does not know a key may have done something else
    than its default.
    """
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        names = dict.fromkeys((*before, *after))
        below = (first_change(before.get(name, ABSENT), after.get(name, ABSENT), f"{key}.{name}" if key else str(name)) for name in names)
        return next((found for found in below if found), None)
    return None if before == after else ChangedSetting(key=key, before=before, after=after)
