"""robots.txt, as RFC 9309 has it: asked for once per origin, kept for an hour, judged for us.

Protego judges: it knows wildcards, the longest match and crawl delays, of which the standard
library's parser knows the last alone; and it matches in linear time, whatever a pattern holds.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable

from protego import Protego

from pipeline.curation.fetching.answers import Answers
from pipeline.curation.fetching.deadline import Deadline
from pipeline.curation.fetching.failures import FetchError
from pipeline.curation.fetching.targets import Target

MAX_BYTES = 500 << 10  # what comes after is not read, as the RFC allows
_KEPT_S, _UNREACHABLE_KEPT_S = 3600.0, 60.0
_KEPT_KIB = 2 << 10  # of text, all origins; its rules take tens of times that
_LONGEST_PAUSE_S = 30.0
# An origin that cannot be reached for its rules cannot be reached for its pages either; and that
# the unit's time is over says nothing about it.
_NOT_OF_THE_FILE = {"dns", "timeout", "connection", "tls", "forbidden_address", "deadline"}

Rules = Protego | FetchError | None  # the rules, why there are none to be had, all is allowed
Read = Callable[[str, Deadline], bytes]


class Robots:
    """The rules of every origin for the agent named `agent`; safe to use from threads.

    `read` fetches: it raises FetchError, and cuts a body at MAX_BYTES.
    """

    def __init__(self, agent: str, read: Read) -> None:
        self.agent, self.read = agent, read
        self._rules: Answers[str, tuple[Rules, int]] = Answers(
            _KEPT_KIB, weigh=lambda answer: answer[1]
        )
        self._parsing = threading.Lock()  # a large one takes memory: one at a time

    def check(self, target: Target, clock: Deadline) -> float:
        """Seconds that the origin wants between two requests.

        Raises FetchError: robots_txt (rule), robots_unreachable, or what the origin died of.
        """
        with clock.queueing() as patience:
            rules, _ = self._rules(target.origin, lambda: self._ask(target.origin, clock), patience)
        if isinstance(rules, FetchError):
            raise FetchError(rules.cause, str(rules), transient=True, soon=False)
        if rules is None:
            return 0.0
        if not rules.can_fetch(target.url, self.agent):
            raise FetchError("robots_txt", target.url, rule=True)
        pause = rules.crawl_delay(self.agent) or 0.0
        return min(max(pause, 0.0), _LONGEST_PAUSE_S) if math.isfinite(pause) else 0.0

    def _ask(self, origin: str, clock: Deadline) -> tuple[tuple[Rules, int], float]:
        """The rules and their weight, and for how long they hold."""
        try:
            text = self.read(f"{origin}/robots.txt", clock).decode("utf-8", "replace")
        except FetchError as error:
            if error.cause in _NOT_OF_THE_FILE:
                raise
            if _unavailable(error.cause):
                return (None, 1), _KEPT_S
            unreachable = FetchError("robots_unreachable", str(error))
            return (unreachable, 1), _UNREACHABLE_KEPT_S
        with self._parsing:
            return (Protego.parse(text), 1 + (len(text) >> 10)), _KEPT_S


def _unavailable(cause: str) -> bool:
    """Whether there is no robots.txt: then everything is allowed. 429 says "not now" instead."""
    gone = cause.startswith("http_4") and cause != "http_429"
    return gone or cause in ("empty", "too_many_redirects")
