"""Work units: all of resume and accounting; the only place that knows what "done" means.

A stage turns one unit's upstream file into one Parquet file of its own folder, and knows nothing
else. `run_unit` publishes that file, checks that no row was lost, and writes the unit's commit
marker `<stage>/_done/<unit>.json` last. A unit without a marker does not exist. Resume is: list
the markers once, run what is missing.
"""

from __future__ import annotations

import builtins
import contextlib
import hashlib
import itertools
import json
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any, BinaryIO, Protocol, cast

import pyarrow.parquet as pq

from pipeline.errors import UnitFault, UserError
from pipeline.storage import Storage

_DONE = "_done"
_AT_ONCE = 1000
"""Markers read side by side."""
_CHECKED = 4000
"""Markers that a run reads before it begins, at most."""
_MOST_DEATHS = 4


@dataclass
class Tally:
    """Where a unit's rows went; `dropped` by reason (a rule), `failed` by cause (a fault)."""

    rows_in: int
    kept: int
    dropped: dict[str, int] = field(default_factory=dict)
    failed: dict[str, int] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)

    def check(self) -> None:
        """Raise RuntimeError if rows were lost or made: in = kept + dropped + failed."""
        out = self.kept + sum(self.dropped.values()) + sum(self.failed.values())
        if out != self.rows_in:
            raise RuntimeError(
                f"rows were lost or made: {self.rows_in} in, {out} accounted for: {self}"
            )


class Stage(Protocol):
    """One step of curation. Building it is cheap (the driver does, to learn its settings); what is
    heavy (models) belongs into an optional method `open()`, called once in the worker.
    """

    @property
    def name(self) -> str:
        """Its folder under the root, and its name in settings and messages."""
        ...

    @property
    def source(self) -> str | None:
        """The upstream stage's folder; None = the stage reads what is outside of the root."""
        ...

    @property
    def settings(self) -> dict[str, Any]:
        """JSON of everything that shapes the output: options, seeds, hashes of weights."""
        ...

    def __call__(self, unit: str, storage: Storage, sink: BinaryIO, /) -> Tally:
        """Read the unit's inputs from `storage`, write its Parquet to `sink`, account for rows."""
        ...


@dataclass
class Marker:
    """The commit of one unit: it says what it covers."""

    unit: str
    stage: str
    fingerprint: str
    settings: dict[str, Any]
    tally: Tally
    bytes: int
    sha256: str
    seconds: float
    finished: str

    @classmethod
    def parse(cls, data: builtins.bytes, path: str) -> Marker:
        try:
            fields = json.loads(data)
            return cls(**{**fields, "tally": Tally(**fields["tally"])})
        except (ValueError, TypeError, KeyError) as error:
            raise MarkerFault(
                f"{path} is no commit marker ({error}); delete it and run again"
            ) from None


class MarkerFault(UserError):
    """A marker that a run cannot build on: of other settings, or none at all. It stays so."""


def fingerprint(stage: Stage, upstream: str | None) -> str:
    """16 hex digits over everything that shapes the stage's output, its upstream's included."""
    covered = {"stage": stage.name, "settings": stage.settings, "upstream": upstream}
    text = json.dumps(covered, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Ledger:
    """The commit markers of one stage. Of each unit it keeps the name alone: a million fit."""

    def __init__(self, storage: Storage, stage_name: str) -> None:
        self.storage, self.stage_name = storage, stage_name
        self.units: set[str] = set()
        """Committed units, as `look` last saw them."""
        self.stale = False
        """Whether `check` found units that have to be made again."""
        self._read: set[str] = set()
        self._checked: dict[str, Marker] = {}
        self._settings: dict[str, dict[str, Any]] = {}
        self._wanted: tuple[str, Mapping[str, Any]] | None = None

    def path(self, unit: str) -> str:
        return f"{self.stage_name}/{_DONE}/{unit}.json"

    def look(self, begin: Sequence[str] | None = None) -> set[str]:
        """Bring `units` up to date by a listing: of all, or, where `begin` is given, of those whose
        names begin with one of its entries (what is gone is not noticed then). Returns the new.
        """
        names = self.storage.names(f"{self.stage_name}/{_DONE}", begin)
        found = {sys.intern(name.removesuffix(".json")) for name in names}
        new = found - self.units
        if begin is not None:
            self.units |= new
            return new
        self.units = found
        self._read &= found
        self._checked = {unit: m for unit, m in self._checked.items() if unit in found}
        return new

    @property
    def unread(self) -> int:
        """Markers that `news` would have to read."""
        return len(self.units) - len(self._read) - len(self._checked)

    def news(self) -> Iterator[Marker]:
        """The markers of `units` that it has not given yet, one after another; none is kept. Who
        stops at one without asking for the next is given it again.

        Raises MarkerFault at one of another fingerprint than was checked.
        """
        new = sorted(self.units - self._read)
        read = self.some([unit for unit in new if unit not in self._checked])
        for unit in new:
            marker = self._checked.pop(unit, None) or next(read)
            if self._wanted is not None and marker.fingerprint != self._wanted[0]:
                raise MarkerFault(self._changed([marker], self._wanted[1]))
            yield marker
            self._read.add(unit)

    def done(self) -> dict[str, Marker]:
        """The markers of all committed units, in memory: for stages of few units."""
        self.look()
        return {marker.unit: marker for marker in self.some(sorted(self.units))}

    def each(self) -> Iterator[Marker]:
        """Every marker, one after the other and none of them kept: for totals over many units."""
        self.look()
        return self.some(sorted(self.units))

    def some(self, units: Iterable[str], alike: bool = False) -> Iterator[Marker]:
        """The markers of these committed units, in this order, read side by side, some at a time;
        `alike`: UserError at one of another fingerprint than the first.
        """
        paths = (self.path(unit) for unit in units)
        first: Marker | None = None
        while part := list(itertools.islice(paths, _AT_ONCE)):
            for path, data in self.storage.read_many(part).items():
                marker = self._parse(path, data)
                first = first or marker
                if alike and marker.fingerprint != first.fingerprint:
                    raise UserError(self._changed([marker], first.settings))
                yield marker

    def get(self, unit: str) -> Marker | None:
        """The unit's marker, or None where it is not committed."""
        if not self.storage.exists(self.path(unit)):
            return None
        path = self.path(unit)
        return self._parse(path, self.storage.read_bytes(path))

    def _parse(self, path: str, data: bytes) -> Marker:
        marker = Marker.parse(data, self.storage.url(path))
        # one copy of what all the markers of a stage repeat
        marker.settings = self._settings.setdefault(marker.fingerprint, marker.settings)
        return marker

    def commit(self, unit: str, marker: Marker) -> None:
        self.storage.write_json(self.path(unit), asdict(marker))

    @contextlib.contextmanager
    def deaths(self, unit: str, replaced: bool) -> Iterator[None]:
        """Count the workers that die in the block; UnitFault for a unit that always kills them.

        A worker that stands in for one that died (`replaced`) notes each unit before it makes it:
        a note of its own kind that is still there tells of a death in that unit.
        """
        path = f"{self.stage_name}/_deaths/{unit}"
        noted = replaced and self.storage.exists(path)
        died = int(self.storage.read_bytes(path)) if noted else 0
        if died >= _MOST_DEATHS:
            self.storage.delete(path)
            raise UnitFault(
                f"its worker died {died + 1} times, most often for want of memory; give the stage "
                "a smaller batch"
            )
        if replaced:
            self.storage.write_bytes(path, str(died + 1).encode())
        try:
            yield
        finally:  # what is raised is no death
            if replaced:
                self.storage.delete(path)

    def check(self, fingerprint: str, settings: Mapping[str, Any], redo: bool = False) -> None:
        """List the committed units, and see that this run may build on them; nothing is deleted.

        Where a marker's fingerprint differs, raises UserError naming what changed; with `redo` the
        ledger is `stale` instead, until `forget_others`. A run refuses to mix fingerprints, and
        makes no unit before it has forgotten all others, so of very many units some markers, spread
        over all, stand for the rest; those are compared when they are read (`news`).
        """
        self._wanted = fingerprint, settings
        self.look()
        units = sorted(self.units)
        step = -(-len(units) // _CHECKED) or 1
        self._checked = {marker.unit: marker for marker in self.some(units[::step])}
        stale = [m for m in self._checked.values() if m.fingerprint != fingerprint]
        self.stale = bool(stale)
        if stale and not redo:
            raise UserError(self._changed(stale, settings))

    def forget_others(self, fingerprint: str) -> None:
        """Make every unit undone whose marker has another fingerprint: it will be made again."""
        if self._wanted is None:
            self.look()
        elif not self.stale:
            return
        for marker in self.some(sorted(self.units)):
            if marker.fingerprint != fingerprint:
                self.forget(marker.unit)
        self.stale = False

    def forget(self, unit: str) -> None:
        """Make a unit undone; nothing happens if it is."""
        self.storage.delete(self.path(unit))
        for units in (self.units, self._read):
            units.discard(unit)
        self._checked.pop(unit, None)

    def _changed(self, stale: list[Marker], settings: Mapping[str, Any]) -> str:
        before, now = _flat(stale[0].settings), _flat(settings)
        names = [key for key in {**before, **now} if before.get(key) != now.get(key)]
        what = ", ".join(
            f"{key} (was {_short(before.get(key))}, now {_short(now.get(key))})"
            for key in names[:3]
        )
        what = what or "what they were made from"
        return (
            f"{self.storage.url(self.stage_name)}: {len(stale)} finished unit(s) were made with "
            f"other settings; changed: {what}; set it back, use another --root, or add "
            f"--redo {self.stage_name}"
        )


class _MadeMeanwhile(Exception):
    """Another worker, taken for dead or of another run, has committed the unit."""


def run_unit(stage: Stage, unit: str, storage: Storage, fingerprint: str) -> Marker:
    """Make one unit, unless it is committed already: publish, check the rows, commit.

    A stage that writes nothing to its sink (the filter, whose outputs are many) publishes nothing.
    """
    ledger = Ledger(storage, stage.name)
    marker = ledger.get(unit)
    if marker is not None:
        if marker.fingerprint != fingerprint:
            raise UserError(ledger._changed([marker], stage.settings))
        return marker
    started = time.monotonic()
    path = f"{stage.name}/{unit}.parquet"
    try:
        with storage.publish(path) as sink:
            tally = stage(unit, storage, cast(BinaryIO, sink))
            tally.check()
            if ledger.get(unit) is not None:  # of two makers the first counts, whole
                raise _MadeMeanwhile
    except _MadeMeanwhile:
        return run_unit(stage, unit, storage, fingerprint)
    if sink.bytes:
        _check_rows(storage, path, tally.kept, "kept")
    if stage.source is not None:
        _check_rows(storage, f"{stage.source}/{unit}.parquet", tally.rows_in, "rows_in")
    marker = Marker(
        unit=unit,
        stage=stage.name,
        fingerprint=fingerprint,
        settings=stage.settings,
        tally=tally,
        bytes=sink.bytes,
        sha256=sink.sha256,
        seconds=round(time.monotonic() - started, 3),
        finished=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    ledger.commit(unit, marker)
    return marker


def chain(stages: Iterable[Stage], upstream: str | None = None) -> dict[str, str]:
    """Fingerprint of every stage of a row of stages, each over the one before it."""
    prints: dict[str, str] = {}
    for stage in stages:
        upstream = prints[stage.name] = fingerprint(stage, upstream)
    return prints


def _check_rows(storage: Storage, path: str, expected: int, what: str) -> None:
    with storage.open_input(path) as file:
        rows = pq.ParquetFile(file).metadata.num_rows
    if rows != expected:
        raise RuntimeError(
            f"{storage.url(path)} has {rows} rows, but the tally's {what} is {expected}"
        )


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = list(value) if isinstance(value, tuple) else value
    return flat


def _short(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 40 else text[:37] + "..."
