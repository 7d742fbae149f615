"""A further try for downloads that failed in passing: their rows, dealt into units of their own.

A round is one more marker of the stage "units", `units/_done/retry-1.json`, and is like the
filter's from there on: every stage makes its units, and sealing joins them. A finished unit gives
its rows to one round at most, so that no row is in flight twice. What a round leaves, the next one
may take.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.accounts import CAUSES, RETRIED, split_of
from pipeline.curation.downloading import outcomes
from pipeline.curation.seal import SCORES, STAGES
from pipeline.progress import say
from pipeline.storage import Storage
from pipeline.units import Ledger, Marker, Stage, Tally, fingerprint, run_unit

_READERS = 16


def units(
    storage: Storage,
    filtered: Marker,
    images: Stage,
    again: bool = False,
    ledgers: Sequence[Ledger] = (),
) -> list[str]:
    """The units of the run, those of retries included; with `again` a new round is dealt first.

    While an earlier round is unfinished there is no new one: the run goes on with that. `images` is
    the download stage, `ledgers` those of the run's stages, if they have been listed already.
    """
    mark = fingerprint(images, filtered.fingerprint)
    known = {ledger.stage_name: ledger for ledger in ledgers}
    if images.name not in known:
        known[images.name] = Ledger(storage, images.name)
        known[images.name].check(mark, images.settings, redo=True)
    downloads = known[images.name]
    rounds = _rounds(storage, filtered.fingerprint, mark, known)
    made = [unit for marker in [filtered, *rounds] for unit in marker.tally.extra["units"]]
    if not again:
        return made
    retried = [unit for marker in rounds for unit in marker.tally.extra["units"]]
    waiting = [unit for unit in retried if unit not in downloads.units]
    if waiting:
        say(f"retry:    goes on with round {len(rounds)}, {len(waiting)} of its units are left")
        return made
    taken = {unit for marker in rounds for unit in marker.tally.extra[RETRIED]}
    left = [unit for unit in made if unit in downloads.units and unit not in taken]
    sources = [
        marker
        for marker in map(_slim, downloads.some(left))
        if marker.fingerprint == mark and marker.tally.extra["transient"]
    ]
    if not sources:
        say("retry:    nothing to retry: no download that is left failed in passing")
        return made
    stage = _Round(len(rounds) + 1, sources, filtered)
    marker = run_unit(stage, stage.unit, storage, filtered.fingerprint)
    new = marker.tally.extra["units"]
    say(
        f"retry:    round {stage.number} takes {marker.tally.rows_in:,} rows that failed in passing"
        f", as {len(new)} new unit(s); if this run stops, the same command goes on with them"
    )
    return [*made, *new]


def _slim(marker: Marker) -> Marker:
    """What a round needs of a download's marker: hosts and histograms of a million would not fit.

    Changes it.
    """
    extra = marker.tally.extra
    marker.tally.extra = {name: extra.get(name) for name in ("transient", "outcomes")}
    return marker


def _rounds(
    storage: Storage, filtered: str, mark: str, known: Mapping[str, Ledger]
) -> list[Marker]:
    """The rounds in their order; those whose rows came from units that are no more are undone.
    `filtered` and `mark` are the fingerprints of the filter and of the downloads.
    """
    ledger, downloads = Ledger(storage, "units"), known[STAGES[1]]
    found = [
        marker
        for marker in ledger.done().values()
        if RETRIED in marker.tally.extra and marker.fingerprint == filtered
    ]
    kept: list[Marker] = []
    for marker in sorted(found, key=lambda marker: int(marker.tally.extra["round"])):
        sources = marker.tally.extra[RETRIED]
        there = downloads.some(unit for unit in sources if unit in downloads.units)
        ended = {m.unit: m.tally.extra.get("outcomes") for m in there if m.fingerprint == mark}
        if len(kept) + 1 == marker.tally.extra["round"] and ended == sources:
            kept.append(marker)
            continue
        say(f"retry:    {marker.unit} is dropped: the units that it came from are made anew")
        for stage in reversed([*STAGES[1:], SCORES]):
            for unit in marker.tally.extra["units"]:
                known.get(stage, Ledger(storage, stage)).forget(unit)
        ledger.forget(marker.unit)
    return kept


class _Round:
    """Deals the rows of one round; a stage, so that the runner commits and counts it."""

    name = "units"
    source: str | None = None

    def __init__(self, number: int, sources: list[Marker], filtered: Marker) -> None:
        self.number, self.sources = number, sources
        self.settings: dict[str, Any] = filtered.settings
        self.unit = f"retry-{number}"

    def __call__(self, unit: str, storage: Storage, sink: BinaryIO) -> Tally:
        size = max(marker.tally.rows_in for marker in self.sources)
        made, rows = [], 0
        for split in dict.fromkeys(split_of(marker.unit) for marker in self.sources):
            sources = [marker for marker in self.sources if split_of(marker.unit) == split]
            for index, table in enumerate(_chunks(_failed(storage, sources), size)):
                made.append(f"{split}-r{self.number}-{index:05d}")
                rows += len(table)
                with storage.publish(f"units/{made[-1]}.parquet") as file:
                    pq.write_table(table, file, compression="zstd")
        taken = {marker.unit: marker.tally.extra["outcomes"] for marker in self.sources}
        causes: Counter[str] = Counter()
        for marker in self.sources:
            causes.update(marker.tally.extra["transient"])
        extra = {"units": made, "round": self.number, RETRIED: taken, CAUSES: dict(causes)}
        return Tally(rows, rows, extra=extra)


def _failed(storage: Storage, sources: list[Marker]) -> Iterator[pa.Table]:
    """Of each source, whole rows of its unit whose download failed in passing."""

    def read(marker: Marker) -> pa.Table:
        ended = outcomes.load(storage, marker)
        again = pc.and_(ended["transient"], pc.invert(ended["rule"]))
        with storage.open_input(f"units/{marker.unit}.parquet") as file:
            return pq.read_table(file).filter(again)  # outcomes are in the unit's order

    with ThreadPoolExecutor(_READERS) as pool:
        for start in range(0, len(sources), _READERS):
            yield from pool.map(read, sources[start : start + _READERS])


def _chunks(tables: Iterator[pa.Table], size: int) -> Iterator[pa.Table]:
    """The tables' rows, `size` at a time."""
    waiting: list[pa.Table] = []
    for table in tables:
        waiting.append(table)
        if sum(len(part) for part in waiting) >= size:
            joined = pa.concat_tables(waiting)
            yield joined.slice(0, size)
            waiting = [joined.slice(size)]
    if sum(len(part) for part in waiting):
        yield pa.concat_tables(waiting)
