"""No silent hang: a phase that outlasts its deadline ends the process, after writing where every thread stands.

Two watchers, since a hang takes what it likes with it. A thread waits for the earliest deadline, writes phase, step, rank, gauges and
all stacks to standard error and to `stacks-rank<N>.txt`, and leaves by `os._exit`, which waits for nobody. Where C code keeps the
interpreter's lock no Python thread ever runs again; `faulthandler`'s own timer, which needs no lock, then does the same `GRACE_S`
later, into `phase-rank<N>.txt`. That file names the phase in flight, so a run that was killed says where it was.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

EXIT_HUNG = 124
"""Exit status after a hang, as of timeout(1); 1 where only faulthandler's timer could act."""
GRACE_S = 10.0
"""Seconds that the watching thread has before faulthandler's timer ends the process without it."""
_STACKS_MARK = b"(most recent call first)"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Phase:
    name: str
    place: str
    limit_s: float | None
    start: float
    """Of the monotonic clock, in seconds"""

    @property
    def deadline(self) -> float:
        return float("inf") if self.limit_s is None else self.start + self.limit_s


class Watchdog:
    """Watches the phases of this process; a context manager, one in a process, its phases entered by one thread.

    Example: `with Watchdog(folder, rank=0) as watchdog, watchdog.phase("save", place="sft, step 12", limit_s=3600): ...`. Phases
    nest, each with its own deadline. `gauges` returns what else to write, such as the sizes of queues; it must take no lock.
    """

    def __init__(self, folder: Path, *, rank: int = 0, gauges: Callable[[], Mapping[str, object]] = dict) -> None:
        self.rank = rank
        self._gauges = gauges
        self._phase_file = folder / f"phase-rank{rank}.txt"
        self._stacks_file = folder / f"stacks-rank{rank}.txt"
        self._open: list[_Phase] = []
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._descriptor = -1

    def __enter__(self) -> Watchdog:
        _keep_stacks(self._phase_file, self._stacks_file)
        self._descriptor = os.open(self._phase_file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        self._thread.start()
        return self

    def __exit__(self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()
        faulthandler.cancel_dump_traceback_later()
        self._thread.join()
        os.close(self._descriptor)
        self._phase_file.unlink(missing_ok=True)

    @contextlib.contextmanager
    def phase(self, name: str, *, place: str, limit_s: float | None) -> Iterator[None]:
        """Ends the process when the block takes longer than `limit_s` seconds; None: it may take for ever. `place` is stage and step."""
        phase = _Phase(name=name, place=place, limit_s=limit_s, start=time.monotonic())
        with self._changed:
            self._open.append(phase)
            self._changed.notify()
        try:
            self._arm()
            yield
        finally:
            with self._changed:
                self._open.remove(phase)
                self._changed.notify()
            self._arm()

    def _arm(self) -> None:
        """Sets faulthandler's timer behind the earliest deadline and writes which phase is in flight; the timer first: a disk may hang."""
        deadline = min((phase.deadline for phase in self._open), default=float("inf"))
        if deadline < float("inf"):
            left = max(0.0, deadline - time.monotonic())
            faulthandler.dump_traceback_later(left + GRACE_S, exit=True, file=self._descriptor)
        else:
            faulthandler.cancel_dump_traceback_later()
        line = "".join(f"{phase.name} ({phase.place})\n" for phase in reversed(self._open)).encode()
        with contextlib.suppress(OSError):  # a full disk must not end the run here
            os.ftruncate(self._descriptor, 0)
            os.lseek(self._descriptor, 0, os.SEEK_SET)
            os.write(self._descriptor, line)

    def _watch(self) -> None:
        with self._changed:
            while not self._closed:
                late = min(self._open, key=lambda phase: phase.deadline, default=None)
                left = float("inf") if late is None else late.deadline - time.monotonic()
                if late is not None and left <= 0:
                    break
                self._changed.wait(None if left == float("inf") else left)
            else:
                return
        self._end(late)

    def _end(self, phase: _Phase) -> None:
        """Writes all that is known and leaves; from the standard streams on, whatever fails or blocks has the timer behind it."""
        report = (
            f"vlpost: {phase.place}: hung: {phase.name} has taken longer than its {phase.limit_s:g} s (watchdog: in the recipe), rank "
            f"{self.rank}; the process ends with status {EXIT_HUNG}; go on with --resume. Where every thread stands:\n"
        ).encode()
        with contextlib.suppress(OSError):
            self._write_stacks(os.open(self._stacks_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), report)
        with contextlib.suppress(OSError):
            self._write_stacks(2, report)
        os._exit(EXIT_HUNG)

    def _write_stacks(self, descriptor: int, report: bytes) -> None:
        os.write(descriptor, report)
        faulthandler.dump_traceback(file=descriptor, all_threads=True)
        os.write(descriptor, "".join(f"{name}: {value}\n" for name, value in self._gauges().items()).encode())


def _keep_stacks(phase_file: Path, stacks_file: Path) -> None:
    """Adds what faulthandler's timer wrote in an earlier run to that rank's stacks."""
    earlier = phase_file.read_bytes() if phase_file.exists() else b""
    if _STACKS_MARK in earlier:
        with stacks_file.open("ab") as stacks:
            stacks.write(earlier)
