"""The reward `code_execution`: runs the program of a response in a jail and pays for what it computes, never for what it claims.

Expected outputs stay in this process: a program gets its input, this process reads its output and compares. A verdict is reached
here from plain bytes; an exit status, a marker or a file never makes one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from ..model.config import Settings
from ..model.records import DataError, Example, Rollout
from .built_in import BuiltInReward, Row, TimedVerdict
from .code_calls import FunctionJudge, Jails, describe_end, verdict_of
from .code_problem import CodeJudgement, CodeProblem, CodeVerdict, NoProgram, StdinCase, find_program, gold_response, read_problem
from .config import RewardConfigError, RewardsConfig
from .result import RewardResult, Unavailable
from .sandbox import Execution, Limits, Sandbox

_NUMBER = re.compile(rb"[+-]?(?:[0-9]{1,400}(?:\.[0-9]{0,400})?|\.[0-9]{1,400})(?:[eE][+-]?[0-9]{1,3})?")


class CodeExecutionOptions(Settings):
    """Options of `code_execution`."""

    language: Literal["python"] = "python"
    """Of the programs; the interpreter is the sandbox's."""
    partial: Literal["all", "share"] = "all"
    """`all`: 1.0 when every case or assert is passed, else 0.0; `share`: the share of them that is."""
    time_limit_s: Annotated[float, Field(gt=0.0, le=120.0)] = 4.0
    """Wall time of one run: one stdin case, or all calls or asserts of a problem."""
    memory_mib: Annotated[int, Field(ge=32, le=65_536)] = 512
    """Memory of a run, MiB."""
    output_kib: Annotated[int, Field(ge=1, le=16_384)] = 1024
    """stdout of a run, KiB; more is the verdict `output`."""
    float_tolerance: Annotated[float, Field(ge=0.0, le=0.1)] = 0.0
    """Above 0: numbers of which one has a point or an exponent count as equal within tolerance x max(1, |both|)."""

    def limits(self) -> Limits:
        """Returns the limits of one run."""
        return Limits(
            wall_s=self.time_limit_s,
            memory_bytes=self.memory_mib * 2**20,
            output_bytes=self.output_kib * 2**10,
        )


def normalise_output(output: bytes) -> bytes:
    """Returns the output without what counts for nothing: spaces, tabs and carriage returns at the ends of lines, empty lines at the end.

    Everything else is compared byte by byte: a full-width digit, a zero-width character, a BOM or a NUL makes another output.
    """
    return b"\n".join(line.rstrip(b" \t\r") for line in output.split(b"\n")).rstrip(b"\n")


def is_expected_output(expected: bytes, output: bytes, *, float_tolerance: float) -> bool:
    """True when the outputs are equal after `normalise_output`, or, with a tolerance, line by line and word by word within it."""
    expected, output = normalise_output(expected), normalise_output(output)
    if expected == output:
        return True
    lines, other_lines = expected.split(b"\n"), output.split(b"\n")
    if float_tolerance <= 0 or len(lines) != len(other_lines):
        return False
    for line, other in zip(lines, other_lines, strict=True):
        words, other_words = line.split(b" "), other.split(b" ")
        if len(words) != len(other_words):
            return False
        if not all(word == their or _is_close(word, their, float_tolerance) for word, their in zip(words, other_words, strict=True)):
            return False
    return True


def _is_close(expected: bytes, word: bytes, tolerance: float) -> bool:
    if not (_NUMBER.fullmatch(expected) and _NUMBER.fullmatch(word)):
        return False
    if not any(mark in expected + word for mark in (b".", b"e", b"E")):
        return False
    return math.isclose(float(expected), float(word), rel_tol=tolerance, abs_tol=tolerance) and math.isfinite(float(word))


class CodeJudge:
    """Judges programs and rows in a sandbox; safe for several threads."""

    def __init__(self, sandbox: Jails, options: CodeExecutionOptions) -> None:
        self._sandbox = sandbox
        self._options = options
        self._functions = FunctionJudge(
            sandbox, limits=options.limits(), stop_at_failure=options.partial == "all", float_tolerance=options.float_tolerance
        )

    def judge_program(self, problem: CodeProblem, program: str) -> CodeJudgement:
        """Returns what the program came to on the problem."""
        if problem.cases is not None:
            return self._judge_cases(program, problem.cases)
        if problem.calls is not None:
            return self._functions.judge_calls(program, problem.calls)
        return self._functions.judge_asserts(program, problem.rewritten_asserts())

    def judge_row(self, example: Example, rollout: Rollout) -> TimedVerdict:
        """Returns the verdict on one response and the seconds that its program ran."""
        try:
            problem = read_problem(example)
        except DataError as error:
            return Unavailable(reason=str(error)), 0.0
        program = find_program(rollout.text, prompt_suffix=rollout.prompt_suffix)
        if isinstance(program, NoProgram):
            return RewardResult(value=0.0, note=program.reason, metrics={"passed_frac": 0.0}), 0.0
        try:
            judgement = self.judge_program(problem, program)
        except RewardConfigError as error:
            # A remote service has no sessions: the recipe cannot judge such a problem.
            return Unavailable(reason=str(error)), 0.0
        if judgement.verdict == "internal_error":
            return Unavailable(reason=f"sandbox: {judgement.reason}"), judgement.seconds
        passed_frac = judgement.num_passed / judgement.num_tests
        value = passed_frac if self._options.partial == "share" else float(judgement.verdict == "accepted")
        note = judgement.verdict + (f": {judgement.reason}" if judgement.reason else "")
        return RewardResult(value=value, note=note, metrics={"passed_frac": passed_frac, "run_s": judgement.seconds}), judgement.seconds

    def _judge_cases(self, program: str, cases: Sequence[StdinCase]) -> CodeJudgement:
        num_passed, seconds, reason = 0, 0.0, ""
        verdict: CodeVerdict = "accepted"
        for number, case in enumerate(cases, 1):
            execution = self._sandbox.run(program, stdin=case.stdin.encode(), limits=self._options.limits())
            seconds += execution.seconds
            failure = self._failure(case, execution)
            if failure is None:
                num_passed += 1
                continue
            if verdict == "accepted" or failure == "internal_error":
                verdict, reason = failure, f"case {number}: {'another output' if failure == 'wrong' else describe_end(execution)}"
            # A program that is out of time would take its limit again in every further case.
            if self._options.partial == "all" or failure in ("time", "internal_error"):
                break
        return CodeJudgement(verdict=verdict, num_passed=num_passed, num_tests=len(cases), seconds=seconds, reason=reason)

    def _failure(self, case: StdinCase, execution: Execution) -> CodeVerdict | None:
        """Returns why a run did not pass its case, or None; an output of a run that failed is not read."""
        if execution.status != "finished" or execution.exit_code != 0:
            return verdict_of(execution)
        expected = case.stdout.encode()
        return None if is_expected_output(expected, execution.stdout, float_tolerance=self._options.float_tolerance) else "wrong"


class _RowJudge:
    """The component at work: rows side by side, as many as the sandbox runs at a time."""

    def __init__(self, judge: CodeJudge, sandbox: Sandbox, threads: ThreadPoolExecutor) -> None:
        self._judge = judge
        self._sandbox = sandbox
        self._threads = threads

    @property
    def is_unsafe(self) -> bool:
        """True when programs run without a jail."""
        return self._sandbox.is_unsafe

    def describe(self) -> str:
        """Returns which jail runs."""
        return self._sandbox.describe()

    def judge(self, rows: Sequence[Row]) -> list[TimedVerdict]:
        """Returns a verdict for each row, in order."""
        return list(self._threads.map(lambda row: self._judge.judge_row(*row), rows))


@contextmanager
def open_judge(options: CodeExecutionOptions, config: RewardsConfig, recipe_folder: Path | None) -> Iterator[_RowJudge]:
    """Opens the sandbox of the reward settings and a judge in it; the sandbox's own error when no backend works."""
    with (
        Sandbox(config.sandbox) as sandbox,
        ThreadPoolExecutor(max_workers=config.sandbox.num_workers, thread_name_prefix="code") as threads,
    ):
        yield _RowJudge(CodeJudge(sandbox, options), sandbox, threads)


def check_code_problem(example: Example) -> None:
    """Raises a `DataError` unless the example's metadata holds a whole problem that some program could pass."""
    read_problem(example)


REWARDS: Mapping[str, BuiltInReward] = {
    "code_execution": BuiltInReward(
        summary="runs the response's Python program in a jail and compares what it computes",
        value_range=(0.0, 1.0),
        check_answer=check_code_problem,
        gold_response=gold_response,
        cacheable=False,
        service=open_judge,
        options=CodeExecutionOptions,
    ),
}
