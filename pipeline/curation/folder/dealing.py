"""Rows of one's own -> units: order and split follow seeded hashes of what a row is called."""

from __future__ import annotations

import hashlib

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config import FilterConfig
from pipeline.curation.filtering.metadata import delete_other_units
from pipeline.storage import Storage

ROW = pa.schema(
    [
        ("url", pa.string()),
        ("alt_text", pa.string()),
        ("aesthetic", pa.float32()),
        ("predictor", pa.string()),
    ]
)
"""What every row has."""
SHAPING = ("unit_rows", "test_rows", "max_rows", "seed")
"""Settings of the filter that count."""


def deal(storage: Storage, rows: pa.Table, cfg: FilterConfig) -> tuple[list[str], int]:
    """Write `rows` as units, in place of all that were there.

    Args:
        rows: of the schema ROW and what else the next stage wants; urls are distinct, and key,
            order and split follow from them.
        cfg: its unit_rows, test_rows, max_rows and seed count.

    Returns:
        The units, those of the test split first, and the number of rows in them.
    """
    urls = rows.column("url").to_pylist()

    def drawn(what: str, row: int) -> str:
        return hashlib.sha256(f"{cfg.seed}/{what}/{urls[row]}".encode()).hexdigest()

    chosen = sorted(range(len(urls)), key=lambda row: drawn("order", row))[: cfg.max_rows]
    held_out = set(sorted(chosen, key=lambda row: drawn("split", row))[: cfg.test_rows])
    units = []
    for split in ("test", "train"):
        of_split = [row for row in chosen if (row in held_out) == (split == "test")]
        for number, start in enumerate(range(0, len(of_split), cfg.unit_rows)):
            units.append(f"{split}-{number:05d}")
            some = of_split[start : start + cfg.unit_rows]
            keys = [hashlib.sha256(urls[row].encode()).hexdigest()[:16] for row in some]
            table = rows.take(some)
            table = table.append_column("split", pa.array([split] * len(some), pa.string()))
            table = table.add_column(0, "key", pa.array(keys, pa.string()))
            with storage.publish(f"units/{units[-1]}.parquet") as file:
                pq.write_table(table, file, compression="zstd")
    delete_other_units(storage, units)
    return units, len(chosen)
