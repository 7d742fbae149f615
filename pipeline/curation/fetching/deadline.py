"""The time that one fetch may take."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Iterator


class Deadline:
    """`seconds` from now for the fetch itself, and `until` (monotonic) for everything.

    Waiting in our own queues extends the first, never the second.
    """

    def __init__(self, seconds: float, until: float | None = None) -> None:
        self._end = time.monotonic() + seconds
        self._until = math.inf if until is None else until

    @property
    def remaining(self) -> float:
        """Seconds left, negative once it has passed."""
        return min(self._end, self._until) - time.monotonic()

    @property
    def patience(self) -> float:
        """Seconds that may be spent in our own queues; infinite without `until`."""
        return self._until - time.monotonic()

    def left(self) -> float:
        """Seconds left. Raises TimeoutError when there are none."""
        if (left := self.remaining) <= 0:
            raise TimeoutError("deadline")
        return left

    @contextlib.contextmanager
    def queueing(self) -> Iterator[float]:
        """Time spent in here does not count for the fetch itself. Gives the seconds that may be
        waited, as threading takes them.
        """
        started = time.monotonic()
        try:
            yield min(max(self.patience, 0.0), threading.TIMEOUT_MAX)
        finally:
            self._end += time.monotonic() - started

    def renewed(self, seconds: float) -> Deadline:
        """A deadline for work beside this one's, with the same end of everything."""
        return Deadline(seconds, self._until)

    def within(self, seconds: float) -> Deadline:
        """A deadline for a part of the work: this one, but at most `seconds` from now."""
        return Deadline(min(seconds, self.remaining))
