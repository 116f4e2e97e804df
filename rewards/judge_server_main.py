"""The supervisor of a judge server; started by `judge_server.JudgeServer` as `python -I -m vlpost.rewards.judge_server_main ARGUMENTS`.

The arguments are the trainer's process id, the seconds that the server may take to end, and the server's command line.
It starts the command and ends it, with all its descendants, when the trainer closes the pipe to its stdin, when the trainer is gone
(its own parent is another process then), or on SIGTERM. A signal bound to the parent's death alone would not do: it is sent when
the *thread* that started the child ends, and not to grandchildren.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_POLL_S = 0.25


def _descendants(pid: int) -> list[int]:
    """Returns the processes below one, by /proc."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            # Processes come and go while one looks.
            with contextlib.suppress(OSError, ValueError):
                # The name in brackets may hold anything; the state and the parent follow it.
                parent = int((entry / "stat").read_text(errors="replace").rpartition(")")[2].split()[1])
                parents.setdefault(parent, []).append(int(entry.name))
    found, unread = [], [pid]
    while unread:
        children = parents.get(unread.pop(), [])
        found += children
        unread += children
    return found


def _signal_all(pids: list[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _reap() -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def main(parent: int, stop_s: float, command: list[str]) -> int:
    """Runs the command until it ends or the parent is gone; returns its exit status."""
    libc = ctypes.CDLL(None, use_errno=True)
    # Orphans among the server's processes become children of this one, where they can be found.
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    is_asked_to_stop = False

    def stop(_number: int, _frame: object) -> None:
        nonlocal is_asked_to_stop
        is_asked_to_stop = True

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    # This process has one thread, so the server hears of the supervisor's death, not of a thread's.
    server = subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=lambda: libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0))
    while not is_asked_to_stop and os.getppid() == parent and server.poll() is None:
        readable, _, _ = select.select([0], [], [], _POLL_S)
        if readable and not os.read(0, 4096):
            break
    status = server.poll()
    server.terminate()
    deadline = time.monotonic() + stop_s
    while server.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    # What the server left behind had its chance too.
    while left := _descendants(os.getpid()):
        _signal_all(left, signal.SIGKILL)
        time.sleep(0.02)
        server.poll()
        _reap()
    return 1 if status is None or status < 0 else status


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]))
