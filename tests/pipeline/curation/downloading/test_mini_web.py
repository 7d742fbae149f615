"""A machine of a cluster on which nobody serves the mini world's web."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import psutil

from pipeline.config import DownloadConfig
from pipeline.curation.downloading.mini_web import MiniWebImages
from pipeline.miniworld import links, website
from pipeline.storage import Storage
from pipeline.units import fingerprint, run_unit
from tests.pipeline.curation.downloading.test_download import write_unit
from tests.ports import free_port


def sites(port: int) -> Iterator[psutil.Process]:
    for process in psutil.Process().children():
        with contextlib.suppress(psutil.Error):  # other tests' may end just now
            if f"--port={port}" in process.cmdline():
                yield process


def test_a_worker_serves_its_own_machine_and_again_when_that_is_gone(tmp_path: Path) -> None:
    port = free_port()
    host = f"{website.HOST}:{port}"
    alive = [item for item in (links.link(0, i) for i in range(200)) if item.fate == "ok"][:8]
    stage = MiniWebImages(port, DownloadConfig(timeout_s=20.0, allow_private_hosts=[host]))
    for unit in ("train-00000", "train-00001"):
        root = tmp_path / unit
        write_unit(root, host, alive)
        marker = run_unit(stage, "train-00000", Storage(root), fingerprint(stage, "up"))
        assert marker.tally.kept == len(alive), marker.tally.failed
        (site,) = sites(port)
        site.kill()
        site.wait(60)
