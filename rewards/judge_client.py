"""Asking a judge model over HTTP so that no failure of the server ever looks like a verdict.

A request that fails is tried again with full jitter, within one deadline a verdict. When failures come in a row, or the server says
Retry-After, the whole step pauses: nobody asks, clocks of verdicts stand still, one small probe at a time looks whether the server is
back, and then everything goes on where it was. Only when a verdict has waited `max_outage_s` is it `Unavailable`.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ..model.records import VlpostError
from .config import RewardConfigError
from .judge_config import JudgeConfig, is_loopback
from .judge_gate import Clock, Gate, JudgeUsage, OutageError
from .judge_server import JudgeServer, serve_command
from .result import Unavailable

if TYPE_CHECKING:
    import httpx

MAX_REPLY_BYTES = 2**20
"""A longer reply is given up while it is read."""
_RETRIED = frozenset((408, 409, 425, 429))
_EXCERPT_CHARS = 200


class JudgeError(VlpostError):
    """The judge cannot be used any longer in this run; the message says why and what to do."""


class JudgeBudgetError(JudgeError):
    """A cap on the judge's calls or tokens was reached; the message names the cap."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """One question to the judge."""

    messages: Callable[[int], Sequence[Mapping[str, Any]]]
    """Chat messages of the n-th attempt (0 or 1)."""
    schema: Mapping[str, Any]
    """JSON schema that the server holds the verdict to."""
    read: Callable[[object], dict[str, Any]]
    """Returns the verdict in a reply's text; a `ValueError` when there is none."""
    keep: Callable[[Mapping[str, Any]], None] | None = None
    """Called with the verdict as soon as it is there, on the client's thread."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reply:
    """A verdict and what it took."""

    verdict: dict[str, Any] | Unavailable
    seconds: float
    """Of work; pauses and waiting for a free place left out."""
    tokens: int


class _TransientError(Exception):
    """This request failed; the same one may succeed later."""


class _BusyError(Exception):
    """The server asks for time: 429."""


class _RefusedError(Exception):
    """The server will never answer this request."""


class JudgeClient:
    """A client of one server for all judges of a process; a context manager. `ask` may be called from any thread.

    Example: `with JudgeClient(config, url=config.base_url, model="m", api_key=None) as client: replies = client.ask(questions)`.
    """

    def __init__(self, config: JudgeConfig, *, url: str, model: str, api_key: str | None) -> None:
        self._config = config
        self._url = url
        self.model = model
        self._api_key = api_key
        self.usage = JudgeUsage()
        self._random = random.Random()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="judge", daemon=True)
        # Made on the loop, where they live.
        self._http: httpx.AsyncClient | None = None
        self._free = asyncio.Semaphore(config.max_concurrent)
        self._gate = Gate(config, probe=self._probe, usage=self.usage)

    def __enter__(self) -> JudgeClient:
        self._thread.start()
        self._run(self._open())
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._run(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def ask(self, questions: Sequence[Question]) -> list[Reply]:
        """Returns a reply to each question, in order; a `JudgeBudgetError` when a cap is reached."""
        return self._run(self._ask_all(questions))

    def _run(self, work: Any) -> Any:  # noqa: ANN401
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            # Ctrl-C, say: what is in flight must not go on behind the caller's back.
            future.cancel()
            raise

    async def _open(self) -> None:
        import httpx

        headers = {"Accept-Encoding": "identity", "User-Agent": "vlpost"}
        if self._api_key is not None:
            headers["Authorization"] = f"Bearer {self._api_key}"
        self._http = httpx.AsyncClient(
            headers=headers,
            follow_redirects=False,  # a redirect would take the key along
            trust_env=not is_loopback(self._url),  # a proxy has no business between two processes of one machine
            timeout=None,  # one deadline for all, kept here: those of httpx start anew with each byte
            limits=httpx.Limits(max_connections=self._config.max_concurrent + 1, max_keepalive_connections=self._config.max_concurrent),
        )

    async def _close(self) -> None:
        self._gate.close()
        if self._http is not None:
            await self._http.aclose()

    async def _ask_all(self, questions: Sequence[Question]) -> list[Reply]:
        # When a cap is reached, nobody sends any more, and what has been sent (and paid for) is still waited for.
        replies = await asyncio.gather(*map(self._ask, questions), return_exceptions=True)
        failed = [reply for reply in replies if isinstance(reply, BaseException)]
        if failed:
            raise failed[0]
        return [reply for reply in replies if isinstance(reply, Reply)]

    async def _ask(self, question: Question) -> Reply:
        clock = Clock()
        reason = ""
        for attempt in range(2):
            body = self._body(question.messages(attempt), max_tokens=self._config.max_tokens)
            body["response_format"] = {"type": "json_schema", "json_schema": {"name": "verdict", "schema": question.schema, "strict": True}}
            content = await self._complete(json.dumps(body, ensure_ascii=True).encode(), clock)
            if isinstance(content, Unavailable):
                return Reply(verdict=content, seconds=clock.worked_s, tokens=clock.tokens)
            try:
                verdict = question.read(content)
            except ValueError as error:
                reason = str(error)
                continue
            if question.keep is not None:
                question.keep(verdict)
            return Reply(verdict=verdict, seconds=clock.worked_s, tokens=clock.tokens)
        return Reply(verdict=Unavailable(reason=f"judge: no verdict in two tries: {reason}"), seconds=clock.worked_s, tokens=clock.tokens)

    def _body(self, messages: Sequence[Mapping[str, Any]], *, max_tokens: int) -> dict[str, Any]:
        return {
            **self._config.extra_body,
            "model": self.model,
            "messages": list(messages),
            "temperature": self._config.temperature,
            "max_tokens": max_tokens,
            "seed": self._config.seed,
        }

    async def _complete(self, body: bytes, clock: Clock) -> object:
        """Returns the text of a completion (whatever JSON value stands there), or `Unavailable`."""
        is_suspect = False
        try:
            while True:
                try:
                    return await self._round(body, clock)
                except _TransientError as error:
                    reason = str(error)
                # A question that has used up its tries is no worse than its neighbours as long as none of them is answered: perhaps
                # the server is down. Where it was not, the question gets one more round and then has itself to blame.
                if self._gate.succeeded_at >= clock.failed_before:
                    return Unavailable(reason=f"judge: {reason}")
                self._gate.shut(reason)
                was_down = await self._gate.wait(clock)
                if is_suspect and not was_down:
                    return Unavailable(reason=f"judge: {reason}")
                is_suspect = not was_down
        except _RefusedError as error:
            return Unavailable(reason=f"judge: {error}")
        except OutageError as error:
            return Unavailable(reason=str(error))

    async def _round(self, body: bytes, clock: Clock) -> object:
        """Tries until the deadline or `retries` are used up; an outage gives both back."""
        clock.worked_in_round_s, failures = 0.0, 0
        clock.failed_at = clock.failed_before = time.monotonic()
        while True:
            if await self._gate.wait(clock):
                clock.worked_in_round_s, failures = 0.0, 0
            try:
                async with self._free:
                    if not self._gate.is_open:
                        continue
                    content = await self._send(body, clock)
            except _BusyError:
                # No failure: the server lives and says so. How long it may say so is bounded by `max_outage_s`.
                self.usage.retries += 1
                await self._gate.sleep(self._jitter(clock.busy_times), clock)
                clock.busy_times += 1
            except _TransientError as error:
                self._gate.failed(str(error))
                clock.failed_before, clock.failed_at = clock.failed_at, time.monotonic()
                pause_s = self._jitter(failures)
                if failures >= self._config.retries or clock.worked_in_round_s + pause_s >= self._config.deadline_s:
                    raise
                self.usage.retries += 1
                with clock.working():
                    await asyncio.sleep(pause_s)
                failures += 1
            else:
                self._gate.succeeded()
                return content

    def _jitter(self, failures: int) -> float:
        longest_s = min(self._config.max_backoff_s, self._config.backoff_s * 2.0 ** min(failures, 30))
        return self._random.uniform(0.0, longest_s)

    async def _send(self, body: bytes, clock: Clock) -> object:
        self._spend_call()
        limit_s = min(self._config.request_timeout_s, self._config.deadline_s - clock.worked_in_round_s)
        with clock.working():
            completion, received = await self._post(body, limit_s=limit_s)
        tokens = _counted_tokens(completion)
        tokens = len(body) + received if tokens is None else tokens
        clock.tokens += tokens
        self.usage.tokens += tokens
        try:
            choice = completion["choices"][0]
            return choice["message"]["content"]
        except (KeyError, IndexError, TypeError) as error:
            raise _TransientError("the reply is no chat completion") from error

    def _spend_call(self) -> None:
        for cap, limit, used in (
            ("max_calls", self._config.max_calls, self.usage.calls),
            ("max_run_tokens", self._config.max_run_tokens, self.usage.tokens),
        ):
            if limit is not None and used >= limit:
                raise JudgeBudgetError(
                    f"rewards.judge.{cap} = {limit} is reached ({self.usage.calls} calls, {self.usage.tokens} tokens in this run); "
                    "verdicts so far are in the cache if there is one: raise the cap and resume, or judge fewer rows"
                )
        self.usage.calls += 1

    async def _post(self, body: bytes, *, limit_s: float) -> tuple[Any, int]:
        """Returns the JSON of a reply and its length in bytes."""
        import httpx

        assert self._http is not None, "a JudgeClient is used inside its `with` block"
        headers = {"Content-Type": "application/json"}
        try:
            async with (
                asyncio.timeout(limit_s),
                self._http.stream("POST", f"{self._url}/chat/completions", content=body, headers=headers) as response,
            ):
                received = await _read(response)
        except TimeoutError as error:
            raise _TransientError(f"no whole reply in {limit_s:.3g} s") from error
        except (httpx.TransportError, httpx.DecodingError) as error:
            raise _TransientError(f"{type(error).__name__}: {self._shown(str(error))}") from error
        if response.status_code != 200:
            self._refuse_status(response, received)
        try:
            return json.loads(received), len(received)
        except (ValueError, RecursionError) as error:
            raise _TransientError("the reply is no JSON, or is cut off") from error

    def _refuse_status(self, response: httpx.Response, received: bytes) -> None:
        status = response.status_code
        retry_after_s = retry_after_seconds(response.headers.get("retry-after"), limit_s=self._config.max_retry_after_s)
        if status in _RETRIED or status >= 500:
            if retry_after_s is not None:
                self._gate.pause(retry_after_s)
            if status == 429:
                raise _BusyError
            raise _TransientError(f"HTTP {status}")
        if status in (401, 403):
            # Servers quote the key that they refuse: none of the text is shown.
            key = f"the key in {self._config.api_key_env}" if self._config.api_key_env else "a request without a key (set api_key_env)"
            raise _RefusedError(f"HTTP {status}: the server refuses {key}")
        raise _RefusedError(f"HTTP {status}: {self._shown(received.decode(errors='replace'))}")

    def _shown(self, text: str) -> str:
        """Returns the beginning of a foreign text, without the key."""
        if self._api_key:
            text = text.replace(self._api_key, "***")
        return ascii(text[:_EXCERPT_CHARS])[1:-1]

    async def _probe(self) -> bool:
        """Returns true when the server completes a small question."""
        body = self._body([{"role": "user", "content": "Reply with OK."}], max_tokens=1)
        try:
            await self._send(json.dumps(body).encode(), Clock())
        except (_TransientError, _BusyError):
            return False
        except (_RefusedError, JudgeBudgetError):
            # The next question will meet the same, and say so.
            return True
        return True


async def _read(response: httpx.Response) -> bytes:
    """Returns the body as it came; a reply that is too long or compressed (a bomb, perhaps) is given up."""
    if response.headers.get("content-encoding", "identity").lower() != "identity":
        raise _TransientError("the reply is compressed, which was not asked for")
    received = bytearray()
    async for piece in response.aiter_raw():
        received += piece
        if len(received) > MAX_REPLY_BYTES:
            raise _TransientError(f"a reply of more than {MAX_REPLY_BYTES} bytes")
    return bytes(received)


def _counted_tokens(completion: object) -> int | None:
    usage = completion.get("usage") if isinstance(completion, dict) else None
    if not isinstance(usage, dict):
        return None
    prompt, verdict = usage.get("prompt_tokens"), usage.get("completion_tokens")
    return prompt + verdict if type(prompt) is int and type(verdict) is int and min(prompt, verdict) >= 0 else None


def retry_after_seconds(header: str | None, *, limit_s: float) -> float | None:
    """Returns the seconds that a Retry-After header asks for (a number or an HTTP date), 0 to `limit_s`; None when it says nothing."""
    if header is None or len(header) > 64:
        return None
    if re.fullmatch(r"\s*\d{1,12}(\.\d{1,6})?\s*", header, re.ASCII):
        return min(float(header), limit_s)
    try:
        date = parsedate_to_datetime(header)
        return min(max(0.0, (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp() - datetime.now(UTC).timestamp()), limit_s)
    except (ValueError, OverflowError, TypeError):
        return None


def read_api_key(name: str | None) -> str | None:
    """Returns the key in an environment variable; a `RewardConfigError` that never shows it when there is none or it is no header."""
    if name is None:
        return None
    key = os.environ.get(name, "")
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        state = "holds white space or other characters that no key has" if key else "is not set"
        raise RewardConfigError(f"rewards.judge.api_key_env: the environment variable {name} {state}; export the judge's key there")
    return key


@dataclass(slots=True)
class _Shared:
    client: JudgeClient
    resources: ExitStack
    num_users: int = 1


_SHARED: dict[str, _Shared] = {}
_SHARED_LOCK = threading.Lock()


@contextmanager
def shared_client(config: JudgeConfig, *, recipe_folder: Path | None) -> Iterator[JudgeClient]:
    """Yields the process's client for these settings; the first user starts the server, if it is to be started, the last one stops it."""
    key = f"{recipe_folder} {config.model_dump_json()}"
    with _SHARED_LOCK:
        if key in _SHARED:
            _SHARED[key].num_users += 1
        else:
            with ExitStack() as started:
                client = started.enter_context(_new_client(config, recipe_folder=recipe_folder, resources=started))
                _SHARED[key] = _Shared(client=client, resources=started.pop_all())
        shared = _SHARED[key]
    try:
        yield shared.client
    finally:
        with _SHARED_LOCK:
            shared.num_users -= 1
            if shared.num_users == 0:
                del _SHARED[key]
                shared.resources.close()


def _new_client(config: JudgeConfig, *, recipe_folder: Path | None, resources: ExitStack) -> JudgeClient:
    if config.serve is None:
        assert config.model is not None, "a judge at a url has a model"
        return JudgeClient(config, url=config.base_url, model=config.model, api_key=read_api_key(config.api_key_env))
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RewardConfigError(
            f"rewards.judge.serve with {os.environ['WORLD_SIZE']} ranks would start a server on each; start one server yourself "
            "(python -m vllm.entrypoints.openai.api_server) and give rewards.judge its `url` and `model`"
        )
    server = resources.enter_context(JudgeServer(config.serve, command=serve_command, recipe_folder=recipe_folder))
    return JudgeClient(config, url=server.url, model=server.model_name, api_key=server.token)
