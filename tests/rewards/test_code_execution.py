"""The reward for programs: which text is the program, what a problem may be, how outputs are compared, and what is paid."""

import json
import os
import time

import pytest
from hypothesis import example as with_example
from hypothesis import given
from hypothesis import strategies as st
from vlpost.model.records import DataError, Example
from vlpost.rewards.code_execution import REWARDS, CodeExecutionOptions, CodeJudge, is_expected_output, normalise_output
from vlpost.rewards.code_problem import MAX_PROGRAM_CHARS, NoProgram, find_program, gold_response, read_problem
from vlpost.rewards.result import RewardResult, Unavailable
from vlpost.rewards.sandbox import Execution, Sandbox
from vlpost.rewards.sandbox_config import SandboxConfig

SUMS = {"cases": [{"stdin": "1 2\n", "stdout": "3\n"}, {"stdin": "40 2\n", "stdout": "42\n"}]}
HONEST = "print(sum(map(int, input().split())))"
OPTIONS = CodeExecutionOptions(time_limit_s=2.0, memory_mib=256)


def code_example(problem, **more):
    return Example(id="sum-1", messages=(), answer="", task="code", source="test", metadata={"code": problem, **more})


def fenced(program, label="python"):
    return f"Here it is:\n```{label}\n{program}\n```\nDone."


class Scripted:
    """A sandbox whose runs end as scripted."""

    def __init__(self, *executions):
        self.executions = list(executions)
        self.num_runs = 0

    def run(self, program, *, stdin, limits):
        self.num_runs += 1
        return self.executions.pop(0)

    def open_session(self, program, *, limits):
        raise AssertionError("not for stdin problems")


def ended(status="finished", stdout=b"", stderr=b"", exit_code=0, reason=""):
    return Execution(status=status, stdout=stdout, stderr=stderr, exit_code=exit_code, seconds=0.01, reason=reason)


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox(SandboxConfig()) as sandbox:
        yield sandbox


@pytest.fixture(scope="module")
def judge(sandbox):
    return CodeJudge(sandbox, OPTIONS)


class TestFindingTheProgram:
    @pytest.mark.parametrize(
        ("text", "program"),
        [
            (fenced("print(1)"), "print(1)"),
            (fenced("print(1)", "py"), "print(1)"),
            (fenced("print(1)", "Python3"), "print(1)"),
            (fenced("print(1)", ""), "print(1)"),
            ("print(1)", "print(1)"),
            (fenced("print(1)") + "\n" + fenced("print(2)"), "print(2)"),
            (fenced("print(1)") + "\n" + fenced("3", ""), "print(1)"),
            (fenced("print(1)") + "\n" + fenced("ls", "sh"), "print(1)"),
            ("~~~python\nprint('```')\n~~~", "print('```')"),
            ("````python\nprint('''\n```\n''')\n````", "print('''\n```\n''')"),
            ("<think>```python\nprint(0)\n```</think>" + fenced("print(1)"), "print(1)"),
        ],
    )
    def test_the_last_python_block_is_the_program(self, text, program):
        assert find_program(text, prompt_suffix="") == program

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("```python\nprint(1)", "not closed"),
            (fenced("print(1)") + "\n```python\nprint(2)", "not closed"),
            (fenced("ls", "sh"), "labelled"),
            (fenced("  "), "empty"),
            ("", "empty"),
            ("<think>print(1)", "no visible answer"),
            (fenced("#" * (MAX_PROGRAM_CHARS + 1)), "characters"),
            (fenced("print('\0')"), "NUL"),
            (fenced("print('\ud800')"), "half a character"),
        ],
    )
    def test_a_response_without_a_program_says_why(self, text, words):
        found = find_program(text, prompt_suffix="")
        assert isinstance(found, NoProgram)
        assert words in found.reason

    def test_a_program_in_the_thinking_part_opened_by_the_prompt_does_not_count(self):
        assert isinstance(find_program(fenced("print(1)"), prompt_suffix="<think>\n"), NoProgram)
        assert find_program("hm</think>" + fenced("print(2)"), prompt_suffix="<think>\n") == "print(2)"

    @given(st.text(alphabet="`~python \n\r\t<think>/x", max_size=200) | st.text(max_size=200))
    def test_finding_is_total(self, text):
        assert isinstance(find_program(text, prompt_suffix=""), (str, NoProgram))

    @given(st.text(alphabet="abc=+()`\n 1", min_size=1, max_size=80).filter(str.strip))
    def test_a_gold_response_holds_its_solution(self, solution):
        response = gold_response(code_example({**SUMS, "solution": solution}))
        assert find_program(response, prompt_suffix="") == solution


class TestProblems:
    @pytest.mark.parametrize(
        ("problem", "words"),
        [
            ({}, "exactly one of cases, calls and asserts, not none"),
            ({**SUMS, "asserts": "assert f() == 1"}, "not cases and asserts"),
            ({"cases": []}, "cases"),
            ({"cases": [{"stdin": "1"}]}, "cases.0.stdout"),
            ({"cases": [{"stdin": 1, "stdout": "1"}]}, "cases.0.stdin"),
            ({"case": []}, "case"),
            ({"calls": {"function": "a b", "cases": [{"expected": 1}]}}, "no name of a Python function"),
            ({"calls": {"function": "class", "cases": [{"expected": 1}]}}, "no name of a Python function"),
            ({"calls": {"function": "f", "cases": [{"expected": float("nan")}]}}, "JSON"),
            ({"calls": {"function": "f", "cases": [{"expected": {1, 2}}]}}, "no JSON"),
            ({"cases": [{"stdin": "", "stdout": "\ud800"}]}, "surrogates"),
            ({"asserts": "x ="}, "cannot be read as Python"),
            ({"asserts": "f(1)"}, "no assert statement"),
            ({"asserts": "assert 1 == 1"}, "nothing of the candidate"),
            ({"asserts": "assert vlpost_asserts == f(1)"}, "taken"),
            ("print(1)", "code"),
        ],
    )
    def test_a_problem_that_cannot_be_used_is_refused_with_words(self, problem, words):
        with pytest.raises(DataError, match="sum-1") as caught:
            REWARDS["code_execution"].check_answer(code_example(problem))
        assert words in str(caught.value)

    def test_a_row_without_a_problem_is_refused(self):
        with pytest.raises(DataError, match=r"'sum-1': metadata 'code' is missing"):
            read_problem(Example(id="sum-1", messages=(), answer="", task="code", source="test"))

    def test_a_row_without_a_solution_has_no_gold_response(self):
        with pytest.raises(DataError, match="solution"):
            gold_response(code_example(SUMS))

    def test_a_problem_out_of_tuples_reads_like_one_out_of_lists(self):
        assert read_problem(code_example({"cases": tuple(SUMS["cases"])})) == read_problem(code_example(SUMS))


class TestComparingOutputs:
    @pytest.mark.parametrize("output", [b"3\n4\n", b"3\n4", b"3 \t\r\n4\r\n\n \n"])
    def test_ends_of_lines_and_empty_last_lines_count_for_nothing(self, output):
        assert is_expected_output(b"3\n4\n", output, float_tolerance=0.0)

    @pytest.mark.parametrize(
        "output",
        [b" 3\n4", b"3\n\n4", b"3 4", b"\xef\xbb\xbf3\n4", b"3\0\n4", "３\n4".encode(), b"3\n4\n5", b"", b"3.0\n4", b"+3\n4", b"3\x0b\n4"],
    )
    def test_everything_else_counts(self, output):
        assert not is_expected_output(b"3\n4\n", output, float_tolerance=0.0)

    def test_a_tolerance_applies_to_numbers_with_a_point_only(self):
        assert is_expected_output(b"x 0.333333\n", b"x 0.33333349\n", float_tolerance=1e-6)
        assert not is_expected_output(b"x 0.333333\n", b"x 0.33333349\n", float_tolerance=0.0)
        assert not is_expected_output(b"1000000\n", b"1000001\n", float_tolerance=1e-3)
        assert not is_expected_output(b"0.5\n", b"nan\n", float_tolerance=1e-3)
        assert not is_expected_output(b"1e300\n", b"1e999\n", float_tolerance=1e-3)

    @given(st.binary(max_size=200), st.binary(max_size=200))
    @with_example(b"1e999", b"1e998.")
    def test_comparing_is_total_and_normalising_twice_changes_nothing(self, left, right):
        once = normalise_output(left)
        assert normalise_output(once) == once
        assert is_expected_output(left, left, float_tolerance=0.0)
        assert is_expected_output(left, right, float_tolerance=0.0) == is_expected_output(right, left, float_tolerance=0.0)
        assert is_expected_output(left, right, float_tolerance=1e-6) in (True, False)

    def test_normalising_a_mebibyte_of_spaces_takes_linear_time(self):
        started = time.process_time()
        assert len(normalise_output(b" " * 2**20 + b"x")) == 2**20 + 1
        assert time.process_time() - started < 1.0


class TestVerdicts:
    @pytest.mark.parametrize(
        ("execution", "verdict"),
        [
            (ended(stdout=b"3\n"), "accepted"),
            (ended(stdout=b"4\n"), "wrong"),
            (ended(stdout=b"3\n", exit_code=1), "runtime"),
            (ended("runtime_error", stdout=b"3\n", exit_code=1), "runtime"),
            (ended("time_limit", stdout=b"3\n", exit_code=None), "time"),
            (ended("memory_limit", stdout=b"3\n", exit_code=None), "memory"),
            (ended("output_limit", stdout=b"3\n", exit_code=None), "output"),
            (ended("refused", stdout=b"3\n", exit_code=None), "refused"),
        ],
    )
    def test_only_a_run_that_finished_and_printed_the_answer_is_paid(self, execution, verdict, make_rollout):
        example = code_example({"cases": [{"stdin": "1 2", "stdout": "3"}]})
        result, seconds = CodeJudge(Scripted(execution), OPTIONS).judge_row(example, make_rollout(fenced(HONEST)))
        assert isinstance(result, RewardResult)
        assert result.value == (1.0 if verdict == "accepted" else 0.0)
        assert result.note.startswith(verdict)
        assert seconds == 0.01

    def test_a_fault_of_the_sandbox_is_unavailable_and_not_a_wrong_answer(self, make_rollout):
        broken = ended("internal_error", exit_code=None, reason="no memory for a jail")
        result, _ = CodeJudge(Scripted(broken), OPTIONS).judge_row(code_example(SUMS), make_rollout(fenced(HONEST)))
        assert isinstance(result, Unavailable)
        assert "no memory for a jail" in result.reason

    def test_a_fault_of_the_sandbox_after_a_wrong_case_is_unavailable_too(self, make_rollout):
        judge = CodeJudge(Scripted(ended(stdout=b"0"), ended("internal_error")), OPTIONS.model_copy(update={"partial": "share"}))
        assert isinstance(judge.judge_row(code_example(SUMS), make_rollout(fenced(HONEST)))[0], Unavailable)

    def test_a_problem_that_cannot_be_read_is_unavailable(self, make_rollout):
        result, _ = CodeJudge(Scripted(), OPTIONS).judge_row(code_example({}), make_rollout(fenced(HONEST)))
        assert isinstance(result, Unavailable)

    def test_judging_stops_at_the_first_failure_unless_shares_are_paid(self, make_rollout):
        scripted = Scripted(ended(stdout=b"0"), ended(stdout=b"42"))
        result, _ = CodeJudge(scripted, OPTIONS).judge_row(code_example(SUMS), make_rollout(fenced(HONEST)))
        assert (result.value, scripted.num_runs, result.note) == (0.0, 1, "wrong: case 1: another output")
        scripted = Scripted(ended(stdout=b"0"), ended(stdout=b"42"))
        judge = CodeJudge(scripted, CodeExecutionOptions(partial="share"))
        result, _ = judge.judge_row(code_example(SUMS), make_rollout(fenced(HONEST)))
        assert (result.value, result.metrics["passed_frac"], scripted.num_runs) == (0.5, 0.5, 2)

    def test_a_program_out_of_time_does_not_take_its_limit_again(self, make_rollout):
        scripted = Scripted(ended("time_limit"), ended(stdout=b"42"))
        judge = CodeJudge(scripted, CodeExecutionOptions(partial="share"))
        result, _ = judge.judge_row(code_example(SUMS), make_rollout(fenced(HONEST)))
        assert (result.value, scripted.num_runs) == (0.0, 1)

    def test_the_note_never_holds_the_expected_output(self, make_rollout):
        example = code_example({"cases": [{"stdin": "", "stdout": "canary"}]})
        result, _ = CodeJudge(Scripted(ended(stdout=b"x")), OPTIONS).judge_row(example, make_rollout(fenced(HONEST)))
        assert "canary" not in result.note

    def test_control_characters_of_stderr_do_not_reach_the_log(self, make_rollout):
        scripted = Scripted(ended("runtime_error", stderr=b"\x1b[2Jboo\n", exit_code=1))
        result, _ = CodeJudge(scripted, OPTIONS).judge_row(code_example(SUMS), make_rollout(fenced(HONEST)))
        assert result.note == "runtime: case 1: exit code 1; ?[2Jboo"


class TestInTheSandbox:
    @pytest.mark.parametrize(
        ("program", "verdict"),
        [
            (HONEST, "accepted"),
            ("print(3)", "wrong"),
            ("print(", "runtime"),
            ("while True: pass", "time"),
            ("x = bytearray(2**30)", "memory"),
            ("while True: print('x' * 9999)", "output"),
        ],
    )
    def test_verdicts_of_real_runs(self, judge, program, verdict):
        problem = read_problem(code_example(SUMS))
        assert judge.judge_program(problem, program).verdict == verdict

    def test_the_expected_output_is_nowhere_in_the_jail(self, judge):
        canary = "canary-" + os.urandom(12).hex()
        problem = read_problem(code_example({"cases": [{"stdin": "go", "stdout": canary}]}))
        search = (
            "import re\n"
            "for line in open('/proc/self/maps'):\n"
            "    part = re.match('([0-9a-f]+)-([0-9a-f]+) r', line)\n"
            "    if part and '[v' not in line:\n"
            "        start, end = (int(number, 16) for number in part.groups())\n"
            "        try:\n"
            "            memory = open('/proc/self/mem', 'rb', 0)\n"
            "            memory.seek(start)\n"
            "            content = memory.read(min(end - start, 2**23))\n"
            "        except OSError:\n"
            "            continue\n"
            "        for found in re.findall(b'canary-[0-9a-f]{24}', content):\n"
            "            print(found.decode())\n"
        )
        assert judge.judge_program(problem, search).verdict in ("wrong", "runtime")
        # The search finds what is there: the program's own canary.
        assert judge.judge_program(problem, f"kept = {canary!r}\n" + search).verdict in ("accepted", "wrong", "runtime")

    def test_the_component_judges_many_rows_in_order(self, make_rollout):
        class Config:
            sandbox = SandboxConfig()

        entry = REWARDS["code_execution"]
        rows = [(code_example(SUMS), make_rollout(fenced(HONEST if number % 2 else "print(0)"))) for number in range(6)]
        with entry.service(CodeExecutionOptions(), Config(), None) as component:
            verdicts = component.judge(rows)
        assert [verdict.value for verdict, _ in verdicts] == [0.0, 1.0] * 3
        assert all(seconds > 0 for _, seconds in verdicts)

    def test_the_solution_of_a_row_gets_the_full_value(self, judge, make_rollout):
        example = code_example({**SUMS, "solution": HONEST})
        result, _ = judge.judge_row(example, make_rollout(REWARDS["code_execution"].gold_response(example)))
        assert result == RewardResult(value=1.0, note="accepted", metrics=result.metrics)

    def test_a_problem_survives_a_trip_through_json(self):
        assert read_problem(code_example(json.loads(json.dumps(SUMS)))) == read_problem(code_example(SUMS))
