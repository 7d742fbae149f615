"""A run as it goes on, from the markers as they appear: storage is the truth, for the bars too."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Sequence

from pipeline import ray_metrics
from pipeline.accounts import Account
from pipeline.errors import UserError
from pipeline.pace import Pace
from pipeline.progress import Progress
from pipeline.units import Ledger

_CAUSES = 3
_STEADY_S = 1.0


class Watch:
    """Shows `units` of the `ledgers`' stages as progress, and as Ray metrics where Ray collects
    them; in the `with` block at a steady pace, and once more at each `look`.
    """

    def __init__(self, ledgers: Sequence[Ledger], units: Sequence[str], progress: Progress) -> None:
        self.ledgers, self.units, self.progress = ledgers, set(units), progress
        self.accounts = {ledger.stage_name: Account() for ledger in ledgers}
        self._seen: dict[str, set[str]] = {name: set() for name in self.accounts}
        self._pace: dict[str, Pace] = {}
        self._metrics: ray_metrics.RunMetrics | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        for ledger in ledgers:
            self._count(ledger)
            done = self.accounts[ledger.stage_name].units
            progress.task(ledger.stage_name, len(self.units), done=done)
            self._pace[ledger.stage_name] = Pace()

    def __enter__(self) -> Watch:
        if self.ledgers and ray_metrics.collected():
            self._metrics = ray_metrics.RunMetrics(self.ledgers[0].storage.url())
            self._publish()
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        assert self._thread is not None
        self._thread.join()
        if self._metrics is not None:
            with contextlib.suppress(UserError):
                self.look()  # the last commits, while Ray is still there to be told
            self._metrics = None

    def look(self) -> float:
        """Bring everything up to date; return the seconds that it took."""
        started = time.monotonic()
        for ledger in self.ledgers:
            ledger.done()
            before = self.accounts[ledger.stage_name].rows_in
            if new := self._count(ledger):
                account, pace = self.accounts[ledger.stage_name], self._pace[ledger.stage_name]
                pace.add(account.rows_in - before)
                shown = {"rows/s": f"{pace.rate():,.3g}", **figures(account)}
                self.progress.advance(ledger.stage_name, new, **shown)
        self.progress.tick()
        self._publish()
        return time.monotonic() - started

    def _count(self, ledger: Ledger) -> int:
        """Count the units that `ledger` has read and we have not yet; return how many."""
        account, seen = self.accounts[ledger.stage_name], self._seen[ledger.stage_name]
        new = [unit for unit in ledger.read if unit in self.units and unit not in seen]
        for unit in new:
            account.add(ledger.read[unit])
        seen.update(new)
        return len(new)

    def _publish(self) -> None:
        if self._metrics is not None:
            for stage, account in self.accounts.items():
                self._metrics.publish(stage, account, len(self.units))

    def _run(self) -> None:
        due = time.monotonic() + _STEADY_S
        while not self._stop.wait(_STEADY_S):
            self._publish()  # also between looks: Ray forgets a gauge that is not set again
            if time.monotonic() < due:
                continue
            try:
                # at most a tenth of the time goes into listing
                pause = max(_STEADY_S, 10 * self.look())
            except UserError:
                pause = 10.0  # a store's hiccup is no reason to stop the work
            due = time.monotonic() + pause


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
