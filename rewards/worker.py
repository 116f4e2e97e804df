"""Worker processes that can be killed: for verifiers that may hang, eat memory or crash on what a policy writes.

A worker is `worker_main`, started by exec and never by forking the trainer, whose threads would be lost half way. It reads and writes
JSON lines over pipes. The deadline is wall clock, kept here with `select`, and starts when the request is sent to a free worker;
past it the process is killed and a fresh one takes its place, so one hostile text costs its own time and no neighbour's.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import queue
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import IO, Any, Literal

from ..model.records import VlpostError
from .result import RewardResult, Unavailable

WORKER_START_S = 120.0
"""Longest wait for a worker process to load its verifier, seconds."""
MAX_WORKER_MEMORY_BYTES = 4 * 2**30
"""Address space of a worker process; an allocation beyond it fails inside the worker."""
MAX_REQUESTS_PER_PROCESS = 2000
"""A process is replaced after this many requests, which bounds what a verifier's caches may grow to."""
MAX_REQUEST_BYTES = 60_000
"""Below the 64 KiB of a pipe; the callers bound their texts accordingly."""
MAX_REPLY_BYTES = 65_536
MAX_KEPT_VERDICTS = 20_000
"""Verdicts that a pool remembers; the least recently used ones go first."""
CONTROL_S = 0.35
"""Longest time for a control question, seconds: it takes milliseconds, and what a hostile response costs in all is this more at most."""
BLAME_CPU_FRAC = 0.2
"""A process that hung must have computed for this share of its limit, else the machine was too busy to judge and not the response too hard:
an honest question takes a hundredth of that."""
MAX_PATIENCE = 3
"""Deadlines that a process gets on a machine too busy to let it compute; it answers as soon as it is let."""


def _proof(answer: str, prediction: str) -> dict[str, str]:
    return {"answer": answer, "predictions": prediction, "decimal_places": "6"}


# The judge of a worker, as `module:function` of this package, and questions that it must find right before it is trusted. They
# also load what the verifier loads late, and teach its parser the common forms (10 to 30 ms each the first time), so that a fresh process
# answers its first request as fast as any other.
_JUDGES: Mapping[str, tuple[str, Sequence[Mapping[str, str]]]] = {
    "math_answer": (
        ".math_answer:verdict",
        (
            _proof("\\frac{1}{2}", "\\frac{\\sqrt{4}}{4}"),
            _proof("3\\sqrt{2}", "\\sqrt{18}"),
            _proof("x^2+2x+1", "(x+1)^2"),
            _proof("\\{1,\\sqrt{2}\\}", "\\{2^{0.5},1\\}"),
            _proof("0 \\le x < 1", "[0,1)"),
            _proof("x > 2", "(2,\\infty)"),
            _proof("x+2y=4", "2x+4y=8"),
            _proof("y=2x+3", "2x-y+3=0"),
            _proof("\\sqrt{1/n}", "1/\\sqrt{n}"),
            _proof("\\pi", "3.141593"),
            _proof("\\log_2 8", "3"),
            _proof("\\sin^2 x+\\cos^2 x", "1"),
            _proof("2\\sin x\\cos x", "\\sin(2x)"),
            _proof("e^{2}", "e \\cdot e"),
            _proof("\\frac{a+b}{2}", "\\frac{1}{2}(a+b)"),
            _proof("\\frac{\\sqrt{2}}{2}", "\\frac{1}{\\sqrt{2}}"),
            _proof("|-3|", "3"),
            _proof("5!", "60 \\cdot 2"),
            _proof("3+4i", "4i+3"),
            _proof("\\binom{5}{2}", "2 \\cdot 5"),
            _proof("f(x)=x^2+1", "f(x)=1+x^2"),
            _proof("(-\\infty,1) \\cup (2,\\infty)", "\\mathbb{R} \\setminus [1,2]"),
        ),
    ),
    "json": (
        ".json_answer:verdict",
        (
            {"schema": '{"type": "object", "required": ["a"]}', "instance": '{"a": [1]}', "value": "1.0"},
            {"schema": '{"$ref": "#/$defs/n", "$defs": {"n": {"type": "integer"}}}', "instance": "1.0", "value": "1.0"},
        ),
    ),
}
# Longest deadline of a judge, seconds, where the recipe's `timeout_s` is longer: what an honest question never takes.
_MAX_TIMEOUT_S: Mapping[str, float] = {"math_answer": 1.0}
# All that a worker gets to see of the environment: no tokens, no keys.
_ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "LANG", "LC_ALL")


class WorkerError(VlpostError):
    """A worker process cannot be started or has been lost; the message holds what it wrote last."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerRequest:
    """One judgement for a worker: `judge(**arguments)`."""

    function: str
    """Which judge: a name that is registered in this module."""
    arguments: Mapping[str, str]
    control: Mapping[str, str]
    """Arguments that do not depend on the response and can be judged when the worker is sound."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """The process hung or died on a request and has been replaced."""

    reason: str
    is_by_request: bool
    """The process computed all the time, or was ended by what it computed; false where the machine may be at fault."""


class Worker:
    """One worker process for one judge; not safe for several threads at once."""

    def __init__(self, function: str, *, timeout_s: float) -> None:
        self._function = function
        self._timeout_s = min(timeout_s, _MAX_TIMEOUT_S.get(function, timeout_s))
        self._inner_pid = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._unread = b""
        self._num_asked = 0
        self._num_asked_of_process = 0

    def start(self) -> None:
        """Starts the process and waits until it has proved itself; a `WorkerError` if it does not."""
        judge, proofs = _JUDGES[self._function]
        settings = {"judge": judge, "proofs": proofs, "timeout_s": self._timeout_s, "max_memory_bytes": MAX_WORKER_MEMORY_BYTES}
        with tempfile.TemporaryFile() as last_words:
            try:
                process = self._spawn(settings, last_words)
            except OSError as error:
                raise WorkerError(f"no process for {self._function!r} can be started from {sys.executable} ({error.strerror})") from error
            self._process, self._unread, self._num_asked_of_process = process, b"", 0
            os.set_blocking(self._pipe("stdin"), False)
            try:
                ready = self._read_until(lambda message: "ready" in message, deadline=time.monotonic() + WORKER_START_S)
                self._inner_pid = ready["ready"]
            except (TimeoutError, EOFError) as error:
                self.close()
                last_words.seek(0)
                words = last_words.read().decode(errors="replace").strip()[-2000:]
                raise WorkerError(
                    f"the worker process of {self._function!r} did not start ({error}); "
                    f"is the package installed for {sys.executable}? It wrote:\n{words}"
                ) from error

    def _spawn(self, settings: Mapping[str, Any], last_words: IO[bytes]) -> subprocess.Popen[bytes]:
        # -I: neither the working directory nor PYTHON* variables decide which code the worker runs.
        return subprocess.Popen(
            [sys.executable, "-I", "-m", f"{__package__}.worker_main", json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=last_words,
            cwd="/",
            env={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
            start_new_session=True,
        )

    def ask(self, arguments: Mapping[str, str], *, max_s: float = math.inf) -> RewardResult | Unavailable | Failure:
        """Returns the judge's verdict within the deadline, `max_s` if that is shorter; a `WorkerError` if there is no worker to ask."""
        if self._process is None:
            self.start()
        elif self._num_asked_of_process >= MAX_REQUESTS_PER_PROCESS:
            self._replace()
        self._num_asked += 1
        self._num_asked_of_process += 1
        number = self._num_asked
        # The first newline ends what may be left of a request that was cut short.
        line = b"\n" + json.dumps({"id": number, "arguments": dict(arguments)}).encode() + b"\n"
        assert len(line) <= MAX_REQUEST_BYTES, f"a request of {len(line)} bytes: the caller bounds its texts to {MAX_REQUEST_BYTES} in all"
        limit_s = min(self._timeout_s, max_s)
        deadline = time.monotonic() + limit_s
        try:
            self._discard_old_messages()
            cpu_before_s = _cpu_seconds(self._inner_pid)
            self._write(line, deadline=deadline)
            message = self._read_reply(number, limit_s=limit_s, blame_at_s=cpu_before_s + BLAME_CPU_FRAC * limit_s)
        except TimeoutError:
            is_by_request = _cpu_seconds(self._inner_pid) >= cpu_before_s + BLAME_CPU_FRAC * limit_s
            self._replace()
            return Failure(reason=f"no verdict in {limit_s:g} s", is_by_request=is_by_request)
        except EOFError as error:
            self.close()
            raise WorkerError(f"the worker process of {self._function!r} is gone ({error})") from error
        if "ready" in message:
            # A fresh inner process says so only because the one that had the request died.
            self._num_asked_of_process, self._inner_pid = 0, message["ready"]
            # Killed from outside, as by the kernel for want of memory; whatever else ends it was computed.
            return Failure(reason="the verifier's process died", is_by_request=message["ended_by"] != -signal.SIGKILL)
        if "error" in message:
            return Unavailable(reason=message["error"])
        return RewardResult(value=message["value"], note=message["note"])

    def _read_reply(self, number: int, *, limit_s: float, blame_at_s: float) -> dict[str, Any]:
        """Returns the reply, or word of a fresh process; a process that the machine has hardly let compute gets a few limits more."""
        for _deadline in range(MAX_PATIENCE):
            with contextlib.suppress(TimeoutError):
                deadline = time.monotonic() + limit_s
                return self._read_until(lambda message: "ready" in message or message.get("id") == number, deadline=deadline)
            if _cpu_seconds(self._inner_pid) >= blame_at_s:
                break
        raise TimeoutError("no reply in time")

    def interrupt(self) -> None:
        """Ends the process under whoever waits for it; may be called from another thread."""
        process = self._process
        if process is not None:
            process.terminate()

    def close(self) -> None:
        """Ends the process and all it started; the next request would start it again."""
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(timeout=5.0)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()

    def _replace(self) -> None:
        """Kills the inner process and waits for the next one."""
        assert self._process is not None
        self._process.send_signal(signal.SIGUSR1)
        self._num_asked_of_process = 0
        try:
            ready = self._read_until(lambda message: "ready" in message, deadline=time.monotonic() + WORKER_START_S)
            self._inner_pid = ready["ready"]
        except (TimeoutError, EOFError) as error:
            self.close()
            raise WorkerError(f"the worker process of {self._function!r} could not be replaced ({error})") from error

    def _write(self, line: bytes, *, deadline: float) -> None:
        descriptor = self._pipe("stdin")
        while line:
            _wait(descriptor, select.POLLOUT, deadline=deadline)
            try:
                line = line[os.write(descriptor, line) :]
            except BrokenPipeError as error:
                raise EOFError("it closed its input") from error

    def _read_until(self, is_wanted: Callable[[dict[str, Any]], bool], *, deadline: float) -> dict[str, Any]:
        """Returns the first message that is wanted; others are replies to requests that were given up."""
        descriptor = self._pipe("stdout")
        while True:
            line, newline, rest = self._unread.partition(b"\n")
            if newline:
                self._unread = rest
                message = json.loads(line)
                if is_wanted(message):
                    return message
                continue
            if len(self._unread) > MAX_REPLY_BYTES:
                raise EOFError(f"a reply of more than {MAX_REPLY_BYTES} bytes")
            _wait(descriptor, select.POLLIN, deadline=deadline)
            received = os.read(descriptor, MAX_REPLY_BYTES)
            if not received:
                raise EOFError("it ended")
            self._unread += received

    def _discard_old_messages(self) -> None:
        """Reads what has come in since the last verdict: late replies, and word of a process that died while it was idle."""
        descriptor = self._pipe("stdout")
        poller = select.poll()
        poller.register(descriptor, select.POLLIN)
        while poller.poll(0):
            received = os.read(descriptor, MAX_REPLY_BYTES)
            if not received:
                raise EOFError("it ended")
            self._unread += received
        lines, _, self._unread = self._unread.rpartition(b"\n")
        for line in lines.splitlines():
            self._inner_pid = json.loads(line).get("ready", self._inner_pid)

    def _pipe(self, name: Literal["stdin", "stdout"]) -> int:
        assert self._process is not None, "a worker is started before it is written to or read from"
        pipe = self._process.stdin if name == "stdin" else self._process.stdout
        assert pipe is not None, "both ends of a worker are pipes"
        return pipe.fileno()


def _cpu_seconds(pid: int) -> float:
    """Returns the processor time that another process has used, seconds; 0.0 when it is gone."""
    try:
        # Linux: the clock id of a process's time, as `clock_getcpuclockid` makes it.
        return time.clock_gettime(~pid << 3 | 2)
    except OSError:
        return 0.0


def _wait(descriptor: int, event: int, *, deadline: float) -> None:
    """Returns when the pipe is ready or broken; a `TimeoutError` at the deadline. `poll`, since `select` ends at descriptor 1023."""
    poller = select.poll()
    poller.register(descriptor, event)
    if not poller.poll(max(0.0, deadline - time.monotonic()) * 1000.0):
        raise TimeoutError("no reply in time")


class WorkerPool:
    """Workers of one judge, each driven by its own thread; a context manager that leaves no process behind."""

    def __init__(self, function: str, *, num_workers: int, timeout_s: float) -> None:
        self._workers = [Worker(function, timeout_s=timeout_s) for _ in range(num_workers)]
        self._idle: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        self._kept: OrderedDict[tuple[tuple[str, str], ...], RewardResult] = OrderedDict()
        self._kept_lock = threading.Lock()
        self._threads = ThreadPoolExecutor(max_workers=num_workers, thread_name_prefix=f"reward-{function}")

    def __enter__(self) -> WorkerPool:
        try:
            for started in [self._threads.submit(worker.start) for worker in self._workers]:
                started.result()
        except BaseException:
            self.close()
            raise
        for worker in self._workers:
            self._idle.put(worker)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Ends all workers and threads; judgements not yet begun are given up."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        for worker in self._workers:
            worker.interrupt()
        self._threads.shutdown(wait=True)
        for worker in self._workers:
            worker.close()

    def judge(self, requests: Sequence[WorkerRequest]) -> list[tuple[RewardResult | Unavailable, float]]:
        """Returns verdict and seconds of work for each request, in order.

        Equal requests are judged once, also in later calls. A request that computes until the deadline or breaks the process is followed
        by its control: if that is judged, the response is what cannot be graded, and its value is 0.0 with the note "ungradable"; if
        not, the verdict is `Unavailable`. A process that hung without computing, was killed from outside or lost is no verdict on the
        response: the request is asked once more, and is `Unavailable` when that fails too.
        """
        keys = [tuple(sorted(request.arguments.items())) for request in requests]
        with self._kept_lock:
            verdicts = {key: (self._kept[key], 0.0) for key in dict.fromkeys(keys) if key in self._kept}
        distinct = {key: request for key, request in zip(keys, requests, strict=True) if key not in verdicts}
        judged = dict(zip(distinct, self._threads.map(self._judge_one, distinct.values()), strict=True))
        with self._kept_lock:
            for key in (*verdicts, *judged):
                verdict, _seconds = verdicts[key] if key in verdicts else judged[key]
                if isinstance(verdict, RewardResult):
                    self._kept[key] = verdict
                    self._kept.move_to_end(key)
            while len(self._kept) > MAX_KEPT_VERDICTS:
                self._kept.popitem(last=False)
        found = verdicts | judged
        return [found[key] for key in keys]

    def _judge_one(self, request: WorkerRequest) -> tuple[RewardResult | Unavailable, float]:
        worker = self._idle.get()
        started = time.monotonic()
        try:
            return _judge_with_control(worker, request), time.monotonic() - started
        finally:
            self._idle.put(worker)


def _judge_with_control(worker: Worker, request: WorkerRequest) -> RewardResult | Unavailable:
    reason = ""
    for _attempt in range(2):
        try:
            verdict = worker.ask(request.arguments)
            if not isinstance(verdict, Failure):
                return verdict
            if verdict.is_by_request:
                return _blame(worker, request, verdict.reason)
            reason = f"{verdict.reason}, and the machine may be at fault"
        except WorkerError as error:
            reason = str(error)
    return Unavailable(reason=reason)


def _blame(worker: Worker, request: WorkerRequest, reason: str) -> RewardResult | Unavailable:
    """Returns the verdict on a request that computed without end: 0.0 if its control can still be judged."""
    try:
        control = worker.ask(request.control, max_s=CONTROL_S)
    except WorkerError as error:
        return Unavailable(reason=str(error))
    if isinstance(control, RewardResult):
        return RewardResult(value=0.0, note=f"ungradable answer: {reason}")
    return Unavailable(reason=f"{reason}; then the control question failed: {control.reason}")
