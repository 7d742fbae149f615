"""How hard one worker may press one host: so many requests at a time, so many a second,
and none for a while where it keeps saying "not now".
"""

from __future__ import annotations

import contextlib
import math
import random
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from pipeline.curation.fetching.deadline import Deadline
from pipeline.curation.fetching.failures import too_late

_BUSY = 3  # answers in a row
_LONGEST_REST_S = 5.0
_REMEMBERED = 10_000  # hosts that nobody waits for


@dataclass
class _Host:
    free: threading.Semaphore
    users: int = 0
    next_at: float = field(default=-math.inf)
    """When the next request may begin, monotonic seconds."""
    busy: int = 0
    """Answers in a row that told us to wait."""


class Courtesy:
    """Turns at hosts: at most `limit` at a time, `rate` a second (0 = no limit); for threads."""

    def __init__(self, limit: int, rate: float) -> None:
        self.limit, self.pause_s = limit, 1 / rate if rate else 0.0
        self._lock = threading.Lock()
        self._hosts: dict[str, _Host] = {}

    @contextlib.contextmanager
    def turn(self, host: str, clock: Deadline, pause_s: float = 0.0) -> Iterator[None]:
        """Wait for our turn, which extends the deadline. `pause_s` is what the host itself asks
        for between two requests. Raises FetchError (deadline) where it would come too late.
        """
        with self._lock:
            entry = self._hosts.setdefault(host, _Host(threading.Semaphore(self.limit)))
            entry.users += 1
        try:
            with clock.queueing() as patience:
                if not entry.free.acquire(timeout=patience):
                    raise too_late(f"no turn at {host} in time")
            try:
                with clock.queueing() as patience:
                    self._await_slot(host, entry, patience, max(self.pause_s, pause_s))
                yield
            finally:
                entry.free.release()
        finally:
            with self._lock:
                entry.users -= 1
                self._forget(host, entry)

    def answered(self, host: str, wait_s: float | None = None) -> None:
        """To be called in our turn: the host answered, and `wait_s` where it told us to wait.

        One page may be busy, so a host has to say it three times in a row. Then nobody asks it for
        so long, a few seconds at most: it may be that all of our rows are its.
        """
        with self._lock:
            entry = self._hosts[host]
            entry.busy = 0 if wait_s is None else entry.busy + 1
            if wait_s is not None and entry.busy >= _BUSY:
                rest = min(wait_s, _LONGEST_REST_S) * random.uniform(1.0, 1.25)
                entry.next_at = max(entry.next_at, time.monotonic() + rest)

    def _await_slot(self, host: str, entry: _Host, patience: float, pause_s: float) -> None:
        with self._lock:
            wait = max(0.0, entry.next_at - time.monotonic())
            if wait > patience:
                raise too_late(f"no turn at {host} in time")
            entry.next_at = time.monotonic() + wait + pause_s
        if wait:
            time.sleep(wait)

    def _forget(self, host: str, entry: _Host) -> None:
        now = time.monotonic()
        if not entry.users and not entry.busy and entry.next_at <= now:
            del self._hosts[host]
        elif len(self._hosts) > _REMEMBERED:
            for name in [n for n, e in self._hosts.items() if not e.users and e.next_at <= now]:
                del self._hosts[name]
