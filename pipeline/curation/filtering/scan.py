"""Metadata files -> survivors: each part of the input is judged by itself, in a task of its own.

A part is a run of row groups of at most `PART_ROWS` rows: several small files, or a piece of a
large one. Parts are a matter of the input alone, so what they leave is the same on any cluster.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config import FilterConfig
from pipeline.curation.filtering import spill
from pipeline.curation.filtering.conditions import SCORE_EDGES, Judge
from pipeline.curation.filtering.schemas import SOURCE_KEY, Mapped
from pipeline.curation.filtering.score_table import ScoreTable
from pipeline.curation.urls import keys_of
from pipeline.errors import UserError
from pipeline.storage import Storage
from pipeline.storage_faults import public
from pipeline.units import Tally

PART_ROWS = 1_000_000
_READERS = 16
_NEARBY_BYTES = 1 << 20
_RANK_BITS = 32  # of a row's place in its part; the part's number stands above


@dataclass(frozen=True)
class Slice:
    """Rows `start` to `start + rows` of one file: its row groups `groups[0]` to `groups[1] - 1`."""

    url: str
    start: int
    rows: int
    groups: tuple[int, int]
    whole: bool


def footers(urls: Sequence[str]) -> dict[str, pq.FileMetaData]:
    """Every file's footer, read side by side. Raises UserError for one that is no Parquet file."""

    def of(url: str) -> pq.FileMetaData:
        storage, name = Storage.for_path(url)
        try:
            with storage.open_input(name) as file:
                return pq.ParquetFile(file).metadata
        except (ValueError, OSError) as error:  # pyarrow's ArrowInvalid is a ValueError
            raise UserError(
                f"{public(url)} is no readable Parquet file ({str(error).splitlines()[0][:120]})"
            ) from None

    with ThreadPoolExecutor(_READERS) as pool:
        return dict(zip(urls, pool.map(of, urls), strict=True))


def schema_of(footer: pq.FileMetaData) -> dict[str, pl.DataType]:
    """The columns of a file and their types, as polars sees them."""
    empty = pl.from_arrow(footer.schema.to_arrow_schema().empty_table())
    assert isinstance(empty, pl.DataFrame)
    return dict(empty.schema)


def parts_of(
    found: Mapping[str, pq.FileMetaData], part_rows: int = PART_ROWS
) -> dict[str, list[Slice]]:
    """Part id -> its slices, in the order of the files."""
    parts: list[list[Slice]] = []
    room = 0
    for url, footer in found.items():
        for piece in _slices(url, footer, part_rows):
            if piece.rows > room:
                parts.append([])
                room = part_rows
            parts[-1].append(piece)
            room -= piece.rows
    return {f"part-{number:05d}": slices for number, slices in enumerate(parts)}


def _slices(url: str, footer: pq.FileMetaData, part_rows: int) -> Iterator[Slice]:
    """A file in runs of row groups of at most `part_rows` rows; a larger row group in pieces."""
    first = start = held = 0
    sizes = [footer.row_group(i).num_rows for i in range(footer.num_row_groups)]
    for index, size in enumerate(sizes):
        held += size
        if index + 1 < len(sizes) and held + sizes[index + 1] <= part_rows:
            continue
        while held:
            rows = min(held, part_rows)
            whole = rows == footer.num_rows
            yield Slice(url, start, rows, (first, index + 1), whole)
            start, held = start + rows, held - rows
        first = index + 1


class Scan:
    """One part of the metadata -> its survivors, sorted by their place in the shuffle.

    Columns: order (uint64: a seeded hash of the key, the place), rank (uint64: the place in the
    input), key (uint64), those of schemas.TYPES, and those that pass through.
    """

    name = "scan"
    source: str | None = None

    def __init__(
        self,
        cfg: FilterConfig,
        parts: Mapping[str, Sequence[Slice]],
        mapped: Mapping[str, Mapped],
        settings: dict[str, Any],
        scores: ScoreTable | None = None,
    ) -> None:
        self.cfg, self.parts, self.mapped, self.scores = cfg, parts, mapped, scores
        self.settings = settings

    def of(self, unit: str) -> Scan:
        """The stage for this unit alone, which is all that a worker has to be sent."""
        slices = self.parts[unit]
        mapped = {piece.url: self.mapped[piece.url] for piece in slices}
        return Scan(self.cfg, {unit: slices}, mapped, self.settings, self.scores)

    def __call__(self, unit: str, storage: Storage, sink: BinaryIO) -> Tally:
        tally = Tally(sum(piece.rows for piece in self.parts[unit]), 0)
        scores = np.zeros(len(SCORE_EDGES) - 1, np.int64)
        kept, rejected = [], []
        for piece in self.parts[unit]:
            judge = Judge(self.cfg, self.mapped[piece.url])
            rows, rejects = self._judged(piece, judge)
            if self.scores is not None:
                rows, rejects = self._scored(rows, rejects, judge, storage)
            kept.append(rows.drop(SOURCE_KEY, strict=False))
            rejected += [
                (reason, frame.drop(SOURCE_KEY, strict=False)) for reason, frame in rejects
            ]
            for reason, count in judge.dropped.items():
                if count:
                    tally.dropped[reason] = tally.dropped.get(reason, 0) + count
            scores += judge.scores
        survivors = self._placed(pl.concat(kept), int(unit.rpartition("-")[2]))
        spill.write(sink, survivors, "order")
        if rejected and self.cfg.write_rejects:
            told = [rows.with_columns(pl.lit(why).alias("reason")) for why, rows in rejected]
            write_rejects(storage, unit, pl.concat(told))
        tally.kept = survivors.height
        tally.extra["scores"] = scores.tolist()
        return tally

    def _judged(
        self, piece: Slice, judge: Judge
    ) -> tuple[pl.DataFrame, list[tuple[str, pl.DataFrame]]]:
        mapped = self.mapped[piece.url]
        columns = mapped.select()
        if SOURCE_KEY in mapped.columns:
            columns.append(mapped.column(SOURCE_KEY))
        rejects: list[tuple[str, pl.DataFrame]] = []
        try:
            with _frame(piece, mapped) as frame:
                if self.cfg.write_rejects:  # every string of every row: not the fast way
                    everything = frame.select(*columns, judge.numbers().alias("passes")).collect()
                    rows = everything.filter("passes").drop("passes")
                    others = everything.filter(~pl.col("passes")).drop("passes")
                    reasons = judge.reasons(others)
                    rejects += [(why, others.filter(reasons == why)) for why in reasons.unique()]
                else:
                    rows = frame.filter(judge.numbers()).select(columns).collect()
                if judge.seen != piece.rows:  # some plans have polars ask it more than once a row
                    judge.count(frame)
        except (pl.exceptions.PolarsError, pa.ArrowException, OSError) as error:
            line = " ".join(str(error).split())[:200]
            raise UserError(
                f"{public(piece.url)} cannot be read to its end ({line}); replace it, or leave it "
                "out"
            ) from error
        rows, others_by_reason = judge.strings(rows)
        return rows, rejects + others_by_reason

    def _scored(
        self,
        rows: pl.DataFrame,
        rejects: list[tuple[str, pl.DataFrame]],
        judge: Judge,
        storage: Storage,
    ) -> tuple[pl.DataFrame, list[tuple[str, pl.DataFrame]]]:
        """Join the scores: a row that the table does not hold above the bound is dropped."""
        assert self.scores is not None
        found = self.scores.look_up(rows, storage)
        missing = np.isnan(found)
        judge.dropped["no_joined_score"] += int(missing.sum())
        rejects = [*rejects, ("no_joined_score", rows.filter(missing))]
        scored = rows.with_columns(pl.Series("aesthetic", found, pl.Float32))
        return scored.filter(~missing), rejects

    def _placed(self, rows: pl.DataFrame, part: int) -> pl.DataFrame:
        keys = keys_of(rows["url"])
        order = spill.mixed(keys, self.cfg.seed, 1)
        rank = (np.uint64(part) << np.uint64(_RANK_BITS)) + np.arange(rows.height, dtype=np.uint64)
        placed = rows.select(
            pl.Series("order", order), pl.Series("rank", rank), pl.Series("key", keys), pl.all()
        )
        return placed[np.argsort(order, kind="stable")]


def write_rejects(storage: Storage, name: str, rejected: pl.DataFrame) -> None:
    """rejects/<name>.parquet: dropped rows, each with its reason; nothing where there are none."""
    if rejected.height:
        with storage.publish(f"rejects/{name}.parquet") as sink:
            pq.write_table(rejected.to_arrow(), sink, compression="zstd")


@contextlib.contextmanager
def _frame(piece: Slice, mapped: Mapped) -> Iterator[pl.LazyFrame]:
    """The slice as polars scans it; of a remote file, a local copy of the bytes that it needs."""
    # polars would bring its own client and credentials: remote bytes come by the storage seam
    storage, name = Storage.for_path(piece.url)
    spans = None if storage.local else _spans(storage, name, piece, mapped)
    with storage.local_copy(name, spans) as path:
        frame = pl.scan_parquet(path, glob=False, hive_partitioning=False)
        yield frame if piece.whole else frame.slice(piece.start, piece.rows)


def _spans(storage: Storage, name: str, piece: Slice, mapped: Mapped) -> list[tuple[int, int]]:
    """Byte ranges [start, end): the footer, and of the row groups the columns that are read."""
    size = storage.size(name)
    with storage.open_input(name) as file:
        footer = pq.ParquetFile(file).metadata
    wanted = {column for column, _ in mapped.columns.values()}
    spans = [(0, 4), (size - footer.serialized_size - 8, size)]
    for index in range(*piece.groups):
        group = footer.row_group(index)
        for number in range(group.num_columns):
            chunk = group.column(number)
            if chunk.path_in_schema.partition(".")[0] in wanted:
                offsets = [chunk.data_page_offset, chunk.dictionary_page_offset]
                start = min(offset for offset in offsets if offset)
                spans.append((start, start + chunk.total_compressed_size))
    joined: list[tuple[int, int]] = []
    for start, stop in sorted(spans):
        if joined and start - joined[-1][1] < _NEARBY_BYTES:
            joined[-1] = joined[-1][0], max(stop, joined[-1][1])
        else:
            joined.append((start, stop))
    return joined
