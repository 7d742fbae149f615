"""Metadata -> units: conditions, exact dedup, a seeded shuffle and split; every row accounted for.

The stage plans and adds up; the work is spread over tasks that read and write storage: a scan of
every part of the input (scan.py), then dedup and dealing, range by range (dealing.py). What they
set aside lies under scan/ until the units are committed.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import cached_property, partial
from typing import Any, BinaryIO

import numpy as np
import pyarrow.parquet as pq

from pipeline.config import FilterConfig
from pipeline.curation.filtering import score_table
from pipeline.curation.filtering.conditions import SCORE_EDGES
from pipeline.curation.filtering.dealing import (
    RANGE_ROWS,
    Dealer,
    Dealt,
    deal_all,
    ranges_for,
)
from pipeline.curation.filtering.scan import PART_ROWS, Scan, footers, parts_of, schema_of
from pipeline.curation.filtering.schemas import (
    Mapped,
    SchemaReport,
    map_schema,
    map_scores,
    passed_through,
)
from pipeline.errors import UserError
from pipeline.progress import say
from pipeline.storage import Storage, glob
from pipeline.tasks import TASK_BYTES, Spread, in_turn
from pipeline.units import Ledger, Marker, Tally, fingerprint, run_unit

UNIT = "_all"
"""The filter is one unit of this name; its marker's extra lists the units that it made."""

_READERS = 16
_END_BYTES = 1 << 16
_NOT_SHAPING = ("inputs", "score_inputs")


class Filter:
    """The stage "units". Raises UserError, before any work, for metadata that it cannot judge."""

    name = "units"
    source: str | None = None

    def __init__(
        self,
        cfg: FilterConfig,
        inputs: Sequence[str] | None = None,
        spread: Spread = in_turn,
        part_rows: int = PART_ROWS,
        range_rows: int = RANGE_ROWS,
    ) -> None:
        """`inputs` are files, folders or globs; none = those of `cfg`. `part_rows` and `range_rows`
        bound what a task holds: they and the input decide the units' bytes, `spread` does not.
        """
        self.cfg, self.spread = cfg, spread
        self.part_rows, self.range_rows = part_rows, range_rows
        self.files, found = _identified(inputs or cfg.inputs)
        self.score_files, of_scores = _identified(cfg.score_inputs)
        if not self.files:
            raise UserError("no metadata to filter; name Parquet files with --filter.inputs")
        self.settings: dict[str, Any] = {
            "inputs": found,
            "score_inputs": of_scores if self.score_files else None,
            **{key: value for key, value in asdict(cfg).items() if key not in _NOT_SHAPING},
        }

    def __call__(self, unit: str, storage: Storage, sink: BinaryIO) -> Tally:
        found, mapped = self.look()
        report = SchemaReport()
        for url, one in mapped.items():
            report.add(url.rpartition("/")[2], one)
        for line in report.lines():
            say(f"metadata: {line}")
        scan = Scan(self.cfg, parts_of(found, self.part_rows), mapped, self.settings)
        if self.score_files:
            mark = fingerprint(self, None)
            scan.scores = score_table.build(self.cfg, self._tables, storage, self.spread, mark)
        scans = self.scan(scan, storage)
        dropped: Counter[str] = Counter()
        for marker in scans:
            dropped.update(marker.tally.dropped)
        rows_in = sum(marker.tally.rows_in for marker in scans)
        kept = sum(marker.tally.kept for marker in scans)
        dealer = Dealer(
            storage,
            tuple(f"{scan.name}/{marker.unit}.parquet" for marker in scans),
            self.cfg,
            ranges_for(kept, self.range_rows),
            tuple(next(iter(mapped.values())).passed),
        )
        dealt = Dealt()
        if kept and dealer.ranges == 1:  # a task less for every step
            [dealt] = self.spread(partial(deal_all, spread=in_turn), [dealer], "deal")
        elif kept:
            dealt = deal_all(dealer, self.spread)
        dropped.update(dealt.dropped)
        if not any(name.startswith("train") for name in dealt.units):
            raise UserError(_nothing_left(rows_in, dealt.rows, dropped))
        delete_other_units(storage, dealt.units)
        return Tally(
            rows_in=rows_in,
            kept=dealt.rows,
            dropped={reason: rows for reason, rows in sorted(dropped.items()) if rows},
            extra={
                "units": dealt.units,
                "schemas": report.to_json(),
                "scores": {
                    "edges": SCORE_EDGES,
                    "rows": np.sum([m.tally.extra["scores"] for m in scans], axis=0).tolist(),
                },
            },
        )

    def clear(self, storage: Storage) -> None:
        """Delete what the tasks set aside; to be called when the unit is committed."""
        storage.delete("scan")

    def look(self) -> tuple[dict[str, pq.FileMetaData], dict[str, Mapped]]:
        """Every file's footer, and how its columns map to ours. Raises UserError for metadata that
        cannot be judged; changes nothing. The files are read once.
        """
        return self._looked

    @cached_property
    def _looked(self) -> tuple[dict[str, pq.FileMetaData], dict[str, Mapped]]:
        found = footers(self.files)
        mapped = {url: map_schema(schema_of(found[url]), self.cfg, url) for url in self.files}
        passed = passed_through(self.cfg, list(mapped.values()))
        self._tables  # noqa: B018 (refuses too)
        return found, {url: replace(one, passed=passed) for url, one in mapped.items()}

    @cached_property
    def _tables(self) -> dict[str, Mapped]:
        """How the columns of the score table's files map to ours."""
        found = footers(self.score_files)
        return {url: map_scores(schema_of(found[url]), self.cfg, url) for url in found}

    def scan(self, scan: Scan, storage: Storage) -> list[Marker]:
        """Judge the parts that are not judged yet; the markers of all."""
        mark = fingerprint(scan, None)
        ledger = Ledger(storage, scan.name)
        ledger.check(mark, scan.settings, redo=True)
        ledger.forget_others(mark)
        if not ledger.units:  # nothing to go on with
            storage.delete("rejects")
        work = partial(_run_part, storage=storage, fingerprint=mark)
        memory = TASK_BYTES + (scan.scores.memory if scan.scores else 0)
        return list(self.spread(work, [scan.of(unit) for unit in scan.parts], "scan", memory))


def _run_part(scan: Scan, storage: Storage, fingerprint: str) -> Marker:
    [unit] = scan.parts
    return run_unit(scan, unit, storage, fingerprint)


def delete_other_units(storage: Storage, units: list[str]) -> None:
    """Delete units of an earlier filter with other settings, which nobody would read again."""
    wanted = {f"units/{unit}.parquet" for unit in units}
    for path in storage.list("units"):
        if path.endswith(".parquet") and path not in wanted:
            storage.delete(path)


def _nothing_left(rows_in: int, test_rows: int, dropped: Mapping[str, int]) -> str:
    if test_rows:
        return (
            f"all {test_rows} rows that pass the filter are held out for the test split; lower "
            "--filter.test_rows or give more metadata"
        )
    most = Counter(dropped).most_common()
    why = ", ".join(f"{reason} {number}" for reason, number in most if number)
    why = why or "there are none"
    return f"none of {rows_in} metadata rows passes the filter ({why}); loosen --filter.*"


def _identified(entries: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """Parquet files in an order that does not depend on where they lie, and which metadata they
    are: names, sizes, and a hash of the ends, where Parquet has its statistics.
    """
    urls = sorted({url for entry in entries for url in glob(entry)})

    def identity(url: str) -> tuple[str, int, str]:
        storage, name = Storage.for_path(url)
        with storage.open_input(name) as file:
            size = file.size()
            file.seek(max(0, size - _END_BYTES))
            return name, size, hashlib.sha256(file.read()).hexdigest()

    with ThreadPoolExecutor(_READERS) as pool:
        found = sorted(zip(pool.map(identity, urls), urls, strict=True))
    named = [entry for entry, _ in found]
    digest = hashlib.sha256(json.dumps(named).encode()).hexdigest()[:16]
    size = sum(size for _, size, _ in named)
    return [url for _, url in found], {"files": len(urls), "bytes": size, "sha256": digest}
