"""A jail as the trainer sees it: a process of `jail_main`, and the program that runs in it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

from .execution import Execution, Limits, Status

MAX_STDERR_BYTES = 16 * 1024
START_S = 30.0
"""Longest wait for a jail to come up, seconds."""
END_S = 5.0
"""Longest wait for a killed program's process to be gone, seconds."""
MEMORY_EXIT = 70
"""What `jail_main` exits with when a program ran out of memory."""

ENVIRONMENT: Mapping[str, str] = {
    "PATH": "/usr/bin:/bin",
    "LANG": "C.UTF-8",
    "PYTHONHASHSEED": "0",  # the same program gives the same output twice
}
"""All that a jail gets to see of an environment."""


class JailError(Exception):
    """A jail that cannot be started or has been lost."""


class Jail:
    """One process of `jail_main`, which runs one program at a time; not safe for several threads at once."""

    def __init__(self, command: Sequence[str], *, paths: Sequence[str] | None, user: int | None, is_unsafe: bool) -> None:
        self.is_unsafe = is_unsafe
        try:
            self.control, inner = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        except OSError as error:
            raise JailError(f"no socket for a jail can be made ({error.strerror})") from error
        settings = json.dumps({"control": inner.fileno(), "paths": None if paths is None else list(paths)})
        identity = {} if user is None else {"user": user, "group": user, "extra_groups": ()}
        try:
            self._process = subprocess.Popen(
                [*command, "-s", "-S", "-B", "-c", _jail_program(), settings],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=ENVIRONMENT,
                cwd="/",
                pass_fds=(inner.fileno(),),
                start_new_session=True,
                **identity,
            )
        except (OSError, subprocess.SubprocessError) as error:
            self.control.close()
            reason = error.strerror if isinstance(error, OSError) else error
            raise JailError(f"{command[0]} cannot be started ({reason})") from error
        finally:
            inner.close()
        try:
            self.receive(START_S, "ready")
        except JailError:
            self.close()
            raise

    def receive(self, timeout_s: float, key: str) -> dict[str, object]:
        """Returns the next message, which must hold `key`; a `JailError` if none comes in time or it tells of an error."""
        poll = select.poll()
        poll.register(self.control, select.POLLIN)
        try:
            message = self.control.recv(4096) if poll.poll(max(0.0, timeout_s) * 1000) else None
        except ConnectionError:
            message = b""
        if message is None:
            raise JailError(f"the jail did not answer in {timeout_s:g} s")
        if not message:
            raise JailError("the jail's process has ended")
        parsed = json.loads(message)
        if key not in parsed:
            raise JailError(str(parsed.get("error", f"the jail said {parsed!r}")))
        return parsed

    def start(self, program: bytes, *, limits: Limits, stdin: int, stdout: int, stderr: int) -> None:
        """Starts a program on three descriptors and returns when it runs."""
        order = {
            "program_bytes": len(program),
            "memory_bytes": limits.memory_bytes,
            "cpu_s": cpu_limit_s(limits),
            "is_unsafe": self.is_unsafe,
        }
        text = sealed_file(program)
        try:
            socket.send_fds(self.control, [json.dumps(order).encode()], [text, stdin, stdout, stderr])
        except OSError as error:
            raise JailError(f"the jail does not listen ({error.strerror})") from error
        finally:
            os.close(text)
        self.receive(START_S, "started")

    def kill_program(self) -> None:
        """Ends the program that runs; it may have ended by itself."""
        with contextlib.suppress(OSError):
            self.control.send(b"kill")

    def interrupt(self) -> None:
        """Ends the jail under whoever waits for a program in it; may be called from another thread."""
        self._process.kill()

    def close(self) -> None:
        """Ends the jail and everything in it."""
        self.control.close()
        try:
            self._process.wait(1.0)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


@cache
def _jail_program() -> str:
    # `-c` puts the working directory first of all places to import from, and -P, which does not, is younger than Python 3.9.
    return "import sys\nsys.path[:] = [path for path in sys.path if path]\n" + Path(__file__).with_name("jail_main.py").read_text(
        encoding="utf-8"
    )


def sealed_file(content: bytes) -> int:
    """Returns a descriptor of a file in memory that nobody can change any more; a `JailError` when there is no room for it."""
    descriptor = -1
    try:
        descriptor = os.memfd_create("vlpost", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        view = memoryview(content)
        while view:
            view = view[os.write(descriptor, view) :]
        os.lseek(descriptor, 0, os.SEEK_SET)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
    except OSError as error:
        if descriptor >= 0:
            os.close(descriptor)
        raise JailError(f"no file in memory can be made ({error.strerror})") from error
    return descriptor


def open_pipe() -> tuple[int, int]:
    """Returns a pipe to read from and to write to; a `JailError` when this process has no descriptor left."""
    try:
        return os.pipe()
    except OSError as error:
        raise JailError(f"no pipe can be made ({error.strerror})") from error


class Running:
    """A program that runs in a jail: reads what it prints, with bounds, until it ends or its time is over."""

    def __init__(self, jail: Jail, program: bytes, *, limits: Limits, stdin: int) -> None:
        self._jail = jail
        self._limits = limits
        self.stdout = bytearray()
        self._stderr = bytearray()
        self._num_out = 0
        self._ended: dict[str, object] | None = None
        self._stopped: tuple[Status, str] | None = None
        out_read, out_write = open_pipe()
        try:
            err_read, err_write = open_pipe()
        except JailError:
            os.close(out_read)
            os.close(out_write)
            raise
        self._streams = {out_read: self.stdout, err_read: self._stderr}
        self._out = out_read
        for descriptor in self._streams:
            os.set_blocking(descriptor, False)
        try:
            jail.start(program, limits=limits, stdin=stdin, stdout=out_write, stderr=err_write)
        except JailError:
            self.close()
            raise
        finally:
            os.close(out_write)
            os.close(err_write)
        self._started = time.monotonic()
        self._seconds = self._cpu_s = 0.0

    @property
    def is_running(self) -> bool:
        """False when the process is gone."""
        return self._ended is None

    def pump(self, timeout_s: float) -> None:
        """Waits for output or the end, at most so long, and takes what there is; stops a program that is over a limit."""
        left = self._started + self._limits.wall_s - time.monotonic()
        if self._stopped is not None:
            left = END_S
        poll = select.poll()
        poll.register(self._jail.control, select.POLLIN)
        for descriptor in self._streams:
            poll.register(descriptor, select.POLLIN)
        ready = [descriptor for descriptor, _ in poll.poll(max(0.0, min(left, timeout_s)) * 1000 + 1)]
        for descriptor in ready:
            if descriptor in self._streams:
                self._read(descriptor)
        if self._jail.control.fileno() in ready:
            self._end(self._jail.receive(0.0, "code"))
        elif self._stopped is None and time.monotonic() >= self._started + self._limits.wall_s:
            self.stop("time_limit", f"ran longer than {self._limits.wall_s:g} s")

    def _end(self, ended: dict[str, object]) -> None:
        """Takes the end of the process down. The jail's clock counts: this process may have been late to look."""
        self._ended = ended
        seconds, cpu_s = ended["seconds"], ended["cpu_s"]
        assert isinstance(seconds, float), "jail_main sends seconds"
        assert isinstance(cpu_s, float), "jail_main sends seconds"
        self._seconds, self._cpu_s = seconds, cpu_s
        for descriptor in list(self._streams):  # everything that could write is dead: what is in the pipes is all
            while descriptor in self._streams and self._read(descriptor):
                pass
        if self._stopped is None and seconds > self._limits.wall_s:
            self._stopped = ("time_limit", f"ran longer than {self._limits.wall_s:g} s")

    def stop(self, status: Status, reason: str) -> None:
        """Has the program killed, if it has not ended; the first reason counts."""
        if self._stopped is None:
            self._stopped = (status, reason)
            if self.is_running:
                self._jail.kill_program()

    def _read(self, descriptor: int) -> bool:
        """Takes what is in a pipe; returns False when nothing was."""
        try:
            received = os.read(descriptor, 65536)
        except BlockingIOError:
            return False
        if not received:
            self._streams.pop(descriptor)
            os.close(descriptor)
            return False
        if descriptor != self._out:
            self._stderr += received[: MAX_STDERR_BYTES - len(self._stderr)]
        else:
            room = self._limits.output_bytes - self._num_out
            self._num_out += len(received)
            self.stdout += received[: max(0, room)]
            if len(received) > room:
                self.stop("output_limit", f"printed more than {self._limits.output_bytes} bytes")
        return True

    def finish(self) -> Execution:
        """Returns how the program ran, when it has ended; a `JailError` when a killed one does not."""
        killed_at = None
        while self.is_running:
            if self._stopped is not None:
                killed_at = killed_at or time.monotonic()
                if time.monotonic() - killed_at > END_S:
                    raise JailError(f"a killed program was still there after {END_S:g} s")
            self.pump(END_S)
        assert self._ended is not None, "the loop ends with it"
        code = self._ended["code"]
        assert isinstance(code, int), "jail_main sends whole numbers"
        status, reason = self._stopped or _status_of(code, used_up=self._cpu_s >= cpu_limit_s(self._limits) - 0.5)
        return Execution(
            status=status,
            stdout=bytes(self.stdout),
            stderr=bytes(self._stderr),
            exit_code=code if self._stopped is None else None,
            seconds=self._seconds,
            reason=reason,
        )

    def close(self) -> None:
        """Closes the pipes."""
        for descriptor in self._streams:
            os.close(descriptor)
        self._streams = {}


def cpu_limit_s(limits: Limits) -> int:
    """Returns the processor time that a program may use, seconds: more than one thread on one processor can in its time."""
    return int(limits.wall_s) + 2


def _status_of(code: int, *, used_up: bool) -> tuple[Status, str]:
    if code == 0:
        return "finished", ""
    if code == MEMORY_EXIT:
        return "memory_limit", "out of memory"
    if code in (-signal.SIGXCPU, -signal.SIGKILL) and used_up:
        return "time_limit", "used more processor time than it may run"
    if code == -signal.SIGKILL:
        # A program cannot do that to itself: its filter has no way to.
        return "internal_error", "killed from outside, as the system does when the machine's memory runs out"
    return "runtime_error", f"ended by signal {signal_name(-code)}" if code < 0 else f"exit code {code}"


def signal_name(number: int) -> str:
    """Returns SIGSEGV for 11, and `signal 40` in words for those that Python has no name for."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return str(number)
