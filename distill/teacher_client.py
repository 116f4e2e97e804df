"""Asking a teacher over HTTP so that no failure of its server ever looks like a score.

A request that fails is tried again with full jitter. While the server is away the whole step pauses: one thread looks whether it is
back, the others wait for that one, and then every request goes on where it was. A server that stays away, or a request that fails again and
again while the server is there, is a `TeacherError`.
"""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import httpx

from ..model.token_client import Endpoint, RequestFailedError, RequestRefusedError, ServerBusyError, answers, open_client, post
from .config import RequestsConfig
from .teacher import TeacherError

_LONGEST_PAUSE_S = 30.0
_POLL_S = 1.0
_PROBE_TIMEOUT_S = 10.0


class TeacherPausedError(TeacherError):
    """A stop was asked for while the step waited for a teacher."""


Answer = TypeVar("Answer")


@dataclass(frozen=True, kw_only=True, slots=True)
class Question(Generic[Answer]):
    """One request."""

    place: str
    """What it is about, for messages: whose response."""
    path: str
    """Below the endpoint's url."""
    body: Callable[[], Mapping[str, Any]]
    """Builds the JSON body when it is sent: all bodies at once, with their images, may be large."""
    read: Callable[[Mapping[str, Any]], Answer]
    """Returns what is wanted of the reply, as soon as it is there: all replies at once are larger still. What it raises is not tried
    again."""


class _GivenUpError(Exception):
    """Another request of the step has failed for good."""


class TeacherClient:
    """A client of one server."""

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        name: str,
        config: RequestsConfig,
        heed: Callable[[str], None],
        fault: Callable[[], str | None],
        is_stopping: Callable[[], bool],
    ) -> None:
        """`name` is what messages call the teacher. `heed` is told when its server goes away and when it is back; `fault` returns why a
        server of the run's own will not come back, None while it may; `is_stopping` says whether somebody asked the run to stop.
        """
        self.endpoint = endpoint
        self.name = name
        self._config = config
        self._heed = heed
        self._fault = fault
        self._is_stopping = is_stopping
        self._looking = threading.Lock()
        self._given_up = threading.Event()

    def ask(self, questions: Sequence[Question[Answer]]) -> list[Answer]:
        """Returns what each question reads in its reply, in order.

        Raises `TeacherError` where one cannot be had, and `TeacherPausedError` when a stop was asked for while the server was away.
        """
        if not questions:
            return []
        self._given_up.clear()
        with (
            open_client(self.endpoint, timeout_s=self._config.request_timeout_s) as http,
            ThreadPoolExecutor(min(self._config.max_concurrent, len(questions)), thread_name_prefix=f"teacher-{self.name}") as pool,
        ):
            futures = [pool.submit(self._ask, http, question) for question in questions]
            try:
                wait(futures, return_when=FIRST_EXCEPTION)
            finally:
                if not all(future.done() for future in futures):  # after an error, or Ctrl-C
                    self._given_up.set()
                    pool.shutdown(wait=True, cancel_futures=True)
        errors = [error for future in futures if not future.cancelled() and (error := future.exception()) is not None]
        if errors:
            raise next((error for error in errors if not isinstance(error, _GivenUpError)), errors[0])
        return [future.result() for future in futures]

    def _ask(self, http: httpx.Client, question: Question[Answer]) -> Answer:
        body = json.dumps(question.body()).encode()
        failures, busy_s = 0, 0.0
        while True:
            self._check_wanted()
            try:
                reply = post(http, question.path, body)
            except ServerBusyError as error:
                if busy_s >= self._config.max_wait_s:
                    raise self._error(f"answered {error} to {question.place} for {busy_s:.0f} s: ask it less at once") from error
                busy_s += self._pause(failures + 1)
            except RequestRefusedError as error:
                raise self._error(f"refused {question.place} with {error}") from error
            except RequestFailedError as error:
                if self._wait_until_back(http, str(error)):
                    continue
                failures += 1
                if failures >= self._config.max_tries:
                    what = f"failed {failures} times at {question.place} while it was there (requests.max_tries), at last with {error}"
                    raise self._error(what) from error
                self._pause(failures)
            else:
                return question.read(reply)

    def _wait_until_back(self, http: httpx.Client, reason: str) -> bool:
        """Returns whether the server was away; then it is back."""
        with self._looking:
            self._check_wanted()
            if answers(http, self.endpoint, timeout_s=_PROBE_TIMEOUT_S) is None:
                return False
            since = time.monotonic()
            self._heed(f"its server does not answer ({reason}); the step waits for it, for at most {self._config.max_wait_s:g} s")
            while (said := answers(http, self.endpoint, timeout_s=_PROBE_TIMEOUT_S)) is not None:
                waited_s = time.monotonic() - since
                fault = self._fault()
                if fault is not None or waited_s > self._config.max_wait_s:
                    self._given_up.set()
                    why = fault or f"has been away for {waited_s:.0f} s (requests.max_wait_s): {said}"
                    raise self._error(f"{why}. No update was made with missing scores; start it again and resume the run")
                if self._is_stopping():
                    self._given_up.set()
                    raise TeacherPausedError(f"teacher {self.name}: a stop was asked for while its server was away")
                self._given_up.wait(_POLL_S)
                self._check_wanted()
            self._heed(f"its server answers again after {time.monotonic() - since:.0f} s; the step goes on")
            return True

    def _check_wanted(self) -> None:
        if self._given_up.is_set():
            raise _GivenUpError

    def _pause(self, failures: int) -> float:
        """Sleeps between 0 and the pause of so many failures; returns the seconds."""
        seconds = random.uniform(0.0, min(_LONGEST_PAUSE_S, self._config.backoff_s * 2.0 ** (failures - 1)))
        self._given_up.wait(seconds)
        return seconds

    def _error(self, what: str) -> TeacherError:
        return TeacherError(f"teacher {self.name} at {self.endpoint.url}: {what}")
