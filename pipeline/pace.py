"""How fast things go lately: what an ETA is made of."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from itertools import pairwise

_PAUSE_S, _PAUSE_GAPS = 600.0, 20


class Pace:
    """Things per second over a sliding window, fed by `add` as they are done.

    The window holds the last `seconds`, and at least the last `least` additions.
    """

    def __init__(self, seconds: float = 120.0, least: int = 5) -> None:
        self.seconds, self.least = seconds, least
        self.total = 0
        self._seen = deque([(time.monotonic(), 0)])

    def add(self, n: int) -> None:
        now = time.monotonic()
        self.total += n
        # thousands of additions in a window need not be told apart
        seen, step = self._seen, self.seconds / 100
        if len(seen) > self.least and seen[-1][0] - seen[-2][0] < step:
            seen.pop()
        self._seen.append((now, self.total))
        while len(self._seen) > self.least + 1 and self._seen[1][0] < now - self.seconds:
            self._seen.popleft()

    def rate(self) -> float:
        """Things per second in the window, up to now."""
        since, before = self._seen[0]
        return (self.total - before) / max(time.monotonic() - since, 1e-6)


class Stall:
    """For how long something has not moved, by this machine's clock."""

    def __init__(self) -> None:
        self._at: object = None
        self._since = time.monotonic()

    def seconds(self, at: object, idle: bool = False) -> float:
        """Since it was first seen where it is now, `at`; 0 while it is `idle`: nothing to do."""
        now = time.monotonic()
        if idle or at != self._at:
            self._at, self._since = at, now
        return now - self._since


def lately(
    commits: Sequence[tuple[float, int]], now: float, most: int = 32
) -> tuple[float, float] | None:
    """(commits, rows) per second over the last `most` commits, as storage tells.

    Args:
        commits: (seconds since the epoch, rows) of each, in the order of time.
        now: seconds since the epoch.

    Returns:
        None where nothing can be said: too few commits, or none for a long time. A pause (a night
        between two runs) begins the window anew.
    """
    last = list(commits[-most - 1 :])
    gaps = [after[0] - before[0] for before, after in pairwise(last)]
    if not gaps:
        return None
    pause = max(_PAUSE_S, _PAUSE_GAPS * sorted(gaps)[len(gaps) // 2])
    if now - last[-1][0] > pause:
        return None
    start = max((at + 1 for at, gap in enumerate(gaps) if gap > pause), default=0)
    counted, span = last[start + 1 :], max(now, last[-1][0]) - last[start][0]
    if not counted or span <= 0:
        return None
    return len(counted) / span, sum(rows for _, rows in counted) / span
