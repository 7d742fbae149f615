"""How far a run is, from its commit markers alone: no Ray, no models, no data file is opened."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import UTC, datetime

from pipeline.accounts import Account
from pipeline.curation.seal import SCORES, STAGES, stages_of, unit_ids
from pipeline.errors import UserError
from pipeline.pace import lately
from pipeline.progress import clock
from pipeline.shards import MANIFEST
from pipeline.storage import Storage
from pipeline.units import Ledger

_SCAN = "scan"
_TITLES = ("stage", "units", "rows in", "kept", "dropped", "failed", "MiB", "rows/s", "last", "ETA")


def status(storage: Storage, now: float | None = None) -> str:
    """The run under `storage` in lines for people; `now` in seconds since the epoch."""
    now = time.time() if now is None else now
    accounts, total = accounts_of(storage)
    if not any(account.units for account in accounts.values()):
        where = storage.url()
        if storage.is_file():
            raise UserError(f"{where} is a file; give the folder of a run with --root")
        return f"{where}: no curation yet; begin it with python jobs/curate.py --root {where}"
    lines = [_headline(storage, accounts, total), ""]
    lines += _aligned([_TITLES, *(_row(name, accounts[name], total, now) for name in accounts)])
    lines.append("")
    for name, account in accounts.items():
        lines += _reasons(name, account)
    last = accounts[STAGES[-1]]
    if last.kept:
        splits = ", ".join(f"{split} {rows:,}" for split, rows in sorted(last.splits.items()))
        lines.append(f"splits: {splits} rows")
    moments = [moment for account in accounts.values() for moment in account.moments]
    if moments:
        lines.append(f"commits: {_when(min(moments))} to {_when(max(moments))}")
    return "\n".join(lines)


def accounts_of(storage: Storage) -> tuple[dict[str, Account], int | None]:
    """Every stage's account as it stands in storage now, and the number of units that the filter
    made (None where it is not through). Units of an earlier filter do not count.
    """
    filtered = Ledger(storage, STAGES[0]).done()
    try:
        units = set(unit_ids(storage, filtered))
    except (UserError, KeyError):
        units = None
    accounts = {STAGES[0]: Account.of(filtered.values())}
    if units is None:  # the parts that the filter has scanned; it deletes them in the end
        scan = Account.read(storage, _SCAN)
        accounts = {**({_SCAN: scan} if scan.units else {}), **accounts}
    for stage in (STAGES[1], SCORES, *STAGES[2:]):
        accounts[stage] = Account.read(storage, stage, units)
    accounts[STAGES[1]].less_retried(filtered.values())
    captions = accounts["captions"]
    if captions.units:  # scores that lie there may be an earlier run's, which had them turned on
        scored = SCORES in stages_of([captions.settings])
    else:
        scored = accounts[SCORES].units > 0
    if not scored:
        del accounts[SCORES]
    return accounts, None if units is None else len(units)


def _headline(storage: Storage, accounts: dict[str, Account], total: int | None) -> str:
    where, through = storage.url(), accounts[STAGES[-1]].units
    if storage.exists(MANIFEST):
        left = f"; but {total - through:,} units came after" if total and total > through else ""
        return f"{where}: sealed, {through:,} units{left}"
    if total is None:
        return f"{where}: not sealed; the filter is at work or was stopped, there are no units yet"
    if through >= total:
        return f"{where}: not sealed; all units are through, the same command seals them"
    return (
        f"{where}: not sealed; {through:,} of {total:,} units are through; the command that began "
        "the run goes on with it"
    )


def _row(name: str, account: Account, total: int | None, now: float) -> tuple[str, ...]:
    commits = account.commits()
    pace = lately(commits, now)
    planned = total if name not in (_SCAN, STAGES[0]) else None
    finished = planned is not None and account.units >= planned
    if name == STAGES[0] or finished or pace is None:
        rate = _overall(commits) or account.rows_per_second()
    else:
        rate = pace[1]
    if planned is None or not account.units:
        eta = ""
    elif finished:
        eta = "done"
    else:
        eta = clock((planned - account.units) / pace[0]) if pace else "?"
    return (
        name,
        f"{account.units:,}" + (f"/{planned:,}" if planned is not None else ""),
        f"{account.rows_in:,}",
        f"{account.kept:,}",
        f"{account.dropped.total():,}",
        f"{account.failed.total():,}",
        f"{account.bytes / 2**20:,.1f}",
        f"{rate:,.0f}" if account.units else "",
        f"{clock(now - commits[-1][0])} ago" if commits else "",
        eta,
    )


def _overall(commits: Sequence[tuple[float, int]]) -> float | None:
    """Rows per second from the first commit to the last; the first's own rows took time before."""
    if len(commits) < 2 or commits[-1][0] <= commits[0][0]:
        return None
    return sum(rows for _, rows in commits[1:]) / (commits[-1][0] - commits[0][0])


def _reasons(name: str, account: Account) -> list[str]:
    lines = []
    if account.dropped:
        counts = ", ".join(f"{reason} {rows:,}" for reason, rows in account.dropped.most_common())
        lines.append(f"{name} dropped: {counts}")
    if account.failed:
        counts = ", ".join(
            f"{cause} {rows:,}{_again(account, cause)}"
            for cause, rows in account.failed.most_common()
        )
        lines.append(f"{name} failed: {counts}")
    if account.retried and name != STAGES[0]:
        lines.append(f"{name} retried: {account.retried:,} of the rows in came a second time")
    return lines


def _again(account: Account, cause: str) -> str:
    """Which of a cause's rows may come at another try, where the markers tell."""
    rows, of = account.transient[cause], account.failed[cause]
    if not rows:
        return ""
    return " (transient)" if rows >= of else f" ({rows:,} of them transient)"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if index else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _when(moment: float) -> str:
    return datetime.fromtimestamp(moment, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
