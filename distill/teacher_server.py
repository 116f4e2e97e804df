"""A teacher's vLLM server that the run starts itself: on loopback, behind a random key, started again when it dies, gone with the run."""

from __future__ import annotations

import json
import os
import re
import secrets
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import httpx

from ..rewards import judge_server_main as supervisor
from ..rewards.judge_server import STOP_S
from .config import ServerConfig
from .teacher import TeacherError

SERVED_NAME = "teacher"
_POLL_S = 0.5
_LOG_TAIL_BYTES = 3000
# Of a launcher of the trainer's own ranks: the server would take itself for one of them. The engine switches of an in-process
# sampler are not the server's either.
_NOT_INHERITED = re.compile(
    r"(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE|ROLE_NAME)|MASTER_(ADDR|PORT)|TORCHELASTIC_.*|VLLM_ENABLE_V1_MULTIPROCESSING|VLLM_API_KEY"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Endpoint:
    """Where a teacher answers: `Endpoint(url="http://127.0.0.1:8123", model="teacher", api_key="...")`."""

    url: str
    """Without /v1 and without a slash at its end."""
    model: str
    """The name that the server gives to its model."""
    api_key: str | None = field(repr=False)

    @property
    def headers(self) -> dict[str, str]:
        """What every request says."""
        return {} if self.api_key is None else {"Authorization": f"Bearer {self.api_key}"}


@dataclass(frozen=True, kw_only=True, slots=True)
class ServedModel:
    """What a server is started with beside its settings."""

    source: str
    """Folder or hub name."""
    dtype: str
    """float32 or bfloat16."""
    max_model_len: int
    max_images_per_prompt: int
    max_logprobs: int
    """Most ids that a request asks for at a position."""


def serve_command(config: ServerConfig, model: ServedModel, *, port: int) -> list[str]:
    """Returns the command line of vLLM's server; the key is not on it, where every user could read it."""
    limits = json.dumps({"image": model.max_images_per_prompt, "video": 0})
    # -P: a folder called vllm in the working directory is not what is meant.
    command = [sys.executable, "-P", "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--model", model.source, "--served-model-name", SERVED_NAME, "--dtype", model.dtype]
    command += ["--max-model-len", str(model.max_model_len), "--limit-mm-per-prompt", limits]
    command += ["--max-logprobs", str(model.max_logprobs), "--logprobs-mode", "raw_logprobs", "--generation-config", "vllm"]
    # The end point that takes token ids with images. Requests for prompt log-probs do not read the prefix cache.
    command += ["--enable-scale-out", "--no-enable-prefix-caching", "--load-format", "safetensors"]
    command += ["--gpu-memory-utilization", str(config.gpu_memory_utilization)]
    for name, value in config.arguments.items():
        flag = name.strip("-").replace("_", "-")
        if isinstance(value, bool):
            command.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            command.append(f"--{flag}={value}")
    return command


class TeacherServer:
    """A server as a child process; entering starts it and waits until it answers, leaving stops it and all that it started.

    The supervisor of the judge server (`rewards.judge_server_main`) stands between: it ends the server when the run is gone, however that
    went. A thread of the run watches the supervisor: when it ends by itself, the server is started again at the same address with the
    same key, at most `max_restarts` times.
    """

    def __init__(self, config: ServerConfig, model: ServedModel, *, name: str, log_file: Path, heed: Callable[[str], None]) -> None:
        """`name` is what messages call the teacher; `heed` is told, on the watching thread, of every death and every start."""
        self._config = config
        self._model = model
        self._name = name
        self._heed = heed
        self._process: subprocess.Popen[bytes] | None = None
        self._stopping = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name=f"teacher-{name}", daemon=True)
        self._port = config.port
        self._key = secrets.token_urlsafe(32)
        self.log_file = log_file
        """Where the server's output goes"""
        self.fault: str | None = None
        """Why it is not started again; None as long as it is"""

    @property
    def endpoint(self) -> Endpoint:
        """Where it answers; the same after a restart."""
        return Endpoint(url=f"http://127.0.0.1:{self._port}", model=SERVED_NAME, api_key=self._key)

    @property
    def supervisor_pid(self) -> int:
        """Process id of the supervisor; the server is its child."""
        assert self._process is not None, "a TeacherServer is used inside its `with` block"
        return self._process.pid

    def __enter__(self) -> TeacherServer:
        if self._port == 0:
            self._port = _free_port()
        self._process = self._start()
        try:
            self._wait_until_up()
        except BaseException:
            self._stop()
            raise
        self._watcher.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stopping.set()
        self._watcher.join()
        self._stop()

    def _start(self) -> subprocess.Popen[bytes]:
        environment = {name: value for name, value in os.environ.items() if not _NOT_INHERITED.fullmatch(name)}
        environment |= {"VLLM_API_KEY": self._key, "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": str(self._config.kv_cache_gib)}
        if self._config.devices is not None:
            environment["CUDA_VISIBLE_DEVICES"] = self._config.devices
        command = serve_command(self._config, self._model, port=self._port)
        try:
            self.log_file.parent.mkdir(parents=True, exist_ok=True)
            with self.log_file.open("ab") as log:
                return subprocess.Popen(
                    [sys.executable, "-I", "-m", supervisor.__name__, str(os.getpid()), str(STOP_S), *command],
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=log,
                    env=environment,
                    start_new_session=True,  # Ctrl-C goes to the run, which then ends the server in order
                )
        except OSError as error:
            raise TeacherError(f"teacher {self._name}: its server cannot be started: {error}") from error

    def _wait_until_up(self) -> None:
        deadline = time.monotonic() + self._config.start_timeout_s
        with httpx.Client(trust_env=False) as client:
            while time.monotonic() < deadline and not self._stopping.is_set():
                assert self._process is not None, "it was started"
                if self._process.poll() is not None:
                    raise TeacherError(
                        f"teacher {self._name}: its server ended while it started; the end of {self.log_file}:\n{self._log_tail()}"
                    )
                if answers(client, self.endpoint, timeout_s=_POLL_S * 4) is None:
                    return
                self._stopping.wait(_POLL_S)
        if not self._stopping.is_set():
            raise TeacherError(
                f"teacher {self._name}: its server did not answer within {self._config.start_timeout_s:g} s (serve.start_timeout_s); the "
                f"end of {self.log_file}:\n{self._log_tail()}"
            )

    def _watch(self) -> None:
        """Starts the server again whenever it has ended by itself; runs until the server is stopped or may not be started any more."""
        deaths = 0
        while not self._stopping.wait(_POLL_S):
            if self._process is not None and self._process.poll() is None:
                continue
            deaths += 1
            most = self._config.max_restarts
            if deaths > most:
                self.fault = (
                    f"its server ended {deaths} times (serve.max_restarts = {most}); the end of {self.log_file}:\n{self._log_tail()}"
                )
                return
            self._heed(f"its server ended and is started again, time {deaths} of at most {most}; see {self.log_file}")
            self._stop()
            try:
                self._process = self._start()
                self._wait_until_up()
            except TeacherError as error:
                self._heed(str(error))
                self._stop()

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
            process.wait(timeout=STOP_S + 15.0)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def answers(client: httpx.Client, endpoint: Endpoint, *, timeout_s: float) -> str | None:
    """Returns None where the server is well and has the model, else what it says instead."""
    try:
        # /health asks the engine, which may be dead behind a server that still answers; it needs no key, so a stranger on the port
        # would pass: hence /v1/models.
        for path in ("/health", "/v1/models"):
            reply = client.get(f"{endpoint.url}{path}", headers=endpoint.headers, timeout=timeout_s)
            if reply.status_code != 200:
                return f"{path}: status {reply.status_code} {reply.reason_phrase}"
        names = [str(model["id"]) for model in reply.json()["data"]]
    except httpx.TransportError as error:
        return f"{type(error).__name__}: {error}"
    except (ValueError, KeyError, TypeError):
        return "/v1/models: no list of models"
    return None if endpoint.model in names else f"it has {', '.join(names)}, not {endpoint.model}"


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
