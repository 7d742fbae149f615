"""Rows set aside between the steps of the filter, sorted by a 64-bit number and read by its ranges.

However many rows there are, a reader holds one range of them: this is what bounds the memory of
dedup and shuffle. A spill is a Parquet file whose row groups are runs of the sorted column.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import xxhash

from pipeline.storage import Storage

_GROUP_ROWS = 4096
_MAX_GROUPS = 4096
_PAGE_BYTES = 16 << 20  # nobody reads less than a row group
_READERS = 8


def mixed(numbers: np.ndarray, seed: int, stream: int) -> np.ndarray:
    """splitmix64 of numbers and seed: uniform 64-bit numbers, the same on every machine.

    One number gives one number: what is equal before is equal after, and nothing else.
    """
    salt = xxhash.xxh3_64_intdigest(f"{seed}/{stream}".encode())
    with np.errstate(over="ignore"):
        z = numbers ^ np.uint64(salt)
        z = (z + np.uint64(0x9E3779B97F4A7C15)) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def bounds(index: int, ranges: int) -> tuple[int, int]:
    """First and last 64-bit number of range `index` of `ranges`."""
    width = 2**64 // ranges
    last = 2**64 - 1 if index == ranges - 1 else (index + 1) * width - 1
    return index * width, last


def write(sink: Any, rows: pl.DataFrame, by: str) -> None:
    """Write rows, already sorted by the uint64 column `by`, in runs of some thousands."""
    table = rows.to_arrow(compat_level=pl.CompatLevel.oldest())
    groups = min(_MAX_GROUPS, max(1, rows.height // _GROUP_ROWS))
    with pq.ParquetWriter(
        sink,
        table.schema,
        compression="lz4",
        write_statistics=[by],
        use_dictionary=False,
        data_page_size=_PAGE_BYTES,
        write_batch_size=_GROUP_ROWS,
    ) as out:
        numbers = rows[by].to_numpy()
        edges = [bounds(index, groups)[0] for index in range(1, groups)]
        cuts = [0, *np.searchsorted(numbers, np.array(edges, np.uint64)), rows.height]
        for start, stop in itertools.pairwise(cuts):
            if stop > start:
                out.write_table(table.slice(start, stop - start), row_group_size=stop - start)


def read(
    storage: Storage, paths: Sequence[str], by: str, index: int, ranges: int, columns: list[str]
) -> pl.DataFrame:
    """The rows of all spills whose `by` falls into the range: in the order of `paths`, and within
    one of them sorted by `by`.
    """
    first, last = bounds(index, ranges)

    def of(path: str) -> pl.DataFrame:
        with storage.open_input(path) as source, pq.ParquetFile(source, pre_buffer=True) as file:
            column = file.schema_arrow.get_field_index(by)
            runs = [
                file.metadata.row_group(i).column(column).statistics
                for i in range(file.num_row_groups)
            ]
            wanted = [i for i, run in enumerate(runs) if run.max >= first and run.min <= last]
            table = pl.from_arrow(file.read_row_groups(wanted, columns=columns, use_threads=False))
        assert isinstance(table, pl.DataFrame)
        return table.filter(pl.col(by).is_between(first, last))

    with ThreadPoolExecutor(_READERS) as pool:
        return pl.concat(pool.map(of, paths))
