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

from pipeline.config import FilterConfig
from pipeline.curation.folder.dealing import ROW, SHAPING, deal
from pipeline.curation.folder.pairs import Pair, pairs
from pipeline.errors import UserError
from pipeline.storage import Storage
from pipeline.units import Tally


class FolderUnits:
    """The stage "units", from a folder. Raises UserError for a folder that gives nothing.

    Args:
        path: the folder, which may be s3:// or gs://.
        cfg: its unit_rows, test_rows, max_rows and seed count; there are no conditions.
        captioned: an image without a caption is dropped (`no_caption`).
        captions: a table of captions that lies elsewhere.
    """

    name = "units"
    source: str | None = None

    def __init__(
        self, path: str, cfg: FilterConfig, captioned: bool, captions: str | None = None
    ) -> None:
        self.folder, self.cfg, self.captioned = Storage(path), cfg, captioned
        self.captions = captions

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
            **{key: getattr(self.cfg, key) for key in SHAPING},
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
        found = [{"url": pair.path, "alt_text": pair.caption} for pair in self._kept]
        units, dealt = deal(storage, pa.Table.from_pylist(found, ROW), self.cfg)
        dropped = {"no_caption": given - kept, "over_max_rows": kept - dealt}
        return Tally(
            rows_in=given,
            kept=dealt,
            dropped={reason: rows for reason, rows in dropped.items() if rows},
            extra={"units": units},
        )

    @cached_property
    def _pairs(self) -> list[Pair]:
        return pairs(self.folder, self.captions)

    @cached_property
    def _kept(self) -> list[Pair]:
        return [pair for pair in self._pairs if pair.caption or not self.captioned]
