"""A folder through the stages of its own: dealt the same wherever it lies, every image judged."""

from __future__ import annotations

import hashlib
import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.config import CurateConfig, DownloadConfig, FilterConfig, FolderConfig
from pipeline.curation import run as curation
from pipeline.curation.captioning.caption_given import GivenCaptionStage
from pipeline.curation.folder.images import FolderImages
from pipeline.curation.folder.units import FolderUnits
from pipeline.errors import UserError
from pipeline.progress import Progress
from pipeline.storage import Storage
from pipeline.units import Marker, run_unit

SIDE = 32
DEAL = FilterConfig(unit_rows=4, test_rows=3)
DOWNLOAD = DownloadConfig(image_size=SIDE, min_image_size=16, max_bytes=200_000, max_pixels=250_000)


def picture(width: int, height: int, kind: str = "PNG", **options: object) -> bytes:
    drawn = np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(drawn).save(buffer, kind, **options)
    return buffer.getvalue()


def put(folder: Path, count: int) -> Path:
    folder.mkdir(exist_ok=True)
    for index in range(count):
        (folder / f"{index}.png").write_bytes(picture(40 + index, 40))
        (folder / f"{index}.txt").write_text(f"a red fish and a cup in photo {index}")
    return folder


def deal(
    folder: Path | str, root: Path, cfg: FilterConfig = DEAL, captioned: bool = True
) -> Marker:
    stage = FolderUnits(str(folder), cfg, captioned)
    return run_unit(stage, "_all", Storage(root), "x")


def rows(root: Path, path: str) -> list[dict[str, object]]:
    return list(pq.read_table(root / path).to_pylist())


def dealt(root: Path, marker: Marker) -> dict[str, list[str]]:
    """Unit -> the images in it."""
    units = marker.tally.extra["units"]
    return {unit: [str(r["url"]) for r in rows(root, f"units/{unit}.parquet")] for unit in units}


def test_every_image_is_dealt_once(tmp_path: Path, bucket: str) -> None:
    folder = put(tmp_path / "photos", 12)
    (folder / "11.txt").unlink()
    marker = deal(folder, tmp_path / "run")
    assert (marker.tally.rows_in, marker.tally.kept) == (12, 11)
    assert marker.tally.dropped == {"no_caption": 1}
    units = dealt(tmp_path / "run", marker)
    assert {name: len(paths) for name, paths in units.items()} == {
        "test-00000": 3, "train-00000": 4, "train-00001": 4,
    }  # fmt: skip
    together = [path for paths in units.values() for path in paths]
    assert sorted(together) == sorted(f"{index}.png" for index in range(11))
    assert together != sorted(together)
    first = rows(tmp_path / "run", "units/test-00000.parquet")[0]
    assert first["key"] == hashlib.sha256(str(first["url"]).encode()).hexdigest()[:16]
    assert first["alt_text"].startswith("a red fish") and first["split"] == "test"  # type: ignore[attr-defined]

    # elsewhere it is the same; more images move none of the held-out ones but to make room
    Storage(f"{bucket}/photos").upload_tree(folder, "")
    again = deal(f"{bucket}/photos", tmp_path / "again")
    assert dealt(tmp_path / "again", again) == units and again.settings == marker.settings
    assert deal(folder, tmp_path / "all", captioned=False).tally.kept == 12
    few = deal(folder, tmp_path / "few", replace(DEAL, max_rows=5))
    assert few.tally.dropped == {"no_caption": 1, "over_max_rows": 6}
    (folder / "3.txt").write_text("another text")
    assert deal(folder, tmp_path / "changed").settings["folder"] != marker.settings["folder"]


def test_hostile_images_cost_their_row(tmp_path: Path) -> None:
    """As on the web: judged by the header, and with the same causes."""
    folder = put(tmp_path / "photos", 4)
    whole, scan = picture(100, 100, "JPEG"), b"\xff\xda\x00\x08\x01\x01\x00\x00\x3f\x00"
    turned = Image.Exif()
    turned[0x0112] = 6
    hostile = {
        "ok_turned": picture(60, 40, "JPEG", exif=turned),
        "not_an_image": b"<html>hello</html>",
        "truncated": whole[: len(whole) // 2],
        "too_many_pixels": picture(600, 500, "PNG")[:3000],
        "too_large": whole + bytes(200_000),
        "too_small": picture(12, 40),
        "empty": b"",
        "too_many_scans": whole[:-2] + scan * 200 + whole[-2:],
    }  # fmt: skip
    for cause, data in hostile.items():
        (folder / f"{cause}.jpg").write_bytes(data)
        (folder / f"{cause}.txt").write_text("a cup")
    marker = deal(folder, tmp_path / "run", FilterConfig(unit_rows=64, test_rows=1))
    storage, stage = Storage(tmp_path / "run"), FolderImages(str(folder), DOWNLOAD)
    tallies = [run_unit(stage, unit, storage, "x").tally for unit in marker.tally.extra["units"]]
    lost: dict[str, int] = {}
    for tally in tallies:
        lost |= tally.dropped | tally.failed
    assert lost == {cause: 1 for cause in hostile if cause != "ok_turned"}
    kept = [
        r
        for u in marker.tally.extra["units"]
        for r in rows(tmp_path / "run", f"images/{u}.parquet")
    ]
    assert len(kept) == 5 and sum(tally.rows_in for tally in tallies) == 12
    assert {Image.open(io.BytesIO(r["image"])).size for r in kept} == {(SIDE, SIDE)}  # type: ignore[arg-type]
    turned_row = next(row for row in kept if row["url"] == "ok_turned.jpg")
    assert (turned_row["original_width"], turned_row["original_height"]) == (40, 60)


def test_a_folder_that_cannot_be_read_is_no_lost_row(tmp_path: Path) -> None:
    folder = put(tmp_path / "photos", 6)
    marker = deal(folder, tmp_path / "run")
    (folder / "2.png").rename(tmp_path / "elsewhere.png")
    storage, stage = Storage(tmp_path / "run"), FolderImages(str(folder), DOWNLOAD)
    with pytest.raises(UserError, match=r"2\.png: no such file"):
        for unit in marker.tally.extra["units"]:
            run_unit(stage, unit, storage, "x")


def test_given_captions_are_kept_as_they_are(tmp_path: Path) -> None:
    folder = put(tmp_path / "photos", 6)
    (folder / "0.txt").write_text("!!!")
    marker = deal(folder, tmp_path / "run", FilterConfig(unit_rows=64, test_rows=1))
    storage = Storage(tmp_path / "run")
    told = {}
    dropped = 0
    for unit in marker.tally.extra["units"]:
        run_unit(FolderImages(str(folder), DOWNLOAD), unit, storage, "x")
        made = run_unit(GivenCaptionStage(), unit, storage, "x")
        dropped += made.tally.dropped.get("empty_caption", 0)
        told |= {r["caption"]: r for r in rows(tmp_path / "run", f"captions/{unit}.parquet")}
    assert dropped == 1 and len(told) == 5
    row = told["a red fish and a cup in photo 3"]
    assert row["captions"] == [row["caption"]] and row["subjects"] == ["a red fish", "a cup"]
    assert row["backend"] == "given" and row["alt_text"] == row["caption"]


def refused(folder: Path, root: Path, match: str, **fields: object) -> None:
    cfg = CurateConfig(root=str(root), folder=FolderConfig(str(folder)))
    cfg.filter, cfg.caption.backend = replace(DEAL, **fields), "given"  # type: ignore[arg-type]
    with pytest.raises(UserError, match=match) as caught, Progress() as progress:
        curation.select(cfg, Storage(root), progress, lambda: None)
    assert "\n" not in str(caught.value) and not (root / "units").exists()


def test_what_gives_nothing_is_refused(tmp_path: Path) -> None:
    folder = put(tmp_path / "photos", 3)
    refused(folder, tmp_path / "run", "all 3 images of .* are held out .* lower --filter.test_rows")
    refused(folder, folder / "run", "lies in folder.path .* choose another root")
    refused(tmp_path / "none", tmp_path / "run", "there is no image")
    for text in folder.glob("*.txt"):
        text.unlink()
    refused(folder, tmp_path / "run", "none of 3 images has a caption; put a .txt beside each")
    with pytest.raises(UserError, match="two sources of rows; give one of them"):
        CurateConfig(folder=FolderConfig("x"), filter=FilterConfig(inputs=["y"]))
