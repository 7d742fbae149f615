"""Memory for large bodies: many at a time may be small, few may be large."""

from __future__ import annotations

from queue import Empty, SimpleQueue

from pipeline.curation.fetching.deadline import Deadline

_SMALL = 4 << 20  # bytes that any fetch may hold, at most
_SMALL_BUDGET = 256 << 20  # bytes that all small bodies together may take
_IN_FLIGHT = 2  # bodies of a thread: one that comes, one that waits for its decoder
_BUDGET = 256 << 20  # bytes that all large bodies together may take
_LONGEST_WAIT_S = 60.0  # bodies that somebody keeps must not hold a worker for good


class Claim:
    """The right to hold one large body, until it is released or nobody refers to it any more."""

    def __init__(self, places: SimpleQueue[None]) -> None:
        self._places: SimpleQueue[None] | None = places

    def release(self) -> None:
        places, self._places = self._places, None
        if places is not None:
            places.put(None)  # the one lock that a destructor may take anywhere

    def __del__(self) -> None:
        self.release()


class Room:
    """Room for as many bodies of up to `largest` bytes as the budget holds, and at least one.
    Bodies of up to `small` bytes need none: four MiB, or less for more than 32 threads.
    """

    def __init__(self, largest: int, threads: int) -> None:
        self.small = min(_SMALL, _SMALL_BUDGET // (_IN_FLIGHT * threads))
        self._places: SimpleQueue[None] = SimpleQueue()
        for _ in range(max(1, _BUDGET // max(largest, self.small))):
            self._places.put(None)

    def claim(self, clock: Deadline) -> Claim:
        """Wait for room, which extends the deadline. Raises TimeoutError."""
        with clock.queueing() as patience:
            try:
                self._places.get(timeout=min(patience, _LONGEST_WAIT_S))
            except Empty:
                raise TimeoutError("no room for a large body in time") from None
        return Claim(self._places)
