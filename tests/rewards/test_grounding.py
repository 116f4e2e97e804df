"""Boxes, points and clicks: exact values, that spraying does not pay, and no text that makes a verifier raise."""

import dataclasses
import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vlpost.model.records import DataError
from vlpost.rewards import RewardResult, Unavailable
from vlpost.rewards.grounding import REWARDS, box, click, iou, is_in_region, matched_value, point

ONE = '[{"bbox_2d": [100, 100, 300, 300], "label": "cat"}]'
TWO = '[{"bbox_2d": [100, 100, 300, 300], "label": "cat"}, {"bbox_2d": [500, 500, 700, 900], "label": "dog"}]'
boxes = st.tuples(*[st.integers(0, 499)] * 2, *[st.integers(1, 500)] * 2).map(lambda b: (b[0], b[1], b[0] + b[2], b[1] + b[3]))


@pytest.mark.parametrize(
    ("answer", "text", "value"),
    [
        (ONE, ONE, 1.0),
        (ONE, f"```json\n{ONE}\n```", 1.0),
        (ONE, '{"bbox_2d": [100, 100, 300, 300]}', 1.0),
        (ONE, "[100, 100, 300, 300]", 1.0),
        (ONE, "(100,100),(300,300)", 1.0),
        (ONE, "【100】", 0.0),
        (ONE, '[{"边界框": [100，100，300，300], "标签": "Cat"}]', 1.0),
        (ONE, "\\boxed{[100, 100, 300, 200]}", 0.5),
        (ONE, '{"bbox_2d": [100, 100, 300, 300], "label": "dog"}', 0.0),
        (ONE, "[300, 300, 100, 100]", 0.0),
        (ONE, "[100, 100, 100, 300]", 0.0),
        (ONE, "[100, 100, 300, 1001]", 0.0),
        (ONE, "[100, NaN, 300, 300]", 0.0),
        (ONE, f"[100, 100, 300, {'9' * 99}]", 0.0),
        (ONE, "[100, 100, 300, true]", 0.0),
        (ONE, f"<think>{ONE}", 0.0),
        (ONE, f"<answer>{ONE}</answer><answer>{TWO}</answer>", 0.0),
        (ONE, TWO, 0.5),
        (TWO, ONE, 0.5),
        (TWO, "[[500, 500, 700, 900], [100, 100, 300, 300]]", 1.0),
        ("[]", "[]", 1.0),
        ("[]", ONE, 0.0),
        (ONE, "[]", 0.0),
        (ONE, json.dumps([[0, 0, 1, 1]] * 65), 0.0),
    ],
)
def test_box_values(answer, text, value, make_example, make_rollout):
    assert box(make_example(answer), make_rollout(text)).value == pytest.approx(value)


def test_a_threshold_turns_the_iou_into_a_verdict(make_example, make_rollout):
    half = make_rollout("[100, 100, 300, 200]")
    assert box(make_example(ONE), half, iou_threshold=0.5).value == 1.0
    assert box(make_example(ONE), half, iou_threshold=0.51).value == 0.0
    assert box(make_example(ONE), make_rollout("[800, 800, 900, 900]"), iou_threshold=0.0).value == 0.0


def test_pixels_need_a_size_and_end_there(make_example, make_rollout):
    example = make_example(ONE)
    verdict = box(example, make_rollout(ONE), coordinates="pixels")
    assert isinstance(verdict, Unavailable)
    assert "image_size" in verdict.reason
    wide = dataclasses.replace(example, metadata={"image_size": [2000, 400]})
    assert box(wide, make_rollout("[100, 100, 1900, 300]"), coordinates="pixels").value == pytest.approx(1 / 9)
    assert box(wide, make_rollout("[100, 100, 2001, 300]"), coordinates="pixels").value == 0.0
    small = dataclasses.replace(example, metadata={"image_size": [200, 200]})
    assert "reaches outside" in box(small, make_rollout(ONE), coordinates="pixels").reason


@given(boxes, boxes)
def test_iou_is_symmetric_and_1_only_for_equal_boxes(first, second):
    assert iou(first, second) == iou(second, first)
    assert (iou(first, second) == 1.0) == (first == second)
    assert 0.0 <= iou(first, second) <= 1.0


@given(st.lists(boxes, max_size=5), st.lists(boxes, min_size=1, max_size=3), st.lists(boxes, min_size=1, max_size=5))
def test_no_set_of_boxes_beats_its_best_few(honest, answers, sprayed):
    """A value with more boxes than the answer has is at most that of the best subset of the answer's size."""
    everything = honest + sprayed

    def value(predicted):
        return matched_value([[iou(p, a) for a in answers] for p in predicted], num_answers=len(answers))

    size = min(len(answers), len(everything))
    assert value(everything) <= max(map(value, itertools.combinations(everything, size))) + 1e-12
    assert value(answers + sprayed) == pytest.approx(len(answers) / (len(answers) + len(sprayed)))


@given(st.lists(st.lists(st.floats(0, 1), min_size=3, max_size=3), min_size=1, max_size=4))
def test_matching_equals_trying_every_assignment(scores):
    num, answers = len(scores), 3
    padded = [[row[j] if j < answers else 0.0 for j in range(max(num, answers))] for row in scores]
    best = max(sum(padded[i][j] for i, j in enumerate(order[:num])) for order in itertools.permutations(range(max(num, answers))))
    assert matched_value(scores, num_answers=answers) == pytest.approx(best / max(num, answers))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('[{"point_2d": [200, 200], "label": "cat"}]', 1.0),
        ("(200, 200)", 1.0),
        ("（200，200）", 1.0),
        ('{"点": [100, 300]}', 1.0),
        ("[99, 200]", 0.0),
        ('{"point_2d": [200, 200], "label": "dog"}', 0.0),
        ("[[200, 200], [201, 201]]", 0.5),
        ("[[1, 1], [2, 2], [200, 200], [3, 3]]", 0.25),
        ("[-1, 200]", 0.0),
        ("somewhere", 0.0),
    ],
)
def test_point_values(text, value, make_example, make_rollout):
    assert point(make_example(ONE), make_rollout(text)).value == value


@pytest.mark.parametrize(
    "region",
    [
        {"polygon": [[0, 0], [500, 0], [500, 500], [0, 500]]},
        {"size": [2, 2], "counts": [0, 1, 3]},
        {"bbox_2d": [0, 0, 500, 500]},
    ],
)
def test_a_point_lies_in_a_polygon_mask_or_box(region, make_example, make_rollout):
    example = dataclasses.replace(make_example("[[250, 250]]"), metadata={"regions": [region]})
    REWARDS["point"].check_answer(example)
    assert point(example, make_rollout("[250, 250]")).value == 1.0
    for outside in ("[750, 250]", "[250, 750]", "[1000, 1000]"):
        assert point(example, make_rollout(outside)).value == 0.0


def test_a_run_length_mask_reads_column_by_column():
    region = {"size": [2, 3], "counts": [2, 1, 3]}
    inside = [(x, y) for x in (100, 500, 900) for y in (100, 900) if is_in_region((x, y), region, size=(1000.0, 1000.0))]
    assert inside == [(500, 100)]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('{"action": "left_click", "coordinate": [200, 200]}', 1.0),
        ('I click.<tool_call>{"name": "computer_use", "arguments": {"action": "left_click", "coordinate": [200, 200]}}</tool_call>', 1.0),
        ('{"action": "点击", "坐标": [200, 200]}', 1.0),
        ('{"action": "click", "coordinate": [300, 300]}', 1.0),
        ("click(200, 200)", 1.0),
        ('{"point_2d": [200, 200]}', 1.0),
        ('{"action": "right_click", "coordinate": [200, 200]}', 0.0),
        ('{"action": "left_click", "coordinate": [301, 200]}', 0.0),
        ("[[200, 200], [900, 900]]", 0.0),
        ('<tool_call>{"coordinate": [200, 200]}</tool_call><tool_call>{"coordinate": [1, 1]}</tool_call>', 0.0),
    ],
)
def test_click_values(text, value, make_example, make_rollout):
    assert click(make_example(ONE), make_rollout(text)).value == value


@pytest.mark.parametrize("answer", [ONE, TWO, "[1, 2, 3, 4]"])
@pytest.mark.parametrize("name", ["box", "point", "click"])
def test_the_examples_own_answer_gets_full_value(name, answer, make_example, make_rollout):
    entry = REWARDS[name]
    entry.check_answer(make_example(answer))
    assert entry.function(make_example(answer), make_rollout(entry.gold_response(make_example(answer)))).value == 1.0


@pytest.mark.parametrize(
    ("name", "answer", "words"),
    [
        ("box", "a cat", "gives no boxes"),
        ("box", "[3, 3, 1, 1]", "reversed"),
        ("click", "[]", "no box to click"),
        ("point", "[]", "no region"),
    ],
)
def test_an_unreadable_answer_is_named(name, answer, words, make_example, make_rollout):
    example = make_example(answer, number=7)
    with pytest.raises(DataError, match=rf"example 'add-7'.*{words}"):
        REWARDS[name].check_answer(example)
    assert isinstance(REWARDS[name].function(example, make_rollout(ONE)), Unavailable)


@pytest.mark.parametrize("regions", ["x", [{}], [{"polygon": [[1, 2]]}], [{"size": [2, 2], "counts": [9]}], [{"counts": [4]}]])
def test_an_unreadable_region_is_refused(regions, make_example):
    with pytest.raises(DataError, match="region"):
        REWARDS["point"].check_answer(dataclasses.replace(make_example("[[1, 2]]"), metadata={"regions": regions}))


pieces = st.lists(st.sampled_from([*'[]{}(),:"', "bbox_2d", "point_2d", "1", "1e999", "NaN", "-", "null", "<tool_call>", "```", "\n"]))


@given(name=st.sampled_from(["box", "point", "click"]), text=st.one_of(st.text(max_size=200), pieces.map("".join)))
def test_verifiers_are_total(name, text, make_example, make_rollout):
    for answer in (ONE, text):
        verdict = REWARDS[name].function(make_example(answer), make_rollout(text))
        assert isinstance(verdict, Unavailable) or (isinstance(verdict, RewardResult) and 0.0 <= verdict.value <= 1.0)
