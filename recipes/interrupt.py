"""Ctrl-C between steps: the run saves and says how to go on."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType

from ..model.layout import Ranks


class StopRequestedError(Exception):
    """Somebody asked the run to stop; the step in flight is dropped."""


class Interrupt:
    """While open, the first SIGINT or SIGTERM is remembered; a second one acts at once."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.requested = False
        self._previous: dict[int, object] = {}

    def __enter__(self) -> Interrupt:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._restore()

    def check(self) -> None:
        """Raises `StopRequestedError` if a stop was asked for on any rank; called by all of them."""
        if any(self.ranks.gather(self.requested)):
            raise StopRequestedError

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]
