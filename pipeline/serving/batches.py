"""Requests that wait for the device, and the one thread that works on it: alike ones together."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from PIL import Image

from pipeline.errors import UserError
from pipeline.generation.recipe import Recipe
from pipeline.serving.artist import Busy, Gone, Step

_log = logging.getLogger(__name__)
_SICK_AFTER = 3
"""Batches in a row that fail for no fault of a request: the device is lost, or out of memory."""


class Makes(Protocol):
    """What draws: a Sampler."""

    def make(
        self, recipes: Sequence[Recipe], on_step: Callable[[int], None] | None = None
    ) -> list[Image.Image]: ...


@dataclass(frozen=True)
class Made:
    """A picture, and how many were denoised with it."""

    picture: Image.Image
    batch: int


@dataclass(eq=False)
class Ticket:
    """A request that waits, or is worked on."""

    asked: Recipe | Callable[[], Any]
    """What to draw; or other work for the device, which is done alone."""
    ends: float
    """By time.monotonic(): past it nobody waits for the answer."""
    tell: Callable[[Any], None]
    """Takes each Step, and last what came of it: a Made, what the work returned, or an exception.
    Called in the drawing thread."""
    arrived: float = field(default_factory=time.monotonic)
    given_up: bool = False

    @property
    def wanted(self) -> bool:
        return not self.given_up and time.monotonic() < self.ends


class _Unwanted(Exception):
    """Nobody waits for any picture of the batch."""


class Batches:
    """A bounded queue of tickets, and the thread that takes them: it alone uses the models.

    The first ticket waits up to `wait_s` for others; those that are alike go together, at most
    `most`. At most `queue` tickets wait, besides those that an idle thread takes at once.
    """

    def __init__(self, makes: Makes, most: int, wait_s: float, queue: int) -> None:
        self._makes, self._most, self._wait_s, self._queue = makes, most, wait_s, queue
        self._waiting: list[Ticket] = []
        self._changed = threading.Condition()
        self._at_work = self._closed = False
        self._failures = 0
        self._thread = threading.Thread(target=self._run, name="drawing", daemon=True)
        self._thread.start()

    @property
    def well(self) -> bool:
        """Whether the thread lives, and its last batches did not all fail."""
        return self._thread.is_alive() and self._failures < _SICK_AFTER

    def put(self, ticket: Ticket) -> None:
        """Raises Busy when too many wait, Gone after `close` and when the thread is dead."""
        with self._changed:
            if self._closed or not self._thread.is_alive():
                raise Gone("the service is stopping")
            room = self._queue if self._at_work else self._queue + self._most
            if len(self._waiting) >= room:
                raise Busy(f"{len(self._waiting)} requests wait already")
            self._waiting.append(ticket)
            self._changed.notify_all()

    def give_up(self, ticket: Ticket) -> None:
        """Nobody waits for it any more: it is not drawn, or its batch ends when it was the last."""
        with self._changed:
            ticket.given_up = True
            if ticket in self._waiting:
                self._waiting.remove(ticket)

    def close(self) -> None:
        """Take no more tickets; the thread ends after those that wait."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def join(self, within_s: float) -> bool:
        """Whether the thread ended in time, after `close`."""
        self._thread.join(within_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            while batch := self._next():
                self._work(batch)
        finally:
            with self._changed:
                self._closed = True
                left, self._waiting = self._waiting, []
            for ticket in left:
                _tell(ticket, Gone("the service is stopping"))

    def _next(self) -> list[Ticket]:
        """The next tickets that are worked on together; none = closed, and nothing waits."""
        with self._changed:
            self._at_work = False
            while True:
                self._waiting = [ticket for ticket in self._waiting if ticket.wanted]
                if not self._waiting:
                    if self._closed:
                        return []
                    self._changed.wait()
                    continue
                first = self._waiting[0]
                batch = [t for t in self._waiting if _together(first, t)][: self._most]
                left_s = first.arrived + self._wait_s - time.monotonic()
                full = len(batch) == self._most or not isinstance(first.asked, Recipe)
                if not full and left_s > 0 and not self._closed:
                    self._changed.wait(left_s)
                    continue
                self._waiting = [ticket for ticket in self._waiting if ticket not in batch]
                self._at_work = True
                return batch

    def _work(self, batch: list[Ticket]) -> None:
        try:
            if isinstance(batch[0].asked, Recipe):
                self._draw(batch)
            else:
                _tell(batch[0], batch[0].asked())
            self._failures = 0
        except _Unwanted:
            pass
        except UserError as error:
            self._failures = 0
            if len(batch) == 1:
                _tell(batch[0], error)
            else:  # one of them asks for what cannot be: it must not fail the others
                for ticket in batch:
                    if ticket.wanted:
                        self._work([ticket])
        except Exception as error:
            self._failures += 1
            _log.exception("a batch of %d failed", len(batch))
            for ticket in batch:
                _tell(ticket, error)
        except BaseException:  # the thread ends
            self._failures = _SICK_AFTER  # before anybody is told, and asks whether it is well
            for ticket in batch:
                _tell(ticket, Gone("the drawing thread has ended"))
            raise

    def _draw(self, batch: list[Ticket]) -> None:
        recipes = [ticket.asked for ticket in batch if isinstance(ticket.asked, Recipe)]

        def on_step(done: int) -> None:
            wanted = [ticket for ticket in batch if ticket.wanted]
            if not wanted:
                raise _Unwanted
            for ticket in wanted:
                _tell(ticket, Step(done, recipes[0].steps))

        for ticket, picture in zip(batch, self._makes.make(recipes, on_step), strict=True):
            _tell(ticket, Made(picture, len(batch)))


def _together(one: Ticket, other: Ticket) -> bool:
    if isinstance(one.asked, Recipe) and isinstance(other.asked, Recipe):
        return one.asked.alike == other.asked.alike
    return one is other


def _tell(ticket: Ticket, what: Any) -> None:
    try:
        ticket.tell(what)
    except RuntimeError:  # its event loop is closed
        ticket.given_up = True
