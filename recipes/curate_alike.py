"""When two texts or two images are nearly the same: shingles, MinHash signatures, perceptual hashes. Pure functions."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PILImage
from scipy.fft import dctn

from ..model.records import ImagePart, MediaPart
from ..rewards.text_units import words
from .curate_config import PERCEPTUAL_BITS

NUM_BANDS = 16
"""Bands of a signature: texts that agree in all values of one are compared."""
BAND_VALUES = 4
"""Values in a band. Of texts with similarity 0.8 a share of 0.9998 meets in at least one of 16 bands of 4, of those with 0.5 0.64."""
_HASH_SIDE = 16
_PICTURE_SIDE = 64
"""Side of the picture whose slow waves are hashed: four samples to a wave of the hash."""
_NOISE = 2.0
"""Waves below this many grey levels count as none: rounding and compression make such in flat pictures too."""
_NOISE_FRAC = 0.25
"""So do those below this share of the picture's mean wave: in a smooth picture most are, and would give bits by chance."""

Hash = NDArray[np.uint64]


def plain_words(text: str) -> tuple[str, ...]:
    """Returns the words of a text in lower case; a Chinese character is one."""
    return tuple(words(text.casefold()))


def ngrams(sequence: Sequence[str], n: int) -> Hash:
    """Returns the distinct n-grams of the words as sorted 64-bit hashes; a text of fewer words is one n-gram, an empty one has none."""
    if not sequence:
        return np.empty(0, dtype=np.uint64)
    grams = {" ".join(sequence[start : start + n]) for start in range(max(1, len(sequence) - n + 1))}
    return np.array(sorted(_hash(gram) for gram in grams), dtype=np.uint64)


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def jaccard(first: Hash, second: Hash) -> float:
    """Returns |A and B| / |A or B| of two sorted sets; 1.0 for two empty ones."""
    common = np.intersect1d(first, second, assume_unique=True).size
    union = first.size + second.size - common
    return common / union if union else 1.0


@lru_cache(maxsize=1)
def _factors() -> tuple[Hash, Hash]:
    generator = np.random.Generator(np.random.PCG64(20251126))
    shape = (NUM_BANDS * BAND_VALUES, 1)
    odd = generator.integers(0, 2**63, size=shape, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    return odd, generator.integers(0, 2**63, size=shape, dtype=np.uint64)


def bands(grams: Hash) -> tuple[bytes, ...]:
    """Returns the bands of the MinHash signature of a set (Broder 1997): two sets share one the likelier, the more similar they are."""
    if not grams.size:
        return (b"",)
    factors, offsets = _factors()
    with np.errstate(over="ignore"):  # arithmetic modulo 2**64 is what is wanted
        mixed = grams[None, :] * factors + offsets
        mixed ^= mixed >> np.uint64(32)
        mixed *= factors
    least = mixed.min(axis=1).reshape(NUM_BANDS, BAND_VALUES)
    return tuple(bytes([number]) + row.tobytes() for number, row in enumerate(least))


def picture_hashes(part: MediaPart) -> Hash:
    """Returns the perceptual hash of an image, [4], or of a video's frames, [4 x frames]."""
    images = (part.image,) if isinstance(part, ImagePart) else part.frames
    return np.concatenate([perceptual_hash(image) for image in images])


def perceptual_hash(image: PILImage.Image) -> Hash:
    """Returns 256 bits, [4] of 64, that hardly change when an image is scaled, compressed, or made a little brighter.

    The image is shrunk to 64 x 64 greys; each of the 16 x 16 slowest waves of its cosine transform, the mean left out, gives a bit:
    whether it is positive and above the noise.
    """
    grey = image.convert("L").resize((_PICTURE_SIDE, _PICTURE_SIDE), PILImage.Resampling.BOX)
    waves = np.array(dctn(np.asarray(grey, dtype=np.float64), norm="ortho"))[:_HASH_SIDE, :_HASH_SIDE].ravel()
    waves[0] = 0.0
    bits = waves > max(_NOISE, _NOISE_FRAC * float(np.sqrt(np.mean(waves**2))))
    return np.packbits(bits).view(np.uint64)


def distance(first: Hash, second: Hash) -> int:
    """Returns in how many bits the worst pair of hashes differs, in order; all 256 where their numbers differ."""
    if first.shape != second.shape:
        return PERCEPTUAL_BITS
    if not first.size:
        return 0
    return int(np.bitwise_count(first ^ second).reshape(-1, PERCEPTUAL_BITS // 64).sum(axis=1).max())


def chunks(picture: Hash, *, max_distance: int) -> tuple[bytes, ...]:
    """Returns pieces of a 256-bit hash of which two within `max_distance` bits share at least one: a piece more than bits that differ."""
    bits = np.unpackbits(picture[: PERCEPTUAL_BITS // 64].view(np.uint8))
    return tuple(bytes([number]) + np.packbits(piece).tobytes() for number, piece in enumerate(np.array_split(bits, max_distance + 1)))
