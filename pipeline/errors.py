"""What the user can mend, in one line: what is wrong, where, and what to do about it."""

from __future__ import annotations

import sys
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
            return " ".join(str(link).split())
    return None


def run(main: Callable[[], None]) -> None:
    """Run a job's main and end the process: 0, 2 with one line for a UserError, 130 for Ctrl-C."""
    try:
        main()
    except KeyboardInterrupt:
        sys.stderr.write("stopped; the same command goes on from here\n")
        sys.exit(130)
    except Exception as error:
        line = user_message(error)
        if line is None:
            raise
        sys.stderr.write(f"error: {line}\n")
        sys.exit(2)


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
