"""Verifiers of times: the time of day that a clock shows, and spans of a video. English and Chinese, digits and words.

`clock` gives 1.0 or 0.0, within a tolerance if the recipe has one. `time_span` gives the temporal IoU of all spans together,

    value = seconds in both / seconds in either,

so a span that is added where the answer has none lowers it, and spans that overlap count once.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, TypeAlias

from pydantic import Field

from ..model.config import Share
from ..model.records import DataError, Example, Rollout
from .answers import bare, final_answer
from .built_in import BuiltInReward
from .json_answer import Json, JsonError, parse_json, read_json
from .result import RewardResult, Unavailable
from .visual_answer import whole_number

MAX_RESPONSE_CHARS = 200_000
"""Longest response that is searched for an answer, characters."""
MAX_CLOCK_CHARS = 80
MAX_SPANS_CHARS = 5000
MAX_SPANS = 64
MAX_SECONDS = 1e6
DAY_S = 86_400
HALF_DAY_S = 43_200

Span: TypeAlias = tuple[float, float]

_DIGITAL = re.compile(r"([0-9]{1,2})[:.]([0-5][0-9])(?::([0-5][0-9]))? ?(.*)", re.ASCII)
_O_CLOCK = re.compile(r"([a-z0-9]{1,6}) ?(?:o'clock|o’clock|(?=[ap]\.?m\.?$))(?: sharp)? ?(.*)", re.ASCII)
_PAST = re.compile(
    r"(?:a )?(half|quarter|[a-z0-9 -]{1,13}?)(?: minutes?)? (past|after|to|before) ([a-z0-9]{1,6})(?: o'clock)?( .*)?", re.ASCII
)
_TWO_WORDS = re.compile(r"([a-z]{3,6}) ((?:o[h']? ?)?[a-z -]{3,12}?)( (?:[ap]\.?m\.?|in .*|at night))?", re.ASCII)
_MORNING = frozenset({"am", "a.m.", "a.m", "in the morning"})
_AFTERNOON = frozenset({"pm", "p.m.", "p.m", "in the afternoon", "in the evening", "at night"})
_CHINESE_NUMBER = "[0-9零〇一二两三四五六七八九十]{1,3}"
_CHINESE = re.compile(
    "(凌晨|早上|早晨|上午|中午|下午|傍晚|晚上|夜里)? ?"
    f"(?:差(?P<before>{_CHINESE_NUMBER}|一刻)(?:分钟?)? ?)?(?P<hour>{_CHINESE_NUMBER}) ?(?:点钟|点|时)(?:整|过)? ?"
    f"(?:差(?P<less>{_CHINESE_NUMBER}|一刻)(?:分钟?)?|(?P<half>半)|(?P<quarters>[一三])刻"
    f"|(?P<minutes>{_CHINESE_NUMBER})分?钟?(?: ?(?P<seconds>{_CHINESE_NUMBER})秒)?)?"
)
_TENS = {"twenty": 20, "thirty": 30, "forty": 40, "fifty": 50}

_UNIT_TIME = re.compile(
    r"(?:(?P<h>[0-9]{1,3}) ?(?:hours?|hrs?|h|小时|时) ?)?(?:(?P<m>[0-9]{1,5}) ?(?:minutes?|mins?|min|m|分钟|分) ?)?"
    r"(?:(?P<s>[0-9]{1,7}(?:\.[0-9]{1,9})?) ?(?:seconds?|secs?|sec|s|秒钟|秒)?)?",
    re.ASCII,
)
_COLON_TIME = re.compile(r"(?:([0-9]{1,3}):)?([0-9]{1,3}):([0-5][0-9](?:\.[0-9]{1,9})?)", re.ASCII)
_SPLIT_SPANS = re.compile(r" ?(?:[,;、\n]| and |和|以及) ?(?:and )?")
_SPLIT_TIMES = re.compile(r" ?(?:-|–|—|~|→| to | until |到|至) ?")
_LEAD = re.compile(r"^(?:from |between |从|在|第)|(?:之间|为止|为)$")
_START_KEYS = ("start", "start_time", "begin", "from", "开始", "开始时间")
_END_KEYS = ("end", "end_time", "stop", "to", "结束", "结束时间")


class SpanError(ValueError):
    """A text that gives no spans of time; the message says why."""


def _number_below_60(words: str) -> int | None:
    token = words.strip().removeprefix("oh ").removeprefix("o' ").removeprefix("o ").replace("-", " ").strip()
    tens, _, ones = token.partition(" ")
    if tens in _TENS:
        unit = whole_number(ones) if ones else 0
        return _TENS[tens] + unit if unit is not None and 0 <= unit <= 9 and bool(ones) == bool(unit) else None
    number = whole_number(token) if token else None
    return number if number is not None and 0 <= number < 60 else None


def _of_day(hour: int | None, minutes: int | None, seconds: int = 0, *, half_day: str = "") -> int | None:
    if hour is None or minutes is None or not 0 <= hour < 24:
        return None
    half = half_day.strip()
    if half in _MORNING | _AFTERNOON:
        if not 1 <= hour <= 12:
            return None
        hour = hour % 12 + (12 if half in _AFTERNOON else 0)
        # "12 at night" is midnight, "12 in the afternoon" noon.
        hour = 0 if half == "at night" and hour == 12 else hour
    elif half:
        return None
    return (hour * 3600 + minutes * 60 + seconds) % DAY_S


def time_of_day(text: str) -> int | None:
    """Returns the seconds since midnight that the text says, or None.

    Read are `10:15`, `10:15:30`, `3:05 PM`, `15:05`, `10 o'clock`, `3 pm`, `quarter past ten`, `twenty to four`, `ten fifteen`, `noon`,
    `midnight`, 十点一刻, 下午三点零五分, 差五分十点, 十点差五分, 10时15分30秒. Without a word for the half of the day, hours are
    those of the 24-hour clock.
    """
    if len(text) > MAX_CLOCK_CHARS:
        return None
    token = bare(text).lower()
    if token in ("noon", "midnight", "正午", "午夜"):
        return HALF_DAY_S if token in ("noon", "正午") else 0
    if match := _DIGITAL.fullmatch(token):
        return _of_day(int(match[1]), int(match[2]), int(match[3] or 0), half_day=match[4])
    if match := _CHINESE.fullmatch(token):
        return _chinese_time(match)
    if match := _O_CLOCK.fullmatch(token):
        return _of_day(_number_below_60(match[1]), 0, half_day=match[2])
    if match := _PAST.fullmatch(token):
        minutes = {"half": 30, "quarter": 15}.get(match[1]) or _number_below_60(match[1])
        hour = _of_day(_number_below_60(match[3]), 0, half_day=match[4] or "")
        if not minutes or hour is None or (match[1] == "half" and match[2] in ("to", "before")):
            return None
        return (hour + minutes * (60 if match[2] in ("past", "after") else -60)) % DAY_S
    if match := _TWO_WORDS.fullmatch(token):
        return _of_day(_number_below_60(match[1]), _number_below_60(match[2]), half_day=match[3] or "")
    return None


def _chinese_number(text: str) -> int | None:
    if len(text) > 1 and text[0] in "零〇":
        text = text[1:]
    if len(text) == 3 and text[1] == "十":
        text = text.replace("两", "")
    return _number_below_60(text)


def _chinese_time(match: re.Match[str]) -> int | None:
    part = match[1] or ""
    hour = _chinese_number(match["hour"])
    if hour is None or hour > 23 or (match["before"] and match["less"]):
        return None
    if part in ("下午", "傍晚", "晚上") and 1 <= hour <= 11:
        hour += 12
    elif (part in ("凌晨", "夜里", "晚上") and hour == 12) or (part == "中午" and 1 <= hour <= 2):
        hour = (hour + 12) % 24
    elif part in ("早上", "早晨", "上午", "凌晨") and hour > 12:
        return None
    minutes = 30 if match["half"] else 15 * _chinese_value(match["quarters"]) if match["quarters"] else 0
    if match["minutes"]:
        read = _chinese_number(match["minutes"])
        if read is None:
            return None
        minutes = read
    seconds = _chinese_number(match["seconds"]) if match["seconds"] else 0
    if before := match["before"] or match["less"]:
        read = 15 if before == "一刻" else _chinese_number(before)
        if read is None:
            return None
        minutes -= read
    return None if seconds is None else (hour * 3600 + minutes * 60 + seconds) % DAY_S


def _chinese_value(quarters: str) -> int:
    return {"一": 1, "三": 3}[quarters]


def check_clock_answer(example: Example) -> None:
    """Raises a `DataError` unless the example's answer is a time of day."""
    if time_of_day(example.answer) is None:
        raise DataError(f"example {example.id!r}: answer {example.answer[:80]!r} is no time of day; write 15:05 or 15:05:30")


def clock(
    example: Example,
    rollout: Rollout,
    *,
    twelve_hour: bool = False,
    tolerance_minutes: Annotated[float, Field(ge=0, le=60)] = 0.0,
) -> RewardResult | Unavailable:
    """Returns 1.0 when the final answer is the example's time of day, else 0.0.

    `twelve_hour`: 3:05 and 15:05 are equal, as on a dial. `tolerance_minutes`: the largest difference that is right, round the clock.
    """
    answer = time_of_day(example.answer)
    if answer is None:
        return Unavailable(reason=f"example {example.id!r}: answer {example.answer[:80]!r} is no time of day")
    prediction = _prediction(rollout)
    if isinstance(prediction, RewardResult):
        return prediction
    seconds = time_of_day(prediction)
    if seconds is None:
        return RewardResult(value=0.0, note="the final answer is not one time of day")
    period = HALF_DAY_S if twelve_hour else DAY_S
    difference = (seconds - answer) % period
    is_right = min(difference, period - difference) <= tolerance_minutes * 60
    return RewardResult(value=float(is_right), note=f"read {seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}")


def _prediction(rollout: Rollout) -> str | RewardResult:
    if len(rollout.text) > MAX_RESPONSE_CHARS:
        return RewardResult(value=0.0, note=f"a response of {len(rollout.text)} characters; at most {MAX_RESPONSE_CHARS} are read")
    prediction = final_answer(rollout.text, prompt_suffix=rollout.prompt_suffix)
    return RewardResult(value=0.0, note="no final answer, or several that differ") if prediction is None else prediction


def read_seconds(value: Json) -> float:
    """Returns the seconds that a number or a text means: 7.5, `7.5 s`, `<7.5 seconds>`, `1:02:03.5`, `02:03`, `1分30秒`.

    Anything else is a `SpanError`.
    """
    if isinstance(value, str):
        token = bare(value).lower().strip("<>").removeprefix("第").strip()
        if match := _COLON_TIME.fullmatch(token):
            minutes = int(match[2])
            if match[1] is not None and minutes > 59:
                raise SpanError("more than 59 minutes after the hours")
            return _bounded(int(match[1] or 0) * 3600 + minutes * 60 + float(match[3]))
        match = _UNIT_TIME.fullmatch(token)
        if not match or not any(match.groupdict().values()):
            raise SpanError(f"{token[:40]!r} is no time")
        return _bounded(int(match["h"] or 0) * 3600 + int(match["m"] or 0) * 60 + float(match["s"] or 0))
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise SpanError("a time that is neither a number nor a text")
    return _bounded(value)


def _bounded(seconds: float) -> float:
    if not 0 <= seconds <= MAX_SECONDS:
        raise SpanError(f"a time below 0 or above {MAX_SECONDS:.0f} seconds")
    return float(seconds)


def read_spans(text: str) -> list[Span]:
    """Returns the spans (start, end) in seconds that a text gives; a `SpanError` when it gives none, or one is empty or reversed.

    Read are JSON (`{"start": 3, "end": 7.5}`, `[3, 7.5]`, lists of these, also fenced) and words: `from 3 s to 7.5 s`,
    `<3.0 seconds> - <7.5 seconds>`, `0:03-0:07, 0:10-0:12`, `从3秒到7.5秒`.
    """
    if len(text) > MAX_SPANS_CHARS:
        raise SpanError(f"a final answer of {len(text)} characters; at most {MAX_SPANS_CHARS} are read")
    try:
        value = parse_json(text.strip()) if text.lstrip()[:1] in "[{" else read_json(text)
    except JsonError:
        pairs = [_SPLIT_TIMES.split(_LEAD.sub("", piece.strip()).strip()) for piece in _SPLIT_SPANS.split(_prose(text))]
    else:
        entries = value if isinstance(value, list) and value and isinstance(value[0], (list, dict)) else [value]
        pairs = [_pair(entry) for entry in entries]
    if len(pairs) > MAX_SPANS:
        raise SpanError(f"{len(pairs)} spans; at most {MAX_SPANS} are read")
    spans: list[Span] = []
    for pair in pairs:
        if len(pair) != 2:
            raise SpanError("a span without one start and one end")
        start, end = map(read_seconds, pair)
        if start >= end:
            raise SpanError(f"a span that is empty or reversed: {start:g} to {end:g}")
        spans.append((start, end))
    return spans


def _prose(text: str) -> str:
    prose = bare(text).lower()
    # In "between 3 s and 7 s" the word joins a start and an end; elsewhere it joins spans.
    return re.sub(r"^between ([^,;]{1,30}?) and ", r"\1 - ", prose)


def _pair(entry: Json) -> Sequence[Json]:
    if isinstance(entry, list):
        return entry
    if not isinstance(entry, dict):
        raise SpanError("neither an object nor a list")
    ends = [[entry[key] for key in keys if key in entry] for keys in (_START_KEYS, _END_KEYS)]
    if any(len(values) != 1 for values in ends):
        raise SpanError("an object without one start and one end")
    return [value for values in ends for value in values]


def union(spans: Sequence[Span]) -> list[Span]:
    """Returns the same seconds as spans in order that do not overlap."""
    merged: list[Span] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def temporal_iou(first: Sequence[Span], second: Sequence[Span]) -> float:
    """Returns seconds in both / seconds in either, in [0, 1]; symmetric. Both need at least one span that is not empty."""
    one, other = union(first), union(second)
    shared = sum(max(0.0, min(a[1], b[1]) - max(a[0], b[0])) for a in one for b in other)
    total = sum(end - start for start, end in (*one, *other)) - shared
    return 1.0 if one == other else min(1.0, shared / total)


def check_time_span_answer(example: Example) -> None:
    """Raises a `DataError` unless the example's answer gives spans of time."""
    try:
        read_spans(example.answer)
    except SpanError as error:
        raise DataError(f"example {example.id!r}: answer {example.answer[:80]!r}: {error}; write seconds as [[3.0, 7.5]]") from None


def time_span(example: Example, rollout: Rollout, *, iou_threshold: Share | None = None) -> RewardResult | Unavailable:
    """Returns the temporal IoU of the response's spans with the example's, in [0, 1].

    `iou_threshold`: 1.0 from this IoU on and 0.0 below, instead of the IoU.
    """
    try:
        answers = read_spans(example.answer)
    except SpanError as error:
        return Unavailable(reason=f"example {example.id!r}: answer {example.answer[:80]!r}: {error}")
    prediction = _prediction(rollout)
    if isinstance(prediction, RewardResult):
        return prediction
    try:
        found = temporal_iou(read_spans(prediction), answers)
    except SpanError as error:
        return RewardResult(value=0.0, note=str(error))
    value = found if iou_threshold is None else float(found > 0 and found >= iou_threshold)
    return RewardResult(value=value, metrics={"iou": found})


REWARDS: Mapping[str, BuiltInReward] = {
    "clock": BuiltInReward(
        summary="the final answer is the example's time of day",
        value_range=(0.0, 1.0),
        check_answer=check_clock_answer,
        function=clock,
    ),
    "time_span": BuiltInReward(
        summary="temporal IoU with the example's spans of a video",
        value_range=(0.0, 1.0),
        check_answer=check_time_span_answer,
        function=time_span,
    ),
}
