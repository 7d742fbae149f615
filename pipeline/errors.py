"""What the user can mend, in one line: what is wrong, where, and what to do about it."""

from __future__ import annotations

import _thread
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator


class UserError(Exception):
    """A fault of input, settings or surroundings, in one line; jobs print it and exit 2."""


class UnitFault(UserError):
    """What costs a unit of work and not the run: the others go on."""


class StoreHiccup(UnitFault):
    """A store was busy or out of reach for longer than it is tried again: it may be well later."""


def user_message(error: BaseException) -> str | None:
    """The line of the UserError behind `error`, or None where there is none.

    Ray wraps what a worker raised (RayTaskError.cause, TrainingFailedError.worker_failures), so
    the whole chain is searched, not only the outermost exception.
    """
    for link in _chain(error):
        # Ray's own wrappers inherit from what they wrap, and hold its traceback
        if isinstance(link, UserError) and not hasattr(link, "cause"):
            return _printable(" ".join(str(link).split()))
    return None


def _printable(line: str) -> str:
    """A line that only says: names of foreign files may hold sequences that terminals obey."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)


def passing(error: BaseException) -> bool:
    """Whether another try may be well: what no user can mend, and a store that was out of reach."""
    user = [link for link in _chain(error) if isinstance(link, UserError)]
    return not user or all(isinstance(link, StoreHiccup) for link in user)


def run(main: Callable[[], None]) -> None:
    """Run a job's main and end the process: 0, 2 with one line for a UserError, 130 for Ctrl-C and
    143 for SIGTERM (`ray job stop`, a batch system), which say how to go on.
    """
    _stop.armed = True
    take_signals()
    try:
        main()
    except KeyboardInterrupt:
        _stop.leave(signal.SIGINT)
    except SystemExit as ended:
        if ended.code != signal.SIGTERM:  # with which Ray's own handler ends a process, and ours
            raise
        _stop.leave(signal.SIGTERM)
    except Exception as error:
        line = user_message(error)
        if line is None:
            raise
        sys.stderr.write(f"error: {line}\n")
        sys.exit(2)


def take_signals() -> None:
    """Let SIGINT and SIGTERM stop the job; called again after Ray, which takes SIGTERM for itself.

    Nothing happens outside of `run`: a notebook's signals are its own.
    """
    if _stop.armed and threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, _stop)


@contextlib.contextmanager
def before_the_end(act: Callable[[], None]) -> Iterator[None]:
    """Run `act` at the block's end. A stop that ends the process before it is through runs it
    first, in a thread of its own, and waits for it a little. It may run twice.
    """
    _stop.acts.append(act)
    try:
        yield
    finally:
        act()
        _stop.acts.remove(act)  # a stop that interrupts it leaves it, to be done again


class _Stop:
    """The signals' handler: the first one unwinds the job, the second one ends it after what has to
    come before, a third one at once.
    """

    def __init__(self) -> None:
        self.armed = self.stopping = self.leaving = self.said = False
        self.acts: list[Callable[[], None]] = []

    def __call__(self, number: int, _: object) -> None:
        if self.stopping:
            self.leave(number)
        self.stopping = True
        # A library may swallow the exception that is raised here, or hold a lock while it comes.
        timer = threading.Timer(_UNWINDING_S, self.leave, [number])
        timer.daemon = True
        timer.start()
        if number == signal.SIGTERM:
            self.say()  # at once: what follows it within seconds is SIGKILL
            sys.exit(number)
        raise KeyboardInterrupt

    def leave(self, number: int) -> None:
        """End the process, without what libraries do at exit: half-imported ones fail at it."""
        self.say()
        if not self.leaving:  # one more signal waits for nothing
            self.leaving = True
            self._act()
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
        os._exit(128 + number)

    def _act(self) -> None:
        over = threading.Lock()

        def work() -> None:
            for act in self.acts[::-1]:
                with contextlib.suppress(Exception):
                    act()
            over.release()

        with contextlib.suppress(RuntimeError):  # there is no room for another thread
            if self.acts:
                over.acquire()
                # the interrupted thread may hold locks of Thread's
                _thread.start_new_thread(work, ())
                over.acquire(timeout=_ACTING_S)

    def say(self) -> None:
        if not self.said:
            self.said = True
            os.write(2, b"stopped; the same command goes on from here\n")


_UNWINDING_S = 15.0
_ACTING_S = 10.0
STOP_S = _UNWINDING_S + _ACTING_S
"""The longest that a job takes to end after Ctrl-C or SIGTERM."""
_stop = _Stop()


def _chain(error: BaseException) -> Iterator[BaseException]:
    pending: list[object] = [error]
    seen: set[int] = set()
    while pending:
        link = pending.pop(0)
        if isinstance(link, dict):
            pending.extend(link.values())
        if not isinstance(link, BaseException) or id(link) in seen:
            continue
        seen.add(id(link))
        yield link
        pending += [link.__cause__, link.__context__, getattr(link, "cause", None)]
        pending.append(getattr(link, "worker_failures", None))
