"""Programs run by a SandboxFusion-compatible HTTP service: `POST URL/run_code`, one program a request.

The service is believed about what a program printed and how it ended, and about nothing else: it gets no expected output. Whatever
goes wrong between here and there (no connection, no answer in time, a status that is not 200, a cut or foreign document) is an internal
error of the sandbox, never a wrong program. Request and reply: bytedance/SandboxFusion `sandbox/server/sandbox_api.py`.
"""

from __future__ import annotations

import ipaddress
import json
import time
from typing import TYPE_CHECKING, Any, NoReturn
from urllib.parse import urlsplit

from .config import RewardConfigError

if TYPE_CHECKING:
    import httpx

    from .execution import Execution, Limits, Status

MAX_ESCAPED_BYTES = 6
"""Bytes that one byte of output may take in JSON."""
MAX_ENVELOPE_BYTES = 65_536
"""Of a reply, beside the two outputs."""
_REASON_CHARS = 200
# What is compressed could unpack to any size.
_HEADERS = {"Content-Type": "application/json", "Accept-Encoding": "identity"}


class RemoteSandbox:
    """A client of one service; a context manager, safe for several threads.

    Plain `http` is refused for hosts other than this machine's own, since programs and outputs would travel unprotected:
    `allow_plain_http` takes that on. Call and assert problems need an open channel to the program, which the service has not.
    """

    backend = "remote"
    is_unsafe = False

    def __init__(self, url: str, *, allow_plain_http: bool = False, grace_s: float = 10.0) -> None:
        """`grace_s`: seconds that the service may take beyond the program's own time limit, its queue included."""
        self._url = _checked(url, allow_plain_http=allow_plain_http)
        self._grace_s = grace_s
        self._client: httpx.Client | None = None

    def __enter__(self) -> RemoteSandbox:
        import httpx

        # trust_env off: a proxy of the environment would see every program.
        self._client = httpx.Client(trust_env=False, follow_redirects=False)
        return self

    def __exit__(self, *_: object) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None

    def describe(self) -> str:
        """Returns one line for logs."""
        return f"remote service {self._url}; isolation is the service's own"

    def run(self, program: str, *, stdin: bytes, limits: Limits) -> Execution:
        """Returns how the program ended on the service; `internal_error` when the service did not say.

        The service sets its own limit of processes. stdin that is not UTF-8 cannot be sent: `internal_error`.
        """
        try:
            text = stdin.decode("utf-8")
        except UnicodeDecodeError:
            return _internal_error("stdin that is not UTF-8 cannot be sent to the service", seconds=0.0)
        request = {
            "code": program,
            "language": "python",
            "stdin": text,
            "run_timeout": limits.wall_s,
            "memory_limit_MB": max(1, limits.memory_bytes // 2**20),
            "files": {},
            "fetch_files": [],
        }
        started = time.monotonic()
        reply = self._post(request, deadline=started + limits.wall_s + self._grace_s, max_bytes=_max_reply_bytes(limits))
        seconds = time.monotonic() - started
        if isinstance(reply, _Trouble):
            if reply.is_flood:
                return _execution("output_limit", seconds=seconds, reason=str(reply))
            return _internal_error(str(reply), seconds=seconds)
        return _read_reply(reply, limits=limits, seconds=seconds)

    def open_session(self, program: str, *, limits: Limits) -> NoReturn:
        """Refuses: the service takes one program and gives one reply, so that tests and program would share a process."""
        raise RewardConfigError(
            "remote sandbox: problems of calls or asserts need a channel to the running program, which the service has not; "
            "use a backend on this machine for them, or problems of stdin and stdout"
        )

    def _post(self, request: dict[str, Any], *, deadline: float, max_bytes: int) -> bytes | _Trouble:
        import httpx

        assert self._client is not None, "a RemoteSandbox is used inside its `with` block"
        body = json.dumps(request).encode("ascii")
        timeout_s = max(0.001, deadline - time.monotonic())
        try:
            with self._client.stream(
                "POST",
                f"{self._url}/run_code",
                content=body,
                headers=_HEADERS,
                timeout=timeout_s,
            ) as response:
                if response.status_code != 200:
                    return _Trouble(f"status {response.status_code}")
                received = bytearray()
                for piece in response.iter_raw():
                    received += piece
                    if len(received) > max_bytes:
                        return _Trouble(f"a reply of more than {max_bytes} bytes", is_flood=True)
                    if time.monotonic() > deadline:
                        return _Trouble("the reply did not end in time")
                return bytes(received)
        except httpx.HTTPError as error:
            return _Trouble(f"{type(error).__name__}: {str(error)[:_REASON_CHARS]}")


class _Trouble:
    """Why there is no reply to read."""

    def __init__(self, reason: str, *, is_flood: bool = False) -> None:
        self._reason = reason
        self.is_flood = is_flood

    def __str__(self) -> str:
        return self._reason


def _checked(url: str, *, allow_plain_http: bool) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise RewardConfigError(f"remote sandbox url = {url!r}: must be http://HOST:PORT or https://HOST, without query")
    if parts.username or parts.password:
        raise RewardConfigError("remote sandbox url: must not hold a password, which would stand in logs; put a proxy before the service")
    if parts.scheme == "http" and not allow_plain_http and not _is_this_machine(parts.hostname):
        raise RewardConfigError(
            f"remote sandbox url = {url!r}: plain http to another machine can be read and forged on the way; use https, "
            "or set allow_plain_http for a network that is yours"
        )
    return url.rstrip("/")


def _is_this_machine(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _max_reply_bytes(limits: Limits) -> int:
    return 2 * MAX_ESCAPED_BYTES * limits.output_bytes + MAX_ENVELOPE_BYTES


def _read_reply(reply: bytes, *, limits: Limits, seconds: float) -> Execution:
    try:
        document = json.loads(reply.decode("utf-8"))
        service_status, run = document["status"], document["run_result"]
        message = str(document.get("message") or "")[:_REASON_CHARS]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return _internal_error("a reply that is not a SandboxFusion document", seconds=seconds)
    if service_status not in ("Success", "Failed") or not isinstance(run, dict):
        return _internal_error(f"the service failed: {str(service_status)[:40]} {message}", seconds=seconds)
    stdout, stderr = _bytes(run.get("stdout")), _bytes(run.get("stderr"))
    exit_code = run.get("return_code")
    if stdout is None or stderr is None or not (exit_code is None or type(exit_code) is int):
        return _internal_error("a run result with fields of other types", seconds=seconds)
    took = run.get("execution_time")
    if isinstance(took, (int, float)) and 0 <= took < 1e6:
        seconds = float(took)
    if run.get("status") == "TimeLimitExceeded":
        return _execution("time_limit", seconds=seconds, reason=f"more than {limits.wall_s:g} s", stdout=stdout, stderr=stderr)
    if run.get("status") != "Finished" or exit_code is None:
        return _internal_error(f"the service could not run the program: {str(run.get('status'))[:40]} {message}", seconds=seconds)
    if len(stdout) + len(stderr) > limits.output_bytes:
        return _execution("output_limit", seconds=seconds, reason=f"more than {limits.output_bytes} bytes of output")
    ended = stderr.rstrip().rpartition(b"\n")[2]
    status: Status = "finished" if exit_code == 0 else "memory_limit" if ended.startswith(b"MemoryError") else "runtime_error"
    return _execution(status, seconds=seconds, reason="", stdout=stdout, stderr=stderr, exit_code=exit_code)


def _bytes(output: object) -> bytes | None:
    """Returns an output as bytes; a service that leaves an empty one out is taken at its word."""
    if output is None:
        return b""
    # A lone surrogate stands for a byte that the service could not read.
    return output.encode("utf-8", errors="surrogatepass") if isinstance(output, str) else None


def _execution(
    status: Status, *, seconds: float, reason: str, stdout: bytes = b"", stderr: bytes = b"", exit_code: int | None = None
) -> Execution:
    # The sandbox imports this module for its `remote` backend.
    from .sandbox import Execution

    return Execution(status=status, stdout=stdout, stderr=stderr, exit_code=exit_code, seconds=seconds, reason=reason)


def _internal_error(reason: str, *, seconds: float) -> Execution:
    return _execution("internal_error", seconds=seconds, reason=f"remote sandbox: {reason}")
