"""Survivors of the scan -> units: exact dedup, a seeded shuffle and split, a range at a time.

A row's `order` is a seeded hash of its key, that is of its normal url. So one range of the orders
holds every row of its urls, and is also a run of the shuffle: dedup by url, shuffle and dealing
need a single exchange, the scan's own spill. Dedup by LAION's hash needs a second one, of three
numbers a row. Order and split depend on no library's random stream, and a row keeps its place when
others come or go. No step holds more than a range of the rows, nor the driver any of them.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import polars as pl
import pyarrow.parquet as pq

from pipeline.config import FilterConfig
from pipeline.curation.filtering import spill
from pipeline.curation.filtering.scan import write_rejects
from pipeline.curation.filtering.schemas import TYPES
from pipeline.storage import Storage
from pipeline.tasks import Spread

RANGE_ROWS = 1_000_000
_FEW_VALUES = ["predictor", "language", "split"]


@dataclass
class Dealt:
    """What dealing made: unit ids (test first), the rows in them, and rows dropped by reason."""

    units: list[str] = field(default_factory=list)
    rows: int = 0
    dropped: Counter[str] = field(default_factory=Counter)


def ranges_for(rows: int, range_rows: int = RANGE_ROWS) -> int:
    """How many ranges hold about `range_rows` rows each: a power of two, of the input alone."""
    return 1 << max(0, -(-rows // range_rows) - 1).bit_length()


@dataclass(frozen=True)
class Survey:
    """What is left of one range after dedup, in numbers."""

    rows: int
    duplicate_url: int
    duplicate_hash: int
    candidates: np.ndarray
    """uint64, sorted: the lowest split numbers, at most as many as rows are held out."""

    @property
    def left(self) -> int:
        return self.rows - self.duplicate_url - self.duplicate_hash


@dataclass(frozen=True)
class Share:
    """What of a range goes into units: its first `limit` rows, those with a split number up to
    `threshold` into the test split (None = none); `first` numbers its units.
    """

    index: int
    limit: int
    threshold: int | None
    first: int


@dataclass(frozen=True)
class Dealer:
    """The steps, each for one range; every one leaves a file and gives numbers back."""

    storage: Storage
    scans: tuple[str, ...]
    """The scan's spills, in the order of the input."""
    cfg: FilterConfig
    ranges: int
    passed: tuple[str, ...] = ()
    """Columns that pass through."""

    def pairs(self, index: int) -> int:
        """Set aside the hashes of the first row of every url, sorted by a mix of the hash."""
        rows = self._first_rows(index, ["hash"])
        rows = rows.filter(pl.col("hash").is_not_null())
        mix = spill.mixed(rows["hash"].to_numpy().view(np.uint64), 0, 3)
        pairs = rows.select(pl.Series("mix", mix), "rank", "order").sort("mix", "rank")
        with self.storage.publish(self._path("pairs", index)) as sink:
            spill.write(sink, pairs, "mix")
        return rows.height

    def repeats(self, index: int) -> int:
        """Set aside the orders of rows whose hash an earlier row has."""
        paths = [self._path("pairs", number) for number in range(self.ranges)]
        columns = ["mix", "rank", "order"]
        pairs = spill.read(self.storage, paths, "mix", index, self.ranges, columns)
        pairs = pairs.sort("mix", "rank")
        repeated = pairs.filter(~pl.col("mix").is_first_distinct()).select("order").sort("order")
        with self.storage.publish(self._path("repeats", index)) as sink:
            spill.write(sink, repeated, "order")
        return repeated.height

    def survey(self, index: int, limit: int | None = None) -> Survey:
        """Count what is left, of the first `limit` rows if given."""
        rows = self._judged(index, [])
        repeated = dict(rows["reason"].value_counts().iter_rows())
        keys = rows.filter(pl.col("reason").is_null())["key"].to_numpy()[:limit]
        split = np.sort(spill.mixed(keys, self.cfg.seed, 2))[: self.cfg.test_rows]
        return Survey(
            rows.height, repeated.get("duplicate_url", 0), repeated.get("duplicate_hash", 0), split
        )

    def deal(self, share: Share) -> list[str]:
        """Write the range's train units, which are returned; set its test rows aside."""
        columns = [*TYPES, *self.passed]
        judged = self._judged(share.index, columns)
        rows = judged.filter(pl.col("reason").is_null()).drop("reason")
        over, rows = rows.slice(share.limit), rows.slice(0, share.limit)
        held_out = np.zeros(rows.height, bool)
        if share.threshold is not None:
            split = spill.mixed(rows["key"].to_numpy(), self.cfg.seed, 2)
            held_out = split <= np.uint64(share.threshold)
        units = self.write_units(rows.filter(~held_out), "train", share.first)
        with self.storage.publish(self._path("test", share.index)) as sink:
            spill.write(sink, rows.filter(held_out), "order")
        if self.cfg.write_rejects:
            repeats = judged.filter(pl.col("reason").is_not_null())
            over = over.with_columns(pl.lit("over_max_rows").alias("reason"))
            rejects = pl.concat([repeats, over]).drop("order", "rank", "key")
            write_rejects(self.storage, f"range-{share.index:05d}", rejects)
        return units

    def test_units(self, _: Any = None) -> list[str]:
        """The test rows of all ranges, which are few, as units."""
        paths = [self._path("test", number) for number in range(self.ranges)]
        columns = ["order", "key", *TYPES, *self.passed]
        rows = spill.read(self.storage, paths, "order", 0, 1, columns)
        return self.write_units(rows.sort("order"), "test", 0)

    def write_units(self, rows: pl.DataFrame, split: str, first: int) -> list[str]:
        """units/<split>-<number>.parquet of `unit_rows` rows each, numbered from `first`."""
        predictor = None if self.cfg.score == "computed" else self.cfg.predictor
        rows = rows.select(
            _hex(rows["key"]),
            *[pl.col(name) for name in ("url", "alt_text", "aesthetic")],
            pl.lit(predictor, pl.String).alias("predictor"),
            *[pl.col(name) for name in TYPES if name not in ("url", "alt_text", "aesthetic")],
            *[pl.col(name) for name in self.passed],
            pl.lit(split).alias("split"),
        )
        units = []
        whole = rows.to_arrow(compat_level=pl.CompatLevel.oldest())
        for number, start in enumerate(range(0, rows.height, self.cfg.unit_rows), first):
            units.append(f"{split}-{number:05d}")
            table = whole.slice(start, self.cfg.unit_rows)
            with self.storage.publish(f"units/{units[-1]}.parquet") as sink:
                pq.write_table(table, sink, compression="zstd", use_dictionary=_FEW_VALUES)
        return units

    def _first_rows(self, index: int, columns: list[str]) -> pl.DataFrame:
        """The first row of every url of a range, sorted by order."""
        return self._sorted(index, columns).filter(pl.col("order").is_first_distinct())

    def _judged(self, index: int, columns: list[str]) -> pl.DataFrame:
        """The rows of a range, sorted by order, with the `reason` that drops them, or null."""
        rows = self._sorted(index, columns)
        paths = [self._path("repeats", number) for number in range(self.ranges)]
        repeated = spill.read(self.storage, paths, "order", index, self.ranges, ["order"])
        reason = (
            pl.when(~pl.col("order").is_first_distinct())
            .then(pl.lit("duplicate_url"))
            .when(pl.col("order").is_in(repeated["order"].implode()))
            .then(pl.lit("duplicate_hash"))
        )
        return rows.with_columns(reason.alias("reason"))

    def _sorted(self, index: int, columns: list[str]) -> pl.DataFrame:
        names = ["order", "rank", "key", *columns]
        rows = spill.read(self.storage, self.scans, "order", index, self.ranges, names)
        return rows.sort("order", "rank")

    def _path(self, step: str, index: int) -> str:
        return f"scan/_{step}/{index:05d}.parquet"


def _hex(keys: pl.Series) -> pl.Series:
    """Keys as 16 hex digits."""
    digits = keys.to_numpy().astype(">u8").tobytes().hex()
    width = len(digits) // max(1, len(keys))
    parts = [digits[at : at + width] for at in range(0, len(digits), width or 1)]
    return pl.Series("key", parts, pl.String)


def deal_all(dealer: Dealer, spread: Spread) -> Dealt:
    """Every step, one after the other, each spread over the ranges."""
    every = list(range(dealer.ranges))
    list(spread(dealer.pairs, every, "urls"))
    list(spread(dealer.repeats, every, "hashes"))
    surveys = list(spread(dealer.survey, every, "survey"))
    cut, last = cut_range(surveys, dealer.cfg.max_rows), None
    if cut is not None:
        index, limit = cut
        [last] = spread(partial(dealer.survey, limit=limit), [index], "")
    shares = shares_of(surveys, last, dealer.cfg)
    train = spread(dealer.deal, shares, "deal")
    units = [unit for made in train for unit in made]
    [test] = spread(dealer.test_units, [None], "")
    rows = sum(share.limit for share in shares)
    dropped = Counter(
        duplicate_url=sum(survey.duplicate_url for survey in surveys),
        duplicate_hash=sum(survey.duplicate_hash for survey in surveys),
        over_max_rows=sum(survey.left for survey in surveys) - rows,
    )
    return Dealt([*test, *units], rows, dropped)


def shares_of(surveys: list[Survey], last: Survey | None, cfg: FilterConfig) -> list[Share]:
    """What each range gives: the first max_rows rows of all, of which the test_rows with the lowest
    split numbers are held out. `last` is the survey of the range that max_rows cuts, of its first
    rows alone.
    """
    limits, room = [], cfg.max_rows if cfg.max_rows is not None else sum(s.left for s in surveys)
    for survey in surveys:
        limits.append(min(survey.left, room))
        room -= limits[-1]
    candidates = [
        (last if last is not None and 0 < limit < survey.left else survey).candidates
        for survey, limit in zip(surveys, limits, strict=True)
        if limit
    ]
    lowest = np.sort(np.concatenate([np.zeros(0, np.uint64), *candidates]))[: cfg.test_rows]
    threshold = int(lowest[-1]) if len(lowest) else None
    shares, first, used = [], 0, iter(candidates)
    for index, limit in enumerate(limits):
        held_out = 0
        if limit and threshold is not None:
            held_out = int(np.searchsorted(next(used), np.uint64(threshold), side="right"))
        shares.append(Share(index, limit, threshold, first))
        first += -(-(limit - held_out) // cfg.unit_rows)
    return shares


def cut_range(surveys: list[Survey], max_rows: int | None) -> tuple[int, int] | None:
    """The range inside which max_rows ends, and how many of its rows are within."""
    room = max_rows if max_rows is not None else 0
    for index, survey in enumerate(surveys if max_rows is not None else []):
        if room < survey.left:
            return (index, room) if room else None
        room -= survey.left
    return None
