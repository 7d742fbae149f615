"""Images of the mini world's web. It is on loopback, so each machine with a worker has its own."""

from __future__ import annotations

from typing import BinaryIO

from pipeline.config import DownloadConfig
from pipeline.curation.downloading.download import Download
from pipeline.miniworld import website
from pipeline.storage import Storage
from pipeline.units import Tally


class MiniWebImages(Download):
    """The stage "images", of pages that are functions of their URLs: every site has them all."""

    def __init__(self, port: int, cfg: DownloadConfig) -> None:
        super().__init__(cfg)
        self.port = port
        self._site: object = None

    def __call__(self, unit: str, storage: Storage, sink: BinaryIO) -> Tally:
        # asked at every unit: a site may have gone with the worker that started it
        if self._site is None or not website.serves_this_world(self.port):
            self._site = website.attach(self.port)
        return super().__call__(unit, storage, sink)
