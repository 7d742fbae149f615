"""Images of tars -> stored images: judged, decoded and resized as those of the web are."""

from __future__ import annotations

import tarfile
import threading
from collections import OrderedDict
from typing import Any, BinaryIO, NamedTuple

import pyarrow.parquet as pq

from pipeline.config import DownloadConfig, WebDatasetConfig
from pipeline.curation.folder.images import StoredImages
from pipeline.curation.webdataset.tars import find
from pipeline.errors import UserError
from pipeline.storage import Storage
from pipeline.units import Tally

_OPEN = 256
"""Tars that a worker keeps open: of a shuffled unit nearly every row is in another."""


class TarImages(StoredImages):
    """The stage "images", from tars: a row says which bytes of which tar its image is."""

    def __init__(self, webdataset: WebDatasetConfig, cfg: DownloadConfig) -> None:
        self._members = _Members(webdataset)
        super().__init__(cfg, self._members)

    def __call__(self, unit: str, storage: Storage, sink: BinaryIO) -> Tally:
        with storage.open_input(f"units/{unit}.parquet") as file:
            rows = pq.read_table(file, columns=["url", "tar", "offset", "bytes"]).to_pylist()
        self._members.spans = {
            row["url"]: _Span(row["tar"], row["offset"], row["bytes"]) for row in rows
        }
        return super().__call__(unit, storage, sink)


class _Span(NamedTuple):
    tar: str
    offset: int
    size: int


class _Members:
    """Spans of tars in the place of files."""

    def __init__(self, webdataset: WebDatasetConfig) -> None:
        self.webdataset = webdataset
        self.spans: dict[str, _Span] = {}
        self._places: dict[str, tuple[Storage, str]] = {}
        self._open: OrderedDict[str, Any] = OrderedDict()
        self._lock = threading.Lock()

    def size(self, url: str) -> int:
        return self.spans[url].size

    def url(self, url: str) -> str:
        return url

    def read_bytes(self, url: str) -> bytes:
        """The bytes of an image. Raises UserError where the tar is not what was indexed."""
        span = self.spans[url]
        start = span.offset - tarfile.BLOCKSIZE
        tar = self._tar(span.tar)
        if start < 0 or span.offset + span.size > tar.size:
            raise self._changed(span)
        (data,) = tar.read([(start, span.offset + span.size)])
        body = data.tobytes()
        try:
            header = body[: tarfile.BLOCKSIZE]
            info = tarfile.TarInfo.frombuf(header, tarfile.ENCODING, "surrogateescape")
        except (tarfile.TarError, ValueError):
            raise self._changed(span) from None
        if info.size != span.size:
            raise self._changed(span)
        return body[tarfile.BLOCKSIZE :]

    def _tar(self, name: str) -> Any:
        with self._lock:
            if name in self._open:
                self._open.move_to_end(name)
                return self._open[name]
            if not self._places:
                self._places = {tar.name: tar.place() for tar in find(self.webdataset.inputs)}
            if name not in self._places:
                raise UserError(
                    f"the tar {name} is not among webdataset.inputs any more; bring it back, or "
                    "use another --root"
                )
            folder, path = self._places[name]
            opened = self._open[name] = folder.open_ranges(path)
            while len(self._open) > _OPEN:
                self._open.popitem(last=False)
            return opened

    def _changed(self, span: _Span) -> UserError:
        folder, path = self._places[span.tar]
        return UserError(
            f"{folder.url(path)} is not what it was when it was indexed; bring it back, or use "
            "another --root"
        )
