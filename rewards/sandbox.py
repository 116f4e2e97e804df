"""Running model-written programs where they can do nothing but compute, read their input and print.

A jail is a process of `jail_main` that forks one confined process a program: inside bubblewrap's namespaces, with nothing but the
interpreter mounted, read-only; or without namespaces, under Landlock. Both add a seccomp filter and resource limits: no other
process, no socket, no signal to others, no file changed. Everything is decided here, outside: a program's exit code is reported and
never believed, its output is cut while it is read, its clock starts when it starts.
"""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from types import TracebackType

from .execution import Execution, Limits, SandboxError, Session, Status
from .jail import Jail, JailError, Running, open_pipe, sealed_file
from .jail_backends import Backend, probe
from .remote_sandbox import RemoteSandbox
from .sandbox_config import SandboxConfig

__all__ = ["Execution", "Limits", "Sandbox", "SandboxError", "Session", "Status"]

MAX_PROGRAM_BYTES = 2**20
GRACE_S = 1.0
"""Longest wait for a program to end by itself when its input has ended and somebody asks how it did, seconds."""


class _LocalSession:
    """A session with a program in a jail."""

    def __init__(self, running: Running, stdin: int) -> None:
        self._running = running
        self._stdin = stdin
        self._execution: Execution | None = None

    def send(self, line: bytes, *, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        rest = memoryview(line if line.endswith(b"\n") else line + b"\n")
        while rest:
            if not self._running.is_running:
                raise EOFError("the program has ended")
            try:
                rest = rest[os.write(self._stdin, rest) :]
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise TimeoutError(f"the program did not read in {timeout_s:g} s") from None
                self._running.pump(min(0.005, deadline - time.monotonic()))
            except BrokenPipeError:
                raise EOFError("the program reads no more") from None

    def receive(self, *, timeout_s: float) -> bytes:
        deadline = time.monotonic() + timeout_s
        printed, num_searched = self._running.stdout, 0
        while True:
            end = printed.find(b"\n", num_searched)
            if end >= 0:
                line = bytes(memoryview(printed)[:end])
                del printed[: end + 1]
                return line
            num_searched = len(printed)
            if not self._running.is_running:
                raise EOFError("the program has ended")
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError(f"no line in {timeout_s:g} s")
            self._running.pump(left)

    def execution(self) -> Execution:
        """Returns how the program ended; one that does not end soon after its input has is ended."""
        if self._execution is None:
            self.close_input()
            deadline = time.monotonic() + GRACE_S
            while self._running.is_running and time.monotonic() < deadline:
                self._running.pump(deadline - time.monotonic())
            self.end()
        assert self._execution is not None, "end sets it"
        return self._execution

    def end(self) -> None:
        """Ends the program at once."""
        if self._execution is None:
            if self._running.is_running:
                self._running.stop("time_limit", "was ended before it ended by itself")
            self._execution = self._running.finish()

    def close_input(self) -> None:
        """Ends the program's input."""
        if self._stdin >= 0:
            os.close(self._stdin)
            self._stdin = -1


class Sandbox:
    """Runs programs, several at once; a context manager that leaves no process behind.

    Example: `with Sandbox(SandboxConfig()) as sandbox: sandbox.run("print(input())", stdin=b"7", limits=limits).stdout`. Entering tries
    the backends and raises `SandboxError` when none holds. A jail is taken for each program and given back. As many threads as there are
    workers have programs at a time, the others wait; a thread that has one gets further ones at once, as a problem of two programs needs
    them, so that no two threads wait for each other. Hence a thread with an open session must not wait for another thread's program.
    """

    def __init__(self, config: SandboxConfig) -> None:
        self._config = config
        self._backend: Backend | None = None
        self._remote: RemoteSandbox | None = None
        self._idle: list[Jail] = []
        self._busy: set[Jail] = set()
        self._lock = threading.Lock()
        self._workers = threading.Semaphore(config.num_workers)
        self._num_taken: Counter[int] = Counter()
        # bubblewrap's --die-with-parent follows the thread that started it: this one lives as long as the sandbox.
        self._starter = ThreadPoolExecutor(max_workers=1, thread_name_prefix="sandbox")
        self._is_open = False
        self._refusals: dict[str, str] = {}

    def __enter__(self) -> Sandbox:
        if self._config.backend == "remote":
            assert self._config.remote_url is not None, "the settings demand it"
            self._remote = RemoteSandbox(self._config.remote_url)
            self._remote.__enter__()
            return self
        self._backend, self._refusals = probe(self._config)
        self._is_open = True
        try:
            for _ in range(self._config.num_workers):
                self._idle.append(self._start())
        except JailError as error:
            self.__exit__(None, None, None)
            raise SandboxError(
                f"sandbox: {self._backend.name} held in the probe, and then a jail could not be started ({error})"
            ) from error
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._remote is not None:
            self._remote.__exit__(kind, error, trace)
            self._remote = None
        with self._lock:
            self._is_open = False
            idle, self._idle = self._idle, []
            busy = list(self._busy)
        for jail in busy:
            jail.interrupt()  # whoever waits for it gets an internal error, and closes it
        for jail in idle:
            jail.close()
        self._starter.shutdown()

    @property
    def backend(self) -> str:
        """The backend that runs: `bubblewrap`, `landlock`, `remote` or `unsafe`."""
        if self._config.backend == "remote":
            return "remote"
        assert self._backend is not None, "a sandbox is used inside its `with` block"
        return self._backend.name

    @property
    def is_unsafe(self) -> bool:
        """True when programs run with resource limits alone."""
        return self._backend is not None and self._backend.is_unsafe

    def describe(self) -> str:
        """Returns which backend runs, and why another one does not."""
        if self._config.backend == "remote":
            return f"sandbox: remote, {self._config.remote_url}"
        refused = "".join(f"; {name} does not: {reason}" for name, reason in self._refusals.items())
        assert self._backend is not None, "a sandbox is used inside its `with` block"
        return f"sandbox: {self._backend.name}, {self._backend.interpreter}{refused}"

    def run(self, program: str, *, stdin: bytes = b"", limits: Limits) -> Execution:
        """Returns how the program ran on this input. Safe for several threads."""
        if self._remote is not None:
            return self._remote.run(program, stdin=stdin, limits=limits)
        encoded = _encoded(program)
        if isinstance(encoded, Execution):
            return encoded
        try:
            source = sealed_file(stdin)
            try:
                with self._running(encoded, limits=limits, stdin=source) as running:
                    return running.finish()
            finally:
                os.close(source)
        except JailError as error:
            return _failed("internal_error", str(error))

    def open_session(self, program: str, *, limits: Limits) -> AbstractContextManager[Session]:
        """Returns a program that is talked to line by line; leaving the block ends it. Raises `SandboxError` when it cannot be started."""
        if self._remote is not None:
            return self._remote.open_session(program, limits=limits)
        return self._session(program, limits)

    @contextmanager
    def _session(self, program: str, limits: Limits) -> Iterator[_LocalSession]:
        encoded = _encoded(program)
        if isinstance(encoded, Execution):
            raise SandboxError(f"the program cannot be started: {encoded.reason}")
        try:
            stdin_read, stdin_write = open_pipe()
        except JailError as error:
            raise SandboxError(f"the program cannot be started: {error}") from error
        os.set_blocking(stdin_write, False)
        session: _LocalSession | None = None
        try:
            with self._running(encoded, limits=limits, stdin=stdin_read) as running:
                session = _LocalSession(running, stdin_write)
                try:
                    yield session
                finally:
                    session.end()
        except JailError as error:
            raise SandboxError(f"the jail was lost: {error}") from error
        finally:
            os.close(stdin_read)
            if session is None:
                os.close(stdin_write)
            else:
                session.close_input()

    @contextmanager
    def _running(self, program: bytes, *, limits: Limits, stdin: int) -> Iterator[Running]:
        """Takes a jail, starts the program in it, and gives the jail back if the program is gone at the end."""
        with self._worker():
            jail = self._take()
            is_sound = False
            try:
                running = Running(jail, program, limits=limits, stdin=stdin)
                try:
                    yield running
                    is_sound = not running.is_running
                finally:
                    running.close()
            finally:
                self._give_back(jail, is_sound=is_sound)

    @contextmanager
    def _worker(self) -> Iterator[None]:
        """Waits until this thread may have a program; one that has one already need not wait."""
        thread = threading.get_ident()
        with self._lock:
            has_one = self._num_taken[thread] > 0
            if has_one:
                self._num_taken[thread] += 1
        if not has_one:
            self._workers.acquire()
            with self._lock:
                self._num_taken[thread] += 1
        try:
            yield
        finally:
            with self._lock:
                self._num_taken[thread] -= 1
                has_left = self._num_taken[thread] == 0
                if has_left:
                    del self._num_taken[thread]
            if has_left:
                self._workers.release()

    def _take(self) -> Jail:
        assert self._backend is not None, "a sandbox is used inside its `with` block"
        with self._lock:
            jail = self._idle.pop() if self._idle else None
        if jail is None:
            jail = self._start()
        with self._lock:
            if self._is_open:
                self._busy.add(jail)
                return jail
        jail.close()
        raise JailError("the sandbox has been closed")

    def _start(self) -> Jail:
        assert self._backend is not None, "it is open"
        try:
            starting = self._starter.submit(self._backend.jail)
        except RuntimeError as error:
            raise JailError("the sandbox has been closed") from error
        return starting.result()

    def _give_back(self, jail: Jail, *, is_sound: bool) -> None:
        with self._lock:
            self._busy.discard(jail)
            if is_sound and self._is_open and len(self._idle) < 2 * self._config.num_workers:
                self._idle.append(jail)
                return
        jail.close()


def _encoded(program: str) -> bytes | Execution:
    try:
        encoded = program.encode()
    except UnicodeEncodeError:
        return _failed("refused", "the program's text has half of a surrogate pair")
    if len(encoded) > MAX_PROGRAM_BYTES:
        return _failed("refused", f"a program of {len(encoded)} bytes; at most {MAX_PROGRAM_BYTES} are run")
    return encoded


def _failed(status: Status, reason: str) -> Execution:
    return Execution(status=status, stdout=b"", stderr=b"", exit_code=None, seconds=0.0, reason=reason)
