"""Worker processes: killed at the deadline, replaced, never left behind, and honest about whose fault it was."""

import os
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from vlpost.rewards import RewardResult, Unavailable, WorkerError
from vlpost.rewards import worker as worker_module
from vlpost.rewards.math_answer import request
from vlpost.rewards.worker import Failure, Worker, WorkerPool
from vlpost.rewards.worker_main import _forbid

HANGING = {"answer": "4", "predictions": "9^{9^{9}}", "decimal_places": "6"}
EASY = {"answer": "4", "predictions": "2+2", "decimal_places": "6"}


@pytest.fixture(autouse=True)
def _one_proof(monkeypatch):
    """A worker starts twice as fast when it proves itself by one question; the tests of mathematics start it with all."""
    judge, proofs = worker_module._JUDGES["math_answer"]
    monkeypatch.setattr(worker_module, "_JUDGES", {"math_answer": (judge, proofs[:1])})


@pytest.fixture
def worker():
    started = Worker("math_answer", timeout_s=0.4)
    started.start()
    yield started
    started.close()


def _outer(worker: Worker) -> int:
    assert worker._process is not None
    return worker._process.pid


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def _wait_until_gone(*pids: int) -> bool:
    end = time.monotonic() + 30
    while any(map(_is_running, pids)) and time.monotonic() < end:
        time.sleep(0.02)
    return not any(map(_is_running, pids))


def test_a_hung_process_is_replaced_and_the_next_request_is_answered(worker):
    (hung,) = _children(_outer(worker))
    assert worker.ask(HANGING) == Failure(reason="no verdict in 0.4 s", is_by_request=True)
    assert worker.ask(EASY) == RewardResult(value=1.0)
    assert _wait_until_gone(hung)
    assert _children(_outer(worker)) != [hung]


def test_a_process_that_stands_still_is_replaced(worker):
    os.kill(_children(_outer(worker))[0], signal.SIGSTOP)
    assert worker.ask(EASY) == Failure(reason="no verdict in 0.4 s", is_by_request=False)
    assert worker.ask(EASY) == RewardResult(value=1.0)


def test_a_request_that_was_half_read_costs_the_next_one_nothing(worker):
    # What a process leaves behind that is killed while it reads: the pipe holds the tail of a request, with or without its end.
    for left in (b'id": 7, "arguments": {"answer": "4", "prediction": "4"}}\n', b'{"id": 7, "argu'):
        os.write(worker._pipe("stdin"), left)
        assert worker.ask(EASY) == RewardResult(value=1.0)


def test_a_process_that_dies_on_a_request_is_told_from_a_slow_one(monkeypatch):
    monkeypatch.setattr(worker_module, "_MAX_TIMEOUT_S", {})
    worker = Worker("math_answer", timeout_s=60.0)
    worker.start()
    (inner,) = _children(_outer(worker))
    write = worker._write

    def write_and_kill(line, *, deadline):
        write(line, deadline=deadline)
        os.kill(inner, signal.SIGKILL)

    try:
        os.kill(inner, signal.SIGSTOP)
        with monkeypatch.context() as patched:
            patched.setattr(worker, "_write", write_and_kill)
            assert worker.ask(EASY) == Failure(reason="the verifier's process died", is_by_request=False)
        assert worker.ask(EASY) == RewardResult(value=1.0)
    finally:
        worker.close()


def test_a_process_that_died_while_idle_costs_no_request(worker):
    (inner,) = _children(_outer(worker))
    os.kill(inner, signal.SIGKILL)
    assert _wait_until_gone(inner)
    assert select.select([worker._pipe("stdout")], [], [], 30.0)[0], "no fresh process"
    assert worker.ask(EASY) == RewardResult(value=1.0)


def test_a_lost_worker_is_an_error_once_and_then_started_anew(worker):
    (inner,) = _children(_outer(worker))
    os.kill(_outer(worker), signal.SIGKILL)
    # The inner process lives on until nobody is there to be answered.
    assert worker.ask(EASY) == RewardResult(value=1.0)
    os.kill(inner, signal.SIGKILL)
    assert _wait_until_gone(inner)
    with pytest.raises(WorkerError, match="the worker process of 'math_answer' is gone"):
        worker.ask(EASY)
    assert worker.ask(EASY) == RewardResult(value=1.0)


def test_processes_are_renewed_after_their_share_of_requests(worker, monkeypatch):
    monkeypatch.setattr(worker_module, "MAX_REQUESTS_PER_PROCESS", 3)
    processes = []
    for _ in range(7):
        assert worker.ask(EASY) == RewardResult(value=1.0)
        processes += _children(_outer(worker))
    assert [processes.index(pid) for pid in processes] == [0, 0, 0, 3, 3, 3, 6]


def test_closing_leaves_no_process(worker):
    outer = _outer(worker)
    inner = _children(outer)
    assert len(inner) == 1
    worker.close()
    assert _wait_until_gone(outer, *inner)


def test_a_worker_that_hangs_ends_after_the_death_of_its_trainer():
    trainer = """
import os, signal, sys, threading, time
from vlpost.rewards.worker import Worker
worker = Worker("math_answer", timeout_s=0.2)
worker.start()
outer = worker._process.pid
inner = open(f"/proc/{outer}/task/{outer}/children").read()
worker._timeout_s = 1000.0  # this side waits on; only the worker knows its limit
threading.Thread(target=worker.ask, args=({"answer": "4", "predictions": "9^{9^{9}}", "decimal_places": "6"},), daemon=True).start()
time.sleep(0.5)
print(outer, inner, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    run = subprocess.run([sys.executable, "-c", trainer], capture_output=True, text=True, check=False)
    assert run.returncode == -signal.SIGKILL, run.stderr
    outer, inner = map(int, run.stdout.split())
    assert _wait_until_gone(outer, inner)


def test_a_worker_sees_no_secrets_and_no_working_directory(worker):
    environment = Path(f"/proc/{_outer(worker)}/environ").read_bytes().split(b"\0")
    assert {entry.partition(b"=")[0] for entry in environment if entry} <= {b"PATH", b"LD_LIBRARY_PATH", b"LANG", b"LC_ALL"}
    assert Path(f"/proc/{_outer(worker)}/cwd").readlink() == Path("/")


def test_a_worker_that_cannot_start_says_what_it_wrote(monkeypatch, tmp_path):
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho no such verifier >&2\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(broken))
    with (
        pytest.raises(
            WorkerError, match=r"did not start \(it ended\); is the package installed for .*python\? It wrote:\nno such verifier"
        ),
        WorkerPool("math_answer", num_workers=1, timeout_s=1.0),
    ):
        pass


def test_a_machine_that_stands_still_is_no_verdict_on_the_response(monkeypatch):
    asked = []
    ask = Worker.ask

    def ask_with_the_process_stopped(worker, arguments, **limits):
        os.kill(worker._inner_pid, signal.SIGSTOP)
        asked.append(arguments)
        return ask(worker, arguments, **limits)

    monkeypatch.setattr(Worker, "ask", ask_with_the_process_stopped)
    with WorkerPool("math_answer", num_workers=1, timeout_s=0.2) as pool:
        ((verdict, _),) = pool.judge([request("4", "2+2")])
        assert verdict == Unavailable(reason="no verdict in 0.2 s, and the machine may be at fault")
        assert len(asked) == 2
        monkeypatch.undo()
        # Nothing of it is remembered.
        assert pool.judge([request("4", "2+2")])[0][0] == RewardResult(value=1.0)


def test_a_process_killed_from_outside_costs_the_response_nothing(monkeypatch):
    ask, kills = Worker.ask, []

    def ask_and_kill_once(worker, arguments, **limits):
        if not kills:
            kills.append(worker._inner_pid)
            os.kill(worker._inner_pid, signal.SIGSTOP)
            threading.Timer(0.1, os.kill, (worker._inner_pid, signal.SIGKILL)).start()
        return ask(worker, arguments, **limits)

    monkeypatch.setattr(Worker, "ask", ask_and_kill_once)
    with WorkerPool("math_answer", num_workers=1, timeout_s=60.0) as pool:
        assert pool.judge([request("4", "2+2")])[0][0] == RewardResult(value=1.0)
    assert len(kills) == 1


def test_a_long_deadline_is_cut_to_what_the_judge_needs():
    assert Worker("math_answer", timeout_s=60.0)._timeout_s == 1.0
    assert Worker("math_answer", timeout_s=0.4)._timeout_s == 0.4


def test_verdicts_are_remembered_within_bounds(monkeypatch):
    monkeypatch.setattr(worker_module, "MAX_KEPT_VERDICTS", 2)
    asked = []
    ask = Worker.ask
    monkeypatch.setattr(Worker, "ask", lambda self, arguments: asked.append(arguments["predictions"]) or ask(self, arguments))
    with WorkerPool("math_answer", num_workers=1, timeout_s=60.0) as pool:
        for prediction in ("2+2", "2+3", "2+2", "2+4", "2+2", "2+3"):
            pool.judge([request("4", prediction)])
    assert asked == ["2+2", "2+3", "2+4", "2+3"]


def test_whose_fault_it_was(monkeypatch, tmp_path):
    with WorkerPool("math_answer", num_workers=1, timeout_s=0.4) as pool:
        ((hostile, _), (unreadable, _), (hanging, _), (right, _)) = pool.judge(
            [request("4", "9^{9^{9}}"), request("+", "4"), request("(10^9)! + (10^9+1)!", "4"), request("4", "2+2")]
        )
        assert hostile == RewardResult(value=0.0, note="ungradable answer: no verdict in 0.4 s")
        assert isinstance(unreadable, Unavailable)
        assert "the example's answer '+' cannot be read as mathematics" in unreadable.reason
        assert isinstance(hanging, Unavailable)
        assert hanging.reason.endswith("then the control question failed: no verdict in 0.35 s")
        assert right == RewardResult(value=1.0)
        # The infrastructure's fault is never a zero.
        monkeypatch.setattr(sys, "executable", str(tmp_path / "missing"))
        for lost in pool._workers:
            lost.close()
        ((verdict, _),) = pool.judge([request("4", "5")])
        assert isinstance(verdict, Unavailable)
        monkeypatch.undo()
        assert pool.judge([request("4", "1+3")])[0][0] == RewardResult(value=1.0)


def test_equal_requests_are_judged_once_and_answered_in_order(monkeypatch):
    asked = []
    ask = Worker.ask
    monkeypatch.setattr(Worker, "ask", lambda self, arguments: asked.append(arguments) or ask(self, arguments))
    with WorkerPool("math_answer", num_workers=2, timeout_s=5.0) as pool:
        verdicts = pool.judge([request("4", prediction) for prediction in ("4", "5", "4", "2+2", "5")])
    assert [verdict.value for verdict, _ in verdicts if isinstance(verdict, RewardResult)] == [1.0, 0.0, 1.0, 1.0, 0.0]
    assert len(asked) == 3


@pytest.mark.parametrize(
    ("event", "event_arguments"),
    [
        ("os.system", (b"true",)),
        ("subprocess.Popen", ("true", [], None, None)),
        ("os.posix_spawn", ()),
        ("socket.connect", ()),
        ("open", ("x", "w", 0)),
        ("open", ("x", None, os.O_CREAT | os.O_WRONLY)),
        ("ctypes.dlopen", ("libc.so.6",)),
    ],
)
def test_a_verifier_may_only_compute(event, event_arguments):
    with pytest.raises(PermissionError, match="is forbidden in a reward worker"):
        _forbid(event, event_arguments)


def test_reading_is_allowed():
    _forbid("open", ("x", "r", os.O_RDONLY | os.O_CLOEXEC))
    _forbid("import", ("sympy",))
