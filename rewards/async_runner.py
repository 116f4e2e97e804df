"""Runs async reward functions for a caller that is not async, on one event loop that lives as long as the manager."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Sequence
from types import TracebackType
from typing import TypeVar

MAX_CONCURRENT_CALLS = 64
"""Calls in flight at once; the others wait, and their clocks with them."""
CLOSE_S = 5.0
"""Longest wait for cancelled calls at the end, seconds."""

Outcome = TypeVar("Outcome")


class AsyncRunner:
    """A thread with an event loop of its own, so that it works inside a notebook's loop too; a context manager.

    One loop for the whole run: clients that a reward function keeps between calls stay bound to a living loop.
    """

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._serve, name="reward-async", daemon=True)

    def __enter__(self) -> AsyncRunner:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(CLOSE_S)

    def run(self, calls: Sequence[Callable[[], Awaitable[Outcome]]]) -> list[Outcome]:
        """Returns the results of all calls in order; at most `MAX_CONCURRENT_CALLS` at once."""
        return asyncio.run_coroutine_threadsafe(_run_all(calls), self._loop).result()

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()
        unfinished = asyncio.all_tasks(self._loop)
        for task in unfinished:
            task.cancel()
        if unfinished:
            self._loop.run_until_complete(asyncio.wait(unfinished, timeout=CLOSE_S))
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        self._loop.close()


async def _run_all(calls: Sequence[Callable[[], Awaitable[Outcome]]]) -> list[Outcome]:
    free = asyncio.Semaphore(MAX_CONCURRENT_CALLS)

    async def run_one(call: Callable[[], Awaitable[Outcome]]) -> Outcome:
        async with free:
            return await call()

    return list(await asyncio.gather(*map(run_one, calls)))
