r"""Verifiers of places in an image: boxes, points and clicks.

Places are read in Qwen3-VL's own form, `[{"bbox_2d": [x1, y1, x2, y2], "label": "..."}]` and `[{"point_2d": [x, y], "label": "..."}]`,
also inside a JSON fence, as a single object, or as bare numbers (`[x1, y1, x2, y2]`, `(x1,y1),(x2,y2)`, `(x, y)`), and a click as the tool
call `{"action": "left_click", "coordinate": [x, y]}`. Coordinates of answer and response are of one kind: `relative` runs from 0 to 1000
over the width and the height of the image, `pixels` from 0 to its size (`metadata["image_size"] = [width, height]`, else the size of the
example's first image).

Boxes and points are matched one to one with the example's so that the sum of their scores is largest (the assignment problem), and

    value = sum of matched scores / max(number predicted, number in the answer).

Dropping the predictions that are matched with nothing never lowers the value, so spraying does not pay: a response gets at most what
it would have got for its best few boxes alone. A box that is empty, reversed or reaches outside the image is counted as predicted and
matches nothing; a coordinate that is no number, and more than `MAX_PLACES` places, make the whole response malformed: 0.0. Labels must
agree (case and spaces aside) where both sides have one.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from ..model.config import Share
from ..model.records import DataError, Example, ImagePart, Rollout
from .answers import final_answer, half_width, normalise_spaces
from .built_in import BuiltInReward
from .json_answer import JsonError, parse_json, read_json
from .result import RewardResult, Unavailable

MAX_RESPONSE_CHARS = 200_000
"""Longest response that is searched for an answer, characters."""
MAX_ANSWER_CHARS = 20_000
"""Longest final answer, characters."""
MAX_PLACES = 64
"""Most boxes or points that are read."""
MAX_COORDINATE = 1e6
MAX_POLYGON_POINTS = 1000
MAX_MASK_RUNS = 100_000
RELATIVE_SIZE = (1000.0, 1000.0)

Coordinates = Literal["relative", "pixels"]
"""Of answer and response alike."""
Region: TypeAlias = Mapping[str, Any]

_BOX_KEYS = ("bbox_2d", "bbox", "box_2d", "box", "边界框")
_POINT_KEYS = ("point_2d", "point", "coordinate", "坐标", "点")
_LABEL_KEYS = ("label", "标签")
_ACTION_NAMES = {"单击": "left_click", "点击": "left_click", "左键单击": "left_click", "click": "left_click", "右键单击": "right_click"}
_ACTION_NAMES |= {"双击": "double_click"}
_NUMBER = r"\s{0,4}([+-]?[0-9]{1,9}(?:\.[0-9]{1,15})?)\s{0,4}"
_PAIR = re.compile(rf"(?:click)?\s{{0,4}}[(\[]{_NUMBER},{_NUMBER}[)\]]", re.IGNORECASE)
_CORNERS = re.compile(rf"[(\[]{_NUMBER},{_NUMBER}(?:[)\]]\s{{0,4}},?\s{{0,4}}[(\[]|,){_NUMBER},{_NUMBER}[)\]]")
_TOOL_CALL = re.compile(r"<tool_call>((?:(?!<tool_call>).)*?)</tool_call>", re.DOTALL)


class PlaceError(ValueError):
    """A text that does not give places; the message says why."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """A box (x1, y1, x2, y2) or a point (x, y), as it was written."""

    numbers: tuple[float, ...]
    label: str = ""
    action: str = ""
    """What a tool call does there; empty where no call was made."""


def read_places(text: str, *, length: Literal[2, 4]) -> list[Place]:
    """Returns the points (`length` 2) or boxes (4) that a text gives; a `PlaceError` when it gives none, too many or something else."""
    if len(text) > MAX_ANSWER_CHARS:
        raise PlaceError(f"a final answer of {len(text)} characters; at most {MAX_ANSWER_CHARS} are read")
    calls = _TOOL_CALL.findall(text)
    if len(calls) > 1:
        raise PlaceError(f"{len(calls)} tool calls; one is read")
    written = half_width(calls[0] if calls else text).strip()
    bare = (_PAIR if length == 2 else _CORNERS).fullmatch(written.strip("。."))
    if bare:
        return [Place(numbers=_numbers([float(digits) for digits in bare.groups()], length))]
    try:
        value = parse_json(written) if calls else read_json(written)
    except JsonError as error:
        raise PlaceError(str(error)) from None
    entries = value if isinstance(value, list) and not _all_numbers(value) else [value]
    if len(entries) > MAX_PLACES:
        raise PlaceError(f"{len(entries)} places; at most {MAX_PLACES} are read")
    return [_place(entry, length) for entry in entries]


def _all_numbers(value: Sequence[Any]) -> bool:
    return bool(value) and all(isinstance(number, (int, float)) for number in value)


def _place(entry: object, length: int) -> Place:
    if isinstance(entry, list):
        return Place(numbers=_numbers(entry, length))
    if not isinstance(entry, dict):
        raise PlaceError("neither an object nor a list of coordinates")
    if isinstance(arguments := entry.get("arguments"), dict):
        entry = arguments
    found = [entry[key] for key in (_BOX_KEYS if length == 4 else _POINT_KEYS) if key in entry]
    if len(found) != 1 or not isinstance(found[0], list):
        raise PlaceError(f"an object without one {'bbox_2d' if length == 4 else 'point_2d'}")
    label = next((entry[key] for key in _LABEL_KEYS if key in entry), "")
    action = entry.get("action", "")
    if not isinstance(label, str) or not isinstance(action, str):
        raise PlaceError("a label or action that is no text")
    action = _ACTION_NAMES.get(action.strip().lower(), action.strip().lower())
    return Place(numbers=_numbers(found[0], length), label=normalise_spaces(label).casefold(), action=action)


def _numbers(values: Sequence[Any], length: int) -> tuple[float, ...]:
    if len(values) != length:
        raise PlaceError(f"{len(values)} coordinates where {length} are needed")
    for value in values:
        # Compared as it stands: a whole number of a hundred digits is not turned into a float first.
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not -MAX_COORDINATE <= value <= MAX_COORDINATE:
            raise PlaceError("a coordinate that is no number, or too large")
    return tuple(map(float, values))


def iou(first: Sequence[float], second: Sequence[float]) -> float:
    """Returns the intersection over union of two boxes (x1, y1, x2, y2) in [0, 1]; 0.0 where one is empty or reversed."""
    areas = [max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1]) if box[2] > box[0] else 0.0 for box in (first, second)]
    if not all(areas):
        return 0.0
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    if width <= 0 or height <= 0:
        return 0.0
    overlap = width * height
    return min(1.0, overlap / (areas[0] + areas[1] - overlap))


def matched_value(scores: Sequence[Sequence[float]], *, num_answers: int) -> float:
    """Returns the largest sum of scores over one-to-one matches / max(predictions, answers); `scores[i][j]` of prediction i, answer j.

    Nothing predicted where the answer is nothing is 1.0.
    """
    num_predicted = len(scores)
    if not num_predicted or not num_answers:
        return float(num_predicted == num_answers)
    if num_predicted == 1 or num_answers == 1:
        total = max(max(row) for row in scores)
    else:
        # Imported late: scipy takes longer to load than the rest of the package.
        from scipy.optimize import linear_sum_assignment

        rows, columns = linear_sum_assignment(scores, maximize=True)
        total = math.fsum(scores[row][column] for row, column in zip(rows, columns, strict=True))
    return min(1.0, total / max(num_predicted, num_answers))


def image_size(example: Example, coordinates: Coordinates) -> tuple[float, float] | None:
    """Returns width and height that coordinates run to, or None when pixels are asked for and the example does not tell."""
    if coordinates == "relative":
        return RELATIVE_SIZE
    given = example.metadata.get("image_size")
    if given is None:
        first = next(iter(example.media), None)
        return (float(first.image.width), float(first.image.height)) if isinstance(first, ImagePart) else None
    try:
        width, height = _numbers(list(given), 2) if isinstance(given, (list, tuple)) else (0.0, 0.0)
    except PlaceError:
        return None
    return (width, height) if width > 0 and height > 0 else None


def is_inside(numbers: Sequence[float], size: tuple[float, float]) -> bool:
    """Returns whether a point lies in the image, or a box is not empty, not reversed and lies wholly in the image."""
    if any(not 0 <= number <= size[axis % 2] for axis, number in enumerate(numbers)):
        return False
    return len(numbers) == 2 or (numbers[0] < numbers[2] and numbers[1] < numbers[3])


def _agree(first: str, second: str) -> bool:
    return not first or not second or first == second


def _answer_boxes(example: Example) -> list[Place]:
    try:
        boxes = read_places(example.answer, length=4)
    except PlaceError as error:
        raise DataError(
            f'example {example.id!r}: answer {example.answer[:80]!r} gives no boxes ({error}); write [{{"bbox_2d": [x1, y1, x2, y2]}}]'
        ) from None
    for box in boxes:
        if not is_inside(box.numbers, (MAX_COORDINATE, MAX_COORDINATE)):
            raise DataError(
                f"example {example.id!r}: box {box.numbers} is empty, reversed or outside; write [x1, y1, x2, y2] with x1 < x2, y1 < y2"
            )
    return boxes


def check_box_answer(example: Example) -> None:
    """Raises a `DataError` unless the example's answer is a list of boxes, which may be empty."""
    _answer_boxes(example)


def check_click_answer(example: Example) -> None:
    """Raises a `DataError` unless the example's answer is at least one target box."""
    if not _answer_boxes(example):
        raise DataError(f"example {example.id!r}: the answer names no box to click in; give at least one")


def check_point_answer(example: Example) -> None:
    """Raises a `DataError` unless the regions (`metadata["regions"]`, else the boxes of the answer) can be read.

    With regions in the metadata the answer must be one point for each.
    """
    regions = _regions(example)
    if not regions:
        raise DataError(f"example {example.id!r}: there is no region that a point could lie in; give at least one")
    if "regions" in example.metadata:
        try:
            points = read_places(example.answer, length=2)
        except PlaceError as error:
            raise DataError(f'example {example.id!r}: the answer gives no points ({error}); write [{{"point_2d": [x, y]}}]') from None
        if len(points) != len(regions):
            raise DataError(f"example {example.id!r}: {len(points)} points for {len(regions)} regions; give one point in each")


def _regions(example: Example) -> list[Region]:
    if "regions" not in example.metadata:
        return [{"bbox_2d": list(box.numbers), "label": box.label} for box in _answer_boxes(example)]
    regions = example.metadata["regions"]
    if not isinstance(regions, (list, tuple)) or len(regions) > MAX_PLACES:
        raise DataError(f"example {example.id!r}: metadata regions must be a list of at most {MAX_PLACES}")
    for region in regions:
        if not isinstance(region, Mapping) or not any(_is_readable(region, key) for key in ("bbox_2d", "polygon", "counts")):
            raise DataError(
                f"example {example.id!r}: a region that cannot be read ({str(region)[:80]}); give bbox_2d, polygon, or size and counts"
            )
    return list(regions)


def _is_readable(region: Region, key: str) -> bool:
    values = region.get(key)
    if not isinstance(values, (list, tuple)):
        return False
    try:
        if key == "bbox_2d":
            return is_inside(_numbers(values, 4), (MAX_COORDINATE, MAX_COORDINATE))
        if key == "polygon":
            return 3 <= len(values) <= MAX_POLYGON_POINTS and all(len(_numbers(list(corner), 2)) == 2 for corner in values)
        size = region.get("size")
        if not isinstance(size, (list, tuple)) or len(values) > MAX_MASK_RUNS:
            return False
        height, width = _numbers(list(size), 2)
        return all(isinstance(run, int) and run >= 0 for run in values) and sum(values) == height * width > 0
    except (PlaceError, TypeError):
        return False


def is_in_region(point: Sequence[float], region: Region, *, size: tuple[float, float]) -> bool:
    """Returns whether a point lies in a region of the example.

    A region is `{"bbox_2d": [x1, y1, x2, y2]}` (edges belong to it), `{"polygon": [[x, y], ...]}` (even-odd rule; an edge may fall to
    either side) or a mask `{"size": [height, width], "counts": [...]}`: COCO's uncompressed run lengths, column by column, zeros first.
    """
    if "bbox_2d" in region:
        left, top, right, bottom = region["bbox_2d"]
        return left <= point[0] <= right and top <= point[1] <= bottom
    if "polygon" in region:
        return _is_in_polygon(point, region["polygon"])
    height, width = (int(number) for number in region["size"])
    column, row = (min(int(point[axis] / size[axis] * (width, height)[axis]), (width, height)[axis] - 1) for axis in (0, 1))
    position, is_set = column * height + row, False
    for run in region["counts"]:
        if position < run:
            return is_set
        position, is_set = position - run, not is_set
    return False


def _is_in_polygon(point: Sequence[float], corners: Sequence[Sequence[float]]) -> bool:
    inside, (x, y), (from_x, from_y) = False, point, corners[-1]
    for to_x, to_y in corners:
        if (to_y > y) != (from_y > y) and x < (from_x - to_x) * (y - to_y) / (from_y - to_y) + to_x:
            inside = not inside
        from_x, from_y = to_x, to_y
    return inside


def _predictions(rollout: Rollout, *, length: Literal[2, 4]) -> list[Place] | RewardResult:
    if len(rollout.text) > MAX_RESPONSE_CHARS:
        return RewardResult(value=0.0, note=f"a response of {len(rollout.text)} characters; at most {MAX_RESPONSE_CHARS} are read")
    prediction = final_answer(rollout.text, prompt_suffix=rollout.prompt_suffix)
    if prediction is None:
        return RewardResult(value=0.0, note="no final answer, or several that differ")
    try:
        return read_places(prediction, length=length)
    except PlaceError as error:
        return RewardResult(value=0.0, note=f"the final answer cannot be read: {error}")


def _no_size(example: Example) -> Unavailable:
    return Unavailable(reason=f"example {example.id!r}: pixels need metadata image_size = [width, height] or an image in the prompt")


def box(
    example: Example, rollout: Rollout, *, coordinates: Coordinates = "relative", iou_threshold: Share | None = None
) -> RewardResult | Unavailable:
    """Returns the sum of the IoUs of matched boxes / max(number predicted, number in the answer), in [0, 1].

    `iou_threshold`: a matched pair counts 1 from this IoU on and 0 below, instead of the IoU.
    """
    size = image_size(example, coordinates)
    if size is None:
        return _no_size(example)
    try:
        answers = _answer_boxes(example)
    except DataError as error:
        return Unavailable(reason=str(error))
    if not all(is_inside(answer.numbers, size) for answer in answers):
        return Unavailable(reason=f"example {example.id!r}: a box of the answer reaches outside 0 to {size}; is it in {coordinates}?")
    predictions = _predictions(rollout, length=4)
    if isinstance(predictions, RewardResult):
        return predictions

    def score(prediction: Place, answer: Place) -> float:
        if not _agree(prediction.label, answer.label) or not is_inside(prediction.numbers, size):
            return 0.0
        overlap = iou(prediction.numbers, answer.numbers)
        return overlap if iou_threshold is None else float(overlap > 0 and overlap >= iou_threshold)

    return _matched(predictions, answers, score)


def _matched(predictions: Sequence[Place], answers: Sequence[Any], score: Callable[[Place, Any], float]) -> RewardResult:
    scores = [[score(prediction, answer) for answer in answers] for prediction in predictions]
    return RewardResult(value=matched_value(scores, num_answers=len(answers)), note=f"{len(predictions)} for {len(answers)}")


def point(example: Example, rollout: Rollout, *, coordinates: Coordinates = "relative") -> RewardResult | Unavailable:
    """Returns the number of points matched with a region they lie in / max(number of points, number of regions), in [0, 1].

    Regions are those of `metadata["regions"]` (see `is_in_region`), else the boxes of the answer.
    """
    size = image_size(example, coordinates)
    if size is None:
        return _no_size(example)
    try:
        check_point_answer(example)
    except DataError as error:
        return Unavailable(reason=str(error))
    predictions = _predictions(rollout, length=2)
    if isinstance(predictions, RewardResult):
        return predictions

    def score(prediction: Place, region: Region) -> float:
        label = normalise_spaces(str(region.get("label", ""))).casefold()
        is_hit = is_inside(prediction.numbers, size) and is_in_region(prediction.numbers, region, size=size)
        return float(is_hit and _agree(prediction.label, label))

    return _matched(predictions, _regions(example), score)


def click(
    example: Example, rollout: Rollout, *, coordinates: Coordinates = "relative", action: str = "left_click"
) -> RewardResult | Unavailable:
    """Returns 1.0 when the response makes one click, and inside a box of the answer (any of them, edges included), else 0.0.

    `action`: what a tool call must name; a bare point names none.
    """
    size = image_size(example, coordinates)
    if size is None:
        return _no_size(example)
    try:
        check_click_answer(example)
    except DataError as error:
        return Unavailable(reason=str(error))
    predictions = _predictions(rollout, length=2)
    if isinstance(predictions, RewardResult):
        return predictions
    if len(predictions) != 1:
        return RewardResult(value=0.0, note=f"{len(predictions)} clicks; one is wanted")
    if predictions[0].action not in ("", action):
        return RewardResult(value=0.0, note=f"the action is not {action}")
    where = predictions[0].numbers
    targets = [{"bbox_2d": answer.numbers} for answer in _answer_boxes(example)]
    return RewardResult(value=float(is_inside(where, size) and any(is_in_region(where, target, size=size) for target in targets)))


def _centres(boxes: Sequence[Place]) -> str:
    points = [{"point_2d": [(x1 + x2) / 2, (y1 + y2) / 2], "label": place.label} for place in boxes for x1, y1, x2, y2 in [place.numbers]]
    return json.dumps(points, ensure_ascii=False)


def point_response(example: Example) -> str:
    """Returns the centres of the answer's boxes, or the answer itself where the metadata holds the regions."""
    return example.answer if "regions" in example.metadata else _centres(_answer_boxes(example))


def click_response(example: Example) -> str:
    """Returns the centre of the answer's first box."""
    return _centres(_answer_boxes(example)[:1])


REWARDS: Mapping[str, BuiltInReward] = {
    "box": BuiltInReward(
        summary="IoU of matched boxes over max(predicted, in the answer)",
        value_range=(0.0, 1.0),
        check_answer=check_box_answer,
        function=box,
    ),
    "point": BuiltInReward(
        summary="points that lie in the example's boxes or masks, over max(predicted, in the answer)",
        value_range=(0.0, 1.0),
        check_answer=check_point_answer,
        gold_response=point_response,
        function=point,
    ),
    "click": BuiltInReward(
        summary="one click, inside a target box",
        value_range=(0.0, 1.0),
        check_answer=check_click_answer,
        gold_response=click_response,
        function=click,
    ),
}
