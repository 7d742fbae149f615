"""Metadata -> units: conditions, exact dedup, a seeded shuffle and split; every row accounted for.

Two steps, so that the first can become a task per file: `scan_file` reads one file and counts what
it drops; `Filter` joins the files' survivors, which are few, and deals them into units.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from pipeline.config import FilterConfig
from pipeline.curation.schemas import TYPES, Mapped, SchemaReport, map_schema
from pipeline.errors import UserError
from pipeline.progress import say
from pipeline.storage import Storage, glob
from pipeline.storage_faults import public
from pipeline.units import Tally

UNIT = "_all"
"""The filter is one unit of this name; its marker's extra lists the units that it made."""

_READERS = 16
_SCORE_BINS = [float(edge) for edge in np.arange(0.0, 10.5, 0.5)]


@dataclass
class Scanned:
    """One metadata file: its surviving rows in file order, and where the others went."""

    rows_in: int
    kept: pl.DataFrame
    dropped: Counter[str]
    scores: list[int]
    """Rows per bin of 0.5 of the aesthetic score, all rows with one; from 0 to 10."""


class Filter:
    """The stage "units". Raises UserError, before any work, for metadata that it cannot judge."""

    name = "units"
    source: str | None = None

    def __init__(self, cfg: FilterConfig, inputs: Sequence[str] | None = None) -> None:
        """`inputs` are files, folders or globs; none = those of `cfg`."""
        self.cfg = cfg
        self.files = sorted({url for entry in inputs or cfg.inputs for url in glob(entry)})
        if not self.files:
            raise UserError("no metadata to filter; name Parquet files with --filter.inputs")
        self.settings: dict[str, Any] = {
            "inputs": _identity(self.files),
            "min_aesthetic": cfg.min_aesthetic,
            "predictor": cfg.predictor,
            "max_punsafe": cfg.max_punsafe,
            "max_pwatermark": cfg.max_pwatermark,
            "min_side": cfg.min_side,
            "unit_rows": cfg.unit_rows,
            "test_rows": cfg.test_rows,
            "max_rows": cfg.max_rows,
            "seed": cfg.seed,
        }

    def __call__(self, unit: str, storage: Storage, sink: BinaryIO) -> Tally:
        mapped, report = self.schemas()
        for line in report.lines():
            say(f"metadata: {line}")
        scans = [scan_file(url, mapped[url], self.cfg) for url in self.files]
        dropped: Counter[str] = Counter()
        for scan in scans:
            dropped.update(scan.dropped)
        rows = _deduplicated(pl.concat([scan.kept for scan in scans]), dropped)
        rows_in = sum(scan.rows_in for scan in scans)
        rows = _dealt(rows, self.cfg, dropped)
        train, test = rows.filter(split="train"), rows.filter(split="test")
        if not train.height:
            raise UserError(_nothing_left(rows_in, test.height, dropped))
        units = [
            *_write_units(test, "test", self.cfg.unit_rows, storage),
            *_write_units(train, "train", self.cfg.unit_rows, storage),
        ]
        _delete_others(storage, units)
        return Tally(
            rows_in=rows_in,
            kept=rows.height,
            dropped={reason: rows for reason, rows in sorted(dropped.items()) if rows},
            extra={
                "units": units,
                "schemas": report.to_json(),
                "scores": {
                    "edges": _SCORE_BINS,
                    "rows": np.sum([s.scores for s in scans], axis=0).tolist(),
                },
            },
        )

    def schemas(self) -> tuple[dict[str, Mapped], SchemaReport]:
        """How each file's columns map to ours, read from the footers alone."""
        with ThreadPoolExecutor(_READERS) as pool:
            found = list(pool.map(_read_schema, self.files))
        report = SchemaReport()
        mapped = {}
        for url, schema in zip(self.files, found, strict=True):
            mapped[url] = map_schema(schema, self.cfg.predictor, url)
            report.add(url.rpartition("/")[2], mapped[url])
        return mapped, report


def scan_file(url: str, mapped: Mapped, cfg: FilterConfig) -> Scanned:
    """Judge one file's rows, each counted under the first condition that drops it.

    Two scans of one plan: the counts touch the judged columns only, and the strings are read only
    of rows that pass.
    """
    try:
        rows = _scan(url, mapped).select(mapped.select())
        rows = rows.with_columns(_reason(cfg).alias("reason"))
        counts = rows.group_by("reason").len()
        kept = rows.filter(pl.col("reason").is_null()).drop("reason")
        histogram = rows.select(
            pl.col("aesthetic").clip(0, 9.999).floordiv(0.5).cast(pl.Int32).alias("bin")
        )
        binned = histogram.group_by("bin").len()
        counted, survivors, bins = pl.collect_all([counts, kept, binned])
    except (pl.exceptions.PolarsError, pa.ArrowException, OSError) as error:
        line = " ".join(str(error).split())[:200]
        raise UserError(
            f"{public(url)} cannot be read to its end ({line}); replace it, or leave it out"
        ) from error
    total, dropped = 0, Counter[str]()
    for reason, number in counted.iter_rows():
        total += number
        if reason is not None:
            dropped[reason] += number
    scores = [0] * (len(_SCORE_BINS) - 1)
    for index, number in bins.iter_rows():
        if index is not None:
            scores[index] += number
    return Scanned(total, survivors, dropped, scores)


def _reason(cfg: FilterConfig) -> pl.Expr:
    """Why a row is dropped, the first of these; null where it is kept."""
    url, score = pl.col("url"), pl.col("aesthetic")
    small = pl.min_horizontal("width", "height") < cfg.min_side
    if cfg.min_side > 0:  # a row of unknown size cannot promise one
        small = small | pl.col("width").is_null() | pl.col("height").is_null()
    return (
        pl.when(url.is_null() | (url.str.len_bytes() == 0))
        .then(pl.lit("no_url"))
        .when(score.is_null())
        .then(pl.lit("no_score"))
        .when(score <= cfg.min_aesthetic)
        .then(pl.lit("low_aesthetic"))
        .when(pl.col("punsafe") >= cfg.max_punsafe)
        .then(pl.lit("unsafe"))
        .when(pl.col("pwatermark") >= cfg.max_pwatermark)
        .then(pl.lit("watermark"))
        .when(small)
        .then(pl.lit("small"))
        .otherwise(pl.lit(None, pl.String))
    )


def _deduplicated(rows: pl.DataFrame, dropped: Counter[str]) -> pl.DataFrame:
    """The first row of every url and of every hash (rows without a hash have none to repeat)."""
    rows = rows.with_columns(_normal_url().alias("normal"))
    first = rows.filter(pl.col("normal").is_first_distinct())
    dropped["duplicate_url"] += rows.height - first.height
    unique = first.filter(pl.col("hash").is_null() | pl.col("hash").is_first_distinct())
    dropped["duplicate_hash"] += first.height - unique.height
    return unique


def _normal_url() -> pl.Expr:
    """A url's identity: scheme and host in lower case, no fragment, no blanks around it."""
    url = pl.col("url").str.strip_chars()
    origin = url.str.extract(r"^([A-Za-z][A-Za-z0-9+.-]*://[^/?#]*)").str.to_lowercase()
    rest = url.str.extract(r"^[A-Za-z][A-Za-z0-9+.-]*://[^/?#]*([^#]*)")
    return pl.coalesce(origin + rest, url)


def _dealt(rows: pl.DataFrame, cfg: FilterConfig, dropped: Counter[str]) -> pl.DataFrame:
    """Rows in their shuffled order, cut at max_rows, with key, predictor and split.

    Order and split are hashes of (seed, key): they depend on no library's random stream, and a row
    keeps its place when others come or go.
    """
    urls = (xxhash.xxh3_64_intdigest(url.encode()) for url in rows["normal"])
    keys = np.fromiter(urls, np.uint64, rows.height)
    order = np.lexsort((keys, _mixed(keys, cfg.seed, 1)))
    if cfg.max_rows is not None and cfg.max_rows < rows.height:
        dropped["over_max_rows"] += rows.height - cfg.max_rows
        order = order[: cfg.max_rows]
    rows, keys = rows[order], keys[order]
    held_out = np.argsort(_mixed(keys, cfg.seed, 2), kind="stable")[: max(cfg.test_rows, 0)]
    split = np.full(rows.height, "train", object)
    split[held_out] = "test"
    return rows.select(
        pl.Series("key", [f"{key:016x}" for key in keys], pl.String),
        *[pl.col(name) for name in ("url", "alt_text", "aesthetic")],
        pl.lit(cfg.predictor).alias("predictor"),
        *[pl.col(name) for name in TYPES if name not in ("url", "alt_text", "aesthetic")],
        pl.Series("split", split, pl.String),
    )


def _mixed(keys: np.ndarray, seed: int, stream: int) -> np.ndarray:
    """splitmix64 of key and seed: uniform 64-bit numbers, the same on every machine."""
    salt = xxhash.xxh3_64_intdigest(f"{seed}/{stream}".encode())
    with np.errstate(over="ignore"):
        z = keys ^ np.uint64(salt)
        z = (z + np.uint64(0x9E3779B97F4A7C15)) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def _write_units(rows: pl.DataFrame, split: str, unit_rows: int, storage: Storage) -> list[str]:
    starts = range(0, rows.height, unit_rows)
    units = [f"{split}-{number:05d}" for number in range(len(starts))]
    for unit, start in zip(units, starts, strict=True):
        table = rows.slice(start, unit_rows).to_arrow()
        with storage.publish(f"units/{unit}.parquet") as sink:
            pq.write_table(table, sink, compression="zstd")
    return units


def _delete_others(storage: Storage, units: list[str]) -> None:
    """Delete units of an earlier filter with other settings, which nobody would read again."""
    wanted = {f"units/{unit}.parquet" for unit in units}
    for path in storage.list("units"):
        if path.endswith(".parquet") and path not in wanted:
            storage.delete(path)


def _nothing_left(rows_in: int, test_rows: int, dropped: Counter[str]) -> str:
    if test_rows:
        return (
            f"all {test_rows} rows that pass the filter are held out for the test split; lower "
            "--filter.test_rows or give more metadata"
        )
    why = ", ".join(f"{reason} {number}" for reason, number in dropped.most_common() if number)
    why = why or "there are none"
    return f"none of {rows_in} metadata rows passes the filter ({why}); loosen --filter.*"


def _scan(url: str, mapped: Mapped) -> pl.LazyFrame:
    if "://" not in url:
        return pl.scan_parquet(url)
    # polars would bring its own client and credentials: remote bytes come through the storage seam
    storage, name = Storage.for_path(url)
    with storage.open_input(name) as file:
        columns = [column for column, _ in mapped.columns.values()]
        table = pl.from_arrow(pq.ParquetFile(file, pre_buffer=True).read(columns=columns))
    assert isinstance(table, pl.DataFrame)
    return table.lazy()


def _read_schema(url: str) -> dict[str, pl.DataType]:
    storage, name = Storage.for_path(url)
    try:
        with storage.open_input(name) as file:
            schema = pq.ParquetFile(file).schema_arrow
            empty = pl.from_arrow(schema.empty_table())
    except (ValueError, OSError) as error:  # pyarrow's ArrowInvalid is a ValueError
        raise UserError(
            f"{url} is no readable Parquet file ({str(error).splitlines()[0][:120]})"
        ) from None
    assert isinstance(empty, pl.DataFrame)
    return dict(empty.schema)


def _identity(files: list[str]) -> dict[str, Any]:
    """Which metadata this is: names and sizes; where it lies does not matter."""

    def size(url: str) -> tuple[str, int]:
        storage, name = Storage.for_path(url)
        return name, storage.size(name)

    with ThreadPoolExecutor(_READERS) as pool:
        found = sorted(pool.map(size, files))
    digest = hashlib.sha256(json.dumps(found).encode()).hexdigest()[:16]
    return {"files": len(files), "bytes": sum(size for _, size in found), "sha256": digest}
