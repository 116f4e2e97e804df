"""The program of a worker process; started by `worker.Worker` as `python -I -m vlpost.rewards.worker_main SETTINGS`.

Two processes. The outer one loads the verifier, proves that it works, and forks the inner one, which answers requests; whenever
the inner one dies, by a signal from the trainer or by itself, the outer one forks the next: milliseconds, where loading the verifier
takes a second. The outer one has a single thread, so forking it is safe, as forking the trainer is not.

Protocol, JSON lines: at its start an inner process writes `{"ready": PID, "ended_by": STATUS}`, the second being how the one before it
ended (minus the signal, or its exit code; 0 for the first); a request `{"id", "arguments"}` is answered by
`{"id", "value", "note"}` or `{"id", "error"}`. SIGUSR1 to the outer process kills the inner one; SIGTERM ends both; so does the
end of stdin.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import logging
import math
import os
import resource
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Any

MAX_NOTE_CHARS = 500
_FORBIDDEN_EVENTS = (
    *("os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.kill", "subprocess.", "pty.", "socket.", "ctypes.", "shutil."),
    *("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod", "os.chown"),
)
_WRITE_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def _forbid(event: str, event_arguments: tuple[Any, ...]) -> None:
    """Audit hook: a verifier computes. If a text ever reached an interpreter, it could not start, send or write anything from Python."""
    if event.startswith(_FORBIDDEN_EVENTS):
        raise PermissionError(f"{event} is forbidden in a reward worker")
    if event == "open":
        _path, mode, flags = event_arguments
        if (isinstance(mode, str) and set(mode) & set("wax+")) or (isinstance(flags, int) and flags & _WRITE_FLAGS):
            raise PermissionError("opening a file for writing is forbidden in a reward worker")


def _limit_cpu(seconds: float) -> None:
    """Lets the kernel end this process if it computes on although nobody waits, as after the death of the trainer."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    limit = math.ceil(usage.ru_utime + usage.ru_stime + seconds) + 1
    _soft, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


def _answer_requests(judge: Callable[..., tuple[float, str]], *, replies_fd: int, timeout_s: float, ended_by: int) -> None:
    """Answers request after request until stdin ends."""
    sys.addaudithook(_forbid)
    os.write(replies_fd, json.dumps({"ready": os.getpid(), "ended_by": ended_by}).encode() + b"\n")
    # Unbuffered: a request that this process does not live to answer must not take the next one with it.
    for line in os.fdopen(0, "rb", buffering=0, closefd=False):
        try:
            question = json.loads(line)
        except ValueError:
            continue  # the rest of a request that a killed process had begun to read: nobody waits for it
        _limit_cpu(timeout_s)
        reply: dict[str, Any] = {"id": question["id"]}
        try:
            reply["value"], note = judge(**question["arguments"])
            reply["note"] = note[:MAX_NOTE_CHARS]
        except ValueError as error:
            reply["error"] = str(error)[:MAX_NOTE_CHARS]
        # One write of less than a pipe's atomic size: the reader never sees half a reply.
        os.write(replies_fd, json.dumps(reply).encode() + b"\n")


@dataclass(slots=True)
class _Inner:
    """The inner process as the outer one knows it; `pid` is 0 while there is none, so that no signal meets a stranger."""

    pid: int = 0

    def kill(self, _signal: int = 0, _frame: FrameType | None = None) -> None:
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)

    def kill_and_leave(self, _signal: int, _frame: FrameType | None) -> None:
        self.kill()
        os._exit(0)


def main(settings: dict[str, Any]) -> None:
    """Runs the outer process; returns when stdin has ended."""
    sys.dont_write_bytecode = True
    logging.disable(logging.CRITICAL)
    module_name, _, function_name = settings["judge"].partition(":")
    judge = getattr(importlib.import_module(module_name, package=__package__), function_name)
    for arguments in settings["proofs"]:
        value, note = judge(**arguments)
        if value != 1.0:
            raise RuntimeError(f"the verifier judged {arguments} as {value} ({note}), not as right; it cannot be trusted")
    resource.setrlimit(resource.RLIMIT_AS, (settings["max_memory_bytes"],) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # Whatever a verifier prints goes nowhere: the replies have a descriptor of their own.
    replies_fd = os.dup(1)
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    gc.freeze()
    inner = _Inner()
    signal.signal(signal.SIGUSR1, inner.kill)
    signal.signal(signal.SIGTERM, inner.kill_and_leave)
    orders = {signal.SIGUSR1, signal.SIGTERM}
    status: int | None = None
    while status != 0:
        signal.pthread_sigmask(signal.SIG_BLOCK, orders)
        inner.pid = os.fork()
        if inner.pid == 0:
            for order in orders:
                signal.signal(order, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, orders)
            try:
                # Without a reader there is nobody to answer: leave with 0, or the outer process would fork for ever.
                with contextlib.suppress(BrokenPipeError):
                    ended_by = 0 if status is None else os.waitstatus_to_exitcode(status)
                    _answer_requests(judge, replies_fd=replies_fd, timeout_s=settings["timeout_s"], ended_by=ended_by)
                os._exit(0)
            finally:
                # Nothing of the outer process, its loop least of all, may run on in here.
                os._exit(1)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, orders)
        os.waitid(os.P_PID, inner.pid, os.WEXITED | os.WNOWAIT)
        # Dead but not yet reaped: until the signals are blocked, its number still belongs to nobody else.
        signal.pthread_sigmask(signal.SIG_BLOCK, orders)
        _pid, status = os.waitpid(inner.pid, 0)
        inner.pid = 0


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
