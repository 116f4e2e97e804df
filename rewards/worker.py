"""Worker processes that can be killed: for verifiers that may hang, eat memory or crash on what a policy writes.

A worker is `worker_main`, started by exec and never by forking the trainer, whose threads would be lost half way. It reads and writes
JSON lines over pipes. The deadline is wall clock, kept here with `select`, and starts when the request is sent to a free worker;
past it the process is killed and a fresh one takes its place, so one hostile text costs its own time and no neighbour's.
"""

from __future__ import annotations

import json
import os
import queue
import select
import signal
import subprocess
import sys
import tempfile
import time
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

# The judge of a worker, as `module:function` of this package, and questions that it must find right before it is trusted. They
# also load what the verifier loads late, so that a fresh process answers its first request as fast as any other.
_JUDGES: Mapping[str, tuple[str, Sequence[Mapping[str, str]]]] = {
    "math_answer": (
        ".math_answer:verdict",
        (
            {"answer": "\\frac{1}{2}", "prediction": "0.5"},
            {"answer": "3\\sqrt{2}", "prediction": "\\sqrt{18}"},
            {"answer": "x^2+2x+1", "prediction": "(x+1)^2"},
            {"answer": "\\{1,2\\}", "prediction": "\\{2,1\\}"},
            {"answer": "0<x<1", "prediction": "(0,1)"},
            {"answer": "\\begin{pmatrix}1\\\\2\\end{pmatrix}", "prediction": "\\begin{pmatrix}1\\\\2\\end{pmatrix}"},
            {"answer": "x=4", "prediction": "4"},
        ),
    ),
}
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


class Worker:
    """One worker process for one judge; not safe for several threads at once."""

    def __init__(self, function: str, *, timeout_s: float) -> None:
        self._function = function
        self._timeout_s = timeout_s
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
                self._read_until(lambda message: "ready" in message, deadline=time.monotonic() + WORKER_START_S)
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

    def ask(self, arguments: Mapping[str, str]) -> RewardResult | Unavailable | Failure:
        """Returns the judge's verdict on the arguments within the deadline; a `WorkerError` if the worker cannot be brought up."""
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
        deadline = time.monotonic() + self._timeout_s
        try:
            self._discard_old_messages()
            self._write(line, deadline=deadline)
            message = self._read_until(lambda message: "ready" in message or message.get("id") == number, deadline=deadline)
        except TimeoutError:
            self._replace()
            return Failure(reason=f"no verdict in {self._timeout_s:g} s")
        except EOFError as error:
            self.close()
            raise WorkerError(f"the worker process of {self._function!r} is gone ({error})") from error
        if "ready" in message:
            # A fresh inner process says so only because the one that had the request died.
            self._num_asked_of_process = 0
            return Failure(reason="the verifier's process died")
        if "error" in message:
            return Unavailable(reason=message["error"])
        return RewardResult(value=message["value"], note=message["note"])

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
            self._read_until(lambda message: "ready" in message, deadline=time.monotonic() + WORKER_START_S)
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
        self._unread = self._unread.rpartition(b"\n")[2]

    def _pipe(self, name: Literal["stdin", "stdout"]) -> int:
        assert self._process is not None, "a worker is started before it is written to or read from"
        pipe = self._process.stdin if name == "stdin" else self._process.stdout
        assert pipe is not None, "both ends of a worker are pipes"
        return pipe.fileno()


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

        Equal requests are judged once. A request that hangs or kills two fresh processes is followed by its control: if that
        is judged, the response is what cannot be graded, and its value is 0.0 with the note "ungradable"; if not, or when a
        worker cannot be started or is lost, the verdict is `Unavailable`.
        """
        keys = [tuple(sorted(request.arguments.items())) for request in requests]
        distinct = dict(zip(keys, requests, strict=True))
        verdicts = dict(zip(distinct, self._threads.map(self._judge_one, distinct.values()), strict=True))
        return [verdicts[key] for key in keys]

    def _judge_one(self, request: WorkerRequest) -> tuple[RewardResult | Unavailable, float]:
        worker = self._idle.get()
        started = time.monotonic()
        try:
            return _judge_with_control(worker, request), time.monotonic() - started
        finally:
            self._idle.put(worker)


def _judge_with_control(worker: Worker, request: WorkerRequest) -> RewardResult | Unavailable:
    failures: list[Failure | WorkerError] = []
    try:
        while len(failures) < 2:
            try:
                verdict = worker.ask(request.arguments)
            except WorkerError as error:
                failures.append(error)
                continue
            if not isinstance(verdict, Failure):
                return verdict
            failures.append(verdict)
        lost = [failure for failure in failures if isinstance(failure, WorkerError)]
        if lost:
            return Unavailable(reason=str(lost[-1]))
        control = worker.ask(request.control)
    except WorkerError as error:
        return Unavailable(reason=str(error))
    reasons = " and then ".join(failure.reason for failure in failures if isinstance(failure, Failure))
    if isinstance(control, RewardResult):
        return RewardResult(value=0.0, note=f"ungradable answer: {reasons}")
    return Unavailable(reason=f"{reasons}; then the control question failed: {control.reason}")
