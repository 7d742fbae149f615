"""Waiting for what another process brings about, however slow the machine is."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
PATIENCE_S = 300.0
"""A loaded machine needs minutes for what an idle one does in seconds; a hang is a hang."""


def until(
    reached: Callable[[], T],
    alive: subprocess.Popen[str] | None = None,
    seconds: float = PATIENCE_S,
    what: Callable[[], object] = lambda: "it did not come to it",
) -> T:
    """Ask again and again, and return the first answer that is true. Fails after `seconds`, or when
    the process `alive` has ended; `what` says then how far it came.
    """
    end = time.monotonic() + seconds
    while True:
        ended = alive is not None and alive.poll() is not None  # before: it may say it at its end
        if answer := reached():
            return answer
        assert not ended, what()
        assert time.monotonic() < end, what()
        time.sleep(0.1)
