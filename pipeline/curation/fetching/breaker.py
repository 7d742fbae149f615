"""Hosts that do not answer are given up for a while, so that the dead do not hold the living."""

from __future__ import annotations

import math
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass, field

from pipeline.curation.fetching.failures import FetchError

_UNANSWERED = 3
_REST_S, _LONGEST_REST_S = 30.0, 600.0
_REMEMBERED = 10_000  # origins


@dataclass
class _Health:
    answered: float = -math.inf
    unanswered: set[int] = field(default_factory=set)
    """Hashes of the URLs that got no answer since."""
    rest_s: float = 0.0
    given_up: float = -math.inf
    resting_until: float = -math.inf
    cause: str = ""


class Breaker:
    """A circuit breaker for each origin; safe to use from threads.

    Three URLs in a row without any answer give an origin up for half a minute. Then one request
    is let through, and each further failure doubles the rest, up to ten minutes.
    """

    def __init__(self, rest_s: float = _REST_S) -> None:
        self.rest_s = rest_s
        self._known: OrderedDict[str, _Health] = OrderedDict()
        self._lock = threading.Lock()

    def check(self, origin: str, asking: bool = True) -> None:
        """Raises FetchError, with the cause that the origin died of, while it is given up.

        `asking` says that the request follows at once, so that it may be the one let through.
        """
        now = time.monotonic()
        with self._lock:
            health = self._known.get(origin)
            if health is None or len(health.unanswered) < _UNANSWERED:
                return
            rest = health.resting_until - now
            if rest <= 0:
                if asking:  # this one finds out for the others
                    health.resting_until = now + health.rest_s
                return
            cause = health.cause
        raise FetchError(
            cause, f"{origin} does not answer", transient=True, wait_s=rest, soon=False
        )

    def answered(self, origin: str) -> None:
        """Any answer at all, as a 404, says that the origin is alive."""
        with self._lock:
            health = self._of(origin)
            health.answered = time.monotonic()
            health.unanswered.clear()

    def failed(self, origin: str, url: str, cause: str, began: float) -> None:
        """A request that began at `began` got no answer. It says nothing about an origin that
        has answered others since.
        """
        now = time.monotonic()
        with self._lock:
            health = self._of(origin)
            if health.answered >= began:
                return
            health.cause = cause
            if len(health.unanswered) < _UNANSWERED:
                health.unanswered.add(hash(url))
                health.rest_s = self.rest_s
            elif began >= health.given_up:  # the one that was let through
                health.rest_s = min(2 * health.rest_s, _LONGEST_REST_S)
            else:
                return
            health.given_up, health.resting_until = now, now + health.rest_s

    def _of(self, origin: str) -> _Health:
        health = self._known.setdefault(origin, _Health())
        self._known.move_to_end(origin)
        while len(self._known) > _REMEMBERED:
            self._known.popitem(last=False)
        return health
