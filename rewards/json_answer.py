"""Verifier of answers in JSON: the values of an example's answer, a JSON Schema of the example, or both.

A text is bounded before it is parsed (length, depth, digits of a number) and parsed strictly: a key that stands twice in an object, NaN,
Infinity and numbers beyond a double make it malformed. Values are compared as values: 1 equals 1.0 and 1e0, since JSON has one kind of
number (RFC 8259 section 6), but true does not equal 1; texts are compared character by character; the order of a list counts and the
order of keys does not.

A schema comes with the data (`metadata["schema"]`, draft 2020-12 unless it names another). Its keywords may take any time on a hostile
response (`pattern` backtracks, nested `anyOf` multiplies), so validation runs in a killable worker process. References stay inside
the schema; one that points elsewhere is refused and nothing is ever fetched. `format` is not enforced, as the standard has it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal, TypeAlias

from ..model.records import DataError, Example, Rollout
from .answers import strip_thinking, tagged
from .built_in import BuiltInReward
from .result import RewardResult, Unavailable
from .worker import MAX_REQUEST_BYTES, WorkerRequest

MAX_JSON_CHARS = 100_000
"""Longest text that is parsed, characters."""
MAX_RESPONSE_CHARS = 400_000
"""Longest response that is searched for an answer, characters."""
MAX_DEPTH = 32
"""Deepest nesting of lists and objects that is parsed."""
MAX_NUMBER_CHARS = 100
MAX_SCHEMA_BYTES = 20_000
"""Longest schema of an example as JSON in ASCII, bytes."""

Json: TypeAlias = bool | int | float | str | list["Json"] | dict[str, "Json"] | None

_BRACKETS = re.compile(r'[\[\]{}"]|\\.', re.DOTALL)
# Keywords of JSON Schema whose values are data and not schemas.
_DATA_KEYWORDS = frozenset({"const", "enum", "default", "examples"})
_REFERENCES = ("$ref", "$dynamicRef", "$recursiveRef")


class JsonError(ValueError):
    """A text is not JSON, or beyond the bounds; the message says why."""


def parse_json(text: str) -> Json:
    """Returns the value that the text is; a `JsonError` when it is none, breaks a bound or is ambiguous. Linear in the text."""
    if len(text) > MAX_JSON_CHARS:
        raise JsonError(f"{len(text)} characters of JSON; at most {MAX_JSON_CHARS} are read")
    depth, in_string = 0, False
    for match in _BRACKETS.finditer(text):
        token = match.group()
        if token == '"':
            in_string = not in_string
        elif not in_string and token in "[{":
            depth += 1
            if depth > MAX_DEPTH:
                raise JsonError(f"lists and objects more than {MAX_DEPTH} deep")
        elif not in_string and token in "]}":
            depth -= 1
    try:
        return json.loads(text, parse_int=_whole, parse_float=_decimal, parse_constant=_constant, object_pairs_hook=_object)
    except JsonError:
        raise
    except ValueError as error:
        raise JsonError(f"no JSON: {str(error)[:120]}") from None


def _whole(digits: str) -> int:
    if len(digits) > MAX_NUMBER_CHARS:
        raise JsonError(f"a number of {len(digits)} characters; at most {MAX_NUMBER_CHARS} are read")
    return int(digits)


def _decimal(digits: str) -> float:
    if len(digits) > MAX_NUMBER_CHARS:
        raise JsonError(f"a number of {len(digits)} characters; at most {MAX_NUMBER_CHARS} are read")
    number = float(digits)
    if not math.isfinite(number):
        raise JsonError("a number beyond the range of a double")
    return number


def _constant(name: str) -> None:
    raise JsonError(f"{name} is not JSON")


def _object(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise JsonError("an object with one key twice")
    return found


def read_json(text: str) -> Json:
    """Returns the JSON value of a visible response; a `JsonError` when it gives none, or several.

    Tried in this order: the whole text; inside `<answer>...</answer>` where all tags hold one text; inside the one fenced block that is
    marked `json` or not marked at all. Two such blocks are no answer, also when they hold the same.
    """
    try:
        return parse_json(text.strip())
    except JsonError as error:
        refusal = error
    answers = set(tagged(text))
    if len(answers) > 1:
        raise JsonError("several answers that differ")
    inner = next(iter(answers), text)
    blocks = _fenced(inner)
    if len(blocks) > 1:
        raise JsonError(f"{len(blocks)} fenced blocks of JSON; one is read")
    if not blocks and not answers:
        raise refusal
    return parse_json(blocks[0] if blocks else inner)


def _fenced(text: str) -> list[str]:
    """Returns the contents of the closed blocks between lines of three backticks that are marked `json` or not marked."""
    blocks: list[str] = []
    mark: str | None = None
    lines: list[str] = []
    for line in text.split("\n"):
        stripped = line.strip()
        if mark is None and stripped.startswith("```"):
            mark, lines = stripped[3:].strip().lower(), []
        elif mark is not None and stripped == "```":
            if mark in ("", "json"):
                blocks.append("\n".join(lines))
            mark = None
        else:
            lines.append(line)
    return blocks


def compare_json(answer: Json, prediction: Json, *, ignored_keys: frozenset[str] = frozenset()) -> tuple[int, int]:
    """Returns how many leaves of the two values are equal at equal places, and how many leaves there are in either.

    A leaf is a text, number, true, false, null, or an empty list or object. Keys that are ignored are left out on both sides, at any depth.
    The values are equal exactly when the two counts are.
    """
    if isinstance(answer, dict) and isinstance(prediction, dict):
        answer = {key: value for key, value in answer.items() if key not in ignored_keys}
        prediction = {key: value for key, value in prediction.items() if key not in ignored_keys}
        pairs = [(answer[key], prediction[key]) for key in answer.keys() & prediction.keys()]
        alone = [value for key, value in answer.items() if key not in prediction]
        alone += [value for key, value in prediction.items() if key not in answer]
    elif isinstance(answer, list) and isinstance(prediction, list):
        pairs = list(zip(answer, prediction, strict=False))
        alone = answer[len(pairs) :] + prediction[len(pairs) :]
    elif isinstance(answer, (dict, list)) or isinstance(prediction, (dict, list)):
        return 0, max(_num_leaves(answer, ignored_keys), _num_leaves(prediction, ignored_keys))
    else:
        return int(_kind(answer) == _kind(prediction) and answer == prediction), 1
    if not pairs and not alone:
        return 1, 1
    counts = [compare_json(*pair, ignored_keys=ignored_keys) for pair in pairs]
    return sum(equal for equal, _ in counts), sum(both for _, both in counts) + sum(_num_leaves(value, ignored_keys) for value in alone)


def _num_leaves(value: Json, ignored_keys: frozenset[str]) -> int:
    if isinstance(value, dict):
        return sum(_num_leaves(inner, ignored_keys) for key, inner in value.items() if key not in ignored_keys) or 1
    if isinstance(value, list):
        return sum(_num_leaves(inner, ignored_keys) for inner in value) or 1
    return 1


def _kind(leaf: Json) -> str:
    """Returns the kind of a leaf in JSON's own sense: Python's True equals 1, JSON's does not."""
    return "number" if isinstance(leaf, (int, float)) and not isinstance(leaf, bool) else type(leaf).__name__


def _schema_of(example: Example) -> str | None:
    """Returns the schema of the example as JSON, or None; a `JsonError` when it is none that can be used."""
    schema = example.metadata.get("schema")
    if schema is None:
        return None
    if not isinstance(schema, (dict, bool)):
        raise JsonError(f"a schema of type {type(schema).__name__}; it is an object, true or false")
    try:
        text = json.dumps(schema, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise JsonError(f"a schema that is no JSON ({error})") from None
    if len(text) > MAX_SCHEMA_BYTES:
        raise JsonError(f"a schema of {len(text)} bytes; at most {MAX_SCHEMA_BYTES} are used")
    return text


def _sub_schemas(schema: object) -> Iterator[dict[str, Any]]:
    if isinstance(schema, dict):
        yield schema
        for keyword, value in schema.items():
            if keyword not in _DATA_KEYWORDS:
                yield from _sub_schemas(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from _sub_schemas(value)


def _check_schema(schema: dict[str, Any]) -> None:
    """Raises a `JsonError` unless the schema is one, refers to nothing outside itself, and its patterns are regular expressions."""
    import jsonschema.validators

    for part in _sub_schemas(schema):
        for keyword in _REFERENCES:
            if isinstance(target := part.get(keyword), str) and not target.startswith("#"):
                raise JsonError(f"{keyword} = {target!r} points outside the schema; nothing is fetched, so copy it into $defs")
        patterns = [part["pattern"]] if isinstance(part.get("pattern"), str) else []
        patterns += part["patternProperties"] if isinstance(part.get("patternProperties"), dict) else []
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise JsonError(f"pattern {pattern!r} is no regular expression ({error})") from None
    try:
        jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator).check_schema(schema)
    except jsonschema.SchemaError as error:
        raise JsonError(f"no valid schema: {error.message[:200]} (at {error.json_path})") from None


def check_json_answer(example: Example) -> None:
    """Raises a `DataError` unless the example has an answer in JSON, a usable schema in `metadata["schema"]`, or both."""
    try:
        schema = _schema_of(example)
        if schema is None and not example.answer.strip():
            raise JsonError("neither an answer nor a schema; an empty response must not be right")
        if schema is not None:
            _check_schema(json.loads(schema))
        if example.answer.strip():
            answer = parse_json(example.answer)
            if schema is not None and _request(schema, answer, 1.0) is None:
                raise JsonError(f"answer and schema of more than {MAX_REQUEST_BYTES} bytes together")
    except JsonError as error:
        raise DataError(
            f"example {example.id!r}: {error}; `json` compares with JSON in the answer, or validates by metadata.schema"
        ) from None


def json_answer(
    example: Example, rollout: Rollout, *, credit: Literal["all", "leaves"] = "all", ignored_keys: tuple[str, ...] = ()
) -> RewardResult | Unavailable | WorkerRequest:
    """Returns 1.0 when the response is JSON with the example's values that satisfies the example's schema, else 0.0.

    `credit`: with `leaves` the value is the share of equal leaves, (leaves equal at equal places) / (leaves in either), so that leaves too
    many cost as much as leaves left out; a response that the schema refuses is 0.0 all the same. `ignored_keys`: keys of objects that
    are not compared, at any depth; the schema still sees them. Where the example has no answer, the schema alone decides.
    """
    try:
        schema = _schema_of(example)
        answer = parse_json(example.answer) if example.answer.strip() else None
    except JsonError as error:
        return Unavailable(reason=f"example {example.id!r}: {error}")
    if schema is None and not example.answer.strip():
        return Unavailable(reason=f"example {example.id!r}: neither an answer nor a schema")
    if len(rollout.text) > MAX_RESPONSE_CHARS:
        return RewardResult(value=0.0, note=f"a response of {len(rollout.text)} characters; at most {MAX_RESPONSE_CHARS} are read")
    visible = strip_thinking(rollout.text, prompt_suffix=rollout.prompt_suffix)
    if not visible:
        return RewardResult(value=0.0, note="no visible answer")
    try:
        prediction = read_json(visible)
    except JsonError as error:
        return RewardResult(value=0.0, note=str(error))
    value, note = 1.0, ""
    if example.answer.strip():
        equal, both = compare_json(answer, prediction, ignored_keys=frozenset(ignored_keys))
        value = equal / both if credit == "leaves" else float(equal == both)
        note = "" if equal == both else f"{equal} of {both} leaves are equal"
    if schema is None or value == 0.0:
        return RewardResult(value=value, note=note)
    return _request(schema, prediction, value) or RewardResult(value=0.0, note="a response too long for its schema")


def _request(schema: str, instance: Json, value: float) -> WorkerRequest | None:
    """Returns what a worker is asked, or None when it is too long for one; the control does not depend on the instance."""
    arguments = {"schema": schema, "instance": json.dumps(instance, ensure_ascii=False), "value": repr(value)}
    if len(json.dumps(arguments)) > MAX_REQUEST_BYTES - 100:  # the rest of the line is the request's number
        return None
    return WorkerRequest(function="json", arguments=arguments, control={**arguments, "instance": ""})


def self_check(example: Example) -> WorkerRequest:
    """Returns the request that gives 1.0 exactly when the example's own answer satisfies its schema, or the schema is one."""
    schema = _schema_of(example) or "true"
    if not example.answer.strip():
        arguments = {"schema": schema, "instance": "", "value": "1.0"}
        return WorkerRequest(function="json", arguments=arguments, control=arguments)
    # An answer without a schema may be longer than a request; it was parsed when the data were checked.
    request = _request(schema, parse_json(example.answer) if schema != "true" else None, 1.0)
    assert request is not None, "check_answer bounds answer and schema together"
    return request


def verdict(schema: str, instance: str, value: str) -> tuple[float, str]:
    """Returns the value when the instance satisfies the schema, else 0.0, and a note; runs in a worker process, because it may not end.

    An empty instance only checks the schema. A schema that cannot be used is a `ValueError`: no response could be right.
    """
    import jsonschema.exceptions
    import jsonschema.validators
    import referencing
    import referencing.exceptions

    rules = json.loads(schema)
    validator_class = jsonschema.validators.validator_for(rules, default=jsonschema.Draft202012Validator)
    # An empty registry: a reference to the outside is an error and no download.
    validator = validator_class(rules, registry=referencing.Registry())
    try:
        validator_class.check_schema(rules)
        error = next(iter(validator.iter_errors(json.loads(instance) if instance else None)), None)
    except (jsonschema.SchemaError, referencing.exceptions.Unresolvable, jsonschema.exceptions.UnknownType, re.error) as error:
        raise ValueError(f"the schema cannot be used: {str(error)[:200]}") from error
    except RecursionError:
        if not instance:
            raise ValueError("the schema refers to itself without end") from None
        return 0.0, "nested too deep for its schema"
    if error is None or not instance:
        return float(value), "" if value == "1.0" else "not all leaves are equal"
    return 0.0, f"the schema's {str(error.validator)[:40]!r} at {error.json_path[:80]} is not met"


REWARDS: Mapping[str, BuiltInReward] = {
    "json": BuiltInReward(
        summary="the answer is JSON with the example's values (or a share of them), and satisfies the example's JSON Schema",
        value_range=(0.0, 1.0),
        check_answer=check_json_answer,
        function=json_answer,
        self_check=self_check,
    ),
}
