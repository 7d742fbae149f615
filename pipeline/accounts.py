"""Where every row of a stage went: totals over its commit markers.

What progress, status, report and metrics show is counted here and nowhere else, so that they agree.
Optional parts of a marker's `extra` (scores, sizes, hosts ...) may be absent or malformed.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from pipeline.storage import Storage
from pipeline.units import Ledger, Marker

RETRIED = "retried"
"""In the extra of a "units" marker: its rows are no new ones, they came from these units."""
CAUSES = "causes"
"""Beside it, {cause: rows}: why the rows that it took had failed."""
_BINS = 120
_SHOWN = 40
_MOST_NAMES = 20_000
"""Hosts or subjects told apart; past twice as many, the rarest are forgotten."""
_HISTOGRAMS = ("scores", "sizes", "words")


@dataclass
class Account:
    """The totals of one stage."""

    units: int = 0
    rows_in: int = 0
    retried: int = 0
    """Rows whose download was tried once more: in "images" they count in rows_in every time."""
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    transient: Counter[str] = field(default_factory=Counter)
    """Of the failed rows, those that another try may still bring; see `less_retried`."""
    told_apart: bool = False
    """Whether any marker says which failures are transient."""
    bytes: int = 0
    seconds: float = 0.0
    splits: Counter[str] = field(default_factory=Counter)
    """Kept rows by split."""
    moments: array[float] = field(default_factory=lambda: array("d"))
    """When each unit was committed, seconds since the epoch; beside it `moment_rows`."""
    moment_rows: array[int] = field(default_factory=lambda: array("q"))
    """Rows in of each unit."""
    settings: dict[str, Any] = field(default_factory=dict)
    histograms: dict[str, dict[str, list[Any]]] = field(default_factory=dict)
    """scores, sizes (shorter side as it came, pixels), words (of a caption) -> edges, rows."""
    hosts: dict[str, list[int]] = field(default_factory=dict)
    """Host -> rows asked of it, rows that came; of each unit's largest hosts."""
    subjects: Counter[str] = field(default_factory=Counter)
    """Captions that name a subject; of each unit's most frequent ones."""
    schemas: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def of(cls, markers: Iterable[Marker]) -> Account:
        account = cls()
        for marker in markers:
            account.add(marker)
        return account

    @classmethod
    def read(cls, storage: Storage, stage: str, units: Container[str] | None = None) -> Account:
        """The account of a stage as it stands in storage now; of `units` only, where given."""
        each = Ledger(storage, stage).each()
        return cls.of(marker for marker in each if units is None or marker.unit in units)

    def add(self, marker: Marker) -> None:
        """Count one more unit."""
        tally, extra = marker.tally, marker.tally.extra
        if RETRIED in extra:  # a round of retries deals rows that the filter has counted
            self.retried += tally.rows_in
            return
        if marker.stage == "images" and is_retry(marker.unit):
            self.retried += tally.rows_in
        self.units += 1
        self.rows_in += tally.rows_in
        self.kept += tally.kept
        self.dropped.update(tally.dropped)
        self.failed.update(tally.failed)
        self.bytes += marker.bytes
        self.seconds += marker.seconds
        self.splits[split_of(marker.unit)] += tally.kept
        self.settings = self.settings or marker.settings
        if (moment := _epoch(marker.finished)) is not None:
            self.moments.append(moment)
            self.moment_rows.append(tally.rows_in)
        if "transient" in extra:
            self.told_apart = True
            self.transient.update(_counts(extra["transient"]))
        for name in _HISTOGRAMS:
            self._count_bins(name, extra.get(name))
        self._count_hosts(extra.get("hosts"))
        self.subjects.update(_counts(extra.get("subjects")))
        if len(self.subjects) > 2 * _MOST_NAMES:
            self.subjects = Counter(dict(self.subjects.most_common(_MOST_NAMES)))
        if isinstance(extra.get("schemas"), list):
            self.schemas += [entry for entry in extra["schemas"] if isinstance(entry, dict)]

    def less_retried(self, dealt: Iterable[Marker]) -> None:
        """Leave out of `transient` what rounds of retries have taken already. `self` is the account
        of "images", `dealt` are markers of "units", those of rounds among them.
        """
        for marker in dealt:
            if RETRIED in marker.tally.extra:
                self.transient.subtract(_counts(marker.tally.extra.get(CAUSES)))
        self.transient = +self.transient

    def commits(self) -> list[tuple[float, int]]:
        """(seconds since the epoch, rows in) of each unit, in the order of time."""
        return sorted(zip(self.moments, self.moment_rows, strict=True))

    def rows_per_second(self) -> float:
        """Rows per second of one worker's work."""
        return round(self.rows_in / self.seconds, 1) if self.seconds else 0.0

    def timeline(self) -> list[tuple[float, float]]:
        """(hours since the first commit, rows per second around then), of equal steps."""
        if not self.moments:
            return []
        first, last = min(self.moments), max(self.moments)
        # two commits a bin or more: the pace, not the single units
        step = max(1.0, (last - first) / min(_BINS, max(1, len(self.moments) // 2)))
        bins = [0] * (int((last - first) / step) + 1)
        for moment, rows in zip(self.moments, self.moment_rows, strict=True):
            bins[int((moment - first) / step)] += rows
        return [((n + 0.5) * step / 3600, rows / step) for n, rows in enumerate(bins)]

    def to_json(self) -> dict[str, Any]:
        """The account as an entry of `curation.json`; it does not grow with the number of units."""
        return {
            "units": self.units,
            "rows_in": self.rows_in,
            "kept": self.kept,
            **({"retried": self.retried} if self.retried else {}),
            "dropped": dict(self.dropped.most_common()),
            "failed": dict(self.failed.most_common()),
            "transient": dict(self.transient.most_common()) if self.told_apart else None,
            "bytes": self.bytes,
            "seconds": round(self.seconds, 1),
            "rows_per_second": self.rows_per_second(),
            "first": _iso(min(self.moments)) if self.moments else None,
            "last": _iso(max(self.moments)) if self.moments else None,
            "timeline": [(round(at, 5), round(rate, 3)) for at, rate in self.timeline()],
            **self.histograms,
            "hosts": self.notable_hosts(),
            "subjects": dict(self.subjects.most_common(_SHOWN)),
            "schemas": self.schemas[:_SHOWN],
            "settings": self.settings,
        }

    def notable_hosts(self) -> dict[str, list[int]]:
        """The hosts with most rows, and those that lost most."""
        largest = sorted(self.hosts.items(), key=lambda host: -host[1][0])[:_SHOWN]
        worst = sorted(self.hosts.items(), key=lambda host: host[1][1] - host[1][0])[:_SHOWN]
        return dict(largest) | dict(worst)

    def _count_bins(self, name: str, found: Any) -> None:
        if not isinstance(found, Mapping):
            return
        edges, rows = found.get("edges"), found.get("rows")
        if not (isinstance(edges, list) and isinstance(rows, list) and rows):
            return
        mine = self.histograms.setdefault(name, {"edges": edges, "rows": [0] * len(rows)})
        if mine["edges"] == edges and len(mine["rows"]) == len(rows):
            mine["rows"] = [a + int(b) for a, b in zip(mine["rows"], rows, strict=True)]

    def _count_hosts(self, found: Any) -> None:
        if not isinstance(found, Mapping):
            return
        for host, counts in found.items():
            if isinstance(counts, list) and len(counts) >= 2:
                mine = self.hosts.setdefault(str(host), [0, 0])
                mine[0] += int(counts[0])
                mine[1] += int(counts[1])
        if len(self.hosts) > 2 * _MOST_NAMES:
            kept = sorted(self.hosts.items(), key=lambda entry: -entry[1][0])[:_MOST_NAMES]
            self.hosts = dict(kept)


def split_of(unit: str) -> str:
    """train or test: a unit has one split, and its id begins with it."""
    return unit.partition("-")[0]


def is_retry(unit: str) -> bool:
    """Whether the unit's rows failed to download before: `train-r1-00000`."""
    return unit.partition("-")[2].startswith("r")


def _counts(found: Any) -> dict[str, int]:
    if not isinstance(found, Mapping):
        return {}
    return {str(name): rows for name, rows in found.items() if isinstance(rows, int)}


def _epoch(finished: Any) -> float | None:
    try:
        return datetime.fromisoformat(finished).timestamp()
    except (TypeError, ValueError):
        return None


def _iso(moment: float) -> str:
    return datetime.fromtimestamp(moment, UTC).isoformat(timespec="seconds")
