"""Which row is fetched next: one of a host that has not enough threads already."""

from __future__ import annotations

import heapq
import threading
from collections import Counter, defaultdict, deque
from urllib.parse import urlsplit


class Turns:
    """Rows in their order, but a host with `crowd` of them in hand has to wait while there are
    others: the threads that wait for its turns are not there for those. Safe to use from threads.

    Where all the rows that are left are of such hosts, the next one is taken nevertheless.
    """

    def __init__(self, urls: list[str | None], crowd: int) -> None:
        self.crowd = crowd
        self._hosts = [_host(url) for url in urls]
        self._left: dict[str, deque[int]] = defaultdict(deque)
        for index, host in enumerate(self._hosts):
            self._left[host].append(index)
        # a host with rows left is in one of these
        self._open = [(rows[0], host) for host, rows in self._left.items()]  # a heap: it ascends
        self._crowded: set[str] = set()
        self._in_hand: Counter[str] = Counter()
        self._lock = threading.Lock()

    def take(self) -> int:
        """The next row. Raises LookupError when all are taken."""
        with self._lock:
            if self._open:
                _, host = heapq.heappop(self._open)
            elif self._crowded:
                host = min(self._crowded, key=lambda host: self._left[host][0])
                self._crowded.remove(host)
            else:
                raise LookupError("no row is left")
            index = self._left[host].popleft()
            self._in_hand[host] += 1
            self._put(host)
            return index

    def done(self, index: int) -> None:
        """The row's fetch is over."""
        with self._lock:
            host = self._hosts[index]
            self._in_hand[host] -= 1
            if host in self._crowded:
                self._crowded.remove(host)
                self._put(host)

    def _put(self, host: str) -> None:
        if not (left := self._left[host]):
            return
        if self._in_hand[host] < self.crowd:
            heapq.heappush(self._open, (left[0], host))
        else:
            self._crowded.add(host)


def _host(url: str | None) -> str:
    """As the fetch counts turns: without the port."""
    try:
        return urlsplit((url or "").strip()).hostname or ""
    except ValueError:  # a broken bracket
        return ""
