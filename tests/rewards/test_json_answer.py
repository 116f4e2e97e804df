"""The verifier of answers in JSON: bounds, strictness, equality by value, schemas in a worker that can be killed."""

import contextlib
import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vlpost.model.records import DataError
from vlpost.rewards.json_answer import (
    MAX_DEPTH,
    MAX_JSON_CHARS,
    JsonError,
    check_json_answer,
    compare_json,
    json_answer,
    parse_json,
    read_json,
    self_check,
    verdict,
)
from vlpost.rewards.result import RewardResult, Unavailable
from vlpost.rewards.worker import WorkerPool, WorkerRequest

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)


@pytest.fixture(scope="module")
def row(make_example):
    def make(answer="", schema=None):
        return replace(make_example(answer), metadata={} if schema is None else {"schema": schema})

    return make


@pytest.fixture(scope="module")
def judge(make_rollout):
    def value(example, text, **options):
        judged = json_answer(example, make_rollout(text), **options)
        return judged.value if isinstance(judged, RewardResult) else judged

    return value


@pytest.fixture(scope="module")
def workers():
    with WorkerPool("json", num_workers=1, timeout_s=1.0) as pool:
        yield lambda request: pool.judge([request])[0][0]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"a": 1, "a": 1}', "one key twice"),
        ('{"a": {"b": 1, "b": 2}}', "one key twice"),
        ("NaN", "NaN is not JSON"),
        ("[-Infinity]", "-Infinity is not JSON"),
        ("1e400", "beyond the range"),
        ("9" * 101, "a number of 101 characters"),
        ("0." + "1" * 200, "a number of 202 characters"),
        ("[" * (MAX_DEPTH + 1), "more than 32 deep"),
        ("[" * 90_000, "more than 32 deep"),
        ('{"a":' * 15_000, "more than 32 deep"),
        (" " * (MAX_JSON_CHARS + 1), "characters of JSON"),
        ("{'a': 1}", "no JSON"),
        ("[1,]", "no JSON"),
        ("// a\n1", "no JSON"),
        ('"a\nb"', "no JSON"),
        ("", "no JSON"),
        ("\ufeff1", "no JSON"),
    ],
)
def test_what_is_beyond_the_bounds_or_ambiguous_is_refused(text, words):
    with pytest.raises(JsonError, match=words):
        parse_json(text)


def test_brackets_inside_texts_are_no_depth():
    brackets = "[{" * 100
    assert parse_json(json.dumps({"a": brackets, 'q"': "\\" + brackets})) == {"a": brackets, 'q"': "\\" + brackets}
    assert parse_json("[" * MAX_DEPTH + "]" * MAX_DEPTH) is not None


@given(VALUES)
def test_what_python_writes_is_read_back(value):
    assert parse_json(json.dumps(value)) == value
    assert compare_json(value, parse_json(json.dumps(value))) == compare_json(value, value)


@pytest.mark.parametrize(
    ("answer", "response", "value"),
    [
        ('{"a": 1}', '{"a": 1.0}', 1.0),
        ('{"a": 1}', '{"a": 10e-1}', 1.0),
        ('{"a": 1}', '{"a": true}', 0.0),
        ('{"a": 0}', '{"a": false}', 0.0),
        ('{"a": 1}', '{"a": "1"}', 0.0),
        ('{"a": null}', "{}", 0.0),
        ('{"a": 1, "b": [1, 2]}', '{"b":[1,2],"a":1}', 1.0),
        ("[1, 2]", "[2, 1]", 0.0),
        ("[1, 2]", "[1, 2, 3]", 0.0),
        ("[]", "{}", 0.0),
        ("[]", "[]", 1.0),
        ('"文"', '"\\u6587"', 1.0),
        ("12345678901234567890123", "12345678901234567890124", 0.0),
        ("null", "null", 1.0),
    ],
)
def test_values_are_compared_as_values(row, judge, answer, response, value):
    assert judge(row(answer), response) == value


@pytest.mark.parametrize(
    ("response", "value"),
    [
        ('{"a": 1}', 1.0),
        ('Here it is:\n```json\n{"a": 1}\n```\nDone.', 1.0),
        ('```\n{"a": 1}\n```', 1.0),
        ('<answer>{"a": 1}</answer>', 1.0),
        ('So: <answer>\n```json\n{"a": 1}\n```\n</answer>', 1.0),
        ('```python\nprint({"a": 2})\n```\n```json\n{"a": 1}\n```', 1.0),
        ('<think>{"a": 2}</think>{"a": 1}', 1.0),
        ('<think>{"a": 1}</think>{"a": 2}', 0.0),
        ('<think>{"a": 1}', 0.0),
        ('```json\n{"a": 1}\n```\n```json\n{"a": 2}\n```', 0.0),
        ('```json\n{"a": 1}\n```\n```json\n{"a": 1}\n```', 0.0),
        ('<answer>{"a": 1}</answer> or <answer>{"a": 2}</answer>', 0.0),
        ('```json\n{"a": 1}', 0.0),
        ('It is {"a": 1}.', 0.0),
        ('{"a": 1} {"a": 1}', 0.0),
        ("", 0.0),
    ],
)
def test_the_answer_is_the_whole_text_or_its_one_fence(row, judge, response, value):
    assert judge(row('{"a": 1}'), response) == value


def test_thinking_opened_by_the_prompt_is_never_the_answer(row, make_rollout):
    opened = json_answer(row("1"), make_rollout("1", prompt_suffix="<think>\n"))
    closed = json_answer(row("1"), make_rollout("2 or 3?\n</think>\n1", prompt_suffix="<think>\n"))
    assert (opened, closed) == (RewardResult(value=0.0, note="no visible answer"), RewardResult(value=1.0))


def test_tags_and_fences_inside_a_text_of_the_answer_are_text(row, judge):
    answer = json.dumps({"a": "<answer>2</answer>", "b": "```json\n1\n```", "c": "\\boxed{3}"})
    assert judge(row(answer), answer) == 1.0


@pytest.mark.parametrize(
    ("response", "value"),
    [
        ('{"a": 1, "b": {"c": 2, "d": 3}, "e": []}', 1.0),
        ('{"a": 1, "b": {"c": 2, "d": 4}, "e": []}', 3 / 4),
        ('{"a": 1}', 1 / 4),
        ('{"a": 1, "b": {"c": 2, "d": 3}, "e": [], "x": [1, 2, 3, 4]}', 4 / 8),
        ('{"a": [1, 1], "b": 5, "e": [7]}', 0 / 5),
        ("[]", 0.0),
    ],
)
def test_leaves_too_many_cost_as_much_as_leaves_left_out(row, judge, response, value):
    assert judge(row('{"a": 1, "b": {"c": 2, "d": 3}, "e": []}'), response, credit="leaves") == value


def test_ignored_keys_are_ignored_at_any_depth(row, judge):
    example = row('{"a": 1, "note": "x", "b": [{"note": 1, "c": 2}]}')
    assert judge(example, '{"a": 1, "b": [{"c": 2, "note": []}]}', ignored_keys=("note",)) == 1.0
    assert judge(example, '{"a": 1, "b": [{"c": 3, "note": 1}]}', ignored_keys=("note",)) == 0.0


@given(VALUES, VALUES)
def test_comparison_is_symmetric_and_the_counts_tell_equality(one, other):
    equal, both = compare_json(one, other)
    assert compare_json(other, one) == (equal, both)
    assert 0 <= equal <= both
    assert both >= 1
    assert compare_json(one, one)[0] == compare_json(one, one)[1]
    if equal == both:
        assert one == other


@given(st.text() | st.text(alphabet='[]{}",:\\0123e-. truefalsn`jo\n<>/answer'))
def test_no_text_makes_it_raise(make_example, make_rollout, text):
    judged = json_answer(make_example('{"a": [1, 2]}'), make_rollout(text), credit="leaves")
    assert isinstance(judged, RewardResult)
    assert 0.0 <= judged.value <= 1.0
    with contextlib.suppress(JsonError):
        read_json(text)


@pytest.mark.parametrize(
    "text",
    [
        *('"' * 100_000, '\\"' * 50_000, '"\\' * 50_000, "`" * 100_000, "```json\n" * 12_500, "<answer>" * 12_500, "[]" * 50_000),
        *("```\n" * 25_000, "1" * 100_000, "-" * 100_000, "\n" * 100_000, '{"a":{}}' * 12_000, "[" + "0," * 49_000 + "0]"),
    ],
)
def test_hostile_texts_of_100_kb_are_wrong(row, judge, text):
    assert judge(row("1"), text) == 0.0


@pytest.mark.parametrize(
    ("answer", "schema", "words"),
    [
        ("", None, "neither an answer nor a schema"),
        ("{'a': 1}", None, "no JSON"),
        ('{"a": 1, "a": 2}', None, "one key twice"),
        ("1", {"type": "numbers"}, "no valid schema"),
        ("1", {"type": 3}, "no valid schema"),
        ("1", [1], "a schema of type list"),
        ("1", {"$ref": "https://example.com/schema.json"}, "points outside the schema; nothing is fetched"),
        ("1", {"properties": {"a": {"$ref": "file:///etc/passwd"}}}, "points outside"),
        ("1", {"pattern": "("}, "no regular expression"),
        ("1", {"patternProperties": {"[": {}}}, "no regular expression"),
        ("1", {"enum": ["x" * 30_000]}, "a schema of 300.. bytes"),
        ('"' + "文" * 10_000 + '"', {"type": "string"}, "together"),
    ],
)
def test_data_that_no_response_could_satisfy_are_refused(row, make_rollout, answer, schema, words):
    with pytest.raises(DataError, match=f"example 'add-0'.*{words}"):
        check_json_answer(row(answer, schema))


def test_data_that_cannot_be_read_are_unavailable(row, judge):
    assert judge(row("{"), "{") == Unavailable(reason="example 'add-0': " + str(_error("{")))
    assert judge(row(""), "1") == Unavailable(reason="example 'add-0': neither an answer nor a schema")
    assert isinstance(judge(row("1", [1]), "1"), Unavailable)


def _error(text):
    with pytest.raises(JsonError) as caught:
        parse_json(text)
    return caught.value


SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "pattern": "^[a-z]+$"}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("response", "value"),
    [
        ('{"name": "ada", "age": 36}', 1.0),
        ('{"name": "ada", "age": 36.0}', 1.0),
        ('{"name": "Ada", "age": 36}', 0.0),
        ('{"name": "ada"}', 0.0),
        ('{"name": "ada", "age": 36, "x": 1}', 0.0),
        ('{"name": "ada", "age": true}', 0.0),
    ],
)
def test_a_schema_alone_decides_where_there_is_no_answer(row, judge, workers, response, value):
    check_json_answer(row("", SCHEMA))
    assert workers(judge(row("", SCHEMA), response)).value == value


def test_an_answer_and_a_schema_must_both_be_met(row, judge, workers):
    example = row('{"name": "ada", "age": 36}', SCHEMA)
    assert judge(example, '{"name": "bob", "age": 36}') == 0.0
    assert workers(judge(example, '{"name": "bob", "age": 36}', credit="leaves")) == RewardResult(
        value=0.5, note="not all leaves are equal"
    )
    assert workers(judge(example, '{"name": "BOB", "age": 36}', credit="leaves")).value == 0.0
    assert workers(self_check(example)).value == 1.0


def test_the_self_check_finds_an_answer_that_its_own_schema_refuses(row, workers):
    refused = workers(self_check(row('{"name": "ADA", "age": 36}', SCHEMA)))
    assert refused == RewardResult(value=0.0, note="the schema's 'pattern' at $.name is not met")
    assert workers(self_check(row("[1]"))).value == 1.0
    assert workers(self_check(row("", SCHEMA))).value == 1.0
    endless = workers(self_check(row("", {"$ref": "#"})))
    assert isinstance(endless, Unavailable)
    assert "without end" in endless.reason


def test_a_pattern_that_backtracks_for_ever_costs_the_response_and_not_the_next_one(row, judge, workers):
    example = row("", {"type": "string", "pattern": "^(a+)+$"})
    check_json_answer(example)
    hostile = workers(judge(example, json.dumps("a" * 60 + "!")))
    assert hostile.value == 0.0
    assert "ungradable" in hostile.note
    assert workers(judge(example, '"aaa"')).value == 1.0


def test_a_schema_that_multiplies_costs_the_response_and_not_the_next_one(row, judge, workers):
    tree = {"items": {"anyOf": [{"$ref": "#"}, {"allOf": [{"$ref": "#"}, {"$ref": "#"}]}]}, "not": {"const": "x"}}
    hostile = workers(judge(row("", tree), "[" * 31 + '"x"' + "]" * 31))
    assert hostile.value == 0.0
    assert workers(judge(row("", tree), "[[1]]")).value == 1.0


@pytest.mark.parametrize("reference", ["https://example.com/s.json", "http://127.0.0.1:9/s.json", "file:///etc/passwd", "#/$defs/none"])
def test_a_reference_to_elsewhere_is_unavailable_and_never_fetched(row, judge, workers, reference):
    judged = workers(judge(row("", {"$ref": reference}), "1"))
    assert isinstance(judged, Unavailable)
    assert "cannot be used" in judged.reason


def test_a_response_too_long_for_its_schema_is_wrong(row, judge):
    assert judge(row("", {"type": "string"}), json.dumps("文" * 20_000, ensure_ascii=False)) == 0.0
    assert isinstance(judge(row("", {"type": "string"}), json.dumps("x" * 20_000)), WorkerRequest)


def test_a_lone_surrogate_reaches_the_worker_unharmed(row, judge, workers):
    assert workers(judge(row("", {"type": "string", "maxLength": 1}), '"\\ud800"')).value == 1.0


def test_the_schema_of_a_request_is_judged_like_the_function_judges():
    assert verdict('{"type": "integer"}', "1.0", "0.25") == (0.25, "not all leaves are equal")
    assert verdict("true", "[1]", "1.0") == (1.0, "")
    assert verdict("false", "[1]", "1.0")[0] == 0.0
