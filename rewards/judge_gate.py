"""The gate before a judge server: open, or shut while the server is down, so that an outage pauses the step and scores nothing."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from .judge_config import JudgeConfig


@dataclass(slots=True)
class JudgeUsage:
    """What the judge has cost so far in this process."""

    calls: int = 0
    """Requests sent, retries, probes and canaries included."""
    tokens: int = 0
    """Prompt and verdict tokens as the server counted them; where it did not, bytes, which are never fewer."""
    retries: int = 0
    """Requests that had to be sent again."""
    pauses: int = 0
    """Times that the step paused for an outage."""
    paused_s: float = 0.0


@dataclass(slots=True)
class Clock:
    """The time of one verdict: work counts towards the deadline, waiting for the server towards the longest outage."""

    worked_s: float = 0.0
    worked_in_round_s: float = 0.0
    waited_s: float = 0.0
    tokens: int = 0
    busy_times: int = 0
    failed_at: float = 0.0
    """When the last try failed, on the monotonic clock"""
    failed_before: float = 0.0
    """When the one before it failed, or the round began"""

    @contextmanager
    def working(self) -> Iterator[None]:
        """Counts the time inside as work."""
        started = time.monotonic()
        try:
            yield
        finally:
            seconds = time.monotonic() - started
            self.worked_s += seconds
            self.worked_in_round_s += seconds


class OutageError(Exception):
    """A verdict has waited as long as an outage may last."""


class Gate:
    """Lets requests through, or nobody while the server is down; lives on the client's loop."""

    def __init__(self, config: JudgeConfig, *, probe: Callable[[], Awaitable[bool]], usage: JudgeUsage) -> None:
        self._config = config
        self._probe = probe
        self._usage = usage
        self._up = asyncio.Event()
        self._up.set()
        self._paused_until = 0.0
        self._failures = 0
        self._reason = ""
        self._probing: asyncio.Task[None] | None = None
        # Whether the server was down when it was looked at, the last time that the gate was shut.
        self._was_down = False
        self.succeeded_at = -math.inf
        """When a request was last answered, on the monotonic clock."""

    @property
    def is_open(self) -> bool:
        """True when requests may go now."""
        return self._up.is_set() and time.monotonic() >= self._paused_until

    def succeeded(self) -> None:
        """Notes that a request was answered."""
        self._failures = 0
        self.succeeded_at = time.monotonic()

    def failed(self, reason: str) -> None:
        """Notes a failure; enough of them in a row shut the gate."""
        self._failures += 1
        self._reason = reason
        if self._failures >= self._config.breaker_failures:
            self.shut(reason)

    def shut(self, reason: str) -> None:
        """Stops all requests until a probe is answered."""
        self._reason = reason
        if self._up.is_set():
            self._up.clear()
            self._usage.pauses += 1
            self._probing = asyncio.ensure_future(self._look_until_up())

    def pause(self, seconds: float) -> None:
        """Stops all requests for a time that the server asked for."""
        self._paused_until = max(self._paused_until, time.monotonic() + seconds)
        self._reason = f"the server asks to wait ({seconds:.3g} s)"

    async def wait(self, clock: Clock) -> bool:
        """Waits until requests may go; returns true if the server was down meanwhile. An `OutageError` after `max_outage_s` in all."""
        was_shut = False
        while not self.is_open:
            if self._up.is_set():
                await self._bounded(asyncio.sleep(self._paused_until - time.monotonic()), clock)
            else:
                was_shut = True
                await self._bounded(self._up.wait(), clock)
        return was_shut and self._was_down

    async def sleep(self, seconds: float, clock: Clock) -> None:
        """Waits on behalf of the server."""
        self._reason = "the server is busy (HTTP 429)"
        await self._bounded(asyncio.sleep(seconds), clock)

    async def _bounded(self, waiting: Awaitable[object], clock: Clock) -> None:
        started = time.monotonic()
        try:
            async with asyncio.timeout(max(0.0, self._config.max_outage_s - clock.waited_s)):
                await waiting
        except TimeoutError as error:
            raise OutageError(f"judge: down for {self._config.max_outage_s:g} s (max_outage_s): {self._reason}") from error
        finally:
            clock.waited_s += time.monotonic() - started

    async def _look_until_up(self) -> None:
        started, pause_s = time.monotonic(), self._config.probe_s
        self._was_down = False
        while True:
            await asyncio.sleep(max(pause_s, self._paused_until - time.monotonic()))
            if await self._probe():
                break
            self._was_down = True
            pause_s = min(2.0 * pause_s, self._config.max_backoff_s)
        self._usage.paused_s += time.monotonic() - started
        self._failures = 0
        self._up.set()

    def close(self) -> None:
        """Ends the probing."""
        if self._probing is not None:
            self._probing.cancel()
