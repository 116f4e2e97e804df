"""Killable processes for a user's reward functions: one that hangs, dies, leaks or answers nonsense costs its own row only.

A process is `plugin_worker_main`, started by exec. What crosses the pipes is a frame: four bytes of length, a JSON object, and after
it the pixels as raw bytes, whose lengths the object lists under `blobs`. Nothing is pickled. The deadline is wall clock, kept
here, and starts when the process has the whole request; past it the process group is killed and the next request starts a new one.
"""

from __future__ import annotations

import json
import os
import queue
import select
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, TypeVar

from PIL import Image as PILImage

from ..model.records import Example, Group, ImagePart, MediaPart, Message, Part, Rollout, TextPart, ToolAnswer, ToolCall, Turn, VideoPart
from .jail import signal_name
from .plugin import Answered
from .result import RewardResult, Unavailable
from .worker import WorkerError

START_S = 120.0
"""Longest wait for a process to load its reward function, seconds."""
SEND_S = 60.0
"""Longest wait for a process to take a request in, seconds."""
MAX_FRAME_BYTES = 2**30
"""Longest JSON part of a request."""
MAX_REPLY_BYTES = 16 * 2**20
"""Longest reply."""
MEMORY_LOOK_S = 0.1
"""How often the memory of a busy process is looked at, seconds."""
DEFAULT_MEMORY_MIB = 4096
_LENGTH = struct.Struct(">I")
Answer = TypeVar("Answer")


@dataclass(frozen=True, kw_only=True, slots=True)
class PluginSource:
    """Which function a process loads: a file's very text, or an installed module whose file must have this hash."""

    use: str
    path: Path
    sha256: str
    source: bytes | None
    """Text of a file; None for a module, which is imported."""
    module: str
    """Dotted name of an installed module; empty for a file."""
    function: str
    options: Mapping[str, Any]
    """As the recipe gives them: plain JSON values."""
    completions: str


class ProcessFaultError(Exception):
    """The process hung, died, grew too large or answered nonsense, and has been ended."""


def encode_frame(message: Mapping[str, Any], blobs: Sequence[bytes] = ()) -> list[bytes]:
    """Returns the pieces of a frame; a `ValueError` or `TypeError` if the message is no JSON or too long."""
    text = json.dumps({**message, "blobs": [len(blob) for blob in blobs]}).encode()
    if len(text) > MAX_FRAME_BYTES:
        raise ValueError(f"{len(text)} bytes, at most {MAX_FRAME_BYTES} can be sent")
    return [_LENGTH.pack(len(text)) + text, *blobs]


def read_frame(
    read: Callable[[int], bytes], *, max_bytes: int = MAX_FRAME_BYTES, max_blob_bytes: int | None = None
) -> tuple[dict[str, Any], list[bytes]]:
    """Returns message and blobs; `read(n)` returns exactly n bytes. A `ValueError` if what was read is no frame."""
    (length,) = _LENGTH.unpack(read(_LENGTH.size))
    if length > max_bytes:
        raise ValueError(f"a frame of {length} bytes, at most {max_bytes}")
    message = json.loads(read(length))
    sizes = message.get("blobs") if isinstance(message, dict) else None
    if not isinstance(sizes, list) or not all(type(size) is int and size >= 0 for size in sizes):
        raise ValueError("a frame that holds no object with blobs")
    if max_blob_bytes is not None and sum(sizes) > max_blob_bytes:
        raise ValueError(f"blobs of {sum(sizes)} bytes, at most {max_blob_bytes}")
    return message, [read(size) for size in sizes]


def encode_groups(groups: Sequence[Group]) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[bytes]]:
    """Returns groups, media and blobs as plain values; each image or video stands once, whoever shows it."""
    media: dict[str, tuple[dict[str, Any], bytes]] = {}

    def keep(part: MediaPart) -> str:
        if part.digest not in media:
            media[part.digest] = _encode_media(part)
        return part.digest

    def encode_part(part: Part) -> dict[str, str]:
        return {"text": part.text} if isinstance(part, TextPart) else {"media": keep(part)}

    encoded = [
        {
            "example": {
                "id": group.example.id,
                "messages": [[message.role, [encode_part(part) for part in message.parts]] for message in group.example.messages],
                "answer": group.example.answer,
                "task": group.example.task,
                "source": group.example.source,
                "metadata": dict(group.example.metadata),
            },
            "rollouts": [
                {
                    "token_ids": rollout.token_ids,
                    "sampled": rollout.sampled,
                    "sampler_logprobs": rollout.sampler_logprobs,
                    "media": [keep(part) for part in rollout.media],
                    "text": rollout.text,
                    "prompt_suffix": rollout.prompt_suffix,
                    "finish_reason": rollout.finish_reason,
                    "policy_version": rollout.policy_version,
                    "turns": [asdict(turn) for turn in rollout.turns],
                    "ending": rollout.ending,
                }
                for rollout in group.rollouts
            ],
        }
        for group in groups
    ]
    return encoded, [described for described, _pixels in media.values()], [pixels for _described, pixels in media.values()]


def _encode_media(part: MediaPart) -> tuple[dict[str, Any], bytes]:
    if isinstance(part, ImagePart):
        return {"digest": part.digest, "size": part.image.size}, part.image.tobytes()
    described = {"digest": part.digest, "size": part.frames[0].size, "fps": part.fps, "frame_indices": part.frame_indices}
    return described, b"".join(frame.tobytes() for frame in part.frames)


def decode_groups(encoded: Sequence[Mapping[str, Any]], media: Sequence[Mapping[str, Any]], blobs: Sequence[bytes]) -> list[Group]:
    """Returns the groups that `encode_groups` was given."""
    parts = {described["digest"]: _decode_media(described, pixels) for described, pixels in zip(media, blobs, strict=True)}

    def decode_part(part: Mapping[str, str]) -> Part:
        return TextPart(text=part["text"]) if "text" in part else parts[part["media"]]

    return [
        Group(
            example=Example(
                **{
                    **group["example"],
                    "messages": tuple(
                        Message(role=role, parts=tuple(map(decode_part, content))) for role, content in group["example"]["messages"]
                    ),
                }
            ),
            rollouts=tuple(
                Rollout(
                    **{
                        **rollout,
                        "token_ids": tuple(rollout["token_ids"]),
                        "sampled": tuple(rollout["sampled"]),
                        "sampler_logprobs": tuple(rollout["sampler_logprobs"]),
                        "media": tuple(parts[digest] for digest in rollout["media"]),
                        "turns": tuple(map(_decode_turn, rollout["turns"])),
                    }
                )
                for rollout in group["rollouts"]
            ),
        )
        for group in encoded
    ]


def _decode_turn(turn: Mapping[str, Any]) -> Turn:
    calls = tuple(ToolCall(**call) for call in turn["calls"])
    return Turn(**{**turn, "calls": calls, "answers": tuple(ToolAnswer(**answer) for answer in turn["answers"])})


def _decode_media(described: Mapping[str, Any], pixels: bytes) -> MediaPart:
    size = tuple(described["size"])
    if "fps" not in described:
        return ImagePart(image=PILImage.frombytes("RGB", size, pixels), digest=described["digest"])
    step = size[0] * size[1] * 3
    frames = tuple(PILImage.frombytes("RGB", size, pixels[start : start + step]) for start in range(0, len(pixels), step))
    return VideoPart(frames=frames, fps=described["fps"], frame_indices=tuple(described["frame_indices"]), digest=described["digest"])


def encode_answers(answers: Iterable[Answered]) -> list[dict[str, Any] | None]:
    """Returns verdicts as plain JSON values; None stays None."""
    return [
        None
        if answer is None
        else {"reason": str(answer.reason)}
        if isinstance(answer, Unavailable)
        else {"value": float(answer.value), "note": str(answer.note), "metrics": {str(k): float(v) for k, v in answer.metrics.items()}}
        for answer in answers
    ]


def decode_answers(encoded: object, count: int) -> list[Answered]:
    """Returns the verdicts of a reply; a `ValueError` if it does not hold exactly so many."""
    if not isinstance(encoded, list) or len(encoded) != count:
        raise ValueError(f"no list of {count} verdicts")
    try:
        return [
            None
            if item is None
            else Unavailable(reason=str(item["reason"]))
            if "reason" in item
            else RewardResult(value=item["value"], note=str(item["note"]), metrics=dict(item["metrics"]))
            for item in encoded
        ]
    except (KeyError, TypeError) as error:
        raise ValueError(f"a verdict that is none ({error!r})") from error


class PluginProcess:
    """One process for one reward function; not safe for several threads at once."""

    def __init__(self, source: PluginSource, *, max_memory_mib: int) -> None:
        self._source = source
        self._max_memory_mib = max_memory_mib
        self._process: subprocess.Popen[bytes] | None = None
        self._num_asked = 0
        self._is_closed = False

    def start(self) -> None:
        """Starts the process and waits until it has loaded the function; a `WorkerError` if it does not."""
        if self._is_closed:
            raise WorkerError(f"{self._source.use}: the rewards are being closed")
        described = {
            "use": self._source.use,
            "path": str(self._source.path),
            "sha256": self._source.sha256,
            "module": self._source.module,
            "function": self._source.function,
            "options": dict(self._source.options),
            "completions": self._source.completions,
            "sys_path": [entry for entry in sys.path if entry] if self._source.module else sys.path,
        }
        with tempfile.TemporaryFile() as last_words:
            process = self._spawn(last_words)
            self._process = process
            for pipe in (process.stdin, process.stdout):
                assert pipe is not None, "both ends of a worker are pipes"
                os.set_blocking(pipe.fileno(), False)
            try:
                self._send(encode_frame(described, [self._source.source or b""]), deadline=time.monotonic() + START_S)
                reply = self._receive(deadline=time.monotonic() + START_S, limit_s=START_S)
                if reply.get("ready") is not True:
                    raise ProcessFaultError(str(reply.get("error")))
            except ProcessFaultError as error:
                self._kill()
                last_words.seek(0)
                words = last_words.read(4000).decode(errors="replace").strip()[-2000:]
                wrote = f"; it wrote:\n{words}" if words else ""
                raise WorkerError(f"the process of reward {self._source.use!r} did not start ({error}){wrote}") from error

    def _spawn(self, last_words: IO[bytes]) -> subprocess.Popen[bytes]:
        # -P: the working directory is no place to import from. The whole environment goes along: the code is the user's own.
        # One seed of string hashes, so that what a function makes of a set does not depend on which process judged.
        try:
            return subprocess.Popen(
                [sys.executable, "-P", "-m", f"{__package__}.plugin_worker_main"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=last_words,
                env={"PYTHONHASHSEED": "0", **os.environ},
                start_new_session=True,
            )
        except OSError as error:
            raise WorkerError(f"no process for reward {self._source.use!r} can be started ({error.strerror})") from error

    def ask(self, groups: Sequence[Group], *, timeout_s: float) -> tuple[list[Answered], float]:
        """Returns the function's verdicts, one a rollout, and the seconds of work.

        Raises `ProcessFaultError` when the process has been lost over this request, `WorkerError` when none can be started, `ValueError`
        when the function did not return one value a rollout or the rows cannot be sent.
        """
        try:
            encoded, media, blobs = encode_groups(groups)
            self._num_asked += 1
            number = self._num_asked
            frame = encode_frame({"id": number, "groups": encoded, "media": media}, blobs)
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"the row cannot be sent to the reward's process ({error}); metadata holds plain JSON values") from error
        if self._process is None or self._process.poll() is not None:
            # Also one that died while it was idle, in a thread that the function had left behind.
            self._kill()
            self.start()
        started = time.monotonic()
        try:
            self._send(frame, deadline=started + SEND_S)
            started = time.monotonic()
            reply = self._receive(deadline=started + timeout_s, limit_s=timeout_s)
            seconds = time.monotonic() - started
            if reply.get("id") != number:
                raise ProcessFaultError("its reply is garbage: it answers another request")
            if "error" in reply:
                raise ValueError(str(reply["error"]))
            answers = _decoded(reply, sum(len(group.rollouts) for group in groups))
        except ProcessFaultError:
            self._kill()
            raise
        if self._memory_mib() > self._max_memory_mib:
            # It has answered in time; what it holds on to is the next row's trouble, so a fresh process gets that.
            self._kill()
        return answers, seconds

    def interrupt(self) -> None:
        """Ends the process under whoever waits for it, and starts no other; may be called from another thread."""
        self._is_closed = True
        process = self._process
        if process is not None:
            _kill_group(process)

    def close(self) -> None:
        """Ends the process and what it started, as far as it is in its group."""
        self._kill()

    def _kill(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        _kill_group(process)
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()

    def _send(self, pieces: Sequence[bytes], *, deadline: float) -> None:
        assert self._process is not None, "a process is started before it is written to"
        assert self._process.stdin is not None, "and its input is a pipe"
        descriptor = self._process.stdin.fileno()
        for piece in pieces:
            rest = memoryview(piece)
            while rest:
                if not _is_ready(descriptor, select.POLLOUT, deadline - time.monotonic()):
                    raise ProcessFaultError("it did not take the request in")
                try:
                    rest = rest[os.write(descriptor, rest) :]
                except BlockingIOError:
                    continue
                except OSError as error:
                    raise ProcessFaultError(f"the process died{self._exit_words()}") from error

    def _receive(self, *, deadline: float, limit_s: float) -> dict[str, Any]:
        def read(count: int) -> bytes:
            return self._read(count, deadline=deadline, limit_s=limit_s)

        try:
            message, _blobs = read_frame(read, max_bytes=MAX_REPLY_BYTES, max_blob_bytes=0)
        except (ValueError, RecursionError) as error:
            raise ProcessFaultError(f"its reply is garbage: {str(error)[:200]}") from error
        return message

    def _read(self, count: int, *, deadline: float, limit_s: float) -> bytes:
        assert self._process is not None, "a process is started before it is read from"
        assert self._process.stdout is not None, "and its output is a pipe"
        descriptor = self._process.stdout.fileno()
        received = bytearray()
        while len(received) < count:
            if not _is_ready(descriptor, select.POLLIN, min(MEMORY_LOOK_S, deadline - time.monotonic())):
                if time.monotonic() >= deadline:
                    raise ProcessFaultError(f"no verdict in {limit_s:g} s")
                if (memory := self._memory_mib()) > self._max_memory_mib:
                    raise ProcessFaultError(f"its memory grew to {memory} MiB, at most {self._max_memory_mib} are allowed (max_memory_mib)")
                continue
            try:
                piece = os.read(descriptor, min(count - len(received), 2**16))
            except BlockingIOError:
                continue
            if not piece:
                raise ProcessFaultError(f"the process died{self._exit_words()}")
            received += piece
        return bytes(received)

    def _exit_words(self) -> str:
        """Returns how the process ended, to be added to a sentence."""
        assert self._process is not None
        try:
            status = self._process.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            return " or closed its pipe"
        return f" by {signal_name(-status)}" if status < 0 else f" with exit status {status}"

    def _memory_mib(self) -> int:
        """Returns the resident memory; 0 where the system does not tell."""
        assert self._process is not None
        try:
            pages = int(Path(f"/proc/{self._process.pid}/statm").read_text(encoding="ascii").split()[1])
        except (OSError, IndexError, ValueError):
            return 0
        return pages * os.sysconf("SC_PAGE_SIZE") // 2**20


def _decoded(reply: Mapping[str, Any], count: int) -> list[Answered]:
    try:
        return decode_answers(reply.get("answers"), count)
    except ValueError as error:
        raise ProcessFaultError(f"its reply is garbage: {error}") from error


def _is_ready(descriptor: int, event: int, wait_s: float) -> bool:
    poller = select.poll()
    poller.register(descriptor, event)
    return bool(poller.poll(max(0.0, wait_s) * 1000.0))


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    # The process leads a session of its own and is not reaped before `wait`, so the number cannot be a stranger's.
    if process.returncode is None:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            process.kill()


class PluginPool:
    """Processes of one reward function, each driven by its own thread; a context manager that leaves no process behind."""

    def __init__(self, source: PluginSource, *, num_workers: int, max_memory_mib: int) -> None:
        self._processes = [PluginProcess(source, max_memory_mib=max_memory_mib) for _ in range(num_workers)]
        self._idle: queue.SimpleQueue[PluginProcess] = queue.SimpleQueue()
        self._threads = ThreadPoolExecutor(max_workers=num_workers, thread_name_prefix="reward-plugin")

    def __enter__(self) -> PluginPool:
        try:
            for started in [self._threads.submit(process.start) for process in self._processes]:
                started.result()
        except BaseException:
            self._close()
            raise
        for process in self._processes:
            self._idle.put(process)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._close()

    def _close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        for process in self._processes:
            process.interrupt()
        self._threads.shutdown(wait=True)
        for process in self._processes:
            process.close()

    def map(self, work: Callable[[PluginProcess, Any], Answer], items: Sequence[Any]) -> list[Answer]:
        """Returns `work(process, item)` for each item, in order, as many at once as there are processes."""

        def with_process(item: Any) -> Answer:  # noqa: ANN401
            process = self._idle.get()
            try:
                return work(process, item)
            finally:
                self._idle.put(process)

        return list(self._threads.map(with_process, items))
