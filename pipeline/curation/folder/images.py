"""Images of one's own -> stored images: judged, decoded and resized as those of the web are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import pyarrow as pa

from pipeline.config import DownloadConfig
from pipeline.curation.downloading import driven
from pipeline.curation.downloading.blocklists import BlockLists
from pipeline.curation.downloading.download import Download
from pipeline.curation.downloading.outcomes import Outcome
from pipeline.curation.fetching.fetch import Fetched, FetchError
from pipeline.errors import UserError
from pipeline.storage import Storage


class Files(Protocol):
    """Where images lie, by a row's url. Raises UserError for what cannot be read."""

    def size(self, url: str, /) -> int:
        """Bytes."""
        ...

    def read_bytes(self, url: str, /) -> bytes: ...

    def url(self, url: str, /) -> str:
        """Where it lies, for people."""
        ...


class StoredImages(Download):
    """The stage "images", of files that are ours to read.

    What is no image, or a hostile one, costs its row, by the same causes as on the web. Files that
    cannot be read cost the unit: none of its rows counts as failed.
    """

    def __init__(self, cfg: DownloadConfig, files: Files) -> None:
        super().__init__(cfg)
        self._files = _Bodies(files, cfg.max_bytes)

    def open(self) -> None:
        """Import img2dataset and read the block lists (seconds)."""
        driven.modules()
        self._blocked = BlockLists.load(self.cfg.block_lists)
        self._fetcher = self._files

    def download(self, rows: pa.Table) -> tuple[pa.Table, list[Outcome]]:
        """Read and resize `rows`: the images that are ones, in order, and every row's outcome."""
        self._files.fault = None
        images, ended = super().download(rows)
        if self._files.fault is not None:
            raise self._files.fault
        return images, ended


class FolderImages(StoredImages):
    """The stage "images", from a folder: a row's url is the path under it."""

    def __init__(self, path: str, cfg: DownloadConfig) -> None:
        super().__init__(cfg, Storage(path))


class _Bodies:
    """Files in the place of the web."""

    def __init__(self, files: Files, max_bytes: int) -> None:
        self.files, self.max_bytes = files, max_bytes
        self.fault: UserError | None = None
        """Of the store: the first that was met."""

    def __call__(
        self, url: str, until: float | None = None, listed: Callable[[str], bool] = lambda _: False
    ) -> Fetched:
        if listed(url):
            raise FetchError("blocked", url, rule=True)
        try:
            size = self.files.size(url)
            if size > self.max_bytes:
                raise FetchError("too_large", f"{size} bytes", rule=True)
            body = self.files.read_bytes(url)
        except UserError as error:
            self.fault = self.fault or error
            raise
        if not body:
            raise FetchError("empty")
        return Fetched(body, self.files.url(url))
