"""How one model-written program runs: what it may use, how it ended, and a line by line talk with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from ..model.records import VlpostError

Status = Literal["finished", "time_limit", "memory_limit", "output_limit", "runtime_error", "refused", "internal_error"]
"""How a program ended. `finished`: it exited with 0, which says nothing about its being right; `refused`: it was not started, through its
own fault; `internal_error`: the sandbox failed, through no fault of the program."""


class SandboxError(VlpostError):
    """No sandbox can be had on this machine; the message says what was tried and what to do."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What one program may use."""

    wall_s: float
    """Seconds of clock time from its start"""
    memory_bytes: int
    """Address space, the interpreter's own 30 MiB included"""
    output_bytes: int
    """Of standard output; more ends the program"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Execution:
    """How a program ran: `Execution(status="finished", stdout=b"7\\n", stderr=b"", exit_code=0, seconds=0.01, reason="")`."""

    status: Status
    stdout: bytes
    """At most `output_bytes`"""
    stderr: bytes
    """At most `MAX_STDERR_BYTES`"""
    exit_code: int | None
    """As its process ended, -N for signal N; None when it was killed or never ran"""
    seconds: float
    """From its start to its end"""
    reason: str
    """Why the status is what it is; empty for `finished`"""


class Session(Protocol):
    """A program that is talked to line by line."""

    def send(self, line: bytes, *, timeout_s: float) -> None:
        """Writes a line; `TimeoutError` when the program does not read it in time, `EOFError` when it has ended."""
        ...

    def receive(self, *, timeout_s: float) -> bytes:
        """Returns the next line without its end; `TimeoutError` when none comes in time, `EOFError` when none will."""
        ...

    def execution(self) -> Execution:
        """Ends the program if it has not ended, and returns how it ended; `stdout` is what was not received."""
        ...
