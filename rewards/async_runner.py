"""Runs async reward functions for a caller that is not async, on one event loop that lives as long as the manager."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Generic, TypeVar

MAX_CONCURRENT_CALLS = 64
"""Calls in flight at once; the others wait, and their clocks with them."""
CLOSE_S = 5.0
"""Longest wait for cancelled calls at the end, seconds."""
BEAT_S = 0.05
"""How often the caller looks whether the loop still turns, seconds."""

Outcome = TypeVar("Outcome")


@dataclass(slots=True)
class _Batch(Generic[Outcome]):
    """The calls of one `run`: what came of each, by its number, and which task is which call."""

    calls: Sequence[Callable[[], Awaitable[Outcome]]]
    outcomes: dict[int, Outcome] = field(default_factory=dict)
    number_of_task: dict[asyncio.Task[None], int] = field(default_factory=dict)
    finished: threading.Event = field(default_factory=threading.Event)
    error: BaseException | None = None


class _Loop:
    """A thread with an event loop of its own, which can be left behind when a function blocks it."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._serve, name="reward-async", daemon=True)
        self._thread.start()

    def stop(self, *, wait_s: float) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(wait_s)

    def _serve(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()
        unfinished = asyncio.all_tasks(self.loop)
        for task in unfinished:
            task.cancel()
        if unfinished:
            self.loop.run_until_complete(asyncio.wait(unfinished, timeout=CLOSE_S))
        self.loop.run_until_complete(self.loop.shutdown_asyncgens())
        self.loop.close()


class AsyncRunner:
    """An event loop in a thread, so that it works inside a notebook's loop too; a context manager.

    One loop for the whole run: clients that a reward function keeps between calls stay bound to a living loop. Only a function that
    blocks the loop, by waiting without `await`, costs it: that call is given up, and the others go on in a fresh loop.
    """

    def __init__(self) -> None:
        self._loop: _Loop | None = None

    def __enter__(self) -> AsyncRunner:
        self._loop = _Loop()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        loop, self._loop = self._loop, None
        if loop is not None:
            loop.stop(wait_s=CLOSE_S)

    def run(
        self, calls: Sequence[Callable[[], Awaitable[Outcome]]], *, blocked_after_s: float, when_blocked: Callable[[int], Outcome]
    ) -> list[Outcome]:
        """Returns the results of all calls in order; at most `MAX_CONCURRENT_CALLS` at once.

        A call that keeps the loop from turning for `blocked_after_s` gets `when_blocked` of its number as its result.
        """
        outcomes: dict[int, Outcome] = {}
        while len(outcomes) < len(calls):
            assert self._loop is not None, "an AsyncRunner is used inside its `with` block"
            missing = [number for number in range(len(calls)) if number not in outcomes]
            batch = _Batch(calls=[calls[number] for number in missing])
            loop = self._loop
            asyncio.run_coroutine_threadsafe(_run_all(batch), loop.loop)
            given_up = _wait(batch, loop.loop, blocked_after_s=blocked_after_s)
            # A copy: a loop that was left behind may come to life again and finish calls that are being repeated.
            outcomes |= {missing[number]: outcome for number, outcome in dict(batch.outcomes).items()}
            if batch.error is not None:
                raise batch.error
            if given_up:
                outcomes |= {missing[number]: when_blocked(missing[number]) for number in given_up}
                loop.stop(wait_s=0.0)
                self._loop = _Loop()
        return [outcomes[number] for number in range(len(calls))]


def _wait(batch: _Batch[Outcome], loop: asyncio.AbstractEventLoop, *, blocked_after_s: float) -> list[int]:
    """Returns nothing when all calls have ended, or the number of the call that blocks the loop: all of them if it cannot be told."""
    turned = threading.Event()
    last_turn = time.monotonic()
    loop.call_soon_threadsafe(turned.set)
    while not batch.finished.wait(BEAT_S):
        if turned.is_set():
            last_turn = time.monotonic()
            turned.clear()
            loop.call_soon_threadsafe(turned.set)
        elif time.monotonic() - last_turn > blocked_after_s:
            task = asyncio.current_task(loop)
            if task in batch.number_of_task:
                return [batch.number_of_task[task]]
            return [number for number in range(len(batch.calls)) if number not in batch.outcomes]
    return []


async def _run_all(batch: _Batch[Outcome]) -> None:
    free = asyncio.Semaphore(MAX_CONCURRENT_CALLS)

    async def run_one(number: int) -> None:
        async with free:
            batch.outcomes[number] = await batch.calls[number]()

    try:
        tasks = [asyncio.ensure_future(run_one(number)) for number in range(len(batch.calls))]
        batch.number_of_task.update({task: number for number, task in enumerate(tasks)})
        await asyncio.gather(*tasks)
    except BaseException as error:
        batch.error = error
        raise
    finally:
        batch.finished.set()
