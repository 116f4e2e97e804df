"""Calls of functions that nothing can end from outside, each with a deadline. No torch."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from .tool import ToolUnavailableError

MAX_HUNG_CALLS = 8
"""A function of which this many late calls still run is not called again: each holds a thread, and the next would hang too."""


class DeadlineCalls:
    """Calls one function in threads of its own, and stops waiting for a call that is late; safe for several threads.

    Python cannot end a thread: a late call runs on unseen and what it returns is dropped. Its thread does not keep the program from ending.
    """

    def __init__(self, function: Callable[..., object], *, deadline_s: float, place: str) -> None:
        """`place` names the function in messages."""
        self._function = function
        self._deadline_s = deadline_s
        self._place = place
        self._late: list[threading.Thread] = []
        self._lock = threading.Lock()

    def __call__(self, /, **arguments: Any) -> object:  # noqa: ANN401 arguments of any function
        """Returns what the function returns, or raises what it raises; `ToolUnavailableError` when it is late or too many calls hang."""
        with self._lock:
            self._late = [thread for thread in self._late if thread.is_alive()]
            num_late = len(self._late)
        if num_late >= MAX_HUNG_CALLS:
            raise ToolUnavailableError(f"{self._place} was not called: {num_late} earlier calls of it that missed their deadline still run")
        outcome: Future[object] = Future()
        thread = threading.Thread(target=self._carry_out, args=(outcome, arguments), name=self._place, daemon=True)
        thread.start()
        thread.join(self._deadline_s)
        if not outcome.done():
            with self._lock:
                self._late.append(thread)
            raise ToolUnavailableError(
                f"{self._place} did not answer in {self._deadline_s:g} s; make it faster or raise its deadline_s"
            ) from None
        return outcome.result()

    def _carry_out(self, outcome: Future[object], arguments: dict[str, Any]) -> None:
        try:
            outcome.set_result(self._function(**arguments))
        except BaseException as error:  # raised again in the thread that asked
            outcome.set_exception(error)
