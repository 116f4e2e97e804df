"""Times of day and spans of time: tables of forms, exact values, symmetry, totality."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vlpost.model.records import DataError
from vlpost.rewards import RewardResult, Unavailable
from vlpost.rewards.time_answer import REWARDS, clock, read_spans, temporal_iou, time_of_day, time_span

CLOCKS = {
    "10:15": "10:15 10:15:00 １０：１５ 10.15",
    "10:15:30": "10:15:30 10时15分30秒",
    "15:05": "15:05 3:05pm 下午三点零五分 下午3点05分",
    "9:55": "差五分十点 十点差五分 09:55",
    "0:30": "00:30",
}
CLOCK_PHRASES = [
    *(("quarter past ten", "10:15"), ("a quarter to five", "4:45"), ("half past 3", "3:30"), ("twenty to four", "3:40")),
    *(("twenty-five to six", "5:35"), ("10 o'clock", "10:00"), ("ten o'clock", "10:00"), ("3 pm", "15:00"), ("12 am", "0:00")),
    *(("12:30 PM", "12:30"), ("noon", "12:00"), ("midnight", "0:00"), ("ten fifteen", "10:15"), ("ten oh five", "10:05")),
    *(("ten past two in the afternoon", "14:10"), ("quarter to 1", "0:45"), ("晚上十二点", "0:00"), ("中午十二点", "12:00")),
    *(
        ("十点一刻", "10:15"),
        ("十点半", "10:30"),
        ("三点四十五分", "3:45"),
        ("三点", "3:00"),
        ("二十三点五十九分", "23:59"),
        ("十点三刻", "10:45"),
    ),
]


def seconds(text):
    parts = [int(part) for part in text.split(":")]
    return sum(part * unit for part, unit in zip(parts, (3600, 60, 1), strict=False))


@pytest.mark.parametrize(("text", "time"), [*((text, time) for time, texts in CLOCKS.items() for text in texts.split()), *CLOCK_PHRASES])
def test_times_of_day(text, time):
    assert time_of_day(text) == seconds(time)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "25:00",
        "24:00",
        "10:60",
        "13 pm",
        "0 am",
        "10:15 or 10:20",
        "half to ten",
        "10:15 xm",
        "十",
        "二十五点",
        "9" * 999,
        "ten",
        "10:15:99",
    ],
)
def test_what_is_no_time_of_day(text):
    assert time_of_day(text) is None


@given(st.integers(0, 86_399))
def test_every_second_of_the_day_is_read(second):
    hour, minute, rest = second // 3600, second // 60 % 60, second % 60
    assert time_of_day(f"{hour}:{minute:02}:{rest:02}") == second
    assert time_of_day(f"{hour}点{minute}分{rest}秒") == second
    half = "am" if hour < 12 else "p.m."
    assert time_of_day(f"{hour % 12 or 12}:{minute:02}:{rest:02} {half}") == second


@pytest.mark.parametrize(
    ("answer", "text", "options", "value"),
    [
        ("15:05", "3:05", {}, 0.0),
        ("15:05", "3:05", {"twelve_hour": True}, 1.0),
        ("10:15", "10:16", {}, 0.0),
        ("10:15", "10:16", {"tolerance_minutes": 1.0}, 1.0),
        ("10:15", "10:17", {"tolerance_minutes": 1.0}, 0.0),
        ("23:59", "0:01", {"tolerance_minutes": 2.0}, 1.0),
        ("11:59", "0:01", {"tolerance_minutes": 2.0, "twelve_hour": True}, 1.0),
        ("10:15", "\\boxed{\\text{quarter past ten}}", {}, 1.0),
        ("10:15", "<answer>10:15</answer><answer>10:20</answer>", {}, 0.0),
        ("10:15", "<think>10:15", {}, 0.0),
    ],
)
def test_clock_values(answer, text, options, value, make_example, make_rollout):
    assert clock(make_example(answer), make_rollout(text), **options).value == value


@pytest.mark.parametrize(
    ("text", "spans"),
    [
        ("<3.0 seconds> - <7.5 seconds>", [(3, 7.5)]),
        ("from <3.0 seconds> to <7.5 seconds>", [(3, 7.5)]),
        ("from 3 s to 7.5 s", [(3, 7.5)]),
        ("between 3 s and 7 s", [(3, 7)]),
        ("3 to 7.5 seconds", [(3, 7.5)]),
        ("0:03-0:07, 0:10-0:12", [(3, 7), (10, 12)]),
        ("1:02:03 to 1:02:05.5", [(3723, 3725.5)]),
        ('{"start": 3, "end": "0:07.5"}', [(3, 7.5)]),
        ("[3, 7.5]", [(3, 7.5)]),
        ("```json\n[[1, 2], [3, 4]]\n```", [(1, 2), (3, 4)]),
        ("从3秒到7.5秒、从9秒到10秒", [(3, 7.5), (9, 10)]),
        ("第3秒到第7秒", [(3, 7)]),
        ("1分30秒至2分", [(90, 120)]),
        ('{"开始": 1, "结束": 2}', [(1, 2)]),
    ],
)
def test_spans(text, spans):
    assert read_spans(text) == spans


@pytest.mark.parametrize(
    ("answer", "text", "value"),
    [
        ("[3, 7]", "3-7", 1.0),
        ("[0, 10]", "5-15", 1 / 3),
        ("[0, 10]", "0-5, 3-5", 0.5),
        ("[0, 10]", "0-10, 20-30", 0.5),
        ("[[0, 1], [2, 3]]", "[[2, 3], [0, 1]]", 1.0),
        ("[3, 7]", "7-3", 0.0),
        ("[3, 7]", "3-3", 0.0),
        ("[3, 7]", "nan-7", 0.0),
        ("[3, 7]", '{"start": NaN, "end": 7}', 0.0),
        ("[3, 7]", '{"start": 3, "begin": 4}', 0.0),
        ("[3, 7]", "0-99999999", 0.0),
        ("[3, 7]", ", ".join(["3-7"] * 65), 0.0),
        ("[3, 7]", "<think>3-7</think>", 0.0),
    ],
)
def test_time_span_values(answer, text, value, make_example, make_rollout):
    assert time_span(make_example(answer), make_rollout(text)).value == pytest.approx(value)


def test_a_threshold_turns_the_temporal_iou_into_a_verdict(make_example, make_rollout):
    example, half = make_example("[0, 10]"), make_rollout("0-5")
    assert time_span(example, half, iou_threshold=0.5).value == 1.0
    assert time_span(example, half, iou_threshold=0.6).value == 0.0


spans = st.lists(st.tuples(st.integers(0, 60), st.integers(1, 30)).map(lambda p: (float(p[0]), float(sum(p)))), min_size=1, max_size=4)


@given(spans, spans)
def test_temporal_iou_counts_the_seconds_of_sets(first, second):
    sets = [{second for start, end in side for second in range(int(start), int(end))} for side in (first, second)]
    assert temporal_iou(first, second) == pytest.approx(len(sets[0] & sets[1]) / len(sets[0] | sets[1]))
    assert temporal_iou(first, second) == temporal_iou(second, first)


@pytest.mark.parametrize(("name", "answer"), [("clock", "soon"), ("time_span", "7-3"), ("time_span", "")])
def test_an_unreadable_answer_is_named(name, answer, make_example, make_rollout):
    with pytest.raises(DataError, match="example 'add-0'"):
        REWARDS[name].check_answer(make_example(answer))
    assert isinstance(REWARDS[name].function(make_example(answer), make_rollout("3-7")), Unavailable)


pieces = st.lists(
    st.sampled_from([*"0123456789:.-,<>[]{}差点分刻半秒从到 ", "half", "past", "to", "pm", "ten", "seconds", "start", '"', "NaN"])
)


@given(name=st.sampled_from(["clock", "time_span"]), text=st.one_of(st.text(max_size=100), pieces.map("".join)))
def test_verifiers_are_total(name, text, make_example, make_rollout):
    for answer in ({"clock": "10:15", "time_span": "[3, 7]"}[name], text):
        verdict = REWARDS[name].function(make_example(answer), make_rollout(text))
        assert isinstance(verdict, Unavailable) or (isinstance(verdict, RewardResult) and 0.0 <= verdict.value <= 1.0)
