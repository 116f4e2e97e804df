"""Judging functions: the candidate in one jail, tests of the data set in another, and this process between them.

Calls: this process sends arguments and compares the value that comes back; what is expected never leaves it. Asserts: the tests run in
a jail of their own, each call of theirs is relayed, and the verdict is theirs, with a nonce that the candidate's jail never got. What
crosses is plain JSON, checked for size, depth and length of numbers before it is parsed. An exit status is never a verdict.
"""

from __future__ import annotations

import hmac
import json
import math
import re
import secrets
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, Protocol, TypeVar

from .code_asserts import BOOKKEEPER, RewrittenAsserts
from .code_jail import MAX_DEPTH, decode, encode, same_value
from .code_problem import CallProblem, CodeJudgement, CodeVerdict
from .sandbox import Execution, Limits, SandboxError

MAX_MESSAGE_BYTES = 256 * 2**10
"""Longest line that is parsed."""
MAX_MESSAGE_DEPTH = 3 * MAX_DEPTH + 8
"""Brackets inside brackets of a line: a container is at most three, and the message has its own."""
MAX_NUMBER_DIGITS = 4000
"""Below the 4,300 digits at which Python itself refuses to read a number."""
MAX_CHOSEN_HASHES = 2000
"""Members of sets and keys of dicts of one message whose hashes could be chosen to be all the same: looking them up is quadratic."""
MAX_CALLS = 10_000
"""Most calls that one problem's tests may make."""
MAX_TESTS_BYTES = 64 * 2**20
"""Of all calls of one problem's tests together."""

Reply = TypeVar("Reply")

_JAIL_PROGRAM = "code_jail.py"
# A string that does not end counts to the end of the line: to try every quote in it again would take quadratic time.
_STRING = re.compile(r'"(?:[^"\\]|\\.)*+(?:"|\\?\Z)', re.DOTALL)
_BRACKET = re.compile(r"[\[\]{}]")
_DIGITS = re.compile(r"[0-9]++")
_STATUS_VERDICTS: Mapping[str, CodeVerdict] = {
    "finished": "runtime",
    "time_limit": "time",
    "memory_limit": "memory",
    "output_limit": "output",
    "runtime_error": "runtime",
    "refused": "refused",
    "internal_error": "internal_error",
}


class Channel(Protocol):
    """A running program that lines are sent to and received from."""

    def send(self, line: bytes, *, timeout_s: float) -> None:
        """Hands a line over; `TimeoutError` or `EOFError` when the program does not take it."""
        ...

    def receive(self, *, timeout_s: float) -> bytes:
        """Returns the next line; `TimeoutError` or `EOFError` when there is none."""
        ...

    def execution(self) -> Execution:
        """Returns how the program ended."""
        ...


class Jails(Protocol):
    """What the judges of this package ask of a sandbox."""

    def run(self, program: str, *, stdin: bytes, limits: Limits) -> Execution:
        """Runs a program to its end."""
        ...

    def open_session(self, program: str, *, limits: Limits) -> AbstractContextManager[Channel]:
        """Starts a program that answers line by line."""
        ...


class _MalformedError(ValueError):
    """A line that is no message of the form agreed on."""


class _StoppedError(Exception):
    """A jail that has no answer any more: how it ended."""

    def __init__(self, verdict: CodeVerdict, reason: str) -> None:
        super().__init__(reason)
        self.verdict: CodeVerdict = verdict


@cache
def jail_program() -> str:
    """Returns the text of the program that runs in the jails of call and assert problems."""
    return Path(__file__).with_name(_JAIL_PROGRAM).read_text(encoding="utf-8")


def verdict_of(execution: Execution) -> CodeVerdict:
    """Returns what a run came to that gave no answer; one that ended by itself without an answer is `runtime`."""
    return _STATUS_VERDICTS[execution.status]


def describe_end(execution: Execution) -> str:
    """Returns how a run ended in a few words, with the last line that it wrote to stderr."""
    lines = execution.stderr[-2000:].decode("utf-8", errors="replace").strip().splitlines()
    last = "".join(letter if letter.isprintable() else "?" for letter in lines[-1][:200]) if lines else ""
    parts = (execution.reason, f"exit code {execution.exit_code}" if execution.exit_code else "", last)
    return "; ".join(part for part in parts if part) or execution.status


def read_message(line: bytes) -> dict[str, Any]:
    """Returns the JSON object of one line; a `ValueError` for anything else. Size, depth and digits are bounded before parsing."""
    if len(line) > MAX_MESSAGE_BYTES:
        raise _MalformedError(f"a line of {len(line)} bytes; at most {MAX_MESSAGE_BYTES} are read")
    try:
        text = line.decode("ascii")
    except UnicodeDecodeError as error:
        raise _MalformedError("a line that is not ASCII") from error
    bare = _STRING.sub("", text)
    depth = 0
    for bracket in _BRACKET.finditer(bare):
        depth += 1 if bracket.group() in "[{" else -1
        if not 0 <= depth <= MAX_MESSAGE_DEPTH:
            raise _MalformedError(f"brackets that do not match, or more than {MAX_MESSAGE_DEPTH} inside each other")
    if any(len(digits.group()) > MAX_NUMBER_DIGITS for digits in _DIGITS.finditer(bare)):
        raise _MalformedError(f"a number of more than {MAX_NUMBER_DIGITS} digits")
    try:
        message = json.loads(text, parse_constant=_refuse_constant)
    except ValueError as error:
        raise _MalformedError("a line that is no JSON") from error
    if type(message) is not dict:
        raise _MalformedError("a line that is no JSON object")
    if _num_chosen_hashes(message) > MAX_CHOSEN_HASHES:
        raise _MalformedError(f"more than {MAX_CHOSEN_HASHES} keys or members of sets that are large numbers or contain such")
    return message


def _num_chosen_hashes(message: object) -> int:
    """Returns how many keys and members of sets are neither texts nor small numbers, nor tuples of such."""
    count, left = 0, [message]
    while left:
        document = left.pop()
        if isinstance(document, list):
            left += document
        elif isinstance(document, dict):
            for tag, content in document.items():
                left.append(content)
                if tag in ("set", "frozenset") and isinstance(content, list):
                    count += sum(_has_chosen_hash(member, limit=_INT_HASH_FROM) for member in content)
                elif tag == "dict" and isinstance(content, list):
                    count += sum(_has_chosen_hash(pair[0], limit=_INT_HASH_FROM) for pair in content if isinstance(pair, list) and pair)
    return count


_INT_HASH_FROM = 2**61 - 1
"""Smaller numbers are their own hashes."""


def _has_chosen_hash(document: object, *, limit: int) -> bool:
    if isinstance(document, int):
        return abs(document) >= limit
    if isinstance(document, float):
        return limit != _INT_HASH_FROM  # alone, at most a few floats share a hash
    if isinstance(document, dict):
        # The hash of a tuple is made of those of its members, without a key: 32 bits of each leave no choice.
        members = [member for content in document.values() if isinstance(content, list) for member in content]
        return any(_has_chosen_hash(member, limit=2**32) for member in members)
    return False


def _refuse_constant(name: str) -> float:
    raise ValueError(name)


def is_expected(expected: object, value: object, *, float_tolerance: float) -> bool:
    """True when the value that a function returned is the one expected, which is plain JSON.

    A tuple counts as a list, 2.0 as 2; True is not 1, -0.0 is not 0 and nan equals nothing. `float_tolerance` above 0 also
    accepts |value - expected| <= tolerance x max(1, |value|, |expected|) where one of the two is a float.
    """
    if isinstance(expected, list):
        return (
            isinstance(value, (list, tuple))
            and len(expected) == len(value)
            and all(is_expected(mine, other, float_tolerance=float_tolerance) for mine, other in zip(expected, value, strict=True))
        )
    if isinstance(expected, dict):
        return (
            isinstance(value, dict)
            and expected.keys() == value.keys()
            and all(is_expected(member, value[key], float_tolerance=float_tolerance) for key, member in expected.items())
        )
    if same_value(expected, value):
        return True
    return float_tolerance > 0 and _is_close(expected, value, float_tolerance)


def _is_close(expected: object, value: object, tolerance: float) -> bool:
    if {type(expected), type(value)} not in ({int, float}, {float}):
        return False
    try:
        return math.isclose(expected, value, rel_tol=tolerance, abs_tol=tolerance)  # pyright: ignore[reportArgumentType] numbers, see above
    except OverflowError:
        return False


class _Jail:
    """One running jail program: messages out, messages in, until the deadline."""

    def __init__(self, session: Channel, *, deadline: float, who: str) -> None:
        self._session = session
        self._deadline = deadline
        self._who = who

    def send(self, message: Mapping[str, Any]) -> None:
        line = json.dumps(message, allow_nan=False, separators=(",", ":")).encode("ascii") + b"\n"
        self._wait(lambda timeout_s: self._session.send(line, timeout_s=timeout_s))

    def receive(self) -> dict[str, Any]:
        return read_message(self._wait(lambda timeout_s: self._session.receive(timeout_s=timeout_s)))

    def _wait(self, act: Callable[[float], Reply]) -> Reply:
        try:
            return act(max(0.0, self._deadline - time.monotonic()))
        except TimeoutError as error:
            raise _StoppedError("time", f"{self._who} gave no answer in time") from error
        except EOFError as error:
            execution = self._session.execution()
            raise _StoppedError(verdict_of(execution), f"{self._who} ended without an answer ({describe_end(execution)})") from error


class FunctionJudge:
    """Judges call and assert problems in a sandbox; safe for several threads."""

    def __init__(self, sandbox: Jails, *, limits: Limits, stop_at_failure: bool, float_tolerance: float) -> None:
        self._sandbox = sandbox
        self._limits = limits
        self._stop_at_failure = stop_at_failure
        self._float_tolerance = float_tolerance
        self._program = jail_program()
        # The tests' side of a long exchange is the data set's, and the number of calls bounds it.
        self._tests_limits = replace(limits, output_bytes=MAX_TESTS_BYTES)

    def judge_calls(self, program: str, problem: CallProblem) -> CodeJudgement:
        """Returns the verdict on a program whose function is called once a case, all cases in one process and one time limit."""
        try:
            return self._judge_calls(program, problem)
        except SandboxError as error:
            return _lost(error, num_tests=len(problem.cases))

    def _judge_calls(self, program: str, problem: CallProblem) -> CodeJudgement:
        num_passed, reason = 0, ""
        verdict: CodeVerdict = "accepted"
        with self._sandbox.open_session(self._program, limits=self._limits) as session:
            started = time.monotonic()
            candidate = _Jail(session, deadline=started + self._limits.wall_s, who="the program")
            try:
                _load_candidate(candidate, program)
                for number, case in enumerate(problem.cases, 1):
                    call = {"function": problem.function, "arguments": encode(list(case.arguments)), "keywords": encode(case.keywords)}
                    reply = _call(candidate, number, call)
                    if "value" in reply and is_expected(case.expected, decode(reply["value"]), float_tolerance=self._float_tolerance):
                        num_passed += 1
                        continue
                    if verdict == "accepted":
                        verdict = "runtime" if "error" in reply else "wrong"
                        reason = f"case {number}: {reply['error'][1] if 'error' in reply else 'another value than expected'}"
                    if self._stop_at_failure:
                        break
            except _StoppedError as stopped:
                if verdict == "accepted" or stopped.verdict == "internal_error":
                    verdict, reason = stopped.verdict, f"case {num_passed + 1}: {stopped}"
            except ValueError as error:
                if verdict == "accepted":
                    verdict, reason = "wrong", f"a malformed reply: {error}"
            seconds = time.monotonic() - started
        return CodeJudgement(verdict=verdict, num_passed=num_passed, num_tests=len(problem.cases), seconds=seconds, reason=reason)

    def judge_asserts(self, program: str, tests: RewrittenAsserts) -> CodeJudgement:
        """Returns the verdict on a program by tests in another jail: accepted when every assert was reached and held.

        Tests that cannot run whatever the program is (a missing import, arguments that are no plain values) are `internal_error`.
        """
        try:
            return self._judge_asserts(program, tests)
        except SandboxError as error:
            return _lost(error, num_tests=len(tests.sources))

    def _judge_asserts(self, program: str, tests: RewrittenAsserts) -> CodeJudgement:
        nonce = secrets.token_hex(16)
        with ExitStack() as jails:
            tests_session = jails.enter_context(self._sandbox.open_session(self._program, limits=self._tests_limits))
            session = jails.enter_context(self._sandbox.open_session(self._program, limits=self._limits))
            started = time.monotonic()
            deadline = started + self._limits.wall_s
            tester = _Jail(tests_session, deadline=deadline, who="the tests")
            try:
                tester.send(
                    {
                        "part": "tests",
                        "tests": tests.text,
                        "functions": tests.functions,
                        "bookkeeper": BOOKKEEPER,
                        "nonce": nonce,
                        "stop_at_failure": self._stop_at_failure,
                    }
                )
                final = _relay(tester, _Jail(session, deadline=deadline, who="the program"), program)
                verdict, num_passed, reason = _read_verdict(final, nonce, tests)
            except _StoppedError as stopped:
                verdict, num_passed, reason = stopped.verdict, 0, str(stopped)
            except ValueError as error:
                verdict, num_passed, reason = "wrong", 0, f"a malformed reply: {error}"
            except (KeyError, TypeError) as error:
                verdict, num_passed, reason = "internal_error", 0, f"the tests' jail sent a message of another form ({error!r})"
            seconds = time.monotonic() - started
        return CodeJudgement(verdict=verdict, num_passed=num_passed, num_tests=len(tests.sources), seconds=seconds, reason=reason)


def _lost(error: SandboxError, *, num_tests: int) -> CodeJudgement:
    return CodeJudgement(verdict="internal_error", num_passed=0, num_tests=num_tests, seconds=0.0, reason=str(error))


def _load_candidate(candidate: _Jail, program: str) -> None:
    candidate.send({"part": "candidate", "source": program})
    loaded = candidate.receive()
    if loaded.get("loaded") is not True:
        raise _StoppedError("runtime", f"the program cannot be loaded ({str(loaded.get('error', ''))[:200]})")


def _call(candidate: _Jail, number: int, call: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `{"value": document}` with a document that decodes, or `{"error": [type, words]}`; a `ValueError` for other replies."""
    candidate.send({"call": number, **call})
    reply = candidate.receive()
    if type(reply.get("call")) is not int or reply["call"] != number or len(reply) != 2:
        raise _MalformedError("a reply to another call, or none at all")
    if "value" in reply:
        decode(reply["value"])
        return {"value": reply["value"]}
    error = reply.get("error")
    if type(error) is not list or len(error) != 2 or not all(type(words) is str for words in error):
        raise _MalformedError("a reply without value or error")
    return {"error": [error[0][:100], error[1][:300]]}


def _relay(tester: _Jail, candidate: _Jail, program: str) -> dict[str, Any]:
    """Returns the last message of the tests, after all their calls were answered by the candidate."""
    _load_candidate(candidate, program)
    for number in range(1, MAX_CALLS + 1):
        message = tester.receive()
        if "verdict" in message:
            return message
        call = {name: message[name] for name in ("function", "arguments", "keywords")}
        try:
            tester.send(_call(candidate, number, call))
        except _MalformedError as error:
            tester.send({"error": ["ValueError", f"a malformed reply: {error}"]})
    # Tests may loop on what the program returns: no way out into an unavailable judgement.
    raise _StoppedError("time", f"the tests made more than {MAX_CALLS} calls")


def _read_verdict(final: Mapping[str, Any], nonce: str, tests: RewrittenAsserts) -> tuple[CodeVerdict, int, str]:
    if not hmac.compare_digest(str(final["verdict"]), nonce):
        return "internal_error", 0, "the tests' jail sent a verdict that is not its own"
    if final["broken"] is not None:
        return "internal_error", 0, f"the tests cannot run: {final['broken']}"
    held = set(final["held"]) & set(range(len(tests.sources)))
    first_failure = next((index for index in range(len(tests.sources)) if index not in held), None)
    if first_failure is None and not final["failed"] and not final["error"]:
        return "accepted", len(held), ""
    index = first_failure if first_failure is not None else 0
    words = dict(map(tuple, final["failed"])).get(index, f"not reached ({final['error']})")
    return "wrong", len(held), f"assert {index + 1}, {tests.sources[index][:200]!r}: {words}"
