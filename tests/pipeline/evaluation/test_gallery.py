"""Sheets of pictures: which they show, what is under them, and what is read for them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.config import EvaluateConfig, LookConfig
from pipeline.evaluation import gallery, run
from pipeline.evaluation.benches import MiniBench, Request, folder_bench, open_bench
from pipeline.evaluation.benches.folder import read_picture
from pipeline.evaluation.drawing import read_pictures
from pipeline.evaluation.evaluation import Evaluation, scorers_of
from pipeline.evaluation.methods import Drawn
from pipeline.evaluation.methods.ssr import SelectBy
from pipeline.evaluation.publish import publish
from pipeline.generation import grid
from pipeline.generation.sampler import load_base
from pipeline.progress import Progress
from pipeline.storage import Storage
from ssr_model.maps import overlay
from tests.pipeline.evaluation import folders, rivals
from tests.pipeline.evaluation.test_run import Oracle
from tests.ssr_model.conftest import make_ssr

LOOK = LookConfig(clip="miniworld:clip", dino="miniworld:dino", segmenter="miniworld:judge")
CENTRE = (1 / 3, 0.0, 2 / 3, 1.0)


class Copy:
    """Draws its reference, `smaller` times as small, and looks at a corner of its middle third."""

    native, learns = True, False

    def __init__(self, name: str = "copy", looks: bool = False, smaller: int = 1) -> None:
        self.name, self.title, self.looks, self.smaller = name, name.title(), looks, smaller
        self.settings: dict[str, Any] = {}
        self.calls: list[int] = []

    def check(self, bench: Any) -> None: ...

    def open(self) -> None: ...

    def close(self) -> None: ...

    def __call__(self, requests: Sequence[Request]) -> list[Drawn]:
        self.calls.append(len(requests))
        images = [request.reference.image.reduce(self.smaller) for request in requests]
        looks = np.eye(2, dtype=np.float32) * ((1, 0), (0, 0))
        return [Drawn(i, looks, CENTRE) if self.looks else Drawn(i) for i in images]


class Sheet:
    """What a sheet was drawn of."""

    def __init__(self, titles: Sequence[str], rows: Any, heading: str, note: str = "") -> None:
        self.titles, self.rows, self.heading, self.note = list(titles), rows, heading, note

    def column(self, title: str) -> list[grid.Cell]:
        return [row[self.titles.index(title)] for row in self.rows]

    @property
    def captions(self) -> list[str]:
        return [cell.caption for row in self.rows for cell in row]


@pytest.fixture
def sheets(monkeypatch: pytest.MonkeyPatch) -> list[Sheet]:
    """Of all sheets that are drawn, in turn."""
    found: list[Sheet] = []
    draw = grid.draw

    def told(*args: Any) -> Image.Image:
        found.append(Sheet(*args))
        return draw(*args)

    monkeypatch.setattr(grid, "draw", told)
    return found


def published(root: Path, bench: Any, methods: Sequence[Any], **settings: Any) -> str:
    """Drawn, scored and published: the tables."""
    cfg = EvaluateConfig(**{"resamples": 100, "unit_pictures": 6, "look": LOOK, **settings})
    asked = Evaluation(cfg, bench, methods, scorers_of(cfg, bench))
    for method in methods:
        run.make(asked, method, Storage(root), Progress(terminal=False))
    return publish(asked, Storage(root)).text


def dreambench(folder: Path, subjects: int = 2, seeds: int = 1) -> Any:
    """As many subjects, two prompts each."""
    names = "\n".join(f"cup_{number:02d},cup" for number in range(subjects))
    text = folders.OWN_TEXT.replace("my_cup,cup\nmy_dog,dog", names)
    folders.write_dreambench(folder, text, images=1)
    return open_bench(EvaluateConfig(bench=str(folder), seeds=seeds), 32)


def photos(folder: Path, size: tuple[int, int], masked: Sequence[bool] = (True,)) -> Any:
    """A bench of photos of a red, a green and a blue third; where it is `masked`, the green one."""
    pixels = np.zeros((size[1], size[0], 3), np.uint8)
    for third in range(3):
        pixels[:, third * size[0] // 3 : (third + 1) * size[0] // 3, third] = 200
    folder.mkdir()
    Image.fromarray(pixels).save(folder / "photo.png")
    Image.fromarray(pixels[..., 1] // 200 * 255).save(folder / "mask.png")
    references = [
        {
            "key": f"photo-{number}",
            "images": ["photo.png"],
            "subjects": [{"name": "cup", "masks": ["mask.png" if known else None]}],
            "requests": [{"subjects": ["cup"], "prompts": ["a cup on snow"]}],
        }
        for number, known in enumerate(masked)
    ]
    (folder / "bench.json").write_text(json.dumps({"version": 1, "references": references}))
    return open_bench(EvaluateConfig(bench=str(folder)), 32)


def test_a_measure_without_values_neither_ranks_nor_has_a_column(
    tmp_path: Path, sheets: list[Sheet]
) -> None:
    text = published(tmp_path, dreambench(tmp_path / "bench"), [Copy()])
    assert "DINO ↑" in text and "DINO-M" not in text and "CLIP-ES" not in text
    first, extremes = sheets
    assert first.note == "under each picture: DINO"
    assert extremes.heading == "Best and worst pictures by DINO"
    drawn = [*first.column("Copy"), *extremes.column("Drawn")]
    assert [cell.caption.split("\n")[-1] for cell in drawn] == ["1.000"] * 6
    assert first.titles == ["Reference", "Copy"], "nothing is known of masks or attention"


def test_a_method_that_does_not_point_has_no_column_of_it(tmp_path: Path) -> None:
    text = published(tmp_path, MiniBench(2, 32), [Copy()], look=LookConfig())
    assert "A present ↑" in text and "peak on A" not in text and "attention IoU" not in text
    text = published(tmp_path, MiniBench(2, 32), [Copy(), Oracle("right")], look=LookConfig())
    line = next(line for line in text.splitlines() if line.startswith("| Copy"))
    assert "peak on A" in text and line.count("–") == 3


def test_not_found_is_said_where_the_subject_is_missing_alone(
    tmp_path: Path, sheets: list[Sheet]
) -> None:
    published(tmp_path, MiniBench(3, 32), [Oracle("right"), Oracle("wrong", 1)], look=LookConfig())
    grid_of, extremes = sheets
    assert grid_of.note == "under each picture: distance to A"
    said = {t: [c.caption.endswith("not found") for c in grid_of.column(t)] for t in grid_of.titles}
    assert not any(said["Right"]) and all(said["Wrong"])
    worst = {row[0].caption: row for row in extremes.rows}["Wrong:\nworst"]
    assert worst[2].caption.endswith("not found"), "which is worse than any distance"


def test_pictures_that_were_not_measured_are_not_ranked(
    tmp_path: Path, sheets: list[Sheet]
) -> None:
    bench = photos(tmp_path / "bench", (32, 32), masked=(False, True))
    text = published(tmp_path, bench, [Copy()])
    assert "DINO-M ↑" in text
    assert "DINO-M: subjects that were not found, counted as 0: Copy 0 of 1." in text
    grid_of, extremes = sheets
    assert grid_of.note == "under each picture: DINO-M"
    values = [cell.caption.split("\n")[1] for cell in grid_of.column("Copy")]
    assert values[0] == "not measured" and float(values[1]) > 0
    for row in extremes.rows:
        assert [cell.caption for cell in row[1:] if cell.image] == [
            "“cup”",
            f"“a cup on snow”\n{values[1]}",
        ]


def test_the_map_lies_on_what_it_covers_of_a_photo(tmp_path: Path, sheets: list[Sheet]) -> None:
    bench = photos(tmp_path / "bench", (96, 32))
    published(tmp_path, bench, [Copy(looks=True)], look=LookConfig(clip="miniworld:clip"))
    (looks,) = sheets[0].column("Where it looks")
    (request,) = bench.requests(0, 1)
    corner = np.array([[1, 0], [0, 0]])
    expected = overlay(request.reference.image.crop((32, 0, 64, 32)), corner)
    assert looks.image is not None and np.array_equal(looks.image, expected)
    (mask,) = sheets[0].column("Mask")
    bright = np.asarray(mask.image).max(axis=(0, 2)) > 200
    assert np.flatnonzero(bright).tolist() == list(range(32, 64)), "a mask lies on all of it"


def test_the_encoder_says_what_of_a_photo_its_map_covers(tmp_path: Path, tiny_models: Path) -> None:
    cfg = rivals.settings(tiny_models, root=str(tmp_path), bench=str(tmp_path / "bench"))
    make_ssr(tiny_models, load_base(cfg).unet).save_pretrained(tmp_path / "model")
    method = SelectBy("ssr-text", cfg, "text")
    method.open()
    wide = photos(tmp_path / "wide", (96, 32)).requests(0, 1)
    tall = photos(tmp_path / "tall", (30, 60)).requests(0, 1)
    (of_wide,), (of_tall,) = method(wide), method(tall)
    assert of_wide.seen == pytest.approx(CENTRE) and of_tall.seen == pytest.approx(
        (0, 0.25, 1, 0.75)
    )
    assert (
        of_wide.attention is not None and of_wide.attention.shape[0] == of_wide.attention.shape[1]
    )


def test_large_photos_are_kept_small(tmp_path: Path, sheets: list[Sheet]) -> None:
    bench = photos(tmp_path / "bench", (1800, 600))
    published(tmp_path, bench, [Copy(looks=True)], look=LookConfig(clip="miniworld:clip"))
    cells = [cell for sheet in sheets for row in sheet.rows for cell in row if cell.image]
    assert len(cells) == 8 and max(max(cell.image.size) for cell in cells) == 320
    (looks,) = sheets[0].column("Where it looks")
    assert looks.image is not None and looks.image.size == (106, 107)


def test_the_grid_goes_over_the_whole_bench(tmp_path: Path, sheets: list[Sheet]) -> None:
    bench = dreambench(tmp_path / "bench", 30, seeds=2)
    assert len(bench) == 30 * 2 * 2
    published(tmp_path, bench, [Copy()], look=LookConfig(clip="miniworld:clip"))
    reds = [int(np.asarray(cell.image)[0, 0, 0]) for cell in sheets[0].column("Reference")]
    numbers = [place * 30 // 12 for place in range(12)]
    assert reds == pytest.approx(numbers, abs=1), "its subjects' pictures redden"
    few = dreambench(tmp_path / "few", 5, seeds=2)
    published(tmp_path, few, [Copy()], look=LookConfig(clip="miniworld:clip"))
    prompts = [cell.caption.split("\n")[0] for cell in sheets[2].column("Copy")]
    assert Counter(prompts) == {"“a cup in the snow”": 5, "“a red cup”": 5}
    assert prompts[:2] == ["“a cup in the snow”", "“a red cup”"]


def test_both_subjects_of_a_mini_scene_stand_together(tmp_path: Path, sheets: list[Sheet]) -> None:
    bench = MiniBench(20, 32)
    published(tmp_path, bench, [Copy()], look=LookConfig())
    of = [2 * (place * 20 // 6) + target for place in range(6) for target in range(2)]
    asked = [bench.requests(number, number + 1)[0] for number in of]
    assert [cell.caption.split("\n")[0] for cell in sheets[0].column("Copy")] == [
        f"“{request.prompt}”" for request in asked
    ]
    for cell, request in zip(sheets[0].column("Reference"), asked, strict=True):
        assert np.array_equal(cell.image, request.reference.image)


def test_each_unit_and_photo_is_read_once_a_sheet(
    tmp_path: Path, sheets: list[Sheet], monkeypatch: pytest.MonkeyPatch
) -> None:
    units: list[tuple[int, str, str]] = []
    pictures: list[tuple[int, str]] = []
    rows: list[dict[str, Any]] = []

    def read_unit(storage: Any, folder: str, method: str, unit: str, *rest: Any) -> Any:
        units.append((len(sheets), method, unit))
        rows.extend(read_pictures(storage, folder, method, unit, *rest))
        return rows[-len(rest[1]) :]

    def read_photo(storage: Any, path: str) -> Any:
        pictures.append((len(sheets), path))
        return read_picture(storage, path)

    monkeypatch.setattr(gallery, "read_pictures", read_unit)
    monkeypatch.setattr(folder_bench, "read_picture", read_photo)
    bench = dreambench(tmp_path / "bench", 30)
    methods = [Copy("one"), Copy("two"), Copy("three")]
    look = LookConfig(clip="miniworld:clip")
    published(tmp_path, bench, methods, look=look, unit_pictures=8)
    for log in (units, pictures, rows, sheets):
        log.clear()
    published(tmp_path, bench, methods, look=look, unit_pictures=8)
    assert max(Counter(units).values()) == max(Counter(pictures).values()) == 1
    assert len([unit for unit in units if unit[0] == 0]) == 3 * 7, "all but the last have rows"
    assert len(rows) == 3 * (12 + 8) and set(rows[0]) == {"key", "image", "attention", "seen"}
