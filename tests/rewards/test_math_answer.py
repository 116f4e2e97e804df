"""Mathematical answers: verdicts, and what hostile answers can do to the run and to their neighbours (nothing)."""

import ast
import asyncio
import json
import multiprocessing
import subprocess
import sys
import threading
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import yaml
from vlpost.model.records import DataError, Group
from vlpost.rewards import RewardManager, RewardResult, RewardsConfig
from vlpost.rewards.math_answer import MAX_ANSWER_CHARS, MAX_PREDICTION_CHARS, check_math_answer, expression, math_answer, request
from vlpost.rewards.worker import MAX_REQUEST_BYTES, WorkerPool, WorkerRequest

REWARDS_FOLDER = Path(__file__).resolve().parents[2] / "rewards"
GROUPS = yaml.safe_load(Path(__file__).with_name("math_cases.yaml").read_text(encoding="utf-8"))
HOSTILE_ANSWERS = [
    *GROUPS["hostile"],
    *(opening * times + middle + closing * times for opening, times, middle, closing in GROUPS["hostile_repeated"]),
]
HANGING = ("9^{9^{9}}", "\\lfloor\\pi^{10^6}\\rfloor")


@pytest.mark.parametrize(
    ("answer", "text", "value"),
    [
        ("12", "12", 1.0),
        ("12", "12.", 1.0),
        ("12", "１２", 1.0),
        ("12", "$12$", 1.0),
        ("12", "**12**", 1.0),
        ("8", "2**3", 1.0),
        ("1/2", "$$0.5$$", 1.0),
        ("$\\frac12$", "1/2", 1.0),
        ("\\(3\\sqrt{2}\\)", "\\boxed{\\sqrt{18}}", 1.0),
        ("1234", "1,234", 1.0),
        ("4", "x = 4", 1.0),
        ("x^2+2x+1", "(x+1)^2", 1.0),
        ("12", "13", 0.0),
        ("12", "The answer is 12", 1.0),
        ("12", "I think it is 12", 0.0),
        ("4", "4 or 5", 0.0),
        ("4", "4, 5", 0.0),
        ("1728", "1331 and 1728", 0.0),
        ("4", "$4$ is not the answer", 0.0),
        ("4", "\\boxed{4} \\boxed{5}", 0.0),
        ("4", "x=3=4", 0.0),
        ("4", "1=2=3=4", 0.0),
        ("12", "<think>12", 0.0),
        ("12", "", 0.0),
        ("12", "$$", 0.0),
        ("\\pi", "3.14159", 0.0),
    ],
)
def test_verdicts(answer, text, value, make_group, math_rewards):
    (scored,) = math_rewards.score([make_group(answer, text)])
    assert [judged.score.reward for judged in scored.judged] == [value]


@pytest.mark.parametrize("dress", ["{}", "${}$", "$${}$$", "\\({}\\)", "\\[{}\\]", " {}. ", "**{}**"])
@pytest.mark.parametrize("bare", ["\\frac{3}{7}", "12", "(1,2)", "x=4"])
def test_dress_of_the_answer_changes_nothing(dress, bare):
    assert expression(dress.format(bare)) == bare


def test_hostile_answers_end_and_cost_no_neighbour(make_group):
    config = RewardsConfig.model_validate({"components": {"answer": {"use": "math_answer"}}, "timeout_s": 0.4, "num_workers": 2})
    groups: list[Group] = [
        make_group("\\frac37", f"\\boxed{{{hostile}}}", "3/7", "\\frac{6}{7} \\cdot \\frac12", "4/7", number=number)
        for number, hostile in enumerate(HOSTILE_ANSWERS)
    ]
    with RewardManager(config, recipe_folder=None, allow_code=False) as rewards:
        scored = rewards.score(groups)
    assert len(scored) >= 24
    for hostile, group in zip(HOSTILE_ANSWERS, scored, strict=True):
        assert [judged.score.reward for judged in group.judged] == [0.0, 1.0, 1.0, 0.0], hostile[:40]
        assert group.unjudged == ()
    notes = [group.judged[0].score.results["answer"].note for group in scored]
    # Which of them hang depends on the machine; that some do, and that some are refused by their text, is the point of the test.
    assert sum(note == "ungradable answer: no verdict in 0.4 s" for note in notes) >= 3, notes
    assert sum(note in ("ungradable answer: a power of millions of digits", "ungradable answer: a tower of powers") for note in notes) >= 4


def _judge_hanging() -> list[object]:
    with WorkerPool("math_answer", num_workers=1, timeout_s=0.3) as pool:
        return [
            verdict for verdict, _seconds in pool.judge([request("4", HANGING[0]), request("4", "\\sqrt{16}"), request("4", HANGING[1])])
        ]


def test_hostile_answers_end_wherever_they_are_judged():
    async def in_loop():
        return _judge_hanging()

    found = [_judge_hanging(), asyncio.run(in_loop())]
    thread = threading.Thread(target=lambda: found.append(_judge_hanging()))
    thread.start()
    thread.join()
    with ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("fork")) as processes:
        found.append(processes.submit(_judge_hanging).result())
    ungradable = RewardResult(value=0.0, note="ungradable answer: no verdict in 0.3 s")
    assert found == [[ungradable, RewardResult(value=1.0), ungradable]] * 4


EVENTS = ("exec", "compile", "open", "os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "os.fork", "socket.connect", "import")


def test_payloads_run_nothing_in_this_process(make_example, make_rollout, tmp_path):
    """The audit hook of this process sees no code, file or process that a text could have asked for."""
    payloads = [payload.replace("TRACE", str(tmp_path / "trace")) for payload in GROUPS["payloads"]]
    for payload in payloads:  # what is loaded late is loaded now
        math_answer(make_example("12"), make_rollout(payload))
    seen: list[str] = []
    watching = True

    def watch(event, _arguments):
        if watching and threading.current_thread() is threading.main_thread() and event.startswith(EVENTS):
            seen.append(event)

    sys.addaudithook(watch)  # stays for good, so it looks only while this test runs
    for payload in payloads:
        for text in (payload, f"\\boxed{{{payload}}}", f"<answer>{payload}</answer>"):
            for answer in ("12", payload):
                math_answer(make_example(answer), make_rollout(text))
                math_answer(make_example(answer), make_rollout(text), answer_in="prose")
    compile("1", "the hook works", "eval")
    watching = False
    assert seen == ["compile"]
    assert list(tmp_path.iterdir()) == []


WATCHED_WORKER = """
import json, re, sys
from vlpost.rewards.math_answer import verdict
from vlpost.rewards.worker import _JUDGES
for proof in _JUDGES["math_answer"][1]:
    verdict(**proof)
seen, payload = [], ""
def watch(event, arguments):
    if event in ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "os.fork", "socket.connect", "os.remove", "os.rename"):
        seen.append((event, payload))
    if event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"):
        seen.append((event, payload))
    # Code made from a text: modules that are imported late compile files, which is not that. The parser turns each run of digits into
    # a number by way of `sympify`; nothing else of a text may get that far.
    if event == "compile" and arguments[0] is not None and str(arguments[1]).startswith("<"):
        source = arguments[0].decode() if isinstance(arguments[0], bytes) else str(arguments[0])
        if not re.fullmatch(r"from sympy import \\*|(Integer|Float) \\('?[0-9.]+'? ?\\)", source):
            seen.append((event, source))
sys.addaudithook(watch)
judged = 0
for payload in json.load(sys.stdin):
    for answer, prediction in (("12", payload), (payload, "12"), (payload, payload + "+1")):
        try:
            verdict(answer, prediction, "6")
        except (ValueError, RecursionError):
            pass
        judged += 1
print(json.dumps([judged, seen]))
"""


def test_payloads_run_nothing_in_a_worker(tmp_path):
    payloads = [expression(payload.replace("TRACE", str(tmp_path / "trace"))) for payload in GROUPS["payloads"]]
    run = subprocess.run([sys.executable, "-c", WATCHED_WORKER], input=json.dumps(payloads), capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    assert json.loads(run.stdout.splitlines()[-1]) == [3 * len(payloads), []]
    assert len(payloads) >= 50
    assert list(tmp_path.iterdir()) == []


def test_payloads_are_never_paid_and_leave_no_file(make_group, math_rewards: RewardManager, tmp_path):
    payloads = [payload.replace("TRACE", str(tmp_path / "trace")) for payload in GROUPS["payloads"]]
    groups = [make_group("12", payload, f"\\boxed{{{payload}}}") for payload in payloads]
    rewards = [judged.score.reward for group in math_rewards.score(groups) for judged in group.judged]
    assert rewards == [0.0] * 2 * len(payloads)
    assert list(tmp_path.iterdir()) == []


def test_no_module_of_the_verifier_can_run_a_text():
    """By its syntax tree: no interpreter, no parser of Python expressions, no unpickling, in any module that sees a response."""
    forbidden = {"eval", "exec", "compile", "sympify", "parse_expr", "lambdify", "__import__", "S", "loads_pickle", "literal_eval"}
    modules = [*sorted(REWARDS_FOLDER.glob("math_*.py")), REWARDS_FOLDER / "worker.py", REWARDS_FOLDER / "worker_main.py"]
    assert len(modules) >= 9
    for module in modules:
        tree = ast.parse(module.read_text(encoding="utf-8"))
        imported = {
            name
            for node in ast.walk(tree)
            if isinstance(node, (ast.Import, ast.ImportFrom))
            for name in [alias.name for alias in node.names]
        }
        called = {getattr(node.func, "id", getattr(node.func, "attr", "")) for node in ast.walk(tree) if isinstance(node, ast.Call)}
        called -= {"compile"} if "re" in imported else set()
        assert not (called | imported) & (forbidden | {"pickle", "marshal", "shelve"}), module.name


def test_length_is_bounded_before_a_worker_is_asked(make_example, make_rollout):
    verdict = math_answer(make_example("12"), make_rollout("1" * (MAX_PREDICTION_CHARS + 1)))
    assert isinstance(verdict, RewardResult)
    assert verdict.value == 0.0
    assert verdict.note == "a final answer of 3001 characters; at most 3000 are read"
    # The longest request of the dearest characters still fits what a pipe takes without waiting.
    longest = request("\U0001f600" * MAX_ANSWER_CHARS, "\U0001f600" * MAX_PREDICTION_CHARS)
    assert isinstance(longest, WorkerRequest)
    assert len(str(longest.arguments).encode("ascii", "backslashreplace")) * 12 // 10 + 200 < MAX_REQUEST_BYTES


LONG_PIECES = (
    "*",
    "(",
    "\\{",
    "\\boxed{",
    "\\boxed{1}",
    "<answer>",
    "<answer>1</answer>",
    "the answer is ",
    "answer: 1\n",
    "{",
    "1,",
    "111 ",
    "\\pm",
)


@pytest.mark.parametrize("piece", LONG_PIECES)
def test_the_longest_responses_are_read_in_linear_time(piece, make_example, make_rollout):
    """A quadratic reader would not end here within the patience of anybody."""
    text = piece * (190_000 // len(piece))
    for response in (text, f"\\boxed{{{text}}}"):
        verdict = math_answer(make_example("1, 2"), make_rollout(response))
        assert isinstance(verdict, WorkerRequest) or verdict.value == 0.0
    assert isinstance(math_answer(make_example("1"), make_rollout("x" * 200_001)), RewardResult)


@pytest.mark.parametrize(
    ("answer", "words"), [("", "an answer of 0 characters"), ("$ $", "an answer of 0"), ("1" * 1001, "1 to 1000 characters")]
)
def test_answers_that_cannot_be_compared_with_are_named(answer, words, make_example):
    with pytest.raises(DataError, match=rf"example 'add-3'.*{words}"):
        check_math_answer(make_example(answer, number=3))


def test_the_examples_own_answer_must_be_found_right(make_example, math_rewards):
    assert math_rewards.check_examples([make_example("$\\frac37$"), make_example("x=4", number=1)]) == 2
    with pytest.raises(DataError, match=r"example 'add-1': component 'answer' \(math_answer\) does not find its own answer '2\*\*' right"):
        math_rewards.check_examples([make_example("12"), make_example("2**", number=1)])
