"""Tars -> units: every tar is read once, then its samples are dealt as a folder's images are.

What a tar holds is a unit of a stage of its own, "scan", so that a run that is stopped reads no tar
twice; it lies there until the units are committed, as what the filter sets aside does. Order and
split follow seeded hashes of the tar's name and the image's name in it.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.config import FilterConfig, WebDatasetConfig
from pipeline.curation.folder.dealing import ROW, SHAPING, deal
from pipeline.curation.webdataset import samples
from pipeline.curation.webdataset.tars import Tar, find
from pipeline.errors import UserError
from pipeline.progress import Progress, say
from pipeline.storage import Storage
from pipeline.units import Ledger, Marker, Tally, fingerprint, run_unit

SCHEMA = pa.schema([*ROW, ("tar", pa.string()), ("offset", pa.int64()), ("bytes", pa.int64())])
"""A sample: its url is the tar's name and the image's name in it."""
_READERS = 8
_SAID, _NAMED = 5, 1000  # damaged tars that are named: to the user, in the marker


class Scan:
    """The stage "scan": a tar -> its samples. Its units are named by what they are made from.

    Args:
        tars: by unit.
        cfg: its image and caption count.
    """

    name = "scan"
    source: str | None = None

    def __init__(self, tars: list[Tar], cfg: WebDatasetConfig) -> None:
        self.cfg = cfg
        self.settings: dict[str, Any] = {"image": cfg.image, "caption": cfg.caption, "version": 1}
        self.tars = {self._unit(tar): tar for tar in tars}

    def _unit(self, tar: Tar) -> str:
        told = json.dumps([tar.name, tar.size, self.settings]).encode()
        return hashlib.sha256(told).hexdigest()[:16]

    def __call__(self, unit: str, storage: Storage, sink: BinaryIO) -> Tally:
        tar = self.tars[unit]
        folder, name = tar.place()
        with folder.open_input(name) as source:
            found = samples.read(source, tar.size, self.cfg.image, self.cfg.caption)
        rows = [
            {
                "url": f"{tar.name}/{sample.member}",
                "alt_text": sample.caption,
                "aesthetic": sample.aesthetic,
                "predictor": sample.predictor,
                "tar": tar.name,
                "offset": sample.offset,
                "bytes": sample.bytes,
            }
            for sample in found.samples
        ]
        pq.write_table(pa.Table.from_pylist(rows, SCHEMA), sink, compression="zstd")
        lost = found.dropped.total() + found.failed.total()
        return Tally(
            rows_in=len(rows) + lost,
            kept=len(rows),
            dropped=dict(found.dropped),
            failed=dict(found.failed),
            extra={"tar": tar.name, "damage": found.damage} if found.damage else {},
        )


class TarUnits:
    """The stage "units", from tars. Raises UserError for tars that give nothing.

    Args:
        webdataset: which tars, and what of a sample is its image and its caption.
        cfg: its unit_rows, test_rows, max_rows and seed count; there are no conditions.
        captioned: a sample without a caption is dropped (`no_caption`).
        storage: the root, where what is set aside goes.
    """

    name = "units"
    source: str | None = None

    def __init__(
        self,
        webdataset: WebDatasetConfig,
        cfg: FilterConfig,
        captioned: bool,
        storage: Storage,
        progress: Progress,
    ) -> None:
        self.cfg, self.captioned, self.storage, self.progress = cfg, captioned, storage, progress
        self.scan = Scan(find(webdataset.inputs), webdataset)

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Which tars they are: names and sizes, wherever they lie."""
        tars = sorted((tar.name, tar.size) for tar in self.scan.tars.values())
        return {
            "webdataset": {
                "tars": len(tars),
                "bytes": sum(size for _, size in tars),
                "sha256": hashlib.sha256(json.dumps(tars).encode()).hexdigest()[:16],
                **self.scan.settings,
            },
            "captioned": self.captioned,
            **{key: getattr(self.cfg, key) for key in SHAPING},
        }

    def look(self) -> None:
        """Read the tars that have not been read. Raises UserError for what gives nothing."""
        kept = self._kept.num_rows
        if not kept:
            lost = ", ".join(f"{why} {rows:,}" for why, rows in self._lost[0].most_common())
            raise UserError(
                f"no sample of {len(self.scan.tars)} tars is of use ({lost or 'there are none'}); "
                "see --webdataset.image and --webdataset.caption, or let "
                "--caption.backend transformers write the captions"
            )
        if kept <= self.cfg.test_rows:
            raise UserError(
                f"all {kept} samples are held out for the test split; lower --filter.test_rows or "
                "name more tars"
            )

    def clear(self, storage: Storage) -> None:
        """Delete what was set aside."""
        storage.delete(self.scan.name)

    def __call__(self, unit: str, storage: Storage, sink: BinaryIO) -> Tally:
        self.look()
        lost, failed = self._lost
        units, dealt = deal(storage, self._kept, self.cfg)
        dropped = lost + Counter(over_max_rows=self._kept.num_rows - dealt)
        return Tally(
            rows_in=dealt + dropped.total() + failed.total(),
            kept=dealt,
            dropped=dict(+dropped),
            failed=dict(+failed),
            extra={"units": units, "damaged": dict([*_damaged(self._markers).items()][:_NAMED])},
        )

    @cached_property
    def _markers(self) -> list[Marker]:
        """Of every tar, those that have not been read are read."""
        mark, ledger = fingerprint(self.scan, None), Ledger(self.storage, self.scan.name)
        ledger.look()
        missing = [unit for unit in self.scan.tars if unit not in ledger.units]
        if missing:
            self.progress.task(self.scan.name, len(missing))
            pool = ThreadPoolExecutor(_READERS, thread_name_prefix="scan")
            try:
                made = (
                    pool.submit(run_unit, self.scan, unit, self.storage, mark) for unit in missing
                )
                for done in list(made):
                    done.result()
                    self.progress.advance(self.scan.name)
            finally:  # an interrupt waits for no tar that has not been begun
                pool.shutdown(cancel_futures=True)
        markers = list(ledger.some(self.scan.tars, alike=True))
        damaged = _damaged(markers)
        for tar, damage in [*damaged.items()][:_SAID]:
            say(f"damaged:  {tar}: {damage}; what came before is taken")
        if len(damaged) > _SAID:
            say(f"damaged:  {len(damaged) - _SAID} more tars; see the marker in units/_done")
        return markers

    @cached_property
    def _kept(self) -> pa.Table:
        """The samples that are of use, in the tars' order; only those with a caption, if asked."""
        tables = list(self._tables())
        rows = pa.concat_tables(tables) if tables else SCHEMA.empty_table()
        return rows.filter(pc.not_equal(rows["alt_text"], "")) if self.captioned else rows

    def _tables(self) -> Iterator[pa.Table]:
        for marker in self._markers:
            if marker.tally.kept:
                with self.storage.open_input(f"{self.scan.name}/{marker.unit}.parquet") as file:
                    yield pq.read_table(file)

    @cached_property
    def _lost(self) -> tuple[Counter[str], Counter[str]]:
        dropped, failed = Counter[str](), Counter[str]()
        for marker in self._markers:
            dropped.update(marker.tally.dropped)
            failed.update(marker.tally.failed)
        there = sum(marker.tally.kept for marker in self._markers)
        return dropped + Counter(no_caption=there - self._kept.num_rows), failed


def _damaged(markers: list[Marker]) -> dict[str, str]:
    """Tar -> what is wrong with it."""
    extras = [marker.tally.extra for marker in markers if marker.tally.extra.get("damage")]
    return {str(extra["tar"]): str(extra["damage"]) for extra in extras}
