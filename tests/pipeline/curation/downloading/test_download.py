"""The download stage on the mini world's web: every fate ends in its class, images come right."""

from __future__ import annotations

import functools
import io
import itertools
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from PIL import Image

from pipeline.config import DownloadConfig, WebsiteConfig
from pipeline.curation.downloading.download import SCHEMA, Download
from pipeline.errors import UserError
from pipeline.miniworld import links, website, world
from pipeline.storage import Storage
from pipeline.units import fingerprint, run_unit
from tests.ports import free_port

ENDS = {
    "ok": "ok",
    "slow": "ok",
    "busy_once": "ok",
    "moved": "ok",
    "gone_404": "http_404",
    "gone_410": "http_410",
    "denied_403": "http_403",
    "down_503": "http_503",
    "truncated": "truncated",
    "html": "not_an_image",
    "empty": "empty",
    "opted_out": "opted_out",
    "moved_inside": "forbidden_address",
    "tiny": "too_small",
    "bomb": "too_many_pixels",
    "endless": "too_large",
    "stalled": "timeout",
    "file_scheme": "forbidden_scheme",
}
RULES = {
    *("opted_out", "forbidden_address", "too_small", "too_many_pixels", "too_large"),
    "forbidden_scheme",
}


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    root = Storage(tmp_path_factory.mktemp("web"))
    with website.ensure(WebsiteConfig(port=free_port(), rows=6), root) as site:
        yield site.host


def config(host: str) -> DownloadConfig:
    return DownloadConfig(timeout_s=30.0, allow_private_hosts=[host])


def write_unit(root: Path, host: str, items: list[links.Link]) -> None:
    urls = [
        "file:///etc/hostname" if item.fate == "file_scheme" else f"http://{host}{item.path}"
        for item in items
    ]
    table = pl.DataFrame(
        {
            "key": [f"{item.index:016x}" for item in items],
            "url": urls,
            "alt_text": [f"text {item.index}" for item in items],
            "aesthetic": pl.Series([6.5] * len(items), dtype=pl.Float32),
            "predictor": ["v2"] * len(items),
        }
    )
    (root / "units").mkdir(parents=True, exist_ok=True)
    table.write_parquet(root / "units/train-00000.parquet")


def download(
    root: Path, cfg: DownloadConfig
) -> tuple[dict[str, int], dict[str, int], pl.DataFrame]:
    stage = Download(cfg)
    marker = run_unit(stage, "train-00000", Storage(root), fingerprint(stage, "up"))
    table = pl.read_parquet(root / "images/train-00000.parquet")
    assert table.height == marker.tally.kept
    return marker.tally.dropped, marker.tally.failed, table


@functools.cache
def item(index: int) -> links.Link:
    return links.link(0, index)


def items_with(fate: str, count: int) -> list[links.Link]:
    found = (item(index) for index in range(5000) if item(index).fate == fate)
    return list(itertools.islice(found, count))


def test_every_fate_ends_in_its_class(tmp_path: Path, host: str) -> None:
    fates = [fate for fate in links.FATES if fate != "stalled"]  # waited for in a unit of its own
    items = [item for fate in fates for item in items_with(fate, 2)]
    write_unit(tmp_path, host, items)
    dropped, failed, table = download(tmp_path, config(host))
    ended = dict.fromkeys(ENDS.values(), 0)
    for item in items:
        ended[ENDS[item.fate]] += 1
    assert table.height == ended.pop("ok")
    assert dropped == {end: number for end, number in ended.items() if end in RULES}
    assert failed == {end: n for end, n in ended.items() if end not in RULES and n}


def test_links_that_stall_end_as_a_time_out(tmp_path: Path, host: str) -> None:
    write_unit(tmp_path, host, items_with("stalled", 2))
    dropped, failed, table = download(tmp_path, replace(config(host), timeout_s=2.0))
    assert (dropped, failed, table.height) == ({}, {ENDS["stalled"]: 2}, 0)


def test_images_are_square_upright_colour_and_keep_their_rows(tmp_path: Path, host: str) -> None:
    alive = [item for item in (links.link(0, i) for i in range(600)) if item.fate == "ok"]
    kinds = {(item.format, item.mode, item.orientation): item for item in alive}
    assert len(kinds) >= 7  # formats, modes and orientations
    items = list(kinds.values())
    write_unit(tmp_path, host, items)
    _, _, table = download(tmp_path, config(host))
    assert table.columns == SCHEMA.names
    assert table["key"].to_list() == [f"{item.index:016x}" for item in items]
    for item, row in zip(items, table.iter_rows(named=True), strict=True):
        assert row["alt_text"] == f"text {item.index}" and row["url"].endswith(item.path)
        assert (row["original_width"], row["original_height"]) == (item.width, item.height)
        image = Image.open(io.BytesIO(row["image"]))
        assert (image.format, image.mode, image.size) == ("PNG", "RGB", (32, 32))
        assert (row["width"], row["height"]) == (32, 32)
        scene = world.render(world.scene(item.scene_seed, "train"), (32, 32))
        assert np.abs(np.asarray(image).astype(int) - scene).mean() < 25
        assert len(row["sha256"]) == 64


def test_the_same_web_gives_the_same_bytes(tmp_path: Path, host: str) -> None:
    items = [links.link(0, index) for index in range(40)]
    files = []
    for name in ("a", "b"):
        write_unit(tmp_path / name, host, [item for item in items if item.fate != "stalled"])
        download(tmp_path / name, config(host))
        files.append((tmp_path / name / "images/train-00000.parquet").read_bytes())
    assert files[0] == files[1]


def test_a_unit_without_a_living_link_is_an_empty_file(tmp_path: Path, host: str) -> None:
    write_unit(tmp_path, host, items_with("gone_404", 3))
    dropped, failed, table = download(tmp_path, config(host))
    assert (dropped, failed, table.height) == ({}, {"http_404": 3}, 0)


def test_broken_rows_and_our_own_faults_lose_no_row(tmp_path: Path, host: str) -> None:
    stage = Download(config(host))
    stage.open()

    def fail(url: str, **_: Any) -> Any:
        raise KeyError(url)

    rows = pa.table(
        {
            "key": ["a"],
            "url": ["http://x"],
            "alt_text": [None],
            "aesthetic": [1.0],
            "predictor": ["v2"],
        }
    )
    stage._fetcher = fail
    assert [outcome.cause for outcome in stage.download(rows)[1]] == ["internal_KeyError"]
    empty = rows.set_column(1, "url", pa.array([None], pa.string()))
    assert [outcome.cause for outcome in stage.download(empty)[1]] == ["bad_url"]
    assert stage.download(rows.slice(0, 0))[1] == []


@pytest.mark.parametrize(("form", "quality"), [("jpg", 90), ("webp", 90)])
def test_other_formats(tmp_path: Path, host: str, form: str, quality: int) -> None:
    cfg = config(host)
    cfg.encode_format, cfg.encode_quality, cfg.image_size = form, quality, 48  # type: ignore[assignment]
    write_unit(tmp_path, host, items_with("ok", 2))
    _, _, table = download(tmp_path, cfg)
    for data in table["image"]:
        image = Image.open(io.BytesIO(data))
        assert (image.mode, image.size) == ("RGB", (48, 48))


def test_an_impossible_quality_is_refused_before_any_work() -> None:
    with pytest.raises(UserError, match="encode_quality is 95, but png takes 0 to 9"):
        Download(DownloadConfig(encode_format="png", encode_quality=95))


def test_an_outage_is_not_taken_for_dead_links(tmp_path: Path) -> None:
    with socket.socket() as nobody:  # bound and never listening: every connection is refused
        nobody.bind(("127.0.0.1", 0))
        host = f"127.0.0.1:{nobody.getsockname()[1]}"
        write_unit(tmp_path, host, items_with("ok", 30))
        storage, stage = Storage(tmp_path), Download(replace(config(host), retries=0))
        with pytest.raises(UserError, match="30 of 30 fetches failed as if the network") as caught:
            run_unit(stage, "train-00000", storage, fingerprint(stage, None))
        assert "connection 30" in str(caught.value)
        assert storage.list("images") == []
        gone = Download(replace(config(host), retries=0, outage_share=2.0))
        tally = run_unit(gone, "train-00000", storage, fingerprint(gone, None)).tally
    assert tally.failed == {"connection": 30}
