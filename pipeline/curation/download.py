"""URLs -> images: img2dataset's Downloader and Resizer, one unit at a time, with our own fetch.

img2dataset decodes, crops, resizes and encodes; how bytes come from the web is fetch.py's, what of
them may be decoded is vetting.py's. Every row ends as kept, dropped by a rule or failed by a cause.
"""

from __future__ import annotations

import hashlib
import io
import os
import tempfile
import threading
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config import DownloadConfig
from pipeline.curation.fetch import Fetcher, FetchError
from pipeline.curation.vetting import undecodable, vet
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


@dataclass
class Outcome:
    """How one row ended: "ok", or a cause; `rule` says that we declined the image."""

    cause: str
    rule: bool = False
    sha256: str = ""
    """Of the bytes as they came, hex."""
    size: int = 0
    """Bytes received."""


class Download:
    """The stage "images". One instance, and one unit at a time, per process.

    img2dataset redirects the process's stdout and stderr while it decodes, and its fetch is
    replaced in its module, so two at a time would be in each other's way.
    """

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
        # What decides whether a page answers (time, retries, threads) may change between runs.
        self.settings: dict[str, Any] = {
            "image_size": cfg.image_size,
            "min_image_size": cfg.min_image_size,
            "encode_format": cfg.encode_format,
            "encode_quality": cfg.encode_quality,
            "max_bytes": cfg.max_bytes,
            "max_pixels": cfg.max_pixels,
            "img2dataset": version("img2dataset"),
        }
        self._fetcher: Fetcher | None = None

    def open(self) -> None:
        """Import img2dataset (seconds) and get ready to fetch."""
        _img2dataset()
        self._fetcher = Fetcher(self.cfg)

    def __call__(self, unit: str, storage: Storage, sink: BinaryIO) -> Tally:
        if self._fetcher is None:
            self.open()
        with storage.open_input(f"units/{unit}.parquet") as file:
            rows = pq.ParquetFile(file).read(columns=list(_COPIED))
        images, outcomes = self.download(rows)
        _refuse_outage(unit, outcomes, self.cfg.outage_share)
        pq.write_table(
            images, sink, compression={name: "zstd" for name in SCHEMA.names if name != "image"}
        )
        return _tally(outcomes)

    def download(self, rows: pa.Table) -> tuple[pa.Table, list[Outcome]]:
        """Fetch and resize `rows`: the images that came, in order, and every row's outcome."""
        if not rows.num_rows:
            return SCHEMA.empty_table(), []
        assert self._fetcher is not None
        batch = _Batch(rows.column("url").to_pylist(), self._fetcher, self.cfg)
        batch.run()
        records = [
            {**row, **batch.written[index], "sha256": batch.outcomes[index].sha256}
            for index, row in enumerate(rows.to_pylist())
            if batch.outcomes[index].cause == "ok"
        ]
        return pa.Table.from_pylist(records, SCHEMA), batch.outcomes


class _Batch:
    """One run of an img2dataset Downloader over some URLs: our fetch in front, memory behind."""

    def __init__(self, urls: list[str | None], fetcher: Fetcher, cfg: DownloadConfig) -> None:
        self.urls, self.fetcher, self.cfg = urls, fetcher, cfg
        self.outcomes = [Outcome(_LOST) for _ in urls]
        self.written: dict[int, dict[str, Any]] = {}

    def run(self) -> None:
        module, resizer_class = _img2dataset()
        with tempfile.TemporaryDirectory(prefix="images-") as folder, _ONE_AT_A_TIME:
            shard = Path(folder) / "shard.arrow"
            rows = pa.array(range(len(self.urls)), pa.int64())
            table = pa.table({"row": rows, "url": pa.array(self.urls, pa.string())})
            with pa.OSFile(str(shard), "wb") as file, pa.ipc.new_file(file, table.schema) as out:
                out.write_table(table)
            module.download_image_with_retry = self.fetch
            module.Downloader(
                sample_writer_class=lambda *_: _Writer(self.write),
                resizer=self._resizer(resizer_class),
                thread_count=self.cfg.threads,
                save_caption=False,
                extract_exif=False,
                output_folder=folder,
                column_list=["row", "url"],
                timeout=self.cfg.timeout_s,
                number_sample_per_shard=len(self.urls),
                oom_shard_count=1,
                compute_hash=None,
                verify_hash_type=None,
                encode_format=self.cfg.encode_format,
                retries=self.cfg.retries,
                user_agent_token=None,
                disallowed_header_directives=None,
            ).download_shard((0, str(shard)))
        for index, outcome in enumerate(self.outcomes):
            if outcome.cause == "ok" and index not in self.written:
                self.outcomes[index] = Outcome(_LOST)  # img2dataset swallowed an exception

    def fetch(
        self, row: tuple[int, str | None], **_: Any
    ) -> tuple[int, io.BytesIO | None, str | None]:
        """In the place of img2dataset's own. No exception leaves it: one would end the unit."""
        index, url = row
        try:
            if not url:
                raise FetchError("bad_url", "no url")
            body = self.fetcher(url).body
            digest = hashlib.sha256(body).hexdigest()
            self.outcomes[index] = Outcome("ok", sha256=digest, size=len(body))
            return index, io.BytesIO(vet(body, self.cfg)), None
        except FetchError as error:
            self.outcomes[index] = Outcome(error.cause, error.rule)
        except Exception as error:
            self.outcomes[index] = Outcome(f"internal_{type(error).__name__}")
        return index, None, self.outcomes[index].cause

    def write(self, image: bytes | None, meta: dict[str, Any]) -> None:
        """In the place of img2dataset's writers."""
        index = meta["row"]
        if image is not None:
            sizes = ("width", "height", "original_width", "original_height")
            self.written[index] = {"image": image, **{name: meta[name] for name in sizes}}
        elif self.outcomes[index].cause == "ok":  # it came, but did not decode
            self.outcomes[index] = Outcome(str(meta["error_message"]))

    def _resizer(self, base: Any) -> Any:
        """img2dataset's Resizer, with a class for what does not decode."""
        resizer = base(
            image_size=self.cfg.image_size,
            resize_mode="center_crop",
            resize_only_if_bigger=False,
            encode_quality=self.cfg.encode_quality,
            encode_format=self.cfg.encode_format,
        )

        def resize(stream: io.BytesIO, boxes: Any = None) -> Any:
            *result, error = resizer(stream, boxes)
            return *result, undecodable(stream.getvalue()) if error is not None else None

        return resize


class _Writer:
    """img2dataset's writer protocol."""

    def __init__(self, put: Callable[[bytes | None, dict[str, Any]], None]) -> None:
        self.put = put

    def write(self, image: bytes | None, key: str, caption: Any, meta: dict[str, Any]) -> None:
        self.put(image, meta)

    def close(self) -> None:
        pass


_LOST = "lost"
_NETWORK, _LEAST_OUTAGE = {"dns", "connection", "timeout"}, 8  # causes; rows
_ONE_AT_A_TIME = threading.Lock()


def _img2dataset() -> tuple[Any, Any]:
    """img2dataset's downloader module and its Resizer class, imported without a word."""
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # else it asks the network for its newest version
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from img2dataset import downloader
        from img2dataset.resizer import Resizer
    return downloader, Resizer


def _refuse_outage(unit: str, outcomes: list[Outcome], share: float) -> None:
    """Nearly all rows of a unit fail at once where the network is down, not where links are dead:
    such a unit must not count as done, for nothing would ever try it again.
    """
    causes = Counter(outcome.cause for outcome in outcomes if outcome.cause in _NETWORK)
    if causes.total() >= max(_LEAST_OUTAGE, share * len(outcomes)):
        told = ", ".join(f"{cause} {rows}" for cause, rows in causes.most_common())
        raise UserError(
            f"images/{unit}: {causes.total()} of {len(outcomes)} fetches failed as if the network "
            f"were down ({told}); see to it and run again, the unit is not counted as done; if the "
            "sites are gone for good, set --download.outage_share 2"
        )


def _tally(outcomes: list[Outcome]) -> Tally:
    kept = sum(outcome.cause == "ok" for outcome in outcomes)
    ended = [outcome for outcome in outcomes if outcome.cause != "ok"]
    return Tally(
        rows_in=len(outcomes),
        kept=kept,
        dropped=dict(sorted(Counter(outcome.cause for outcome in ended if outcome.rule).items())),
        failed=dict(
            sorted(Counter(outcome.cause for outcome in ended if not outcome.rule).items())
        ),
        extra={"bytes": sum(outcome.size for outcome in outcomes)},
    )
