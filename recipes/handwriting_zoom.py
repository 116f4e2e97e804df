r"""Questions of the handwriting track about numbers that are too small to read until one zooms in on them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from PIL import Image, ImageChops

from ..model.records import ImagePart, Message, TextPart, ToolCall
from ..rl.tools import ZoomTool
from ..rl.tools_config import ZoomToolConfig
from .data_config import Language, TaskKind
from .handwriting_questions import BOXED
from .handwriting_scans import Size, digits_of, draw_at, draw_row
from .handwriting_scenes import Scene, SceneSource

CANVAS_PIXELS = 1000
"""Width and height of the canvas: pixels are the relative coordinates of boxes. A nano of at most 64 image tokens sees 256 x 256 pixels."""
CELL_PIXELS = 125
"""A number stands in one of 8 x 8 cells, each what one of those 64 tokens covers."""
PLATE_PIXELS = 32
"""Width and height of the grey plate behind a small number, in the middle of its cell: it shows where to zoom in, and is the true box."""
SMALL_DIGIT_PIXELS: Size = (8, 8)
"""As the scans are; a nano of at most 64 image tokens sees 2 x 2 pixels of a digit."""
LARGE_DIGIT_PIXELS: Size = (250, 250)
"""A nano of at most 64 image tokens sees 64 x 64 pixels, as in the other kinds."""
TRACK_ZOOM = ZoomToolConfig(use="image_zoom_in", min_tokens=64, max_tokens=128)
"""The zoom tool of the solutions: it shows a plate as 256 x 256 pixels, its digits as large as in the other kinds. A recipe whose policy
learned from them opens the tool alike."""

_PLATE_SHADE = 64
_PHRASINGS: Mapping[Language, tuple[str, ...]] = {
    "en": ("What is the sum of all numbers in the image?", "Add all numbers that you see.", "What do the numbers add up to?"),
    "zh": ("图中所有的数的和是多少？", "把图中的数都相加。", "图中的数相加等于多少？"),
}
_LABEL = "number"


def _draw_zoom(source: SceneSource) -> Scene:
    """Returns a large number, a small one, or two small ones of one digit each; the sum is asked for, which of one number is itself."""
    dice = source.dice
    text = source.phrasing(_PHRASINGS) + BOXED[source.language]
    target_calls = dice.below(3)
    numbers = [dice.below(10), dice.below(10)] if target_calls == 2 else [dice.number(2)]
    rows = [[source.scan(digit) for digit in digits_of(number)] for number in numbers]
    cells_a_side = CANVAS_PIXELS // CELL_PIXELS
    if target_calls == 0:
        room = [CANVAS_PIXELS - 2 * LARGE_DIGIT_PIXELS[0], CANVAS_PIXELS - LARGE_DIGIT_PIXELS[1]]
        left, top = (CELL_PIXELS * dice.below(1 + pixels // CELL_PIXELS) for pixels in room)
        canvas, plates = _large(rows[0], left, top), []
    else:
        cells = sorted(dice.several(range(cells_a_side**2), len(numbers)))
        margin = (CELL_PIXELS - PLATE_PIXELS) // 2
        plates = [(cell % cells_a_side * CELL_PIXELS + margin, cell // cells_a_side * CELL_PIXELS + margin) for cell in cells]
        canvas = _small(rows, plates)
    answer = str(sum(numbers))
    working = "+".join(map(str, numbers)) + "=" if len(numbers) > 1 else ""
    return Scene(
        messages=(Message(role="user", parts=(ImagePart.from_image(canvas), TextPart(text=text))),),
        solution=f"{working}\\boxed{{{answer}}}",
        answer=answer,
        digits=[digit for number in numbers for digit in digits_of(number)],
        scans=[scan for row in rows for scan in row],
        facts={
            "numbers": numbers,
            "boxes": [[left, top, left + PLATE_PIXELS, top + PLATE_PIXELS] for left, top in plates],
            "target_calls": target_calls,
            "needs_image": True,
        },
    )


def _large(row: Sequence[int], left: int, top: int) -> Image.Image:
    canvas = Image.new("L", (CANVAS_PIXELS, CANVAS_PIXELS))
    width, height = LARGE_DIGIT_PIXELS
    # By way of the size that the other kinds use, whose enlarged scans are kept.
    canvas.paste(draw_row(row, (64, 64)).resize((len(row) * width, height), Image.Resampling.BICUBIC), (left, top))
    return canvas


def _small(rows: Sequence[Sequence[int]], plates: Sequence[tuple[int, int]]) -> Image.Image:
    """Returns a canvas with each row of digits in the middle of its plate."""
    size = (CANVAS_PIXELS, CANVAS_PIXELS)
    width, height = SMALL_DIGIT_PIXELS
    places: dict[tuple[int, int], int] = {}
    background = Image.new("L", size)
    for row, (left, top) in zip(rows, plates, strict=True):
        background.paste(_PLATE_SHADE, (left, top, left + PLATE_PIXELS, top + PLATE_PIXELS))
        first, line = left + (PLATE_PIXELS - len(row) * width) // 2, top + (PLATE_PIXELS - height) // 2
        places |= {(first + offset * width, line): scan for offset, scan in enumerate(row)}
    return ImageChops.lighter(background, draw_at(places, SMALL_DIGIT_PIXELS, size=size))


def _draw_zoom_calls(source: SceneSource) -> Scene:
    """Returns the scene of `zoom` with a zoom on each small number before the solution.

    The turns think nothing, so the rows are for the Instruct template: Thinking's writes no think block for such a turn once it is history,
    while a policy that wrote it has one there.
    """
    scene = _draw_zoom(source)
    tool = ZoomTool(TRACK_ZOOM)
    images = [part for message in scene.messages for part in message.media if isinstance(part, ImagePart)]
    steps: list[Message] = []
    for box in scene.facts["boxes"]:
        arguments = {"bbox_2d": box, "label": _LABEL, "img_idx": 0}
        shown = tool.run(arguments, images=images)
        images += shown.images
        call = ToolCall(name=tool.name, arguments=json.dumps(arguments))
        steps += [Message(role="assistant", parts=(), tool_calls=(call,)), Message(role="tool", parts=shown.images)]
    return replace(scene, steps=tuple(steps))


ZOOM_SCENES: dict[TaskKind, Callable[[SceneSource], Scene]] = {"zoom": _draw_zoom, "zoom_calls": _draw_zoom_calls}
"""What draws each kind."""
