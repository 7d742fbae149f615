"""An iterator that runs ahead of its reader, in a thread."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from queue import Empty, Full, Queue
from typing import Any, Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")


class ReadAhead(Generic[T, R]):
    """Runs an iterator in a background thread, at most `depth` finished items ahead.

    Iterate over it once; `close()` (or the end of a `with`) stops the thread. What the iterator
    raises, iteration raises.

    Args:
        items: the iterator; it is advanced in the thread only.
        depth: finished items that may wait.
        finish: work done in the thread on each item.
    """

    _END = object()

    def __init__(self, items: Iterable[T], finish: Callable[[T], R], depth: int = 4) -> None:
        self._queue: Queue[Any] = Queue(maxsize=depth)
        self._stop = threading.Event()
        self._thread = threading.Thread(
            target=self._run, args=(iter(items), finish), name="read-ahead", daemon=True
        )
        self._thread.start()

    def _run(self, items: Iterator[T], finish: Callable[[T], R]) -> None:
        last: Any = self._END
        try:
            for item in items:
                if not self._put(finish(item)):
                    break
        except BaseException as error:
            last = error
        finally:
            close = getattr(items, "close", None)
            if close is not None:
                close()
            self._put(last)

    def _put(self, item: Any) -> bool:
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=0.2)
                return True
            except Full:
                continue
        return False

    def __iter__(self) -> Iterator[R]:
        while True:
            item = self._queue.get()
            if item is self._END:
                return
            if isinstance(item, BaseException):
                raise item
            yield item

    def close(self) -> None:
        self._stop.set()
        try:
            while True:
                self._queue.get_nowait()
        except Empty:
            pass
        self._thread.join(timeout=5)

    def __enter__(self) -> ReadAhead[T, R]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
