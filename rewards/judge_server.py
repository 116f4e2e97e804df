"""The judge server that a run starts for itself: on loopback, behind a random token, gone when the run is gone."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, TypeAlias

from ..model.records import VlpostError
from .judge_config import JudgeConfig, ServeConfig

STOP_S = 30.0
"""Longest wait for the server to end before it is killed, seconds; the supervisor keeps this too."""
MODEL_NAME = "judge"
_POLL_S = 0.5
_LOG_TAIL_BYTES = 4000
# Of a launcher of the trainer's own ranks: the server would take itself for one of them. The engine switches of an in-process
# sampler are not the server's either.
_NOT_INHERITED = re.compile(
    r"(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE|ROLE_NAME)|MASTER_(ADDR|PORT)|TORCHELASTIC_.*|VLLM_ENABLE_V1_MULTIPROCESSING"
)

Command: TypeAlias = Callable[..., Sequence[str]]
"""`command(config, model=..., port=...)` returns the program and its arguments."""


class JudgeServerError(VlpostError):
    """The judge server did not start; the message holds the end of its log."""


def serve_command(config: ServeConfig, *, model: str, port: int) -> list[str]:
    """Returns the command line of vLLM's OpenAI-compatible server; the token is not on it, where every user could read it."""
    # -P: a folder called vllm in the working directory is not what is meant.
    command = [sys.executable, "-P", "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--model", model, "--served-model-name", MODEL_NAME, "--gpu-memory-utilization", str(config.gpu_memory_utilization)]
    # A judge that may write white space without end sometimes does, and its verdict is cut off.
    command += ["--structured-outputs-config", '{"backend": "xgrammar", "disable_any_whitespace": true}']
    if config.revision is not None:
        command += ["--revision", config.revision]
    for name, value in config.arguments.items():
        flag = name.strip("-").replace("_", "-")
        if isinstance(value, bool):
            command.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            command += [f"--{flag}={value}"]
    return command


def model_source(config: ServeConfig, *, recipe_folder: Path | None) -> str:
    """Returns the hub id, or the absolute path of the folder."""
    if not config.model.startswith(("/", "./", "../")):
        return config.model
    folder = ((recipe_folder or Path()) / config.model).resolve()
    if not (folder / "config.json").is_file():
        raise JudgeServerError(f"rewards.judge.serve.model: {folder} is no model folder (no config.json); its path starts at the recipe")
    return str(folder)


def model_state(config: JudgeConfig, *, recipe_folder: Path | None) -> str:
    """Returns what tells one state of the judge's weights from another, as far as it can be known; part of the cache's key.

    Of a served folder: names, sizes and times of its files, so that a folder written anew counts as another model. Of a hub id or a
    model behind a url: the revision that the recipe states.
    """
    if config.serve is None:
        return f"{config.url} {config.revision}"
    source = model_source(config.serve, recipe_folder=recipe_folder)
    if source == config.serve.model and not Path(source).is_absolute():
        return f"{source} {config.serve.revision} {sorted(config.serve.arguments.items())}"
    files = sorted((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in Path(source).iterdir() if path.is_file())
    return f"{source} {files} {sorted(config.serve.arguments.items())}"


class JudgeServer:
    """A server as a child process; entering starts it and waits until it answers, leaving stops it and all it started.

    A supervisor (`judge_server_main`) stands between: it ends the server when the trainer is gone, however that went.
    """

    def __init__(self, config: ServeConfig, *, command: Command, recipe_folder: Path | None) -> None:
        self._config = config
        self._command = command
        self._model = model_source(config, recipe_folder=recipe_folder)
        self._process: subprocess.Popen[bytes] | None = None
        self._own_folder: Path | None = None
        if config.log_file is not None:
            self.log_file = (recipe_folder or Path()) / config.log_file
            """Where the server's output goes"""
        else:
            self._own_folder = Path(tempfile.mkdtemp(prefix="vlpost-judge-"))
            self.log_file = self._own_folder / "server.log"
        self.model_name = MODEL_NAME
        self.token = secrets.token_urlsafe(32)
        self.port = config.port

    @property
    def url(self) -> str:
        """Base address up to /v1."""
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def supervisor_pid(self) -> int:
        """Process id of the supervisor; the server is its child."""
        assert self._process is not None, "a JudgeServer is used inside its `with` block"
        return self._process.pid

    def __enter__(self) -> JudgeServer:
        if self.port == 0:
            self.port = _free_port()
        try:
            self.log_file.parent.mkdir(parents=True, exist_ok=True)
            with self.log_file.open("ab") as log:
                self._process = self._start(log)
        except OSError as error:
            raise JudgeServerError(f"the judge server cannot be started: {error}") from error
        try:
            self._wait_until_up()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop()
        if self._own_folder is not None and error is None:
            shutil.rmtree(self._own_folder, ignore_errors=True)

    def _start(self, log: IO[bytes]) -> subprocess.Popen[bytes]:
        environment = {name: value for name, value in os.environ.items() if not _NOT_INHERITED.fullmatch(name)}
        environment |= {"VLLM_API_KEY": self.token, "VLLM_NO_USAGE_STATS": "1"}
        if self._config.devices is not None:
            environment["CUDA_VISIBLE_DEVICES"] = self._config.devices
        command = self._command(self._config, model=self._model, port=self.port)
        return subprocess.Popen(
            [sys.executable, "-I", "-m", f"{__package__}.judge_server_main", str(os.getpid()), str(STOP_S), *command],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            env=environment,
            start_new_session=True,  # Ctrl-C goes to the trainer, which then ends the server in order
        )

    def _wait_until_up(self) -> None:
        import httpx

        deadline = time.monotonic() + self._config.start_timeout_s
        headers = {"Authorization": f"Bearer {self.token}"}
        with httpx.Client(headers=headers, trust_env=False, timeout=_POLL_S * 4) as client:
            while time.monotonic() < deadline:
                assert self._process is not None, "it was started"
                if self._process.poll() is not None:
                    raise JudgeServerError(f"the judge server ended while it started; the end of {self.log_file}:\n{self._log_tail()}")
                try:
                    # Not /health, which needs no token: a stranger on the port would pass.
                    reply = client.get(f"{self.url}/models")
                    if reply.status_code == 200 and any(model["id"] == MODEL_NAME for model in reply.json()["data"]):
                        return
                except (httpx.TransportError, ValueError, KeyError, TypeError):
                    pass
                time.sleep(_POLL_S)
        raise JudgeServerError(
            f"the judge server did not answer within {self._config.start_timeout_s:g} s (rewards.judge.serve.start_timeout_s); "
            f"the end of {self.log_file}:\n{self._log_tail()}"
        )

    def _log_tail(self) -> str:
        with self.log_file.open("rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - _LOG_TAIL_BYTES))
            text = log.read().decode(errors="replace")
        return text.replace(self.token, "***").strip()

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


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
