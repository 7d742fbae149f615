"""Pictures drawn elsewhere, and the bench as files for whoever draws them."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from PIL import Image

from pipeline.config import EvaluateConfig
from pipeline.errors import UserError
from pipeline.evaluation import benches
from pipeline.evaluation.methods import DrawnElsewhere, make_methods
from pipeline.storage import Storage
from tests import hostile
from tests.pipeline.evaluation.rivals import requests


def fails(call, *args: object) -> str:
    with pytest.raises(UserError) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def fill(folder: Path, kinds: tuple[str, ...] = ("png", "jpg", "webp")) -> list[str]:
    """A picture of its own grey for each of the first requests; their keys."""
    keys = [request.key for request in requests(len(kinds))]
    for i, (key, kind) in enumerate(zip(keys, kinds, strict=True)):
        Image.new("RGB", (40 + i, 30), (50 * i, 50 * i, 50 * i)).save(folder / f"{key}.{kind}")
    return keys


def test_each_request_gets_its_picture_in_its_own_size(tmp_path: Path) -> None:
    keys = fill(tmp_path, ("png", "jpg", "webp", "JPEG"))
    (tmp_path / "notes.txt").write_text("drawn with another tool")
    method = DrawnElsewhere("elite", str(tmp_path))
    method.check_keys(keys)
    method.open()
    drawn = method(list(reversed(requests(4))))
    assert [each.image.size for each in drawn] == [(43, 30), (42, 30), (41, 30), (40, 30)]
    assert [each.image.getpixel((3, 3))[0] // 45 for each in drawn] == [3, 2, 1, 0]
    assert {each.image.mode for each in drawn} == {"RGB"} and drawn[0].attention is None
    assert not method.native and not method.learns
    method.close()


def test_every_kind_of_picture_becomes_rgb(tmp_path: Path) -> None:
    (first, second, third) = (request.key for request in requests(3))
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(tmp_path / f"{first}.png")
    Image.new("L", (4, 4), 7).save(tmp_path / f"{second}.png")
    Image.fromarray(np.full((4, 4), 256 * 9, np.uint16)).save(tmp_path / f"{third}.png")
    drawn = DrawnElsewhere("odd", str(tmp_path))(requests(3))
    assert [each.image.getpixel((0, 0)) for each in drawn] == [(255,) * 3, (7,) * 3, (9,) * 3]


def test_missing_pictures_are_counted_and_named(tmp_path: Path) -> None:
    keys = fill(tmp_path)
    wanted = [*keys, "e", "d", "c", "b"]
    line = fails(DrawnElsewhere("elite", str(tmp_path)).check_keys, wanted)
    assert "lacks 4 of 7 pictures: e, d, c, ...;" in line and str(tmp_path) in line
    assert "lacks 1 of 4 pictures: e;" in fails(
        DrawnElsewhere("x", str(tmp_path)).check_keys, [*keys, "e"]
    )
    (tmp_path / "empty").mkdir()
    for folder, said in (("empty", "has no pictures"), ("no", "/no is not there; name a folder")):
        assert said in fails(DrawnElsewhere("x", str(tmp_path / folder)).check_keys, keys)
    assert "lacks 1 of 1" in fails(DrawnElsewhere("x", str(tmp_path)), requests(4)[3:])


def test_a_key_has_one_picture(tmp_path: Path) -> None:
    keys = fill(tmp_path)
    Image.new("RGB", (4, 4)).save(tmp_path / f"{keys[0]}.jpeg")
    assert f"two pictures of {keys[0]}" in fails(
        DrawnElsewhere("x", str(tmp_path)).check_keys, keys
    )


def test_bad_pictures_are_one_line(tmp_path: Path) -> None:
    (request,) = requests(1)
    file = tmp_path / f"{request.key}.png"

    def line(data: bytes) -> str:
        file.write_bytes(data)
        said = fails(DrawnElsewhere("x", str(tmp_path)), [request])
        assert str(file) in said
        return said

    assert "not a readable image" in line(b"\x89PNG\r\n\x1a\nno")
    assert "not a readable image" in line(hostile.encoded("PNG")[:500])
    assert "8000x8000 pixels, more than 50,000,000" in line(hostile.black_png(8000))
    assert "more than 50,000,000 pixels" in line(
        hostile.black_png(20_000)
    )  # Pillow's limit, or ours
    with file.open("wb") as sparse:
        sparse.truncate(300_000_000)
    assert "300,000,000 bytes" in fails(DrawnElsewhere("x", str(tmp_path)), [request])
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "f.tiff")
    (tmp_path / "f.tiff").rename(file)  # a float image in a png's clothes
    assert "range" in fails(DrawnElsewhere("x", str(tmp_path)), [request])


def test_another_picture_is_another_method(tmp_path: Path) -> None:
    keys = fill(tmp_path)

    def settings() -> object:
        return DrawnElsewhere("x", str(tmp_path)).settings

    before = settings()
    (tmp_path / "notes.txt").write_text("not a picture")
    assert settings() == before
    stat = (tmp_path / f"{keys[0]}.png").stat()
    data = bytearray((tmp_path / f"{keys[0]}.png").read_bytes())
    data[-20] ^= 1  # of the same length
    (tmp_path / f"{keys[0]}.png").write_bytes(data)
    assert (tmp_path / f"{keys[0]}.png").stat().st_size == stat.st_size
    changed = settings()
    (tmp_path / f"{keys[1]}.jpg").rename(tmp_path / "other.jpg")
    assert len({json.dumps(each) for each in (before, changed, settings())}) == 3


def test_a_folder_on_s3_is_read_like_a_local_one(bucket: str, tmp_path: Path) -> None:
    keys = fill(tmp_path)
    Storage(bucket).upload_tree(tmp_path, "drawn")
    local, remote = DrawnElsewhere("x", str(tmp_path)), DrawnElsewhere("x", f"{bucket}/drawn")
    remote.check_keys(keys)
    assert remote.settings == local.settings
    for here, there in zip(local(requests(3)), remote(requests(3)), strict=True):
        assert (np.asarray(here.image) == np.asarray(there.image)).all()
    line = fails(remote.check_keys, [*keys, "x"])
    assert f"{bucket}/drawn lacks 1 of 4" in line


def test_folders_come_after_the_methods_by_their_names(tmp_path: Path, tiny_models: Path) -> None:
    cfg = EvaluateConfig(methods=["text-only", "reference-only"])
    cfg.models.base = str(tiny_models / "sd")
    (tmp_path / "elite").mkdir()
    cfg.images_from = [f"{tmp_path}/elite/", f"blip={tmp_path}/x=y/out", "s3://some/break-a-scene"]
    made = make_methods(cfg)
    assert [method.name for method in made] == [
        "text-only",
        "reference-only",
        "elite",
        "blip",
        "break-a-scene",
    ]
    assert [method.native for method in made] == [True, True, False, False, False]
    there = [pickle.loads(pickle.dumps(method)) for method in made]  # noqa: S301 (our own, as Ray sends it)
    assert [method.title for method in there] == [method.title for method in made]
    cfg.images_from = [f"{tmp_path}/my pictures"]
    assert "'my pictures' cannot name a method; write NAME=FOLDER" in fails(make_methods, cfg)
    cfg.images_from = [f"{tmp_path}/elite", f"elite={tmp_path}"]
    assert "elite is there twice" in fails(make_methods, cfg)
    cfg.images_from = ["elite="]
    assert "images_from: 'elite=' names no folder" in fails(make_methods, cfg)


def test_the_bench_is_written_for_other_tools(tmp_path: Path) -> None:
    bench = benches.MiniBench(2, 32)
    assert benches.export_requests(bench, Storage(tmp_path)) == 4
    lines = [json.loads(line) for line in (tmp_path / "requests.jsonl").read_text().splitlines()]
    for line, request in zip(lines, bench.requests(0, 4), strict=True):
        assert (line["key"], line["prompt"]) == (request.key, request.prompt)
        assert (line["seed"], line["picture"]) == (request.seed, f"{request.key}.png")
        (said,), (chosen,) = line["selections"], request.selections
        assert (said["query"], said["phrase"]) == (chosen.subject.query, chosen.subject.phrase)
        (image,), (mask,) = said["images"], said["masks"]
        shown = np.asarray(Image.open(tmp_path / image))
        assert (shown == np.asarray(chosen.reference.image)).all()
        white = np.asarray(Image.open(tmp_path / mask))
        assert ((white == 255) == chosen.subject.mask).all() and set(np.unique(white)) == {0, 255}
    # two references, two masks each, and the requests: nothing else, nothing twice
    assert len([file for file in tmp_path.rglob("*") if file.is_file()]) == 2 * (1 + 2) + 1
    with_them = DrawnElsewhere("drawn", str(tmp_path / "drawn"))
    (tmp_path / "drawn").mkdir()
    for line in lines:
        shown = Image.open(tmp_path / line["selections"][0]["images"][0])
        shown.save(tmp_path / "drawn" / line["picture"])
    with_them.check(bench)


def test_what_was_drawn_of_other_requests_is_refused(tmp_path: Path) -> None:
    bench, others = benches.MiniBench(2, 32), benches.MiniBench(2, 32, noise=1)
    for outline in bench.outlines():
        Image.new("RGB", (4, 4)).save(tmp_path / f"{outline.key}.png")
    storage, told = Storage(tmp_path), tmp_path / "requests.jsonl"

    def method() -> DrawnElsewhere:
        return DrawnElsewhere("elite", str(tmp_path))

    method().check(bench)
    assert method().settings["seeds"] == "unknown"
    benches.export_requests(bench, storage)
    method().check(bench)
    assert method().settings["seeds"] == "told"
    benches.export_requests(others, storage)
    assert (
        f"{told}: mismatched seeds of 4 of 4 requests: of bench-000000-a it is 100000 there, and "
        "0 in the bench; draw what" in fails(method().check, bench)
    )
    benches.export_requests(bench, storage)
    lines = told.read_text().splitlines()
    told.write_text("\n".join(lines[:3]))
    unknown = "mismatched requests: 1 of the bench's 4 are not there, bench-000001-b for one; draw"
    assert unknown in fails(method().check, bench)
    of_other_seed = benches.MiniBench(2, 32, seed=1)  # other scenes: no picture of theirs is there
    benches.export_requests(of_other_seed, storage)
    assert "mismatched requests: 4 of the bench's 4 are not there" in fails(method().check, bench)
    told.write_text("\n".join([*lines[:3], lines[3].replace(" on ", " under ")]))
    assert "mismatched prompts of 1 of 4 requests: of bench-000001-b it is 'a" in fails(
        method().check, bench
    )
    for damaged in (b"no", b"[1]", b'{"key": {}}', b"\xff", b"[" * 100_000, b'{"prompt": "a cup"}'):
        told.write_bytes(damaged)
        assert "requests.jsonl is not what jobs/evaluate.py requests writes" in fails(
            method().check, bench
        )
    with told.open("wb") as sparse:
        sparse.truncate(300_000_000)
    assert "300,000,000 bytes" in fails(method().check, bench)


class TwoViews:
    """Two images of one reference; where the subject is in the second one nobody has said."""

    name = title = "two views"
    settings: ClassVar[dict[str, object]] = {}
    published = False

    def __len__(self) -> int:
        return 1

    def references(self) -> list[tuple[int, int]]:
        return [(0, 1)]

    def requests(self, start: int, stop: int) -> list[benches.Request]:
        views = tuple(Image.new("RGB", (8, 6), colour) for colour in ("red", "blue"))
        subject = benches.BenchSubject("cup", "a cup", (np.ones((6, 8), bool), None))
        chosen = benches.Selection(benches.Reference("cup", views, [subject]), 0)
        return [benches.Request("cup-1", (chosen,), "a cup on snow", 3)][start:stop]


def test_unknown_masks_are_written_as_null(tmp_path: Path) -> None:
    benches.export_requests(TwoViews(), Storage(tmp_path))
    (said,) = json.loads((tmp_path / "requests.jsonl").read_text())["selections"]
    assert said["images"] == ["references/cup/0.png", "references/cup/1.png"]
    assert said["masks"] == ["references/cup/0-0.png", None]
