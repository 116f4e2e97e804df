"""What a code problem is, which part of a response is the program, and what a judgement of it can be. Text and records only.

A problem stands in `example.metadata["code"]` in one of three forms: `cases` (stdin and stdout), `calls` (a function, arguments and
the value expected) or `asserts` (Python text that calls the candidate's functions). A `solution`, when given, is a program that
must be accepted.
"""

from __future__ import annotations

import json
import keyword
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, JsonValue, ValidationError, field_validator, model_validator

from ..model.config import Settings
from ..model.records import DataError, Example
from .answers import strip_thinking
from .code_asserts import RewrittenAsserts, rewrite_asserts
from .code_jail import MAX_DEPTH

MAX_PROGRAM_CHARS = 65_536
"""Longest program that is run, characters."""
MAX_PROBLEM_CHARS = 8 * 2**20
"""Longest problem as JSON, characters."""
MAX_CASES = 500
"""Most cases of one problem."""

_LABELS = ("python", "python3", "py")
_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})[ \t]*([^\s`]*)[^`\n]*")

CodeVerdict = Literal["accepted", "wrong", "time", "memory", "output", "runtime", "refused", "internal_error"]
"""`refused`: the program asked for what the jail does not give; `internal_error`: no fault of the program, never a value."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CodeJudgement:
    """What a program came to on one problem: `CodeJudgement(verdict="wrong", num_passed=1, num_tests=3, seconds=0.04, reason="case 2")`."""

    verdict: CodeVerdict
    """Of the first test that was not passed; `accepted` when there is none."""
    num_passed: int
    num_tests: int
    seconds: float
    """Wall time in the jails; waiting for a free one does not count."""
    reason: str = ""
    """The first test that was not passed, and why; goes to logs only."""


class StdinCase(Settings):
    """One run of the program: what it reads and what it must print."""

    stdin: str = ""
    stdout: str


class CallCase(Settings):
    """One call of the function: JSON arrays stand for lists (a tuple in reply counts as one), objects for dicts with text keys."""

    arguments: tuple[JsonValue, ...] = ()
    keywords: dict[str, JsonValue] = Field(default_factory=dict)
    expected: JsonValue


class CallProblem(Settings):
    """A function that the program must define, and calls of it."""

    function: str
    cases: Annotated[tuple[CallCase, ...], Field(min_length=1, max_length=MAX_CASES)]

    @field_validator("function")
    @classmethod
    def _is_a_name(cls, function: str) -> str:
        if not function.isidentifier() or keyword.iskeyword(function):
            raise ValueError(f"{function!r} is no name of a Python function")
        return function


class CodeProblem(Settings):
    """A programming problem; exactly one of `cases`, `calls` and `asserts` is given."""

    cases: Annotated[tuple[StdinCase, ...], Field(min_length=1, max_length=MAX_CASES)] | None = None
    calls: CallProblem | None = None
    asserts: str | None = None
    """Python text; every `assert` statement in it must be reached and hold. Names that it uses and does not define are the candidate's
    functions, which take and return plain values."""
    solution: str | None = None
    """A program that must be accepted."""

    @model_validator(mode="after")
    def _one_form(self) -> CodeProblem:
        given = [name for name in ("cases", "calls", "asserts") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of cases, calls and asserts, not {' and '.join(given) or 'none'}")
        return self

    def rewritten_asserts(self) -> RewrittenAsserts:
        """Returns the tests as they run in their jail; a `ValueError` when the text is no test of anything."""
        assert self.asserts is not None, "only a problem of asserts has them"
        return rewrite_asserts(self.asserts)


def read_problem(example: Example) -> CodeProblem:
    """Returns the problem of an example; a `DataError` that names the example and what is wrong with its metadata."""
    place = f"example {example.id!r}: metadata 'code'"
    if "code" not in example.metadata:
        raise DataError(f"{place} is missing; `code_execution` needs cases, calls or asserts there")
    try:
        document = json.dumps(_plain(example.metadata["code"], 0), allow_nan=False)
        if len(document) > MAX_PROBLEM_CHARS:
            raise DataError(f"{place} has {len(document)} characters; at most {MAX_PROBLEM_CHARS} are read")
        problem = CodeProblem.model_validate_json(document, strict=True)
        if problem.asserts is not None:
            problem.rewritten_asserts()
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise DataError(f"{place}{'.' if where else ''}{where}: {first['msg']}; see `CodeProblem` for the three forms") from error
    except DataError:
        raise
    except ValueError as error:
        raise DataError(f"{place}: {error}") from error
    return problem


def _plain(value: object, depth: int) -> JsonValue:
    """Returns plain JSON as dicts and lists, whatever mappings and sequences the row's reader made of it."""
    if depth > MAX_DEPTH:
        raise ValueError(f"more than {MAX_DEPTH} containers inside each other")
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise ValueError("an object with a key that is no text")
        return {key: _plain(member, depth + 1) for key, member in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(member, depth + 1) for member in value]
    if isinstance(value, str):
        # A lone surrogate could neither be written to a jail nor come back from one.
        value.encode()
        return value
    if value is None or isinstance(value, (bool, int, float)):
        return value
    raise ValueError(f"a value of type {type(value).__name__}, which is no JSON")


@dataclass(frozen=True, kw_only=True, slots=True)
class NoProgram:
    """A response without a program: `NoProgram(reason="the last code block is not closed")`."""

    reason: str


def find_program(text: str, *, prompt_suffix: str) -> str | NoProgram:
    """Returns the program of a response: its last Python block, or the whole visible text when it has no block at all.

    A block is fenced as in CommonMark and labelled `python`, `python3` or `py`; when none is, the last block without a label counts.
    Earlier blocks, equal or not, are drafts and are ignored: only one program is ever run, so several cannot hedge. A block that is
    not closed means that the response was cut off: no program. Blocks in the thinking part do not count.
    """
    visible = strip_thinking(text, prompt_suffix=prompt_suffix)
    if visible is None:
        return NoProgram(reason="no visible answer after the thinking part")
    blocks = list(_blocks(visible))
    if blocks and blocks[-1][1] is None:
        return NoProgram(reason="the last code block is not closed")
    labelled = [source for label, source in blocks if label in _LABELS]
    bare = [source for label, source in blocks if not label]
    if blocks and not labelled and not bare:
        return NoProgram(reason="no code block is labelled python")
    program = ((labelled or bare)[-1] if blocks else visible) or ""
    if not program.strip():
        return NoProgram(reason="the program is empty")
    if len(program) > MAX_PROGRAM_CHARS:
        return NoProgram(reason=f"a program of {len(program)} characters; at most {MAX_PROGRAM_CHARS} are run")
    if "\0" in program or any("\ud800" <= letter <= "\udfff" for letter in program):
        return NoProgram(reason="the program holds a NUL or half a character, which no Python program may")
    return program


def _blocks(text: str) -> Iterator[tuple[str, str | None]]:
    """Yields label and content of each fenced block; the content of one that is never closed is None."""
    fence, label, lines = "", "", []
    for line in text.split("\n"):
        match = _FENCE.fullmatch(line.rstrip("\r"))
        if not fence:
            if match:
                fence, label, lines = match.group(1), match.group(2).lower(), []
        elif match and match.group(1)[0] == fence[0] and len(match.group(1)) >= len(fence) and line.strip() == match.group(1):
            yield label, "\n".join(lines)
            fence = ""
        else:
            lines.append(line)
    if fence:
        yield label, None


def gold_response(example: Example) -> str:
    """Returns the solution of the example's problem as a response; a `DataError` when it has none."""
    solution = read_problem(example).solution
    if solution is None:
        raise DataError(
            f"example {example.id!r}: metadata 'code' has no `solution`, a program that must be accepted; add one to check the row"
        )
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", solution)), default=0))
    return f"{fence}python\n{solution}\n{fence}"
