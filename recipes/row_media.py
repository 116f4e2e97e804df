"""Images and videos of a row: where they may come from, what is wrong with them by name, and what is mended.

Reading never trusts a row: paths stay below the data file's folder, formats are those of `IMAGE_FORMATS`, sizes are bounded before anything
is decoded.
"""

from __future__ import annotations

import base64
import binascii
import io
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from PIL import Image as PILImage
from PIL import UnidentifiedImageError

from ..model.records import IMAGE_FORMATS, MAX_IMAGE_PIXELS, DataError, ImagePart, TimeFormat, VideoPart

MAX_ASPECT_RATIO = 200
"""Longer side / shorter side; Qwen's processors refuse more."""
MIN_IMAGE_SIDE = 2
"""Pixels. A one-pixel image is a place holder of a web page, not a picture."""
MAX_VIDEO_BYTES = 4 * 2**30
_EXIF_ORIENTATION = 0x0112


class RowError(DataError):
    """A row that cannot be trained on as it stands; `kind` is the fault's short name, by which dropped rows are counted."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoSampling:
    """How frames are taken from a film, and how their times are written."""

    fps: float
    """Frames per second taken from a file."""
    max_frames: int
    """Frames of one video; a longer film is taken at fewer a second, a longer list of frames is a fault."""
    time_format: TimeFormat = "seconds"


@dataclass(frozen=True, kw_only=True, slots=True)
class MediaReader:
    """Reads the images and videos of one row; remembers what it mended."""

    place: str
    """Which row, for messages."""
    folder: Path | None
    """Paths are relative to it and stay below it; None: the row comes from no folder and may hold no path."""
    video: VideoSampling
    repairs: list[str] = field(default_factory=list)
    """Names of what was mended, in order."""

    def image(self, reference: object) -> ImagePart:
        """Returns the part for a path, a data URL, encoded bytes, `{"bytes", "path"}` or a PIL image; raises `RowError`."""
        if isinstance(reference, PILImage.Image):
            return self._checked(reference, self.place)
        if isinstance(reference, dict) and set(reference) <= {"bytes", "path"}:
            reference = reference.get("bytes") if reference.get("bytes") is not None else reference.get("path")
        if isinstance(reference, bytes):
            return self._decoded(reference, f"{self.place}, image bytes")
        if not isinstance(reference, str) or not reference:
            raise RowError("image reference", f"{self.place}: an image is a path, a data URL or bytes, this is {reference!r:.80}")
        if reference.startswith("data:"):
            return self._decoded(self._data_url(reference), f"{self.place}, data URL")
        path = self._path(reference, "image")
        try:
            # The checks of the file itself (missing, a folder, a device, too large) are the record's.
            if path.is_file() and path.stat().st_size == 0:
                raise RowError("image of zero bytes", f"{self.place}: {path}: the image file is empty; fetch it again or drop the row")
            if path.is_file() and path.stat().st_size <= MAX_IMAGE_PIXELS * 4:
                return self._decoded(path.read_bytes(), f"{self.place}: {path}")
            return ImagePart.from_file(path)
        except RowError:
            raise
        except (DataError, ValueError, OSError) as error:
            raise RowError("image missing", f"{self.place}: {_reason(error, path)}") from error

    def _data_url(self, reference: str) -> bytes:
        _, found, encoded = reference.partition(";base64,")
        if not found:
            raise RowError("data URL", f"{self.place}: a data URL that is not base64; write data:image/png;base64,...")
        try:
            return base64.b64decode(encoded.encode(), validate=True)
        except (binascii.Error, UnicodeEncodeError) as error:
            raise RowError("data URL", f"{self.place}: the data URL is not base64 ({error})") from error

    def _path(self, reference: str, kind: str) -> Path:
        if "://" in reference and not reference.startswith("file://"):
            raise RowError(
                f"{kind} on the network",
                f"{self.place}: {kind} {reference!r:.120} is a web address, never fetched; download it below the data file's folder",
            )
        local = reference.removeprefix("file://")
        if self.folder is None:
            raise RowError(
                f"{kind} path", f"{self.place}: {kind} {reference!r:.120} is a path, and the row comes from no folder; give bytes"
            )
        if Path(local).is_absolute() or ".." in Path(local).parts:
            raise RowError(
                f"{kind} outside the folder",
                f"{self.place}: {kind} {reference!r} lies outside the data file's folder; give a path below it, or a data URL",
            )
        return self.folder / local

    def _decoded(self, content: bytes, place: str) -> ImagePart:
        if not content:
            raise RowError("image of zero bytes", f"{place}: the image is empty; fetch it again or drop the row")
        advice = "give a whole PNG, JPEG or WebP file"
        try:
            with PILImage.open(io.BytesIO(content), formats=IMAGE_FORMATS) as opened:
                if opened.width * opened.height > MAX_IMAGE_PIXELS:
                    raise RowError(
                        "image too large",
                        f"{place}: the image cannot be decoded ({opened.width} x {opened.height} pixels, at most {MAX_IMAGE_PIXELS} in all "
                        f"are decoded); {advice}",
                    )
                return self._checked(opened, place)
        except RowError:
            raise
        except UnidentifiedImageError as error:
            raise RowError("image format", f"{place}: the image cannot be decoded (its format is unknown); {advice}") from error
        except (PILImage.DecompressionBombError, PILImage.DecompressionBombWarning) as error:
            raise RowError("image too large", f"{place}: the image cannot be decoded ({error}); {advice}") from error
        except (OSError, ValueError, SyntaxError) as error:
            kind = "image truncated" if "truncated" in str(error) else "image corrupt"
            raise RowError(kind, f"{place}: the image cannot be decoded ({error}); {advice}") from error

    def _checked(self, image: PILImage.Image, place: str) -> ImagePart:
        """Returns the part of an opened image after naming what is odd about it."""
        if getattr(image, "n_frames", 1) > 1:
            raise RowError(
                "animated image",
                f"{place}: an animation of {getattr(image, 'n_frames', 1)} frames, of which an image would show one; "
                "save the frame that is meant, or give the frames as a video",
            )
        if min(image.size) < MIN_IMAGE_SIDE:
            kind = "one-pixel image" if max(image.size) < MIN_IMAGE_SIDE else "image strip"
            raise RowError(
                kind, f"{place}: an image of {image.width} x {image.height} pixels shows nothing; each side needs {MIN_IMAGE_SIDE}"
            )
        if max(image.size) > MAX_ASPECT_RATIO * min(image.size):
            raise RowError(
                "image strip",
                f"{place}: an image of {image.width} x {image.height} pixels is longer than {MAX_ASPECT_RATIO} times its width, which the "
                "model's processor refuses; cut it into pieces",
            )
        if image.mode.startswith("I") or image.mode == "F":
            raise RowError(
                "16-bit image",
                f"{place}: an image of mode {image.mode}, deeper than 8 bits a channel: scale it to 8 bits, it would be clipped",
            )
        mended = []
        if image.getexif().get(_EXIF_ORIENTATION, 1) in range(2, 9):
            mended.append("image turned upright by its EXIF orientation")
        if image.has_transparency_data:
            mended.append("transparent image laid on white")
        elif image.mode in ("CMYK", "LAB", "HSV", "YCbCr"):
            mended.append(f"{image.mode} image converted to RGB")
        part = ImagePart.from_image(image)
        self.repairs.extend(mended)
        return part

    def video_frames(self, frames: Sequence[object], *, fps: object, times: object) -> VideoPart:
        """Returns the part for a list of images: frame i at i / fps seconds, or at `times[i]`, to the millisecond. Raises `RowError`."""
        if (fps is None) == (times is None):
            raise RowError("video times", f"{self.place}: a video of frames needs fps or times, one of the two")
        if not frames:
            raise RowError("video without frames", f"{self.place}: the video has no frames; give at least one")
        if len(frames) > self.video.max_frames:
            raise RowError("video too long", f"{self.place}: the video has {len(frames)} frames, at most {self.video.max_frames} are taken")
        pictures = [self.image(frame).image for frame in frames]
        if times is None:
            return self._part(pictures, self._rate(fps), list(range(len(frames))))
        return self._part(pictures, 1000.0, self._milliseconds(times, len(frames)))

    def _rate(self, fps: object) -> float:
        rate = _number(fps)
        if rate is None or not 0 < rate < math.inf:
            raise RowError("video fps", f"{self.place}: video fps = {fps!r}: must be a finite number above 0")
        return rate

    def _milliseconds(self, times: object, count: int) -> list[int]:
        seconds = [_number(time) for time in times] if isinstance(times, list | tuple) else []
        if len(seconds) != count or any(second is None or not 0 <= second < math.inf for second in seconds):
            raise RowError(
                "video times", f"{self.place}: video times = {times!r:.120}: must be {count} numbers of seconds, one for each frame"
            )
        milliseconds = [round(1000 * second) for second in seconds if second is not None]
        if any(after < before for before, after in itertools.pairwise(milliseconds)):
            raise RowError("video times", f"{self.place}: video times = {times!r:.120}: must not go back")
        return milliseconds

    def _part(self, pictures: Sequence[PILImage.Image], fps: float, indices: Sequence[int]) -> VideoPart:
        try:
            return VideoPart.from_frames(pictures, fps=fps, frame_indices=indices, time_format=self.video.time_format)
        except DataError as error:
            raise RowError("video frame sizes", f"{self.place}: {error}") from error

    def video_file(self, reference: str, *, fps: object = None) -> VideoPart:
        """Returns the part for a film file, frames taken evenly at `fps` a second, or where the row names none at `video.fps`.

        Needs OpenCV. Raises `RowError`.
        """
        path = self._path(reference, "video")
        rate = self.video.fps if fps is None else self._rate(fps)
        try:
            if not path.is_file():
                raise RowError(
                    "video missing", f"{self.place}: {path}: no such video file; give a path that exists, relative to the data file"
                )
            if not 0 < path.stat().st_size <= MAX_VIDEO_BYTES:
                size = path.stat().st_size
                raise RowError("video size", f"{self.place}: {path}: a video of {size} bytes; between 1 and {MAX_VIDEO_BYTES} are read")
        except ValueError as error:  # a path with a zero byte
            raise RowError("video missing", f"{self.place}: the video cannot be read ({error})") from error
        pictures, film_fps, indices = read_film(path, replace(self.video, fps=rate), self.place)
        return self._part(pictures, film_fps, indices)


def read_film(path: Path, sampling: VideoSampling, place: str) -> tuple[list[PILImage.Image], float, list[int]]:
    """Returns frames, frames per second of the film, and the frames' numbers in it. Raises `RowError`, or `DataError` without OpenCV."""
    try:
        import cv2
    except ImportError as error:
        raise DataError(f"{place}: a video file needs OpenCV (pip install opencv-python-headless); or give its frames and fps") from error
    film = cv2.VideoCapture(str(path.resolve()), cv2.CAP_FFMPEG)
    try:
        fps, total = film.get(cv2.CAP_PROP_FPS), int(film.get(cv2.CAP_PROP_FRAME_COUNT))
        size = int(film.get(cv2.CAP_PROP_FRAME_WIDTH)) * int(film.get(cv2.CAP_PROP_FRAME_HEIGHT))
        if not film.isOpened() or total < 1 or not 0 < fps < math.inf:
            raise RowError(
                "video corrupt", f"{place}: {path}: the video cannot be decoded; give a whole MP4, WebM or AVI file, or its frames"
            )
        if size > MAX_IMAGE_PIXELS:
            raise RowError("video size", f"{place}: {path}: frames of {size} pixels, at most {MAX_IMAGE_PIXELS} are decoded")
        indices = sampled_indices(total, fps, sampling)
        wanted, pictures = set(indices), {}
        for number in range(indices[-1] + 1):
            if not film.grab():
                raise RowError("video truncated", f"{place}: {path}: the video ends at frame {number}, its header says {total}")
            if number in wanted:
                _, pixels = film.retrieve()
                pictures[number] = PILImage.fromarray(cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB))
        return [pictures[number] for number in indices], fps, indices
    finally:
        film.release()


def sampled_indices(total: int, film_fps: float, sampling: VideoSampling) -> list[int]:
    """Returns which of `total` frames are taken: evenly from the first to the last, `sampling.fps` a second, 4 at least if there are.

    As `Qwen3VLVideoProcessor.sample_frames` of transformers 5.19 takes them, with `sampling.max_frames` as the upper bound.
    """
    count = int(total / film_fps * sampling.fps)
    count = min(max(count, min(4, sampling.max_frames)), sampling.max_frames, total)
    import numpy as np  # not by commands that read no film

    return np.linspace(0, total - 1, count).round().astype(int).tolist()


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _reason(error: Exception, path: Path) -> str:
    if isinstance(error, DataError):
        return str(error)
    reason = error.strerror if isinstance(error, OSError) and error.strerror else error
    return f"{path}: the image cannot be read ({reason}); give a path that exists, relative to the data file"
