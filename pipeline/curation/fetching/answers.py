"""Answers that cost time (a look-up, a robots.txt): kept for a while, and asked for once."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

K = TypeVar("K")
V = TypeVar("V")


class Answers(Generic[K, V]):
    """A bounded memory of answers; safe to use from threads.

    However many threads want the same one at a time, it is asked for once. `size` bounds the sum
    of what `weigh` says of the answers; those not used for the longest time go first. `run` runs
    the asking, in the calling thread if it is not given.
    """

    def __init__(
        self,
        size: int,
        weigh: Callable[[V], int] = lambda answer: 1,
        run: Callable[[Callable[[], None]], object] = lambda work: work(),
    ) -> None:
        self.size, self.weigh, self.run = size, weigh, run
        self._kept: OrderedDict[K, tuple[float, V]] = OrderedDict()
        self._asked: dict[K, Future[V]] = {}
        self._weight = 0
        self._lock = threading.Lock()

    def __call__(self, key: K, ask: Callable[[], tuple[V, float]], timeout_s: float) -> V:
        """The answer to `key`: kept, or what `ask` gives, beside the seconds it may be kept.

        Raises TimeoutError, and what `ask` raises, which is told to everyone who waits for it and
        not kept.
        """
        with self._lock:
            kept = self._kept.get(key)
            if kept is not None and kept[0] > time.monotonic():
                self._kept.move_to_end(key)
                return kept[1]
            pending = self._asked.get(key)
            answer: Future[V] = pending or Future()
            self._asked[key] = answer
        if pending is None:
            self.run(lambda: self._ask(key, ask, answer))
        try:
            return answer.result(timeout=max(timeout_s, 0.01))
        except TimeoutError:
            if answer.done():  # it was the answer
                raise
            raise TimeoutError(f"nothing about {key} in time") from None

    def _ask(self, key: K, ask: Callable[[], tuple[V, float]], answer: Future[V]) -> None:
        try:
            value, seconds = ask()
        except BaseException as error:
            with self._lock:
                del self._asked[key]
            answer.set_exception(error)
            return
        with self._lock:
            del self._asked[key]
            self._keep(key, value, time.monotonic() + seconds)
        answer.set_result(value)

    def _keep(self, key: K, value: V, until: float) -> None:
        old = self._kept.pop(key, None)
        self._weight += self.weigh(value) - (self.weigh(old[1]) if old else 0)
        self._kept[key] = until, value
        while self._weight > self.size:
            _, (_, dropped) = self._kept.popitem(last=False)
            self._weight -= self.weigh(dropped)
