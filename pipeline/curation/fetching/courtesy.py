"""How hard one worker may press one host: so many requests at a time, so many a second."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from pipeline.curation.fetching.deadline import Deadline
from pipeline.curation.fetching.failures import too_late

_REMEMBERED = 10_000  # hosts that nobody waits for


@dataclass
class _Host:
    free: threading.Semaphore
    users: int = 0
    next_at: float = field(default=-math.inf)
    """When the next request may begin, monotonic seconds."""


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
        if not entry.users and entry.next_at <= now:
            del self._hosts[host]
        elif len(self._hosts) > _REMEMBERED:
            for name in [n for n, e in self._hosts.items() if not e.users and e.next_at <= now]:
                del self._hosts[name]
