"""The scans of the handwriting track: which split may show which, how they are enlarged, and the dice that choose them."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from PIL import Image

from .data_config import Split

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

FORM_STARTS = (0, 130, 256, 386, 516, 646, 776, 906, 1029, 1157, 1287, 1415, 1545, 1667)
"""Rows of `load_digits` at which the sequence of labels begins anew."""
SPLIT_SCANS: Mapping[Split, range] = {
    "train": range(0, FORM_STARTS[10]),
    "validation": range(FORM_STARTS[10], FORM_STARTS[12]),
    "test": range(FORM_STARTS[12], 1797),
}
"""Rows of `load_digits` that each split may show."""

Size = tuple[int, int]
"""Width and height in pixels."""

_SHADES = 16
_INK_SHADE = 4


class Dice:
    """Random draws that a key decides. `random.Random.random` is the one generator whose numbers Python promises never to change;
    numpy promises that for raw bits only."""

    def __init__(self, *key: str | int) -> None:
        self._random = random.Random(hash_key(*key))

    def below(self, limit: int) -> int:
        """Returns one of 0 to limit - 1."""
        return int(self._random.random() * limit)

    def fraction(self) -> float:
        """Returns a number of 0 to below 1."""
        return self._random.random()

    def pick(self, choices: Sequence[Any]) -> Any:  # noqa: ANN401
        """Returns one of the choices."""
        return choices[self.below(len(choices))]

    def several(self, choices: Sequence[Any], count: int) -> list[Any]:
        """Returns `count` different ones of the choices in random order."""
        left = list(choices)
        return [left.pop(self.below(len(left))) for _ in range(count)]

    def number(self, num_digits: int) -> int:
        """Returns a number of so many digits, the first of them not 0 unless it is the only one."""
        low, size = _number_range(num_digits)
        return low + self.below(size)

    def other_number(self, number: int, num_digits: int) -> int:
        """Returns a number of so many digits that is not `number`."""
        low, size = _number_range(num_digits)
        if not low <= number < low + size:
            return self.number(num_digits)
        return low + (number - low + 1 + self.below(size - 1)) % size


def hash_key(*key: str | int) -> int:
    """Returns a whole number below 2^256 that the key decides, the same in every process."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, ("handwriting", *key))).encode()).digest(), "big")


def digits_of(number: int) -> tuple[int, ...]:
    """Returns the digits of a number, the first first."""
    return tuple(map(int, str(number)))


def _number_range(num_digits: int) -> tuple[int, int]:
    """Returns the smallest number of so many digits and how many there are."""
    low = 0 if num_digits == 1 else 10 ** (num_digits - 1)
    return low, 10**num_digits - low


@lru_cache(maxsize=1)
def _scans() -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Returns the scans [1797, 8, 8], shades 0 (paper) to 16 (ink), and their digits [1797]."""
    # Takes a second to import; questions without an image, `vlpost check` and the tokenizer's corpus do not need it.
    from sklearn.datasets import load_digits

    bunch: Any = load_digits()
    return bunch.images, bunch.target


@lru_cache(maxsize=32)
def scans_of_digit(split: Split, digit: int) -> tuple[int, ...]:
    """Returns the rows of `load_digits` that show this digit and belong to the split."""
    _, digits = _scans()
    return tuple(scan for scan in SPLIT_SCANS[split] if digits[scan] == digit)


@lru_cache(maxsize=3)
def _upscaled(digit_pixels: Size) -> NDArray[np.uint8]:
    """Returns all scans in grey, [1797, height, width], 0 (paper) to 255 (ink)."""
    import numpy as np

    scans, _ = _scans()
    grey = np.rint(scans * (255 / _SHADES)).astype(np.uint8)
    return np.stack([np.asarray(Image.fromarray(scan).resize(digit_pixels, Image.Resampling.BICUBIC)) for scan in grey])


def draw_row(scans: Sequence[int | None], digit_pixels: Size) -> Image.Image:
    """Returns the row of scans, one `digit_pixels` cell each, white on black; None is an empty cell."""
    import numpy as np

    upscaled = _upscaled(digit_pixels)
    empty = np.zeros_like(upscaled[0])
    return Image.fromarray(np.concatenate([empty if scan is None else upscaled[scan] for scan in scans], axis=1))


def draw_at(places: Mapping[tuple[int, int], int], digit_pixels: Size, *, size: Size) -> Image.Image:
    """Returns a black canvas of `size` with scans on it, each in a cell of `digit_pixels`; `places` maps (left, top) to the scan."""
    import numpy as np

    upscaled = _upscaled(digit_pixels)
    canvas = np.zeros((size[1], size[0]), dtype=np.uint8)
    for (left, top), scan in places.items():
        canvas[top : top + digit_pixels[1], left : left + digit_pixels[0]] = upscaled[scan]
    return Image.fromarray(canvas)


def ink_box(scan: int) -> tuple[int, int, int, int]:
    """Returns (left, top, right, bottom) of the ink of a scan in its 8 x 8 pixels, right and bottom excluded.

    Ink is a shade of 4 of 16 or more (our choice): paler pixels are the blurred edge of the stroke.
    """
    scans, _ = _scans()
    ink = scans[scan] >= _INK_SHADE
    columns, rows = ink.any(axis=0).nonzero()[0], ink.any(axis=1).nonzero()[0]
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
