"""Functions judged across two jails: plain values, bounded messages, a relay that believes nobody, and the cheats of the suite."""

import json
import math
from contextlib import contextmanager, suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vlpost.model.records import Example
from vlpost.rewards.attack import load_attacks
from vlpost.rewards.code_asserts import rewrite_asserts
from vlpost.rewards.code_calls import MAX_MESSAGE_BYTES, FunctionJudge, is_expected, read_message
from vlpost.rewards.code_execution import CodeExecutionOptions, CodeJudge
from vlpost.rewards.code_jail import Asserts, decode, encode, same_value
from vlpost.rewards.code_problem import CallProblem, read_problem
from vlpost.rewards.result import Unavailable
from vlpost.rewards.sandbox import Execution, Sandbox, SandboxError
from vlpost.rewards.sandbox_config import SandboxConfig

OPTIONS = CodeExecutionOptions(time_limit_s=2.0, memory_mib=256, output_kib=256)
LIMITS = OPTIONS.limits()
ADD = CallProblem.model_validate({"function": "add", "cases": [{"arguments": (1, 2), "expected": 3}, {"arguments": (0, 1), "expected": 1}]})
CHEATS = [attack for attack in load_attacks() if attack.kind in (11, 12, 14, 16) and attack.form in ("calls", "asserts")]
ADD_ASSERTS = "assert add(1, 2) == 3\nassert add(0, 1) == 1"

scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(max_size=8)
keys = st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.tuples(st.integers(), st.text(max_size=3))
plain_values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(keys, inner, max_size=4)
        | st.sets(keys, max_size=4)
        | st.frozensets(keys, max_size=4)
    ),
    max_leaves=12,
)
tags = st.sampled_from(["tuple", "set", "dict", "float", "bytes", "x"])
documents = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["tuple", "set", "dict", "float", "bytes", "x"]), inner, max_size=2)
    ),
    max_leaves=12,
)


def example_of(problem):
    return Example(id="add-1", messages=(), answer="", task="code", source="test", metadata={"code": problem})


@pytest.fixture(scope="module")
def judge():
    with Sandbox(SandboxConfig()) as sandbox:
        yield CodeJudge(sandbox, OPTIONS)


@pytest.fixture
def verdict_on(judge):
    def verdict_on(problem, program):
        return judge.judge_program(read_problem(example_of(problem)), program)

    return verdict_on


class ScriptedSession:
    def __init__(self, lines):
        self.lines = list(lines)
        self.sent = []

    def send(self, line, *, timeout_s):
        self.sent.append(json.loads(line))

    def receive(self, *, timeout_s):
        if not self.lines:
            raise EOFError
        line = self.lines.pop(0)
        if isinstance(line, BaseException):
            raise line
        return line(self) if callable(line) else line

    def execution(self):
        return Execution(status="finished", stdout=b"", stderr=b"", exit_code=0, seconds=0.1, reason="")


class ScriptedJails:
    """Sessions in the order in which they are opened: the tests first, then the program."""

    def __init__(self, *scripts):
        self.sessions = [ScriptedSession(script) for script in scripts]
        self.opened = []

    @contextmanager
    def open_session(self, program, *, limits):
        session = self.sessions[len(self.opened)]
        self.opened.append(session)
        yield session


def judge_calls(*lines, problem=ADD):
    jails = ScriptedJails([b'{"loaded": true}', *lines])
    return FunctionJudge(jails, limits=LIMITS, stop_at_failure=True, float_tolerance=0.0).judge_calls("...", problem)


def judge_asserts(tests_lines, program_lines, text=ADD_ASSERTS):
    jails = ScriptedJails(tests_lines, program_lines)
    judgement = FunctionJudge(jails, limits=LIMITS, stop_at_failure=True, float_tolerance=0.0).judge_asserts("...", rewrite_asserts(text))
    return judgement, jails


def verdict_line(**changes):
    def line(session):
        fields = {"verdict": session.sent[0]["nonce"], "held": [0, 1], "failed": [], "broken": None, "error": ""}
        return json.dumps({**fields, **changes}).encode()

    return line


class TestPlainValues:
    @given(plain_values)
    def test_a_plain_value_survives_the_trip_with_its_type(self, value):
        returned = decode(read_message(json.dumps({"value": encode(value)}).encode())["value"])
        assert returned == value
        assert type(returned) is type(value)
        assert same_value(returned, value)

    @given(documents)
    def test_decoding_any_document_gives_a_value_or_a_value_error(self, document):
        try:
            value = decode(document)
        except ValueError:
            return
        assert same_value(value, decode(encode(value)))

    @given(plain_values, plain_values)
    def test_what_is_the_same_is_equal_and_symmetric(self, left, right):
        assert same_value(left, right) == same_value(right, left)
        if same_value(left, right):
            assert left == right

    @pytest.mark.parametrize(
        ("left", "right"),
        [
            *((True, 1), (0, False), (-0.0, 0), (-0.0, 0.0), ([1], [True]), ({1}, {True}), ({"a": 1}, {"a": True}), ({1: 2}, {True: 2})),
            *(((0.0,), (-0.0,)), ([1], (1,)), (math.nan, math.nan), ({(1, 2)}, {(True, 2)}), (1, "1"), ("1", "１"), (b"1", "1")),
        ],
    )
    def test_what_python_or_a_reader_overlooks_is_not_the_same(self, left, right):
        assert not same_value(left, right)
        assert not same_value(right, left)

    @pytest.mark.parametrize(
        ("left", "right"), [(1, 1.0), (2**60, float(2**60)), (True, True), ({1: [2.0]}, {1: [2]}), (set(), frozenset())]
    )
    def test_equal_numbers_of_two_types_are_the_same(self, left, right):
        assert same_value(left, right)

    def test_what_is_not_plain_is_refused(self):
        for value in (object(), len, 1j, iter(()), type("Loud", (int,), {})(3), math):
            with pytest.raises(TypeError):
                encode(value)

    def test_a_value_without_an_end_is_refused(self):
        looped = []
        looped.append(looped)
        with pytest.raises(ValueError, match="containers"):
            encode(looped)

    def test_nan_does_not_come_back(self):
        with pytest.raises(ValueError, match="nan"):
            decode(encode(math.nan))


class TestMessages:
    @pytest.mark.parametrize(
        ("line", "words"),
        [
            (b'{"value": ' + b"[" * 100_000, "brackets"),
            (b"]" * 5, "brackets"),
            (b'{"value": ' + b"9" * 5000 + b"}", "digits"),
            (b'{"value": 0.' + b"1" * 5000 + b"}", "digits"),
            (b"x" * (MAX_MESSAGE_BYTES + 1), "bytes"),
            ('{"value": "３"}'.encode(), "ASCII"),
            ("{}".encode("utf-16"), "ASCII"),
            (b'{"value": NaN}', "no JSON"),
            (b'{"value": -Infinity}', "no JSON"),
            (b"[1]", "no JSON object"),
            (b"", "no JSON"),
            (b'{"value": "' + b"\\" * 1001, "no JSON"),
            (b'{"value": "' + b'a"' * 1001, "no JSON"),
            (b'{"value": ' + b"1" * 4001 + b"}", "more than 4000 digits"),
            (json.dumps({"value": {"set": [k * (2**61 - 1) for k in range(1, 2002)]}}).encode(), "large numbers"),
            (json.dumps({"value": {"dict": [[{"tuple": [k * 2**32]}, 0] for k in range(1, 2002)]}}).encode(), "large numbers"),
        ],
    )
    def test_a_line_that_is_no_message_is_refused_before_it_costs_anything(self, line, words):
        with pytest.raises(ValueError, match=words):
            read_message(line)

    def test_large_collections_whose_hashes_nobody_chooses_are_messages(self):
        message = {"value": {"set": list(range(5000))}, "other": {"dict": [[f"key {k}", k] for k in range(5000)]}}
        assert read_message(json.dumps(message).encode()) == message

    def test_brackets_and_digits_inside_texts_count_for_nothing(self):
        message = {"value": "[" * 5000 + '"\\' + "9" * 5000}
        assert read_message(json.dumps(message).encode()) == message

    @given(st.binary(max_size=300))
    def test_reading_is_total(self, line):
        with suppress(ValueError):
            assert type(read_message(line)) is dict


class TestExpectedValues:
    @pytest.mark.parametrize(
        ("expected", "value"), [(3, 3), (3, 3.0), (2.0, 2), ([1, 2], (1, 2)), ({"a": [1]}, {"a": (1,)}), (None, None), ("x", "x"), ([], ())]
    )
    def test_equal_values_are_expected(self, expected, value):
        assert is_expected(expected, value, float_tolerance=0.0)

    @pytest.mark.parametrize(
        ("expected", "value"),
        [
            *((1, True), (True, 1), (0, -0.0), (1, "1"), ([1, 2], {1, 2}), ([1], [1, 1]), ({"1": 2}, {1: 2}), (None, 0)),
            *((0.3, 0.1 + 0.2), (0.5, math.inf), ("x", b"x"), ([True], [1]), (3, [3]), ({}, [])),
        ],
    )
    def test_other_values_are_not(self, expected, value):
        assert not is_expected(expected, value, float_tolerance=0.0)

    def test_a_tolerance_is_for_floats_alone(self):
        assert is_expected([0.3], (0.1 + 0.2,), float_tolerance=1e-9)
        assert is_expected(1, 1.0000000001, float_tolerance=1e-6)
        assert not is_expected(1_000_000, 1_000_001, float_tolerance=1e-2)
        assert not is_expected(1.0, True, float_tolerance=1e-2)
        assert not is_expected(1.5, 10**400, float_tolerance=1e-2)
        assert not is_expected(1.5, math.inf, float_tolerance=1e-2)


class TestTheCallsOfThisProcess:
    def test_right_values_are_accepted_and_nothing_expected_is_sent(self):
        jails = ScriptedJails([b'{"loaded": true}', b'{"call": 1, "value": 3}', b'{"call": 2, "value": 1}'])
        judgement = FunctionJudge(jails, limits=LIMITS, stop_at_failure=True, float_tolerance=0.0).judge_calls("source", ADD)
        assert (judgement.verdict, judgement.num_passed, judgement.num_tests) == ("accepted", 2, 2)
        assert jails.opened[0].sent == [
            {"part": "candidate", "source": "source"},
            {"call": 1, "function": "add", "arguments": [1, 2], "keywords": {"dict": []}},
            {"call": 2, "function": "add", "arguments": [0, 1], "keywords": {"dict": []}},
        ]

    @pytest.mark.parametrize(
        ("line", "verdict"),
        [
            (b'{"call": 1, "value": 4}', "wrong"),
            (b'{"call": 2, "value": 3}', "wrong"),
            (b'{"call": true, "value": 3}', "wrong"),
            (b'{"call": 1, "value": 3, "verdict": "accepted"}', "wrong"),
            (b'{"call": 1, "value": {"set": [[1]]}}', "wrong"),
            (b'{"call": 1}', "wrong"),
            (b'{"call": 1, "error": "no"}', "wrong"),
            (b'{"call": 1, "error": ["KeyError", "KeyError: 3"]}', "runtime"),
            (b"gibberish", "wrong"),
            (TimeoutError(), "time"),
            (EOFError(), "runtime"),
        ],
    )
    def test_any_other_reply_is_not_paid(self, line, verdict):
        assert judge_calls(line).verdict == verdict

    def test_replies_sent_ahead_are_not_paid(self):
        assert judge_calls(b'{"call": 1, "value": 3}', b'{"call": 1, "value": 1}').verdict == "wrong"


class TestTheRelay:
    CALL = b'{"call": 1, "function": "add", "arguments": [1, 2], "keywords": {"dict": []}}'

    def test_a_verdict_with_the_nonce_and_every_assert_is_accepted(self):
        judgement, jails = judge_asserts([self.CALL, verdict_line()], [b'{"loaded": true}', b'{"call": 1, "value": 3}'])
        assert (judgement.verdict, judgement.num_passed, judgement.num_tests) == ("accepted", 2, 2)
        nonce = jails.opened[0].sent[0]["nonce"]
        assert len(nonce) == 32
        assert nonce not in json.dumps(jails.opened[1].sent)
        assert "== 3" not in json.dumps(jails.opened[1].sent)

    @pytest.mark.parametrize(
        ("changes", "verdict"),
        [
            ({"verdict": "0" * 32}, "internal_error"),
            ({"verdict": None}, "internal_error"),
            ({"broken": "ModuleNotFoundError: no numpy"}, "internal_error"),
            ({"held": [0]}, "wrong"),
            ({"held": [0, 5]}, "wrong"),
            ({"failed": [[1, "AssertionError"]], "held": [0]}, "wrong"),
            ({"error": "ValueError: late"}, "wrong"),
        ],
    )
    def test_any_other_verdict_is_not(self, changes, verdict):
        assert judge_asserts([verdict_line(**changes)], [b'{"loaded": true}'])[0].verdict == verdict

    def test_a_verdict_from_the_program_is_only_a_malformed_reply(self):
        forged = b'{"verdict": "x", "held": [0, 1], "failed": [], "broken": null, "error": ""}'
        judgement, jails = judge_asserts([self.CALL, verdict_line(held=[])], [b'{"loaded": true}', forged])
        assert judgement.verdict == "wrong"
        assert jails.opened[0].sent[1]["error"][0] == "ValueError"

    def test_a_program_that_leaves_early_is_a_runtime_error(self):
        judgement, _ = judge_asserts([self.CALL], [b'{"loaded": true}'])
        assert judgement.verdict == "runtime"
        assert "ended without an answer" in judgement.reason

    def test_a_note_names_the_first_assert_that_failed(self):
        judgement, _ = judge_asserts([verdict_line(held=[0], failed=[[1, "AssertionError: no"]])], [b'{"loaded": true}'])
        assert judgement.reason == "assert 2, 'assert add(0, 1) == 1': AssertionError: no"


class TestRewriting:
    def test_free_names_are_the_candidates(self):
        text = (
            "import math\ndef check(candidate, n=2):\n    assert candidate(n) == math.pi\n"
            "    assert other(1) in [x for x in (1, 2)]\ncheck(area)"
        )
        assert set(rewrite_asserts(text).functions) == {"area", "other"}

    def test_comparisons_of_the_bookkeeper_are_pythons_but_for_booleans(self):
        asserts = Asserts(stop_at_failure=False, counter=[0])
        assert asserts.compare(("<", "<="), 1, 2, 2)
        assert not asserts.compare(("<", "=="), 1, 2, 3)
        assert not asserts.compare(("==",), True, 1)
        assert not asserts.compare(("in",), True, [0, 1])
        assert asserts.compare(("not in",), True, {0: "a", 1: "b"})
        assert asserts.compare(("in",), "b", "abc")
        assert asserts.compare(("!=", "is", "is not", ">", ">="), 1, None, None, 3, 2, 2) in (True, False)

    @given(st.lists(st.integers(-3, 3), min_size=2, max_size=4), st.data())
    def test_chains_of_whole_numbers_come_out_as_python_has_them(self, numbers, drawn):
        direct = {
            "==": lambda a, b: a == b,
            "!=": lambda a, b: a != b,
            "<": lambda a, b: a < b,
            "<=": lambda a, b: a <= b,
            ">": lambda a, b: a > b,
            ">=": lambda a, b: a >= b,
        }
        operators = tuple(drawn.draw(st.sampled_from(sorted(direct))) for _ in numbers[1:])
        wanted = all(direct[name](a, b) for name, a, b in zip(operators, numbers[:-1], numbers[1:], strict=True))
        assert bool(Asserts(stop_at_failure=False, counter=[0]).compare(operators, *numbers)) == wanted


class TestInTheJails:
    @pytest.mark.parametrize("attack", CHEATS, ids=lambda attack: attack.name)
    def test_no_cheat_is_paid(self, verdict_on, attack):
        sums = ((1, 2), (40, 2), (0, 1), (0, 0))
        problems = {
            "calls": {"calls": {"function": "add", "cases": [{"arguments": [a, b], "expected": a + b} for a, b in sums]}},
            "asserts": {"asserts": "\n".join(f"assert add({a}, {b}) == {a + b}" for a, b in sums)},
        }
        assert verdict_on(problems[attack.form], attack.program).verdict in attack.verdicts

    @pytest.mark.parametrize(
        "asserts",
        [
            "assert pair(1, 2) == (1, 2)",
            "assert pair([1], {2: 3}) == ([1], {2: 3})",
            "def check(candidate):\n    for n in range(3):\n        assert candidate(n, n) == (n, n)\ncheck(pair)",
            "assert len(pair('a', None)) == 2 and pair(1, 1) != [1, 1]",
            "import math\nassert math.isclose(pair(0.1, 0)[0], 0.1)",
            "try:\n    pair(1)\nexcept TypeError:\n    caught = True\nassert caught and pair(1, 2)",
            "print('noise')\nassert pair({1, 2}, frozenset([3])) == ({1, 2}, frozenset([3]))",
            "assert pair(b=1, a=2) == (2, 1)",
        ],
    )
    def test_tests_of_many_shapes_accept_an_honest_program(self, verdict_on, asserts):
        judgement = verdict_on({"asserts": asserts}, "def pair(a, b):\n    print('noise')\n    return a, b")
        assert judgement.verdict == "accepted", judgement

    @pytest.mark.parametrize(
        ("asserts", "verdict"),
        [
            ("if pair(1, 2) == 3:\n    assert pair(1, 2) == (1, 2)", "wrong"),
            ("assert pair(1, 2) == (1, 2)\nraise ValueError\nassert pair(1, 2)", "wrong"),
            ("import no_such_module\nassert pair(1, 2) == (1, 2)", "internal_error"),
            ("assert pair(print, 2) == (1, 2)", "internal_error"),
            ("import sys\nassert pair(1, 2) == (1, 2)\nsys.exit(0)", "runtime"),
        ],
    )
    def test_tests_that_are_not_reached_or_cannot_run_are_not_paid(self, verdict_on, asserts, verdict):
        judgement = verdict_on({"asserts": asserts}, "def pair(a, b):\n    return a, b")
        assert judgement.verdict == verdict, judgement

    def test_tests_that_call_for_ever_end_at_a_limit(self, verdict_on):
        judgement = verdict_on({"asserts": "while pair(1, 2):\n    pass\nassert pair(1, 2)"}, "def pair(a, b):\n    return a, b")
        assert judgement.verdict in ("time", "output"), "whichever limit this machine reaches first"

    def test_a_share_of_asserts_is_paid_where_the_option_says_so(self, judge, make_rollout):
        share = CodeJudge(judge._sandbox, OPTIONS.model_copy(update={"partial": "share"}))
        example = example_of({"asserts": "assert f(1) == 1\nassert f(2) == 2\nassert f(3) == 4\nassert f(5) == 5"})
        result, _ = share.judge_row(example, make_rollout("```python\ndef f(x):\n    return x\n```"))
        assert result.value == 0.75
        assert result.note.startswith("wrong: assert 3")

    def test_tests_that_cannot_run_are_unavailable(self, judge, make_rollout):
        example = example_of({"asserts": "import no_such_module\nassert f(1) == 1"})
        result, _ = judge.judge_row(example, make_rollout("```python\ndef f(x):\n    return x\n```"))
        assert isinstance(result, Unavailable)
        assert "no_such_module" in result.reason

    def test_a_share_of_calls_is_paid_where_the_option_says_so(self, judge, make_rollout):
        share = CodeJudge(judge._sandbox, OPTIONS.model_copy(update={"partial": "share"}))
        cases = [{"arguments": [n], "expected": 2 if n == 1 else n} for n in range(4)]
        result, _ = share.judge_row(
            example_of({"calls": {"function": "f", "cases": cases}}), make_rollout("```python\ndef f(x):\n    return x\n```")
        )
        assert (result.value, result.note) == (0.75, "wrong: case 2: another value than expected")


@pytest.mark.parametrize("problem", [{"asserts": ADD_ASSERTS}, {"calls": {"function": "add", "cases": [{"expected": 3}]}}])
def test_a_jail_that_cannot_be_had_is_an_internal_error(problem):
    class Lost:
        def open_session(self, program, *, limits):
            raise SandboxError("the jail was lost")

    judgement = CodeJudge(Lost(), OPTIONS).judge_program(read_problem(example_of(problem)), "add = 1")
    assert (judgement.verdict, judgement.reason, judgement.num_passed) == ("internal_error", "the jail was lost", 0)
