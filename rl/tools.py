"""The tools of the library, `image_zoom_in` and `python`, and how those of a recipe are opened. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Protocol

from PIL import Image

from ..model.records import ImagePart
from ..rewards.execution import Execution, Limits
from ..rewards.json_answer import Json
from ..rewards.sandbox import Sandbox
from .tool import ERROR, Tool, ToolConfigError, ToolResult, ToolUnavailableError, argument_faults, describe, failed, quoted, shorten
from .tools_config import PythonToolConfig, ToolConfig, UserToolConfig, ZoomToolConfig
from .user_tool import user_tool

TOKEN_PIXELS = 32
"""Width and height that one merged vision token of Qwen3-VL covers."""
MIN_CROP_PIXELS = 32
"""A shorter side of a box is widened to this."""
MAX_ASPECT_RATIO = 100
"""Of a cut-out, as in DeepEyes (Visual-Agent/DeepEyes). Rounding makes it at most 1.5 times as much; Qwen3-VL's processor takes 200."""
COORDINATES = 1000
"""Boxes are relative: 0 to 1000 over the width and over the height."""


class ZoomTool:
    """Qwen3-VL's `image_zoom_in_tool`: cuts a box out of any image of the conversation and enlarges it.

    Arguments: `bbox_2d` [x1, y1, x2, y2] in 0-1000 of the image, `label` in words, `img_idx` counting all images of the conversation
    from 0, cut-outs included. Source: QwenLM/Qwen-Agent, qwen_agent/tools/image_zoom_in_qwen3vl.py. Deviations: a box is cut out whole, at
    the pixels around it; a side below 32 pixels is widened to 32 and the other left as it is (there, both grow by one factor, and a box at
    the border that does not fit then stays small); a box without an area, outside the image or with a shape above 100:1 is refused with
    words.
    """

    name = "image_zoom_in_tool"
    description = describe(
        name,
        "Zoom in on a region of an image: cuts out a box and enlarges it",
        properties={
            "bbox_2d": {
                "type": "array",
                "items": {"type": "number"},
                "minItems": 4,
                "maxItems": 4,
                "description": "The box to zoom in on, [x1, y1, x2, y2] from its top left to its bottom right corner, 0 to 1000",
            },
            "label": {"type": "string", "description": "What is in the box"},
            "img_idx": {"type": "number", "description": "Which image of the conversation, counted from 0"},
        },
        required=("bbox_2d", "label", "img_idx"),
    )
    _arguments = ("bbox_2d", "label", "img_idx")

    def __init__(self, config: ZoomToolConfig) -> None:
        self._config = config

    def run(self, arguments: Mapping[str, Json], *, images: Sequence[ImagePart]) -> ToolResult:
        """Returns the enlarged cut-out."""
        if fault := argument_faults(arguments, known=self._arguments, required=self._arguments):
            return failed(fault)
        bbox, label, index = (arguments[name] for name in self._arguments)
        if not isinstance(label, str):
            return failed(f"label = {quoted(label)}: say in a text what is in the box")
        # JSON has one kind of number: 0.0 is the first image too.
        if isinstance(index, bool) or not isinstance(index, int | float) or not 0 <= index < len(images) or index != int(index):
            counted = f"a whole number from 0 to {len(images) - 1}" if images else "none, as the conversation has no image"
            return failed(f"img_idx = {quoted(index)}: must be {counted}")
        corners = _corners(bbox)
        if isinstance(corners, str):
            return failed(corners)
        image = images[int(index)].image
        crop = crop_pixels(corners, image.size)
        width, height = crop[2] - crop[0], crop[3] - crop[1]
        if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
            return failed(
                f"bbox_2d = {quoted(bbox)} is {width} x {height} pixels: a side may be {MAX_ASPECT_RATIO} times the other at most"
            )
        size = enlarged_size((width, height), min_tokens=self._config.min_tokens, max_tokens=self._config.max_tokens)
        enlarged = image.crop(crop).resize(size, resample=Image.Resampling.BICUBIC)
        return ToolResult(images=(ImagePart.from_image(enlarged),))


def _corners(bbox: Json) -> tuple[float, float, float, float] | str:
    """Returns the box in 0-1000, cut at the image's border, or words about what is wrong with it."""
    if not isinstance(bbox, list) or len(bbox) != 4:
        return f"bbox_2d = {quoted(bbox)}: must be a list of four numbers, [x1, y1, x2, y2]"
    numbers = [min(max(side, 0), COORDINATES) for side in bbox if isinstance(side, int | float) and not isinstance(side, bool)]
    if len(numbers) != 4:
        return f"bbox_2d = {quoted(bbox)}: must be a list of four numbers, [x1, y1, x2, y2]"
    x1, y1, x2, y2 = numbers
    if not (x1 < x2 and y1 < y2):
        return f"bbox_2d = {quoted(bbox)} has no area inside the image: x1 < x2 and y1 < y2, each from 0 to {COORDINATES}"
    return x1, y1, x2, y2


def crop_pixels(corners: tuple[float, float, float, float], size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Returns (left, top, right, bottom) in pixels of a box in 0-1000 of an image of `size`; every side is at least 32 where it fits."""
    left, right = _side(corners[0], corners[2], size[0])
    top, bottom = _side(corners[1], corners[3], size[1])
    return left, top, right, bottom


def _side(low: float, high: float, pixels: int) -> tuple[int, int]:
    start, end = math.floor(low * pixels / COORDINATES), math.ceil(high * pixels / COORDINATES)
    if end - start >= MIN_CROP_PIXELS:
        return start, end
    if pixels <= MIN_CROP_PIXELS:
        return 0, pixels
    middle = (low + high) / 2 * pixels / COORDINATES
    start = min(max(math.floor(middle - MIN_CROP_PIXELS / 2), 0), pixels - MIN_CROP_PIXELS)
    return start, start + MIN_CROP_PIXELS


def enlarged_size(size: tuple[int, int], *, min_tokens: int, max_tokens: int) -> tuple[int, int]:
    """Returns the width and height, multiples of 32 near the same shape, at which a cut-out is shown.

    Sides are rounded to the nearest multiple; outside the range of tokens both are scaled by one factor, up to the next multiple when
    enlarged and down when reduced (Qwen2-VL's `smart_resize` with factor 32). What that leaves above the largest number of tokens, as
    happens to thin shapes, is taken off the longer side.
    """
    sides = [side / TOKEN_PIXELS for side in size]
    tokens = [max(1, round(side)) for side in sides]
    area = sides[0] * sides[1]
    if tokens[0] * tokens[1] > max_tokens:
        scale = math.sqrt(area / max_tokens)
        tokens = [max(1, math.floor(side / scale)) for side in sides]
    elif tokens[0] * tokens[1] < min_tokens:
        scale = math.sqrt(min_tokens / area)
        tokens = [math.ceil(side * scale) for side in sides]
    if tokens[0] * tokens[1] > max_tokens:
        longer = 0 if tokens[0] >= tokens[1] else 1
        tokens[longer] = max_tokens // tokens[1 - longer]
    return tokens[0] * TOKEN_PIXELS, tokens[1] * TOKEN_PIXELS


class _Jail(Protocol):
    def run(self, program: str, *, stdin: bytes = b"", limits: Limits) -> Execution: ...


class PythonTool:
    """Runs a program in a jail and answers with what it printed; each call is a program of its own and remembers nothing.

    Only the standard library is in the jail, so there are no figures to return as images.
    """

    name = "python"
    description = describe(
        name,
        "Run a Python program (standard library only) and read what it prints",
        properties={"code": {"type": "string", "description": "The program; it must print what you want to know"}},
        required=("code",),
    )

    def __init__(self, config: PythonToolConfig, jail: _Jail) -> None:
        self._config = config
        self._jail = jail

    def run(self, arguments: Mapping[str, Json], *, images: Sequence[ImagePart]) -> ToolResult:
        """Returns what the program printed, with the end of its traceback when it failed."""
        if fault := argument_faults(arguments, known=("code",), required=("code",)):
            return failed(fault)
        code = arguments["code"]
        if not isinstance(code, str):
            return failed(f"code = {quoted(code)}: must be the text of a program")
        # Output beyond what is shown costs memory only up to what four bytes a character take.
        limits = Limits(
            wall_s=self._config.time_limit_s,
            memory_bytes=self._config.memory_mib * 2**20,
            output_bytes=max(2**16, 8 * self._config.max_output_chars),
        )
        execution = self._jail.run(code, limits=limits)
        if execution.status == "internal_error":
            raise ToolUnavailableError(f"tool python: the sandbox failed ({execution.reason})")
        printed = shorten(execution.stdout.decode(errors="replace"), self._config.max_output_chars)
        if execution.status == "finished" and execution.exit_code == 0:
            return ToolResult(text=printed or "(the program printed nothing)")
        complaint = execution.stderr.decode(errors="replace").strip()
        reason = shorten(complaint or execution.reason, self._config.max_output_chars)
        before = f"{printed.rstrip()}\n" if printed.strip() else ""
        return ToolResult(text=f"{before}{ERROR}{_END_OF_PROGRAM[execution.status]}: {reason}", is_error=True)


_END_OF_PROGRAM: Mapping[str, str] = {
    "finished": "the program failed",
    "runtime_error": "the program failed",
    "time_limit": "the program took too long",
    "memory_limit": "the program took too much memory",
    "output_limit": "the program printed too much",
    "refused": "the program was not run",
}


@contextmanager
def open_tools(tools: Sequence[ToolConfig], *, recipe_folder: Path | None, allow_code: bool) -> Iterator[dict[str, Tool]]:
    """Yields the tools of a recipe by name; leaving the block closes their jails.

    Raises `ToolConfigError` for two tools of one name and for a user's tool that cannot be loaded or described, and the sandbox's own error
    where no jail holds. `recipe_folder` and `allow_code` are those of reward plug-ins: where a file with code may lie.
    """
    with ExitStack() as stack:
        opened: dict[str, Tool] = {}
        for config in tools:
            tool = _open(config, stack, recipe_folder=recipe_folder, allow_code=allow_code)
            if tool.name in opened:
                raise ToolConfigError(f"tool {config.use!r}: another tool is called {tool.name!r} too; give each function its own name")
            opened[tool.name] = tool
        yield opened


def _open(config: ToolConfig, stack: ExitStack, *, recipe_folder: Path | None, allow_code: bool) -> Tool:
    if isinstance(config, UserToolConfig):
        return user_tool(config, recipe_folder=recipe_folder, allow_code=allow_code)
    if isinstance(config, PythonToolConfig):
        return PythonTool(config, stack.enter_context(Sandbox(config.sandbox)))
    return ZoomTool(config)
