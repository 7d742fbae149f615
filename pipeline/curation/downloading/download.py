"""URLs -> images: img2dataset's Downloader and Resizer, one unit at a time, with our own fetch.

img2dataset crops, resizes and encodes; how bytes come from the web is fetch.py's, what of them may
be decoded is vetting.py's, batch.py brings the three together. Every row ends as kept, dropped by a
rule or failed by a cause.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from functools import cached_property
from importlib.metadata import version
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.accounts import is_retry
from pipeline.config import DownloadConfig
from pipeline.curation.downloading import driven, outcomes
from pipeline.curation.downloading.batch import Batch, Fetches, Row
from pipeline.curation.downloading.blocklists import BlockLists, identity
from pipeline.curation.downloading.outcomes import Outcome
from pipeline.curation.fetching.fetch import Fetcher
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
        ("image", pa.binary()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("original_width", pa.int32()),
        ("original_height", pa.int32()),
        ("sha256", pa.string()),
    ]
)

_COPIED = ("key", "url", "alt_text", "aesthetic", "predictor")
_PNG_LEVELS = range(0, 10)
_QUALITIES = range(1, 101)
_NETWORK, _LEAST_OUTAGE = {"dns", "connection", "timeout"}, 8  # causes; rows


class Download:
    """The stage "images". Raises UserError for settings that cannot be met."""

    name = "images"
    source: str | None = "units"

    def __init__(self, cfg: DownloadConfig) -> None:
        allowed = _PNG_LEVELS if cfg.encode_format == "png" else _QUALITIES
        if cfg.encode_quality not in allowed:
            raise UserError(
                f"download.encode_quality is {cfg.encode_quality}, but {cfg.encode_format} takes "
                f"{allowed.start} to {allowed.stop - 1}"
            )
        self.cfg = cfg
        self._fetcher: Fetches | None = None
        self._blocked = BlockLists()

    @cached_property
    def settings(self) -> dict[str, Any]:
        """What decides whether a page answers (time, retries, threads) may change between runs."""
        cfg = self.cfg
        settings: dict[str, Any] = {
            "image_size": cfg.image_size,
            "min_image_size": cfg.smallest,
            "encode_format": cfg.encode_format,
            "encode_quality": cfg.encode_quality,
            "max_bytes": cfg.max_bytes,
            "max_pixels": cfg.max_pixels,
            "img2dataset": version("img2dataset"),
        }
        # what is not used is not named: roots of before it existed go on
        if cfg.decode == "reduced":
            settings |= {"decode": cfg.decode, "simplejpeg": version("simplejpeg")}
        if cfg.robots_txt:
            settings["robots_txt"] = True
        if cfg.verify_hash != "none":
            settings["verify_hash"] = cfg.verify_hash
        if cfg.block_lists:
            lists = [identity(url) for url in cfg.block_lists]
            settings["block_lists"] = sorted(lists, key=lambda held: str(held["sha256"]))
        return settings

    def open(self) -> None:
        """Import img2dataset and read the block lists (seconds), and get ready to fetch."""
        driven.modules()
        self._blocked = BlockLists.load(self.cfg.block_lists)
        self._fetcher = Fetcher(self.cfg)

    def __call__(self, unit: str, storage: Storage, sink: BinaryIO) -> Tally:
        if self._fetcher is None:
            self.open()
        rows = self._read(unit, storage)
        images, ended = self.download(rows)
        # in a retry most hosts are dead, and what fails in passing can be retried once more
        _refuse_outage(unit, ended, self.cfg.outage_share, for_good=is_retry(unit))
        pq.write_table(
            images, sink, compression={name: "zstd" for name in SCHEMA.names if name != "image"}
        )
        urls = rows.column("url").to_pylist()
        tally = outcomes.tally(ended, urls)
        keys = rows.column("key").to_pylist()
        tally.extra["outcomes"] = outcomes.save(storage, unit, keys, urls, ended)
        return tally

    def download(self, rows: pa.Table) -> tuple[pa.Table, list[Outcome]]:
        """Fetch and resize `rows`: the images that came, in order, and every row's outcome."""
        if not rows.num_rows:
            return SCHEMA.empty_table(), []
        assert self._fetcher is not None
        urls = rows.column("url").to_pylist()
        digests = [""] * len(urls)
        if self.cfg.verify_hash != "none":
            promised = rows.column(self.cfg.verify_hash).to_pylist()
            digests = [d.hex() if isinstance(d, bytes) else (d or "").strip() for d in promised]
        wanted = [Row(url, digest) for url, digest in zip(urls, digests, strict=True)]
        batch = Batch(wanted, self._fetcher, self._blocked, self.cfg)
        ended = batch.run()
        records = [
            {**row, **asdict(batch.images[index])}
            for index, row in enumerate(rows.select(_COPIED).to_pylist())
            if ended[index].cause == "ok"
        ]
        return pa.Table.from_pylist(records, SCHEMA), ended

    def _read(self, unit: str, storage: Storage) -> pa.Table:
        path, kind = f"units/{unit}.parquet", self.cfg.verify_hash
        with storage.open_input(path) as file:
            source = pq.ParquetFile(file)
            if kind != "none" and kind not in source.schema_arrow.names:
                raise UserError(
                    f"{storage.url(path)} has no column {kind}, which download.verify_hash needs; "
                    "let the filter pass it through, or set --download.verify_hash none"
                )
            return source.read([*_COPIED, *([] if kind == "none" else [kind])])


def _refuse_outage(unit: str, ended: list[Outcome], share: float, for_good: bool) -> None:
    """Nearly all rows of a unit fail at once where the network is down, not where links are dead:
    such a unit must not count as done, for nothing would ever try it again. `for_good` counts only
    what is never retried: names that are said not to exist.
    """
    causes = Counter(
        outcome.cause
        for outcome in ended
        if outcome.cause in _NETWORK and not (for_good and outcome.transient)
    )
    tried = sum(outcome.cause != "deadline" for outcome in ended)
    if causes.total() >= max(_LEAST_OUTAGE, share * tried):
        told = ", ".join(f"{cause} {rows}" for cause, rows in causes.most_common())
        raise UserError(
            f"images/{unit}: {causes.total()} of {tried} fetches failed as if the network "
            f"were down ({told}); see to it and run again, the unit is not counted as done; if the "
            "sites are gone for good, set --download.outage_share 2"
        )
