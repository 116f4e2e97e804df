"""The records that flow between the stages. Plain Python: no torch, no transformers, no vLLM.

A stage is a type: an `Example` becomes a `Group` of `Rollout`s, the reward manager makes it a `ScoredGroup`, a method makes
`TrainSequence`s of it, packing makes `Batch`es (`model/packing.py`). No field is None "until later".

Every record is frozen and keyword-only. Records that own pixels compare by content hash.
"""

from __future__ import annotations

import errno
import hashlib
import io
import math
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal, TypeAlias, TypeVar

from PIL import Image as PILImage
from PIL import ImageOps, UnidentifiedImageError

Role = Literal["system", "user", "assistant", "tool"]
ROLES: tuple[Role, ...] = ("system", "user", "assistant", "tool")
FinishReason = Literal["stop", "length"]
"""`stop`: the policy wrote an end token; `length`: the token budget cut it off."""
Ending = Literal["one_turn", "answered", "length", "turns", "context", "unavailable"]
"""How a conversation with tools ended; `one_turn`: there was none, and the finish reason says it all. `answered`: a turn called nothing.
Cut off, with the finish reason `length`: a turn by its tokens (`length`), a policy that still called in its last turn (`turns`), a tool's
answer that would not fit the context (`context`). `unavailable`: a tool broke, which says nothing about the policy."""
TimeFormat = Literal["seconds", "clock"]
"""How a video's times are written: `<3.0 seconds>` or h:mm:ss, `<0:00:03>`."""


IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
"""Formats that are decoded: rows may come from anywhere, and some of Pillow's other decoders start programs (EPS: Ghostscript)."""
MAX_IMAGE_PIXELS = 64 * 2**20
"""Larger images are refused before they are decoded; 8192 x 8192 are 192 MiB of RGB."""
MAX_IMAGE_BYTES = 256 * 2**20


class VlpostError(Exception):
    """Base of all errors that a caller of this library may want to catch."""


class DataError(VlpostError, ValueError):
    """A row, message or image that cannot be used; the message names the row, the value and what to do."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TextPart:
    """A piece of text inside a message."""

    text: str


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ImagePart:
    """An RGB image inside a message; equal images have equal `digest`.

    Example: `ImagePart.from_file(Path("cat.png"))` opens, decodes and hashes the file at once, so a corrupt file is an error
    where it is named and not in the middle of a run.
    """

    image: PILImage.Image
    digest: str
    """SHA-256 over mode, size and pixels: 64 hexadecimal digits."""

    @classmethod
    def from_image(cls, image: PILImage.Image) -> ImagePart:
        """Returns the part for a PIL image as RGB: turned upright by its EXIF orientation, transparency laid on white.

        Greyscale deeper than 8 bits is a `DataError`: it would be clipped to white.
        """
        rgb = _upright_rgb(image)
        hasher = hashlib.sha256(f"RGB {rgb.width}x{rgb.height}".encode())
        hasher.update(rgb.tobytes())
        return cls(image=rgb, digest=hasher.hexdigest())

    @classmethod
    def from_bytes(cls, content: bytes, place: str) -> ImagePart:
        """Returns the part for an encoded image; `place` is where it came from, for the message of a `DataError`."""
        try:
            with PILImage.open(io.BytesIO(content), formats=IMAGE_FORMATS) as opened:
                if opened.width * opened.height > MAX_IMAGE_PIXELS:
                    raise ValueError(f"{opened.width} x {opened.height} pixels, at most {MAX_IMAGE_PIXELS} in all are decoded")
                return cls.from_image(opened)
        except UnidentifiedImageError as error:
            raise DataError(f"{place}: the image cannot be decoded (its format is unknown); give a whole PNG, JPEG or WebP file") from error
        except (OSError, ValueError, SyntaxError, PILImage.DecompressionBombError, PILImage.DecompressionBombWarning) as error:
            raise DataError(f"{place}: the image cannot be decoded ({error}); give a whole PNG, JPEG or WebP file") from error

    @classmethod
    def from_file(cls, path: Path) -> ImagePart:
        """Returns the part for an image file; a missing or corrupt file is a `DataError` that names it."""
        try:
            status = path.stat()
            if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
                raise OSError(errno.EINVAL, "neither a file nor a folder: reading it might never end")
            if status.st_size > MAX_IMAGE_BYTES:
                raise OSError(errno.EFBIG, f"{status.st_size} bytes, at most {MAX_IMAGE_BYTES} are read")
            content = path.read_bytes()
        except (OSError, ValueError) as error:  # ValueError: a path with a zero byte
            reason = error.strerror if isinstance(error, OSError) else error
            raise DataError(f"{path}: the image cannot be read ({reason}); give a path that exists, relative to the data file") from error
        return cls.from_bytes(content, str(path))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ImagePart) and other.digest == self.digest

    def __hash__(self) -> int:
        return hash(self.digest)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class VideoPart:
    """Frames of a video inside a message, already sampled: `frames[i]` is frame number `frame_indices[i]` of a film of `fps`."""

    frames: tuple[PILImage.Image, ...]
    fps: float
    """Frames per second of the film that `frame_indices` count in; frame time in seconds = index / fps."""
    frame_indices: tuple[int, ...]
    digest: str
    """SHA-256 over frames, fps, indices and a time format that is not `seconds`."""
    time_format: TimeFormat = "seconds"
    """How the times stand in the text: `<3.0 seconds>`, as the processor and the engine write them, or `<0:00:03>`."""

    @classmethod
    def from_frames(
        cls, frames: Sequence[PILImage.Image], *, fps: float, frame_indices: Sequence[int], time_format: TimeFormat = "seconds"
    ) -> VideoPart:
        """Returns the part for sampled frames; all frames must have one size."""
        if not frames or len(frames) != len(frame_indices):
            raise DataError(
                f"video with {len(frames)} frames and {len(frame_indices)} frame_indices: give at least one frame and one index for each"
            )
        if not 0 < fps < math.inf:
            raise DataError(f"video fps = {fps}: must be finite and above 0, timestamps are index / fps")
        if len({frame.size for frame in frames}) != 1:
            raise DataError(f"video frames of sizes {sorted({frame.size for frame in frames})}: all frames of one video must have one size")
        rgb = tuple(frame.convert("RGB") for frame in frames)
        hasher = hashlib.sha256(f"video {rgb[0].width}x{rgb[0].height} fps={fps!r} {list(frame_indices)}".encode())
        for frame in rgb:
            hasher.update(frame.tobytes())
        if time_format != "seconds":
            hasher.update(time_format.encode())
        return cls(frames=rgb, fps=fps, frame_indices=tuple(frame_indices), digest=hasher.hexdigest(), time_format=time_format)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, VideoPart) and other.digest == self.digest

    def __hash__(self) -> int:
        return hash(self.digest)


def _upright_rgb(image: PILImage.Image) -> PILImage.Image:
    if image.mode.startswith("I") or image.mode == "F":
        raise DataError(f"an image of mode {image.mode}, deeper than 8 bits a channel: scale it to 8 bits, it would be clipped")
    upright = ImageOps.exif_transpose(image)
    if not upright.has_transparency_data:
        return upright.convert("RGB")
    with_alpha = upright.convert("RGBA")
    white = PILImage.new("RGBA", with_alpha.size, "white")
    return PILImage.alpha_composite(white, with_alpha).convert("RGB")


MediaPart: TypeAlias = ImagePart | VideoPart
Part: TypeAlias = TextPart | ImagePart | VideoPart


@dataclass(frozen=True, kw_only=True, slots=True)
class ToolCall:
    """A call that an assistant turn makes: `ToolCall(name="zoom", arguments='{"label": "7"}')`."""

    name: str
    arguments: str
    """A JSON object as text, written into the turn as it stands."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Message:
    """One turn of a conversation: `Message(role="user", parts=(ImagePart.from_image(img), TextPart(text="How many?")))`."""

    role: Role
    parts: tuple[Part, ...]
    tool_calls: tuple[ToolCall, ...] = ()
    """What an assistant turn calls, after its text."""
    tools: tuple[str, ...] = ()
    """On a system message: the functions that may be called, each an OpenAI tool description as JSON text. They stand on the message
    that shows them, so that whatever renders the messages shows them too."""

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise DataError(f"unknown role {self.role!r}: a message is from one of {', '.join(ROLES)}")
        if self.tool_calls and self.role != "assistant":
            raise DataError(f"a {self.role} message holds tool calls: only an assistant message calls tools; move them there")
        if self.tools and self.role != "system":
            raise DataError(f"a {self.role} message holds tools: the system message describes them; move them there")

    @property
    def text(self) -> str:
        """All text of the message, joined."""
        return "".join(part.text for part in self.parts if isinstance(part, TextPart))

    @property
    def media(self) -> tuple[MediaPart, ...]:
        """Images and videos of the message in order."""
        return tuple(part for part in self.parts if not isinstance(part, TextPart))


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """One data row.

    For SFT the messages end with an assistant turn; for RL they end with a user turn and `answer` is the right answer. Example:
    `Example(id="add-17", messages=(...,), answer="12", task="add", source="handwriting")`.
    """

    id: str
    """Unique in its data set; seeds and logs use it."""
    messages: tuple[Message, ...]
    answer: str
    """What a verifier compares with; empty for SFT rows without one."""
    task: str
    source: str
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """Plain JSON values that a reward may read."""

    @property
    def media(self) -> tuple[MediaPart, ...]:
        """Images and videos of all messages in order."""
        return tuple(part for message in self.messages for part in message.media)


@dataclass(frozen=True, kw_only=True, slots=True)
class ToolAnswer:
    """What a tool answered to a block of a turn: `ToolAnswer(text="7", num_images=0, is_error=False)`."""

    text: str
    """As the policy read it."""
    num_images: int
    """Images behind the text; they are the next ones of the rollout's media."""
    is_error: bool
    """True when the text says why there is no result."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """What the policy wrote in one turn of a conversation with tools, and what it was answered.

    Example: a turn that zooms in once has one call and one answer with one image; the turn that answers has neither.
    """

    text: str
    """All that it wrote, calls included."""
    prompt_suffix: str
    """What the chat template wrote after the assistant header."""
    words: str
    """The text before the first call, trimmed; thinking included."""
    calls: tuple[ToolCall, ...]
    """Those that are calls as the format has it, in order."""
    answers: tuple[ToolAnswer, ...]
    """One for each call and each broken one, in order; none where the conversation ended with this turn."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rollout:
    """One response as the engine drew it: prompt and response as one flat token sequence.

    Example: prompt ids (7, 8) and response ids (3, 2) give `token_ids=(7, 8, 3, 2)`, `sampled=(False, False, True, True)`,
    `sampler_logprobs=(0.0, 0.0, -0.1, -0.7)`.
    """

    token_ids: tuple[int, ...]
    """[T] prompt and response; image and video placeholders expanded."""
    sampled: tuple[bool, ...]
    """[T] true where the policy chose the token."""
    sampler_logprobs: tuple[float, ...]
    """[T] log-prob by the engine when it was drawn (temperature and allowed ids applied), nats; 0.0 where not sampled."""
    media: tuple[MediaPart, ...]
    """Images and videos in the order of their placeholders."""
    text: str
    """The sampled tokens as text, special tokens left out; of a conversation with tools, its last turn, by which the answer is judged:
    empty where it was cut off before it answered (`turns`, `context`)."""
    prompt_suffix: str
    """What the chat template wrote after the assistant header, e.g. an opening think tag; empty for Instruct."""
    finish_reason: FinishReason
    policy_version: int
    """Number of optimizer updates in the weights that drew it; of several turns, the smallest."""
    turns: tuple[Turn, ...] = ()
    """Of a conversation with tools, in order; none of any other response."""
    ending: Ending = "one_turn"
    reason: str = ""
    """What broke, where the ending is `unavailable`."""

    def __post_init__(self) -> None:
        lengths = {len(self.token_ids), len(self.sampled), len(self.sampler_logprobs)}
        assert len(lengths) == 1, f"a rollout's arrays must have one length, not {sorted(lengths)}"

    @property
    def drawn_logprobs(self) -> tuple[float, ...]:
        """The engine's log-probs of the sampled tokens alone, nats."""
        return tuple(logprob for logprob, sampled in zip(self.sampler_logprobs, self.sampled, strict=True) if sampled)

    @property
    def num_sampled_tokens(self) -> int:
        """Length of the response in tokens."""
        return sum(self.sampled)

    @property
    def num_tool_calls(self) -> int:
        """Calls that a tool answered with a result."""
        return sum(not answer.is_error for turn in self.turns for answer in turn.answers)

    @property
    def num_tool_errors(self) -> int:
        """Calls, or what was meant for one, that got words instead of a result."""
        return sum(answer.is_error for turn in self.turns for answer in turn.answers)


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """The rollouts of one example: what advantages compare."""

    example: Example
    rollouts: tuple[Rollout, ...]
    """[G]"""


Targets = TypeVar("Targets")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainSequence(Generic[Targets]):
    """A token sequence that a method trains on, with what its loss needs for it.

    `targets` is the method's own record; its per-token arrays run over the trained tokens in order.
    """

    place: str
    """Whose sequence it is, for messages: an example id, with the number of the rollout where there are several."""
    token_ids: tuple[int, ...]
    """[T]"""
    trained: tuple[bool, ...]
    """[T] true where the token is a target; never the first token."""
    media: tuple[MediaPart, ...]
    targets: Targets

    def __post_init__(self) -> None:
        assert len(self.token_ids) == len(self.trained), "token_ids and trained must have one length"
        assert not self.trained[0], "the first token has no token before it that could predict it"

    @property
    def num_trained_tokens(self) -> int:
        """Number of target tokens."""
        return sum(self.trained)
