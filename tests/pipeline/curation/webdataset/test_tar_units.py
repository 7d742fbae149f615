"""Tars through the stages of their own, and out again: every sample accounted for, read once."""

from __future__ import annotations

import hashlib
import io
import json
import signal
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.config import (
    CurateConfig,
    DownloadConfig,
    FilterConfig,
    FolderConfig,
    ImagesExportConfig,
    WebDatasetConfig,
    parse_command,
)
from pipeline.curation import run as curation
from pipeline.curation.captioning.caption_given import GivenCaptionStage
from pipeline.curation.commands import COMMANDS
from pipeline.curation.webdataset import samples, units
from pipeline.curation.webdataset.export import export
from pipeline.curation.webdataset.images import TarImages
from pipeline.curation.webdataset.units import TarUnits
from pipeline.errors import UserError
from pipeline.progress import Progress
from pipeline.storage import Storage
from pipeline.units import Ledger, Marker, run_unit

SIDE = 32
DEAL = FilterConfig(unit_rows=4, test_rows=3)
DOWNLOAD = DownloadConfig(image_size=SIDE, min_image_size=16, max_bytes=100_000, max_pixels=250_000)
GIVEN = "a red fish and a cup in photo {}"


def picture(width: int, height: int, kind: str = "PNG") -> bytes:
    drawn = np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(drawn).save(buffer, kind)
    return buffer.getvalue()


def pack(path: Path, files: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def put(folder: Path, tars: int = 3, each: int = 5) -> Path:
    for tar in range(tars):
        files = {}
        for n in range(each):
            number = tar * each + n
            files[f"{n}.jpg"] = picture(40 + number, 40, "JPEG")
            files[f"{n}.txt"] = GIVEN.format(number).encode()
        pack(folder / f"{tar:03d}.tar", files)
    return folder


def stage(
    folder: Path | str, root: Path, cfg: FilterConfig = DEAL, captioned: bool = True, **more: Any
) -> TarUnits:
    made = WebDatasetConfig(inputs=[str(folder)], **more)
    return TarUnits(made, cfg, captioned, Storage(root), Progress(terminal=False))


def deal(folder: Path | str, root: Path, *options: Any, **more: Any) -> Marker:
    return run_unit(stage(folder, root, *options, **more), "_all", Storage(root), "x")


def rows(root: Path, path: str) -> list[dict[str, Any]]:
    return list(pq.read_table(root / path).to_pylist())


def dealt(root: Path, marker: Marker) -> dict[str, list[str]]:
    """Unit -> its urls."""
    names = marker.tally.extra["units"]
    return {unit: [str(r["url"]) for r in rows(root, f"units/{unit}.parquet")] for unit in names}


def curate(folder: Path | str, root: Path, cfg: FilterConfig = DEAL) -> list[str]:
    """Units, images and captions, as the jobs make them."""
    storage = Storage(root)
    marker = run_unit(stage(folder, root, cfg), "_all", storage, "x")
    images = TarImages(WebDatasetConfig(inputs=[str(folder)]), DOWNLOAD)
    for unit in marker.tally.extra["units"]:
        run_unit(images, unit, storage, "y")
        run_unit(GivenCaptionStage(), unit, storage, "z")
    return list(marker.tally.extra["units"])


def test_every_sample_is_dealt_once(tmp_path: Path, bucket: str) -> None:
    folder = put(tmp_path / "tars")
    marker = deal(folder, tmp_path / "run")
    units = dealt(tmp_path / "run", marker)
    assert {name: len(urls) for name, urls in units.items()} == {
        "test-00000": 3, "train-00000": 4, "train-00001": 4, "train-00002": 4,
    }  # fmt: skip
    together = [url for urls in units.values() for url in urls]
    assert sorted(together) == sorted(f"{t:03d}.tar/{n}.jpg" for t in range(3) for n in range(5))
    assert together != sorted(together)
    first = rows(tmp_path / "run", "units/test-00000.parquet")[0]
    assert first["key"] == hashlib.sha256(first["url"].encode()).hexdigest()[:16]
    assert first["alt_text"].startswith("a red fish") and first["split"] == "test"

    Storage(f"{bucket}/tars").upload_tree(folder, "")  # elsewhere it is the same
    again = deal(f"{bucket}/tars/{{000..002}}.tar", tmp_path / "again")
    assert dealt(tmp_path / "again", again) == units and again.settings == marker.settings
    few = deal(folder, tmp_path / "few", replace(DEAL, max_rows=5))
    assert few.tally.dropped == {"over_max_rows": 10}


def test_a_tar_that_was_read_is_not_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, root = put(tmp_path / "tars"), tmp_path / "run"
    read, opened = samples.read, list[int]()

    def breaks(source: Any, size: int, *options: Any) -> samples.Found:
        opened.append(size)
        if len(opened) >= 2 and not (root / "again").exists():
            raise KeyboardInterrupt
        return read(source, size, *options)

    monkeypatch.setattr(units.samples, "read", breaks)
    monkeypatch.setattr(units, "_READERS", 1)
    with pytest.raises(KeyboardInterrupt):
        deal(folder, root)
    assert len(Ledger(Storage(root), "scan").done()) == 1
    assert not list((root / "units").glob("*"))
    opened.clear()
    (root / "again").touch()
    goes_on = stage(folder, root)
    marker = run_unit(goes_on, "_all", Storage(root), "x")
    assert len(opened) == 2 and marker.tally.kept == 15
    goes_on.clear(Storage(root))
    assert not (root / "scan").exists()


def test_hostile_samples_cost_their_row(tmp_path: Path) -> None:
    whole = picture(100, 100, "JPEG")
    hostile = {
        "not_an_image": b"<html>hello</html>", "truncated": whole[: len(whole) // 2],
        "too_many_pixels": picture(600, 500)[:3000], "too_large": whole + bytes(200_000),
        "too_small": picture(12, 40), "empty": b"",
    }  # fmt: skip
    files = {}
    for cause, data in hostile.items():
        files |= {f"{cause}.jpg": data, f"{cause}.txt": b"a cup"}
    files |= {"silent.jpg": whole, "../up.jpg": whole, "lone.txt": b"x", "mute.txt": b"!!!"}
    files["mute.jpg"] = whole
    folder, root = put(tmp_path / "tars", tars=1, each=4), tmp_path / "run"
    pack(folder / "evil.tar", files)
    (folder / "cut.tar").write_bytes((folder / "000.tar").read_bytes()[:2000])
    (folder / "page.tar").write_bytes(b"<html>")
    names = curate(folder, root, FilterConfig(unit_rows=64, test_rows=1))
    storage = Storage(root)
    marker = Ledger(storage, "units").done()["_all"]
    assert marker.tally.rows_in == 4 + 10 + 1
    assert marker.tally.dropped == {"no_caption": 1, "bad_name": 1, "no_image": 1}
    assert marker.tally.failed == {"truncated_tar": 1}
    assert set(marker.tally.extra["damaged"]) == {"cut.tar", "page.tar"}
    lost: dict[str, int] = {}
    for unit in names:
        tally = Ledger(storage, "images").done()[unit].tally
        lost |= tally.dropped | tally.failed
    assert lost == dict.fromkeys(hostile, 1)
    kept = [row for unit in names for row in rows(root, f"images/{unit}.parquet")]
    assert {Image.open(io.BytesIO(row["image"])).size for row in kept} == {(SIDE, SIDE)}
    captions = [r["caption"] for u in names for r in rows(root, f"captions/{u}.parquet")]
    assert sorted(captions) == sorted(GIVEN.format(n) for n in range(4))
    assert not list(tmp_path.glob("up.jpg")) and not list(tmp_path.rglob("*.jpg"))


def test_a_tar_that_changed_is_no_lost_row(tmp_path: Path) -> None:
    folder, root = put(tmp_path / "tars"), tmp_path / "run"
    marker = deal(folder, root)
    images = TarImages(WebDatasetConfig(inputs=[str(folder)]), DOWNLOAD)
    pack(folder / "001.tar", {"0.txt": b"moved", "0.jpg": b"x"})
    with pytest.raises(UserError, match=r"001\.tar is not what it was when it was indexed"):
        for unit in marker.tally.extra["units"]:
            run_unit(images, unit, Storage(root), "x")
    (folder / "001.tar").unlink()
    images = TarImages(WebDatasetConfig(inputs=[str(folder)]), DOWNLOAD)
    with pytest.raises(UserError, match=r"the tar 001\.tar is not among webdataset.inputs"):
        for unit in marker.tally.extra["units"]:
            run_unit(images, unit, Storage(root), "x")


def test_what_gives_nothing_is_refused(tmp_path: Path) -> None:
    def refused(match: str, folder: Path, **fields: Any) -> None:
        cfg = CurateConfig(webdataset=WebDatasetConfig(inputs=[str(folder)]))
        cfg.filter, cfg.caption.backend = replace(DEAL, **fields), "given"
        root = tmp_path / "run"
        with pytest.raises(UserError, match=match) as caught, Progress() as progress:
            curation.select(cfg, Storage(root), progress, lambda: None)
        assert "\n" not in str(caught.value) and not (root / "units").exists()

    folder = put(tmp_path / "tars", tars=1, each=3)
    refused("all 3 samples are held out .* lower --filter.test_rows", folder)
    refused("no tar there", tmp_path / "none")
    pack(tmp_path / "mute/0.tar", {"a.jpg": b"x", "b.txt": b"x"})
    refused(r"no sample of 1 tars is of use \(.*no_image 1", tmp_path / "mute")
    with pytest.raises(UserError, match=r"folder\.path and webdataset\.inputs are two sources"):
        CurateConfig(folder=FolderConfig("x"), webdataset=WebDatasetConfig(inputs=["y"]))


# --- out again ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def curated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("curated") / "run"
    curate(put(root.parent / "tars"), root)
    return root


def job(*words: str) -> str:
    command, cfg = parse_command(CurateConfig, COMMANDS, ["export", *words])
    assert command is not None
    return command.run(cfg)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.tar"))}


def expected(root: Path, split: str = "train") -> dict[str, tuple[bytes, str]]:
    """Key -> image and caption, in the units' order."""
    found = {}
    for path in sorted((root / "captions").glob(f"{split}-*.parquet")):
        told = {row["key"]: row["caption"] for row in rows(root, f"captions/{path.name}")}
        for row in rows(root, f"images/{path.name}"):
            found[row["key"]] = (row["image"], told[row["key"]])
    return found


def by_webdataset(pattern: str) -> Iterator[tuple[str, bytes, str, dict[str, Any]]]:
    webdataset = pytest.importorskip("webdataset")
    for sample in webdataset.WebDataset(pattern, shardshuffle=False):
        yield sample["__key__"], sample["png"], sample["txt"].decode(), json.loads(sample["json"])


def test_exported_samples_are_the_curated_ones(curated: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    said = job("--root", str(curated), "--out", str(out))
    assert (
        said.startswith(f"exported: {out} (12 samples in 3 tars, ") and "3 of the tars now" in said
    )
    found = list(by_webdataset(f"{out}/train-{{00000..00002}}.tar"))
    assert {key: (image, text) for key, image, text, _ in found} == expected(curated)
    for key, _, text, told in found:
        assert told["key"] == key and told["caption"] == text and told["split"] == "train"
        assert told["url"].endswith(".jpg") and told["width"] == SIDE and told["sha256"]
        assert told["subjects"] == ["a red fish", "a cup"] and told["aesthetic"] is None
    listed = json.loads((out / "train.json").read_text())
    assert listed["samples"] == 12
    for tar in listed["tars"]:
        assert hashlib.sha256((out / tar["name"]).read_bytes()).hexdigest() == tar["sha256"]
    job("--root", str(curated), "--out", str(out), "--split", "test")
    assert len(list(by_webdataset(f"{out}/test-00000.tar"))) == 3


def test_datasets_reads_the_tars(curated: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    job("--root", str(curated), "--out", str(tmp_path))
    read = datasets.load_dataset(
        "webdataset", data_files=f"{tmp_path}/*.tar", split="train", streaming=True,
        cache_dir=tmp_path / "cache",
    )  # fmt: skip
    found = {row["__key__"]: (row["png"], row["txt"], row["json"]) for row in read}
    wanted = expected(curated)
    assert found.keys() == wanted.keys()
    for key, (image, text, told) in found.items():
        pixels = np.asarray(Image.open(io.BytesIO(wanted[key][0])))
        assert np.array_equal(np.asarray(image), pixels)
        assert text == wanted[key][1] and told["key"] == key


def test_to_a_bucket_in_fewer_tars_and_the_same_bytes(
    curated: Path, tmp_path: Path, bucket: str
) -> None:
    for out in (f"{bucket}/set", str(tmp_path)):
        job("--root", str(curated), "--out", out, "--rows", "5", "--threads", "1")
    away = Storage(f"{bucket}/set")
    here = content(tmp_path)
    assert list(here) == ["train-00000.tar", "train-00001.tar"]
    assert {name: away.read_bytes(name) for name in here} == here
    away.delete("")  # from a bucket too, and it gives what went in
    Storage(f"{bucket}/root").upload_tree(curated, "")
    job("--root", f"{bucket}/root", "--out", f"{bucket}/set", "--rows", "5")
    assert {name: away.read_bytes(name) for name in here} == here


def test_a_killed_export_goes_on(curated: Path, tmp_path: Path) -> None:
    """kill -9 between the second tar and its marker, and in the middle of the third."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    root = Storage(curated)
    assert export(root, Storage(whole), ImagesExportConfig(threads=1)).made == 3
    script = """if True:
        import os, signal, sys
        from pipeline.config import ImagesExportConfig
        from pipeline.curation.webdataset.export import export
        from pipeline.storage import Sink, Storage
        from pipeline.units import Ledger
        at, commit, write = sys.argv[3], Ledger.commit, Sink.write
        def dies(self, unit, marker):
            if unit == at:
                os.kill(os.getpid(), signal.SIGKILL)
            commit(self, unit, marker)
        def dies_too(self, data):
            if at in self._url and self.bytes > 5000:
                os.kill(os.getpid(), signal.SIGKILL)
            return write(self, data)
        if at == "train-00001":
            Ledger.commit = dies
        else:
            Sink.write = dies_too
        export(Storage(sys.argv[1]), Storage(sys.argv[2]), ImagesExportConfig(threads=1))
    """
    for at, markers in (("train-00001", 1), ("train-00002", 2)):
        words = [sys.executable, "-c", script, str(curated), str(out), at]
        assert subprocess.run(words, timeout=140, check=False).returncode == -signal.SIGKILL
        assert len(Ledger(Storage(out), "_export").done()) == markers
        assert not (out / "train.json").exists()
    assert len(content(out)) == 2
    made = export(root, Storage(out), ImagesExportConfig())
    assert (made.made, made.tars, made.samples) == (1, 3, 12) and content(out) == content(whole)
    assert export(root, Storage(out), ImagesExportConfig()).made == 0
    (out / "train-00000.tar").unlink()
    (out / "train-00001.tar").write_bytes(b"cut")
    assert export(root, Storage(out), ImagesExportConfig()).made == 2
    assert content(out) == content(whole)
    assert {path.name for path in out.iterdir()} == {*content(out), "train.json", "_export"}
    with pytest.raises(UserError, match="holds an export of another curation, or of other setting"):
        export(root, Storage(out), ImagesExportConfig(rows=100))


def test_what_cannot_be_exported_is_one_line(curated: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--out is missing"):
        job("--root", str(curated))
    with pytest.raises(UserError, match=r"no units yet; run jobs/curate\.py"):
        job("--root", str(tmp_path / "none"), "--out", str(tmp_path / "out"))
    root = Storage(tmp_path / "copy")
    root.upload_tree(curated, "")
    root.delete("captions/_done/train-00001.json")
    with pytest.raises(UserError, match=r"1 of 3 units are unfinished \(train-00001 \.\.\.\)"):
        job("--root", root.url(), "--out", str(tmp_path / "out"))


def test_keys_that_are_paths_and_images_that_are_none(curated: Path, tmp_path: Path) -> None:
    """As who may write the bucket could have left them."""
    root = Storage(tmp_path / "copy")
    root.upload_tree(curated, "")
    for stage_name in ("images", "captions"):
        path = tmp_path / f"copy/{stage_name}/train-00000.parquet"
        table = pq.read_table(path)
        found = table.to_pylist()
        found[0]["key"] = "../../up"
        if stage_name == "images":
            found[1]["image"] = b"#!/bin/sh"
        pq.write_table(type(table).from_pylist(found, table.schema), path)
    out = tmp_path / "out"
    assert export(root, Storage(out), ImagesExportConfig()).samples == 11
    names = set()
    for path in out.glob("*.tar"):
        with tarfile.open(path) as tar:
            names |= set(tar.getnames())
    assert not any("/" in name or ".." in name for name in names) and len(names) == 33


def test_there_and_back(curated: Path, tmp_path: Path) -> None:
    """What is exported is an input: images and captions are the same."""
    job("--root", str(curated), "--out", str(tmp_path / "out"))
    curate(tmp_path / "out", tmp_path / "again", replace(DEAL, test_rows=1))
    again = expected(tmp_path / "again") | expected(tmp_path / "again", "test")
    pixels = {
        text: np.asarray(Image.open(io.BytesIO(image))).tobytes()
        for image, text in expected(curated).values()
    }
    assert pixels == {
        text: np.asarray(Image.open(io.BytesIO(image))).tobytes() for image, text in again.values()
    }
