"""Verdicts on disk, by content: what was judged once is not judged again, also by another rank or after a restart.

One SQLite file in write-ahead mode, shared by threads and processes. A cache may lose what it holds and never stops a run: a corrupt file
is moved aside, and a disk that cannot be written ends the caching, each with one line of warning.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from ..model.records import Example, Rollout, TextPart

BUSY_S = 30.0
"""Longest wait for another process that is writing, seconds."""
MAX_VALUE_BYTES = 2**20
"""A larger value is not kept."""

Outcome = TypeVar("Outcome")

_LOG = logging.getLogger(__name__)


class VerdictCache:
    """A dictionary on disk from a key's text to a JSON object; safe for several threads and processes; a context manager.

    Example: `cache.put(key, {"value": 1.0, "note": ""})`, then `cache.get(key)` gives the same dictionary in any process.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None
        self._process = os.getpid()
        self._is_off = False
        with self._lock:
            self._guarded(lambda connection: None)

    def __enter__(self) -> VerdictCache:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file; the next `get` or `put` would open it again."""
        with self._lock:
            self._forget_connection()

    def get(self, key: str) -> dict[str, Any] | None:
        """Returns the value that was put under the key, or None."""
        with self._lock:
            row = self._guarded(lambda connection: connection.execute("SELECT value FROM verdicts WHERE key = ?", (key,)).fetchone())
        if row is None:
            return None
        try:
            value = json.loads(row[0])
        except (TypeError, ValueError, RecursionError):
            return None
        return value if isinstance(value, dict) else None

    def put(self, key: str, value: Mapping[str, Any]) -> None:
        """Keeps the value; of two for one key the later one stays. A value that is no finite JSON is a `ValueError`."""
        text = json.dumps(dict(value), allow_nan=False)
        if len(text) > MAX_VALUE_BYTES:
            return

        def write(connection: sqlite3.Connection) -> None:
            connection.execute("INSERT OR REPLACE INTO verdicts VALUES (?, ?)", (key, text))

        with self._lock:
            self._guarded(write)

    def _guarded(self, use: Callable[[sqlite3.Connection], Outcome]) -> Outcome | None:
        """Returns `use(connection)`; None when the file cannot be used, which is said once."""
        for is_last in (False, True):
            if self._is_off:
                return None
            try:
                return use(self._open())
            except sqlite3.OperationalError as error:
                # Full, read-only, no such folder: nothing that another file in its place would mend.
                self._turn_off(str(error))
            except sqlite3.DatabaseError as error:
                if is_last:
                    self._turn_off(str(error))
                else:
                    self._move_aside(str(error))
            except OSError as error:
                self._turn_off(error.strerror or str(error))
        return None

    def _open(self) -> sqlite3.Connection:
        if self._connection is not None and self._process != os.getpid():
            # A connection that came along with a fork belongs to the parent: closing it here would drop the parent's locks.
            self._connection = None
        if self._connection is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._process = os.getpid()
            # Autocommit: each verdict is a transaction of its own, and a killed run loses none that was put.
            self._connection = sqlite3.connect(self._path, timeout=BUSY_S, isolation_level=None, check_same_thread=False)
            self._connection.execute("PRAGMA journal_mode = WAL").fetchone()
            self._connection.execute("PRAGMA synchronous = NORMAL")
            self._connection.execute("CREATE TABLE IF NOT EXISTS verdicts (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID")
            self._connection.execute("SELECT value FROM verdicts LIMIT 1").fetchone()
        return self._connection

    def _forget_connection(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None and self._process == os.getpid():
            with contextlib.suppress(sqlite3.Error):
                connection.close()

    def _turn_off(self, reason: str) -> None:
        self._is_off = True
        self._forget_connection()
        _LOG.warning("%s: the cache of verdicts cannot be used (%s); every verdict is reached anew", self._path, reason)

    def _move_aside(self, reason: str) -> None:
        self._forget_connection()
        aside = self._path.with_name(f"{self._path.name}.corrupt-{int(time.time())}-{os.getpid()}")
        # Another rank may have been faster.
        with contextlib.suppress(FileNotFoundError):
            self._path.rename(aside)
        for suffix in ("-wal", "-shm"):
            with contextlib.suppress(FileNotFoundError):
                self._path.with_name(self._path.name + suffix).unlink()
        _LOG.warning("%s: the cache of verdicts is corrupt (%s); moved to %s, a new one is begun", self._path, reason, aside.name)


def verdict_key(example: Example, rollout: Rollout, *, judge: Mapping[str, Any]) -> str:
    """Returns the SHA-256 over all that a cacheable reward may depend on, 64 hexadecimal digits.

    That is the judge (its name, version or source hash, and options), the example with the hashes of its images, and of the rollout the
    text, the prompt's suffix, the finish reason, the turns and the hashes of its media: not its tokens, log-probs and policy version.
    """
    described = {
        "judge": judge,
        "example": {
            "id": example.id,
            "messages": [
                [message.role, [["text", part.text] if isinstance(part, TextPart) else ["media", part.digest] for part in message.parts]]
                for message in example.messages
            ],
            "answer": example.answer,
            "task": example.task,
            "source": example.source,
            "metadata": example.metadata,
        },
        "rollout": {
            "text": rollout.text,
            "prompt_suffix": rollout.prompt_suffix,
            "finish_reason": rollout.finish_reason,
            "media": [part.digest for part in rollout.media],
            **({"turns": [asdict(turn) for turn in rollout.turns], "ending": rollout.ending} if rollout.turns else {}),
        },
    }
    # Escaped: a text may hold half a surrogate pair, which no encoding takes.
    return hashlib.sha256(json.dumps(described, sort_keys=True, default=repr).encode()).hexdigest()
