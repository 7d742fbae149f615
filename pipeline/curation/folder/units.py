"""A folder of images -> units: what the filter does for metadata, without a cluster.

Order and split follow seeded hashes of an image's path under the folder, wherever that lies. As
after the filter, every image is accounted for.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from functools import cached_property
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config import FilterConfig
from pipeline.curation.filtering.metadata import delete_other_units
from pipeline.curation.folder.pairs import Pair, pairs
from pipeline.errors import UserError
from pipeline.storage import Storage
from pipeline.units import Tally

SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("url", pa.string()),
        ("alt_text", pa.string()),
        ("aesthetic", pa.float32()),
        ("predictor", pa.string()),
        ("split", pa.string()),
    ]
)
_SHAPING = ("unit_rows", "test_rows", "max_rows", "seed")


class FolderUnits:
    """The stage "units", from a folder. Raises UserError for a folder that gives nothing.

    Args:
        path: the folder, which may be s3:// or gs://.
        cfg: its unit_rows, test_rows, max_rows and seed count; there are no conditions.
        captioned: an image without a caption is dropped (`no_caption`).
    """

    name = "units"
    source: str | None = None

    def __init__(self, path: str, cfg: FilterConfig, captioned: bool) -> None:
        self.folder, self.cfg, self.captioned = Storage(path), cfg, captioned

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Which images and captions they are: paths, sizes and texts, wherever the folder lies."""
        told = json.dumps([asdict(pair) for pair in self._pairs]).encode()
        return {
            "folder": {
                "images": len(self._pairs),
                "bytes": sum(pair.size for pair in self._pairs),
                "sha256": hashlib.sha256(told).hexdigest()[:16],
            },
            "captioned": self.captioned,
            **{key: getattr(self.cfg, key) for key in _SHAPING},
        }

    def look(self) -> None:
        """Raises UserError for a folder that gives nothing; changes nothing."""
        kept = len(self._kept)
        if not kept:
            raise UserError(
                f"folder.path {self.folder.url()}: none of {len(self._pairs)} images has a "
                "caption; put a .txt beside each, or set --caption.backend transformers"
            )
        if kept <= self.cfg.test_rows:
            raise UserError(
                f"all {kept} images of {self.folder.url()} are held out for the test split; lower "
                "--filter.test_rows or add images"
            )

    def clear(self, storage: Storage) -> None:
        """Nothing is set aside."""

    def __call__(self, unit: str, storage: Storage, sink: BinaryIO) -> Tally:
        self.look()
        given, kept = len(self._pairs), len(self._kept)
        ordered = sorted(self._kept, key=lambda pair: self._drawn(pair, "order"))
        chosen = ordered[: self.cfg.max_rows]
        drawn = sorted(chosen, key=lambda pair: self._drawn(pair, "split"))
        held_out = {pair.path for pair in drawn[: self.cfg.test_rows]}
        units = [
            *self._deal(storage, "test", [pair for pair in chosen if pair.path in held_out]),
            *self._deal(storage, "train", [pair for pair in chosen if pair.path not in held_out]),
        ]
        delete_other_units(storage, units)
        dropped = {"no_caption": given - kept, "over_max_rows": kept - len(chosen)}
        return Tally(
            rows_in=given,
            kept=len(chosen),
            dropped={reason: rows for reason, rows in dropped.items() if rows},
            extra={"units": units},
        )

    @cached_property
    def _pairs(self) -> list[Pair]:
        return pairs(self.folder)

    @cached_property
    def _kept(self) -> list[Pair]:
        return [pair for pair in self._pairs if pair.caption or not self.captioned]

    def _drawn(self, pair: Pair, what: str) -> str:
        return hashlib.sha256(f"{self.cfg.seed}/{what}/{pair.path}".encode()).hexdigest()

    def _deal(self, storage: Storage, split: str, rows: list[Pair]) -> list[str]:
        units = []
        for number, start in enumerate(range(0, len(rows), self.cfg.unit_rows)):
            units.append(f"{split}-{number:05d}")
            records = [
                {
                    "key": hashlib.sha256(pair.path.encode()).hexdigest()[:16],
                    "url": pair.path,
                    "alt_text": pair.caption,
                    "split": split,
                }
                for pair in rows[start : start + self.cfg.unit_rows]
            ]
            with storage.publish(f"units/{units[-1]}.parquet") as file:
                pq.write_table(pa.Table.from_pylist(records, SCHEMA), file, compression="zstd")
        return units
