"""A vLLM server that the run starts itself: on loopback, behind a random key, started again when it dies or hangs, gone with the run."""

from __future__ import annotations

import os
import re
import secrets
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import httpx

from .records import VlpostError
from .token_client import Endpoint, answers

_POLL_S = 0.5
_PROBE_EVERY_S = 2.0
_LOG_TAIL_BYTES = 3000
_GRACE_S = 15.0
"""Beyond `stop_s`, until the supervisor itself is killed."""
# Of a launcher of the trainer's own ranks: the server would take itself for one of them. The engine switches of an in-process
# sampler are not the server's either.
_NOT_INHERITED = re.compile(
    r"(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE|ROLE_NAME)|MASTER_(ADDR|PORT)|TORCHELASTIC_.*|VLLM_ENABLE_V1_MULTIPROCESSING|VLLM_API_KEY"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerPlan:
    """How a server is started, and when it counts as lost."""

    owner: str
    """Whose server it is, for messages: `teacher large`."""
    command: Callable[[int], Sequence[str]]
    """Returns the command line for a port; the key is not on it, where every user could read it."""
    served_as: str
    """The name that it gives to its model."""
    environment: Mapping[str, str]
    """Beside that of the run."""
    log_file: Path
    """Where its output goes, appended."""
    supervisor: str
    """The module that runs a command and ends it when the run is gone: `python -m MODULE run's-pid stop_s COMMAND`."""
    error: type[VlpostError]
    """What is raised where it does not start."""
    port: int
    """0: any free one."""
    start_timeout_s: float
    """Longest wait until it answers, seconds."""
    max_restarts: int
    """How often it is started again in a run."""
    stop_s: float
    """How long it may take to end before it is killed, seconds."""
    probe_path: str | None = None
    """What is asked to see whether the engine still works; None: only the end of the process counts."""
    hung_after_s: float = field(default=20.0)
    """Seconds without an answer to `probe_path` after which it is killed and started again."""


class EngineServer:
    """A server as a child process; entering starts it and waits until it answers, leaving stops it and all that it started.

    A supervisor stands between: it ends the server when the run is gone, however that went. A thread of the run watches both: when the
    server ends by itself or hangs, it is started again at the same address with the same key, at most `max_restarts` times.
    """

    def __init__(self, plan: ServerPlan, *, heed: Callable[[str], None], make_ready: Callable[[], None] | None = None) -> None:
        """`heed` is told, on the watching thread, of every death and every start. `make_ready` is called there after a restart, before
        the server counts as up; where it raises a `VlpostError` the server is started once more."""
        self.plan = plan
        self._heed = heed
        self._make_ready = make_ready
        self._process: subprocess.Popen[bytes] | None = None
        self._stopping = threading.Event()
        self._up = threading.Event()
        self._condemned: str | None = None
        self._num_working = 0
        self._watcher = threading.Thread(target=self._watch, name=f"watches-{plan.owner}", daemon=True)
        self._port = plan.port
        self._key = secrets.token_urlsafe(32)
        self.log_file = plan.log_file
        """Where the server's output goes"""
        self.fault: str | None = None
        """Why it is not started again; None as long as it is"""

    @property
    def endpoint(self) -> Endpoint:
        """Where it answers; the same after a restart."""
        return Endpoint(url=f"http://127.0.0.1:{self._port}", model=self.plan.served_as, api_key=self._key)

    @property
    def supervisor_pid(self) -> int:
        """Process id of the supervisor; the server is its child."""
        assert self._process is not None, "an EngineServer is used inside its `with` block"
        return self._process.pid

    @property
    def is_up(self) -> bool:
        """False from the moment that its end was noticed until it is ready again."""
        return self._up.is_set()

    def __enter__(self) -> EngineServer:
        if self._port == 0:
            self._port = _free_port()
        self._process = self._start()
        try:
            self._wait_until_up()
        except BaseException:
            self._stop()
            raise
        self._up.set()
        self._watcher.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stopping.set()
        self._up.clear()
        # Before the watcher has ended: it may be in `make_ready`, which waits for a reply of the server.
        self._stop()
        self._watcher.join()
        self._stop()

    def condemn(self, why: str) -> None:
        """Has the server ended and started again, for a reason such as `took no weights for 300 s`."""
        self._condemned = why

    @contextmanager
    def working(self) -> Iterator[None]:
        """While the block runs, the engine may be too busy to answer a probe; the server in front of it may not."""
        self._num_working += 1
        try:
            yield
        finally:
            self._num_working -= 1

    def _start(self) -> subprocess.Popen[bytes]:
        plan = self.plan
        environment = {name: value for name, value in os.environ.items() if not _NOT_INHERITED.fullmatch(name)}
        environment |= {**plan.environment, "VLLM_API_KEY": self._key, "VLLM_NO_USAGE_STATS": "1"}
        try:
            plan.log_file.parent.mkdir(parents=True, exist_ok=True)
            with plan.log_file.open("ab") as log:
                return subprocess.Popen(
                    [sys.executable, "-I", "-m", plan.supervisor, str(os.getpid()), str(plan.stop_s), *plan.command(self._port)],
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=log,
                    env=environment,
                    start_new_session=True,  # Ctrl-C goes to the run, which then ends the server in order
                )
        except OSError as error:
            raise plan.error(f"{plan.owner}: its server cannot be started: {error}") from error

    def _wait_until_up(self) -> None:
        plan = self.plan
        deadline = time.monotonic() + plan.start_timeout_s
        with httpx.Client(trust_env=False) as client:
            while time.monotonic() < deadline and not self._stopping.is_set():
                if self._has_ended:
                    raise plan.error(f"{plan.owner}: its server ended while it started; the end of {self.log_file}:\n{self._log_tail()}")
                if answers(client, self.endpoint, timeout_s=_POLL_S * 4) is None:
                    return
                self._stopping.wait(_POLL_S)
        if not self._stopping.is_set():
            raise plan.error(
                f"{plan.owner}: its server did not answer within {plan.start_timeout_s:g} s (serve.start_timeout_s); the end of "
                f"{self.log_file}:\n{self._log_tail()}"
            )

    @property
    def _has_ended(self) -> bool:
        process = self._process
        return process is None or process.poll() is not None

    def _watch(self) -> None:
        """Watches; whatever ends that early becomes the fault, or all would wait for a server that nobody starts again."""
        try:
            self._watch_until_stopped()
        except Exception as error:
            self._up.clear()
            self.fault = f"it cannot be watched any more: {type(error).__name__}: {error}; see {self.log_file}"

    def _watch_until_stopped(self) -> None:
        """Starts the server again whenever it has ended or hangs; runs until the server is stopped or may not be started any more."""
        deaths, next_probe = 0, time.monotonic() + _PROBE_EVERY_S
        with httpx.Client(trust_env=False) as client:
            while not self._stopping.wait(_POLL_S):
                why = "ended" if self._has_ended else self._condemned
                if why is None and time.monotonic() >= next_probe:
                    why = self._probed(client)
                    next_probe = time.monotonic() + _PROBE_EVERY_S
                if why is None or self._stopping.is_set():
                    continue
                deaths += 1
                if not self._started_again(why, deaths):
                    return

    def _probed(self, client: httpx.Client) -> str | None:
        """Returns why the server is lost; None where it answers, where nobody is to ask it, or where it answers that it is unwell: then
        its process ends by itself."""
        plan = self.plan
        if plan.probe_path is None:
            return None
        path = "/health" if self._num_working else plan.probe_path
        try:
            client.get(f"{self.endpoint.url}{path}", headers=self.endpoint.headers, timeout=plan.hung_after_s)
        except httpx.TimeoutException:
            # What began in between, such as the taking of weights, may be why.
            return None if self._num_working and path != "/health" else f"has not answered for {plan.hung_after_s:g} s"
        except httpx.TransportError:
            return None
        return None

    def _started_again(self, why: str, deaths: int) -> bool:
        """Returns whether the server may go on: False once it has been lost too often."""
        plan = self.plan
        self._up.clear()
        self._condemned = None
        if deaths > plan.max_restarts:
            self._stop()
            self.fault = (
                f"its server {why}, time {deaths} (serve.max_restarts = {plan.max_restarts}); the end of {self.log_file}:\n"
                f"{self._log_tail()}"
            )
            return False
        self._heed(f"its server {why} and is started again, time {deaths} of at most {plan.max_restarts}; see {self.log_file}")
        self._stop()
        try:
            self._process = self._start()
            self._wait_until_up()
            if self._make_ready is not None and not self._stopping.is_set():
                self._make_ready()
        except VlpostError as error:
            self._heed(str(error))
            self._stop()
        else:
            self._up.set()
        return True

    def _log_tail(self) -> str:
        with self.log_file.open("rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - _LOG_TAIL_BYTES))
            text = log.read().decode(errors="replace")
        return text.replace(self._key, "***").strip()

    def _stop(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None, "the supervisor's stdin is a pipe"
        # The end of its stdin is the supervisor's word to stop.
        process.stdin.close()
        try:
            process.wait(timeout=self.plan.stop_s + _GRACE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def vllm_command(arguments: Sequence[str], *, port: int) -> list[str]:
    """Returns the command line of vLLM's OpenAI-compatible server on loopback."""
    # -P: a folder called vllm in the working directory is not what is meant.
    server = [sys.executable, "-P", "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1", "--port", str(port)]
    return [*server, *arguments]


def argument_line(arguments: Mapping[str, str | int | float | bool]) -> list[str]:
    """Returns arguments by name as a server's command line has them: `{"tensor_parallel_size": 4}` is `--tensor-parallel-size=4`."""
    line = []
    for name, value in arguments.items():
        flag = name.strip("-").replace("_", "-")
        if isinstance(value, bool):
            line.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            line.append(f"--{flag}={value}")
    return line


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
