"""A run as it goes on, from the markers as they appear: storage is the truth, for the bars too."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections import Counter
from collections.abc import Collection, Sequence

from pipeline import ray_metrics
from pipeline.accounts import Account
from pipeline.errors import UserError
from pipeline.pace import Pace, Stall
from pipeline.progress import Progress
from pipeline.units import Ledger, MarkerFault

_CAUSES = 3
_NUMBERED = 3
"""A page is a thousand units, which differ in so many last characters: one request of a listing."""
_AHEAD = 3
"""Pages without any unit that the first stage is looked for in, behind those that have some."""
_STEADY_S = 1.0
_HICCUP_S = 10.0  # until the next look, after one that failed


class Watch:
    """Shows `units` of the `ledgers`' stages as progress, and as Ray metrics where Ray collects
    them; in the `with` block at a steady pace, and once more at each `look`.
    """

    def __init__(
        self,
        ledgers: Sequence[Ledger],
        units: Sequence[str],
        progress: Progress,
        job: str = "curate",
        run: str | None = None,
    ) -> None:
        """`job` names the metrics, `run` is their tag (None: the root)."""
        self.ledgers, self.units, self.progress = ledgers, set(units), progress
        self.job, self.run = job, run
        self.accounts = {ledger.stage_name: Account() for ledger in ledgers}
        self._pages = Counter(map(_page, units))
        self._done = {ledger.stage_name: self._count(ledger.units) for ledger in ledgers}
        self._told = {name: done.total() for name, done in self._done.items()}
        self._pace: dict[str, Pace] = {}
        self._stalls = {name: Stall() for name in self.accounts}
        self.failed: Counter[str] = Counter()
        """Units that were given up, by the stage that did."""
        self.running: Collection[str] = ()
        """The stages that run now; the others do not stall, they wait for their turn."""
        self.fault: MarkerFault | None = None
        self._metrics: ray_metrics.RunMetrics | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        for name, done in self._told.items():
            progress.task(name, len(units), done=done)
        for ledger in ledgers:
            if not ledger.unread:
                self._read(ledger)

    def __enter__(self) -> Watch:
        if self.ledgers and ray_metrics.collected():
            run = self.run or self.ledgers[0].storage.url()
            self._metrics = ray_metrics.RunMetrics(self.job, run)
            self._publish()
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        assert self._thread is not None
        self._thread.join()
        self._stop.clear()
        if self._metrics is not None:
            with contextlib.suppress(UserError):
                # the last commits, while Ray is still there to be told
                self.look(backlog=False)
            self._metrics = None

    def check(self) -> None:
        """Raise the MarkerFault that was found in the `with` block so far."""
        if self.fault is not None:
            raise self.fault

    def look(self, whole: bool = False, backlog: bool = True) -> float:
        """Bring everything up to date; return the seconds that it took.

        Units that lie where none is due, as of a run beside this one, are found by a `whole` look.
        Without `backlog`, stages are left out whose markers of earlier runs are not read yet: there
        may be a million. Raises MarkerFault where a marker is of other settings than this run's.
        """
        started = time.monotonic()
        before: Counter[str] | None = None
        for ledger in self.ledgers:
            name = ledger.stage_name
            done = self._done[name]
            if not backlog and name not in self._pace:
                before = done
                continue
            self._read(ledger)  # what was there at the beginning is no news
            done.update(self._count(ledger.look(None if whole else self._due(done, before))))
            self._read(ledger)
            if new := done.total() - self._told[name]:
                shown = {
                    "rows/s": f"{self._pace[name].rate():,.3g}",
                    **figures(self.accounts[name]),
                }
                self.progress.advance(name, new, **shown)
                self._told[name] += new
            before = done
        self.progress.tick()
        self._publish()
        return time.monotonic() - started

    def _due(self, done: Counter[str], before: Counter[str] | None) -> list[str]:
        """The pages of the listing where units of a stage may have come. `before` counts those of
        the stage before it; the first stage begins with the run's first units.
        """
        if before is not None:
            return [page for page in self._pages if done[page] < before[page]]
        due, ahead = [], 0
        for page, units in self._pages.items():
            if done[page] < units and (done[page] or ahead < _AHEAD):
                due.append(page)
                ahead += not done[page]
        return due

    def _read(self, ledger: Ledger) -> None:
        """Add up the markers that the ledger has not given yet; pace is counted from the second
        time on.
        """
        account, pace = self.accounts[ledger.stage_name], self._pace.get(ledger.stage_name)
        for marker in ledger.news():
            if self._stop.is_set():
                raise _Stopped
            if marker.unit in self.units:
                account.add(marker)
                if pace is not None:
                    pace.add(marker.tally.rows_in)
        self._pace.setdefault(ledger.stage_name, Pace())

    def _count(self, made: Collection[str]) -> Counter[str]:
        """How many of these units are the run's, by page."""
        return Counter(_page(unit) for unit in made if unit in self.units)

    def _publish(self) -> None:
        if self._metrics is None:
            return
        ready = len(self.units)  # for the first stage; for the others what the one before has done
        for stage, account in self.accounts.items():
            done, failed = self._done[stage].total(), self.failed[stage]
            idle = stage not in self.running or done + failed >= ready
            stalled = self._stalls[stage].seconds(at=done, idle=idle)
            if stage in self._pace:  # not a stage that is added up only in part
                self._metrics.publish(stage, account, len(self.units), failed, stalled)
            ready = done

    def _run(self) -> None:
        due = time.monotonic() + _STEADY_S
        while not self._stop.wait(_STEADY_S):
            self._publish()  # also between looks: Ray forgets a gauge that is not set again
            if time.monotonic() < due:
                continue
            try:
                # at most a tenth of the time goes into listing
                pause = max(_STEADY_S, 10 * self.look())
            except _Stopped:
                return
            except MarkerFault as fault:  # who has the work in hand asks for it, by `check`
                self.fault, pause = fault, math.inf
            except UserError:
                pause = _HICCUP_S  # a store's hiccup is no reason to stop the work
            due = time.monotonic() + pause


def _page(unit: str) -> str:
    return unit[:-_NUMBERED]


class _Stopped(Exception):
    """The work is over, and reading on would hold its end up."""


def figures(account: Account) -> dict[str, str]:
    """What a progress line says of a stage: rows, kept, and the causes of most failures."""
    shown = {"rows": f"{account.rows_in:,}", "kept": f"{account.kept:,}"}
    if account.failed:
        shown["failed"] = top(account.failed, _CAUSES)
    return shown


def top(counts: Counter[str], most: int) -> str:
    """The `most` frequent entries in words: `http_404 1,203, dns 310 and 4 more`."""
    named = ", ".join(f"{name} {rows:,}" for name, rows in counts.most_common(most))
    more = len(counts) - most
    return f"{named} and {more} more" if more > 0 else named
