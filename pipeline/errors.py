"""What the user can mend, in one line: what is wrong, where, and what to do about it."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import NoReturn


class UserError(Exception):
    """A fault of input, settings or surroundings, in one line; jobs print it and exit 2."""


def user_message(error: BaseException) -> str | None:
    """The line of the UserError behind `error`, or None where there is none.

    Ray wraps what a worker raised (RayTaskError.cause, TrainingFailedError.worker_failures), so
    the whole chain is searched, not only the outermost exception.
    """
    for link in _chain(error):
        if type(link) is UserError:
            return " ".join(str(link).split())
    return None


def run(main: Callable[[], None]) -> None:
    """Run a job's main and end the process: 0, 2 with one line for a UserError, 130 for Ctrl-C and
    143 for SIGTERM (`ray job stop`, a batch system), which say how to go on.
    """
    # Ray, once connected, handles SIGTERM in the same way: SystemExit with the signal's number.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(number))
    signal.signal(signal.SIGINT, _interrupt)
    try:
        main()
    except KeyboardInterrupt:
        _stopped(signal.SIGINT)
    except SystemExit as ended:
        if ended.code != signal.SIGTERM:
            raise
        _stopped(signal.SIGTERM)
    except Exception as error:
        line = user_message(error)
        if line is None:
            raise
        sys.stderr.write(f"error: {line}\n")
        sys.exit(2)


def _interrupt(*_: object) -> None:
    """The first Ctrl-C unwinds; from the second on the process ends at once, whatever unwinds."""
    signal.signal(signal.SIGINT, lambda *_: _stopped(signal.SIGINT, at_once=True))
    raise KeyboardInterrupt


def _stopped(number: int, at_once: bool = False) -> NoReturn:
    sys.stderr.write("stopped; the same command goes on from here\n")
    sys.stderr.flush()
    if at_once:
        os._exit(128 + number)
    sys.exit(128 + number)


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
