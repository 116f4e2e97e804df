"""The program inside the jails of call and assert problems, and the plain values that cross between them.

This file is read as text and started in a jail, alone and with the standard library only; the parent imports the three functions on
values. One message is one line of JSON. A jail plays one of two parts: the candidate answers calls, the tests make them.
What a candidate does to its own process is its own loss: the parent believes no verdict that comes from it, only values.
"""

import builtins
import json
import math
import os
import sys
import types
from importlib.machinery import SourceFileLoader

MAX_DEPTH = 64
"""Containers inside containers that a value may have."""
_SIMPLE_ERRORS = (
    *("ArithmeticError", "AssertionError", "AttributeError", "Exception", "IndexError", "KeyError", "LookupError", "MemoryError"),
    *("NotImplementedError", "OverflowError", "RecursionError", "RuntimeError", "TypeError", "ValueError", "ZeroDivisionError"),
)


def encode(value: object, depth: int = 0) -> object:
    """Returns the value as plain JSON: lists as arrays, other containers as an object with one tag.

    A value that is not plain is a `TypeError`, one of too many levels a `ValueError`. Plain are None, bool, int, float,
    str, bytes, list, tuple, dict, set and frozenset; subclasses of the containers count as the container.
    """
    if depth > MAX_DEPTH:
        raise ValueError(f"a value of more than {MAX_DEPTH} containers inside each other")
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"float": repr(value)}
    if type(value) is bytes:
        return {"bytes": value.hex()}
    if isinstance(value, list):
        return [encode(member, depth + 1) for member in value]
    if isinstance(value, dict):
        return {"dict": [[encode(key, depth + 1), encode(member, depth + 1)] for key, member in value.items()]}
    for kind in (tuple, set, frozenset):
        if isinstance(value, kind):
            return {kind.__name__: [encode(member, depth + 1) for member in value]}
    raise TypeError(f"a value of type {type(value).__name__}, which is no plain value")


def decode(document: object) -> object:
    """Returns the value that `encode` made the document of, all of exact built-in types; a `ValueError` for any other document."""
    if document is None or type(document) in (bool, int, str):
        return document
    if type(document) is float:
        if not math.isfinite(document):
            raise ValueError("a number beyond the range of floats")
        return document
    if type(document) is list:
        return [decode(member) for member in document]
    if type(document) is dict and len(document) == 1:
        ((tag, content),) = document.items()
        return _decode_tagged(tag, content)
    raise ValueError("not the form of a plain value")


def _decode_tagged(tag: str, content: object) -> object:
    if tag == "float" and content in ("inf", "-inf"):
        return float(content)
    if tag == "bytes" and type(content) is str:
        return bytes.fromhex(content)
    if type(content) is list:
        if tag == "tuple":
            return tuple([decode(member) for member in content])
        if tag in ("set", "frozenset"):
            members = [_member(member) for member in content]
            return set(members) if tag == "set" else frozenset(members)
        if tag == "dict" and all(type(pair) is list and len(pair) == 2 for pair in content):
            return {_member(key): decode(member) for key, member in content}
    raise ValueError("not the form of a plain value (nan is none)")


def _member(document: object) -> object:
    value = decode(document)
    try:
        hash(value)
    except TypeError as error:
        raise ValueError("a list or dict as key or member of a set") from error
    return value


def same_value(left: object, right: object) -> bool:
    """True when the two are equal in Python and alike in what Python overlooks: True is not 1, -0.0 is not 0, at any depth."""
    if isinstance(left, (bool, int, float)) and isinstance(right, (bool, int, float)):
        return isinstance(left, bool) == isinstance(right, bool) and left == right and _is_minus_zero(left) == _is_minus_zero(right)
    if isinstance(left, (list, tuple)) and isinstance(right, (list, tuple)):
        return (
            isinstance(left, list) == isinstance(right, list)
            and len(left) == len(right)
            and all(same_value(mine, other) for mine, other in zip(left, right, strict=True))
        )
    if isinstance(left, dict) and isinstance(right, dict):
        return same_value(set(left), set(right)) and all(same_value(member, right[key]) for key, member in left.items())
    if isinstance(left, (set, frozenset)) and isinstance(right, (set, frozenset)):
        if left != right:
            return False
        others = {member: member for member in right}
        return all(same_value(member, others[member]) for member in left)
    return bool(left == right)


def _is_minus_zero(value: float) -> bool:
    return value == 0 and math.copysign(1.0, value) < 0


class _Channel:
    """The jail's own stdin and stdout, taken away from the program, whose prints go nowhere and whose reads find the end."""

    def __init__(self) -> None:
        self._requests = os.fdopen(os.dup(0), "rb")
        self._replies = os.dup(1)
        nowhere = os.open(os.devnull, os.O_RDWR)
        os.dup2(nowhere, 0)
        os.dup2(nowhere, 1)
        os.close(nowhere)

    def receive(self) -> dict:
        line = self._requests.readline()
        if not line:
            # The parent has left.
            os._exit(0)
        return json.loads(line)

    def send(self, message: dict) -> None:
        remaining = json.dumps(message, separators=(",", ":")).encode() + b"\n"
        while remaining:
            remaining = remaining[os.write(self._replies, remaining) :]


class _Source(SourceFileLoader):
    """Loads a module from text that never was a file."""

    def __init__(self, name: str, source: str) -> None:
        super().__init__(name, f"{name}.py")
        self._source = source.encode()

    def get_data(self, path: str) -> bytes:
        return self._source


def _load(name: str, source: str, names: dict) -> types.ModuleType:
    module = types.ModuleType(name)
    vars(module).update(names)
    # Dataclasses look their module up there.
    sys.modules[name] = module
    _Source(name, source).exec_module(module)
    return module


def _in_words(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}"[:300]
    except Exception:  # the message of a candidate's own error may raise again
        return type(error).__name__


def serve_candidate(channel: _Channel, source: str) -> None:
    """Loads the program and answers calls until the parent leaves; `SystemExit` and the like end the process."""
    try:
        module = _load("candidate", source, {})
    except Exception as error:
        channel.send({"loaded": False, "error": _in_words(error)})
        return
    channel.send({"loaded": True})
    while True:
        request = channel.receive()
        try:
            function = getattr(module, request["function"])
            arguments, keywords = decode(request["arguments"]), decode(request["keywords"])
            value = function(*arguments, **keywords)  # pyright: ignore[reportGeneralTypeIssues, reportCallIssue] a list and a dict by protocol
            reply = {"call": request["call"], "value": encode(value)}
        except Exception as error:
            reply = {"call": request["call"], "error": [type(error).__name__, _in_words(error)]}
        channel.send(reply)


class CandidateError(Exception):
    """What the candidate raised, in the tests' jail; a built-in error is raised as that error as well."""


class _BrokenTests(BaseException):
    """The tests cannot be what they are meant to be, whatever the candidate does."""


class _FirstFailure(BaseException):
    """Ends tests that need not be run to their end."""


def _is_of_tests(error: BaseException, counter: list) -> bool:
    """True when the tests would fail so whatever the candidate is; after its first answer, a name may be missing because of that."""
    if isinstance(error, CandidateError):
        return False
    return isinstance(error, (ImportError, SyntaxError)) or (isinstance(error, NameError) and counter[0] == 0)


class Asserts:
    """Bookkeeping for the rewritten tests: which asserts held, which failed, and the comparisons that `same_value` makes."""

    def __init__(self, *, stop_at_failure: bool, counter: list) -> None:
        self._counter = counter
        self.held: set[int] = set()
        self.failed: dict[int, str] = {}
        self._stop_at_failure = stop_at_failure

    def hold(self, index: int, outcome: object) -> None:
        """Notes an assert that was reached and what it came to."""
        if not outcome:
            raise AssertionError("the assert does not hold")
        self.held.add(index)

    def fail(self, index: int) -> None:
        """Notes an assert that failed with the error at hand; only the first failure of each is kept."""
        error = sys.exc_info()[1]
        if error is not None and _is_of_tests(error, self._counter):
            raise _BrokenTests(_in_words(error)) from error
        self.failed.setdefault(index, _in_words(error) if error is not None else "")
        if self._stop_at_failure:
            raise _FirstFailure

    def compare(self, operators: tuple, *operands: object) -> object:
        """Returns a chain of comparisons: `==`, `!=`, `in` and `not in` by `same_value`, the others as Python has them."""
        outcome: object = True
        for operator, left, right in zip(operators, operands[:-1], operands[1:], strict=True):
            outcome = _COMPARISONS[operator](left, right)
            if not outcome:
                return outcome
        return outcome


def _is_member(left: object, right: object) -> bool:
    if isinstance(right, (list, tuple, set, frozenset, dict)):
        return any(same_value(left, member) for member in right)
    return left in right  # pyright: ignore[reportOperatorIssue] the tests' own containers


_COMPARISONS = {
    "==": same_value,
    "!=": lambda left, right: not same_value(left, right),
    "in": _is_member,
    "not in": lambda left, right: not _is_member(left, right),
    "<": lambda left, right: left < right,
    "<=": lambda left, right: left <= right,
    ">": lambda left, right: left > right,
    ">=": lambda left, right: left >= right,
    "is": lambda left, right: left is right,
    "is not": lambda left, right: left is not right,
}


class _Proxy:
    """A function of the candidate's, as the tests see it."""

    def __init__(self, channel: _Channel, name: str, counter: list) -> None:
        self._channel = channel
        self._name = name
        self._counter = counter

    def __call__(self, *arguments: object, **keywords: object) -> object:
        self._counter[0] += 1
        number = self._counter[0]
        try:
            sent = {"arguments": encode(list(arguments)), "keywords": encode(keywords)}
        except TypeError as error:
            raise _BrokenTests(f"the tests call {self._name} with {error}") from error
        self._channel.send({"call": number, "function": self._name, **sent})
        reply = self._channel.receive()
        if "value" in reply:
            return decode(reply["value"])
        name, words = reply["error"]
        if name in _SIMPLE_ERRORS:
            raise type(name, (CandidateError, getattr(builtins, name)), {})(words)
        raise CandidateError(words)


def run_tests(channel: _Channel, order: dict) -> None:
    """Runs the rewritten tests with proxies for the candidate's functions and sends what they came to, with the parent's nonce."""
    counter = [0]
    asserts = Asserts(stop_at_failure=order["stop_at_failure"], counter=counter)
    names = {name: _Proxy(channel, name, counter) for name in order["functions"]}
    broken = None
    error_words = ""
    try:
        _load("tests", order["tests"], {**names, order["bookkeeper"]: asserts})
    except _FirstFailure:
        error_words = "stopped at the first failure"
    except _BrokenTests as error:
        broken = str(error)
    except Exception as error:
        if _is_of_tests(error, counter):
            broken = _in_words(error)
        else:
            error_words = _in_words(error)
    # The first is what a log shows; all of them might not fit into a line.
    failed = [[index, words] for index, words in sorted(asserts.failed.items())][:1]
    held = sorted(asserts.held - set(asserts.failed))
    channel.send({"verdict": order["nonce"], "held": held, "failed": failed, "broken": broken, "error": error_words})


def main() -> None:
    """Plays the part that the first line asks for."""
    channel = _Channel()
    order = channel.receive()
    if order["part"] == "candidate":
        serve_candidate(channel, order["source"])
    else:
        run_tests(channel, order)


if __name__ == "__main__":
    main()
