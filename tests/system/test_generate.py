"""jobs/generate.py and jobs/evaluate.py, whole, on tiny random models: nothing is learned here,
so what is checked is which pictures appear, what they say of themselves, and every refusal.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline import report
from pipeline.config import EvaluateConfig, LookConfig, ModelsConfig
from pipeline.errors import UserError
from pipeline.generation import png
from pipeline.progress import Progress
from pipeline.storage import Storage
from tests.system.generating import (
    config,
    draw,
    pixels,
    recipe,
    write_encoder,
    write_photos,
)
from tests.untrained import tiny_parts

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.system, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def parts(tiny_models: Path) -> ModelsConfig:
    return tiny_parts(tiny_models)


@pytest.fixture(scope="module")
def trained(parts: ModelsConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_encoder(tmp_path_factory.mktemp("root"), parts)


@pytest.fixture
def root(trained: Path, tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "model").symlink_to(trained / "model")
    return tmp_path / "run"


def job(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, str(ROOT / "jobs" / f"{name}.py"), *arguments],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
    )


def test_held_out_references(root: Path, parts: ModelsConfig) -> None:
    arguments = ["--root", str(root), "--models.base", parts.base, "--models.vision", parts.vision]
    arguments += ["--references", "2", "--steps", "2", "--device", "cpu"]
    done = job("generate", *arguments)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "grid.png" in done.stdout and "report.html" in done.stdout

    singles = sorted(path.name for path in (root / "generate").iterdir())
    kinds = ("mask-query-a", "text-only", "text-query-a", "text-query-b", "two-subjects")
    assert singles == [f"{i:02d}-{kind}.png" for i in (0, 1) for kind in kinds]
    about = {name: png.made_by((root / "generate" / name).read_bytes()) for name in singles}
    one, other = about["00-text-query-a.png"], about["00-text-query-b.png"]
    assert one and other and one["recipe"]["prompt"] != other["recipe"]["prompt"]
    assert one["recipe"]["subjects"][0]["query"] in one["recipe"]["prompt"]
    assert one["recipe"]["seed"] == other["recipe"]["seed"] and one["recipe"]["steps"] == 2
    assert len(one["model"]) == len(one["vision"]["sha256"]) == 64 and one["base"]["name"] == "sd"
    taken = {name: said["recipe"]["subjects"] for name, said in about.items() if said}
    assert len(taken["01-two-subjects.png"]) == 2 and taken["00-text-only.png"] == []
    (masked,) = taken["00-mask-query-a.png"]
    assert masked["mask"] and masked["query"] is None
    drawn = {name: pixels(root / "generate" / name) for name in singles}
    assert {p.shape for p in drawn.values()} == {(32, 32, 3)}
    assert (drawn["00-text-only.png"] != drawn["00-text-query-a.png"]).any()
    assert (drawn["00-mask-query-a.png"] != drawn["00-text-query-a.png"]).any()
    assert Image.open(root / "grid.png").width > 9 * 160
    assert "data:image/png" in (root / "report.html").read_text()

    before = {path: path.stat().st_mtime_ns for path in root.glob("**/*.png")}
    again = job("generate", *arguments)
    assert again.returncode == 0 and "up to date" in again.stdout
    assert {path: path.stat().st_mtime_ns for path in root.glob("**/*.png")} == before


def test_an_s3_root(
    trained: Path,
    parts: ModelsConfig,
    bucket: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    storage = Storage(f"{bucket}/run")
    storage.upload_tree(trained / "model", "model")
    cfg = config(trained, parts, references=1)
    draw(cfg, storage)
    assert "up to date" not in capsys.readouterr().out
    draw(cfg, storage)
    assert "up to date" in capsys.readouterr().out
    local = Storage(tmp_path)
    local.write_bytes("model/config.json", storage.read_bytes("model/config.json"))
    local.write_bytes("model/model.safetensors", storage.read_bytes("model/model.safetensors"))
    draw(cfg, local)
    for path in ("grid.png", "generate/00-text-query-a.png"):
        assert storage.read_bytes(path) == local.read_bytes(path)
    assert storage.read_bytes(report.build(storage).rpartition("/")[2])
    again = config(trained, parts, from_=f"{bucket}/run/generate/00-text-query-a.png")
    made = draw(again, local)
    assert made.grid == "generate/00-text-query-a-again-grid.png" and local.exists(made.grid)


@pytest.mark.parametrize("own", [False, True])
def test_pictures_that_are_there_are_not_drawn_again(
    own: bool, root: Path, parts: ModelsConfig, tmp_path: Path
) -> None:
    settings: dict[str, object] = {"batch": 2}
    if own:
        photo, _ = write_photos(tmp_path)
        settings |= {"image": [photo], "query": ["cup"], "prompt": "a cup", "pictures": 3}
    grid = root / draw(config(root, parts, **settings)).grid
    singles = {path.name for path in (root / "generate").iterdir()} - {grid.name}
    assert len(singles) == (6 if own else 10)
    folder = root / "generate"
    whole = {name: (folder / name).read_bytes() for name in singles}
    whole_grid = grid.read_bytes()
    # as a kill leaves it: some pictures, one of them broken by another program, no grid
    grid.unlink()
    for name in sorted(whole)[3:]:
        (folder / name).unlink()
    broken = folder / min(whole)
    broken.write_bytes(broken.read_bytes()[:-1000])
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir() if path != broken}
    draw(config(root, parts, **settings))
    after = {name: (folder / name).stat().st_mtime_ns for name in singles}
    assert len(before) == 2 and before.items() <= after.items()
    for name, data in whole.items():
        drawn = np.asarray(Image.open(io.BytesIO(data)), int)
        assert abs(pixels(folder / name) - drawn).max() <= 1
    assert png.made_by(grid.read_bytes()) == png.made_by(whole_grid)


def test_other_settings_are_drawn_again(
    root: Path, parts: ModelsConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed in (0, 1):
        draw(config(root, parts, references=1, seed=seed))
    assert "up to date" not in capsys.readouterr().out
    draw(config(root, parts, references=1, seed=1))
    assert "up to date" in capsys.readouterr().out


def test_guidance_is_rescaled_where_asked_for(root: Path, parts: ModelsConfig) -> None:
    drawn = []
    for settings in ({}, {"guidance_rescale": 1.0}, {"guidance_rescale": 0.0}):
        cfg = config(root, parts, references=1, **settings)
        draw(cfg)
        drawn.append(np.asarray(Image.open(root / "generate" / "00-text-only.png"), int))
    assert abs(drawn[0] - drawn[1]).max() > 1
    assert abs(drawn[0] - drawn[2]).max() <= 1


def test_scale_zero_is_the_plain_pipeline(root: Path, parts: ModelsConfig) -> None:
    draw(config(root, parts, references=1, scale=0.0, batch=1))
    folder = root / "generate"
    plain = np.asarray(Image.open(folder / "00-text-only.png"))
    assert (np.asarray(Image.open(folder / "00-text-query-a.png")) == plain).all()
    assert (np.asarray(Image.open(folder / "00-mask-query-a.png")) == plain).all()


def test_own_images(root: Path, parts: ModelsConfig, tmp_path: Path) -> None:
    photo, mask = write_photos(tmp_path)
    cfg = config(
        root, parts, image=[photo, photo], query=["a cup", ""], mask=["", mask],
        prompt="a cup and a fish on snow", seed=7,
    )  # fmt: skip
    made = draw(cfg)
    name = made.grid.removesuffix("-grid.png")
    assert name.startswith("generate/a-cup-and-a-fish-on-snow-seed7-") and made.pictures == 2
    said = recipe(root / f"{name}.png")
    assert (said["prompt"], said["seed"]) == (cfg.prompt, 7)
    first, second = said["subjects"]  # type: ignore[misc]
    assert (first["name"], first["query"], first["mask"]) == ("cup", "a cup", False)
    assert (second["query"], second["mask"]) == (None, True)
    before = (root / f"{name}.png").stat().st_mtime_ns
    assert draw(cfg) == made
    assert (root / f"{name}.png").stat().st_mtime_ns == before, "nothing is drawn twice"
    Image.open(photo).transpose(Image.Transpose.ROTATE_180).save(photo)
    assert draw(cfg).grid != made.grid
    assert not (root / "grid.png").exists(), "the grid of held-out references is left alone"


def test_every_setting_shapes_the_picture(root: Path, parts: ModelsConfig, tmp_path: Path) -> None:
    """Each one is drawn beside the others, under a name of its own, and differs from the plain."""
    photo, _ = write_photos(tmp_path)
    plain = {"image": [photo, photo], "query": ["a cup", "fish"], "prompt": "a cup and a fish"}
    drawn = {}
    for name, settings in {
        "plain": {},
        "negative": {"negative_prompt": "blue"},
        "scales": {"scales": [1.0, 0.25]},
        "region": {"region": ["0,0,0.5,1", "0.5,0,1,1"]},
        "size": {"width": 48, "height": 40},
        "width": {"width": 40},
        "bfloat16": {"dtype": "bfloat16"},
    }.items():
        made = draw(config(root, parts, **plain, **settings))
        drawn[name] = pixels(root / f"{made.grid.removesuffix('-grid.png')}.png")
        if name == "bfloat16":  # the grid and its pictures are of the same name, and drawn anew
            assert drawn[name].shape == drawn["plain"].shape
    assert drawn.pop("size").shape == (40, 48, 3) and drawn.pop("width").shape == (32, 40, 3)
    first = drawn.pop("plain")
    for name, picture in drawn.items():
        assert (picture != first).any(), name


def test_refusals_are_one_line(root: Path, parts: ModelsConfig, tmp_path: Path) -> None:
    done = job("generate", "--root", str(tmp_path / "empty"))
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert "run jobs/train.py first" in done.stderr
    path = str(tmp_path / "a.png")
    Image.new("RGB", (32, 32)).save(path)
    ask = {"image": [path], "prompt": "a cup"}
    for settings, reason in (
        ({"prompt": "a cup"}, "add --image"),
        ({"control": path}, "add --image"),
        ({"pictures": 2}, "add --image"),
        ({"references": 0}, "references"),
        ({"steps": 0}, "steps"),
        ({"guidance_rescale": 1.5}, "guidance_rescale"),
        ({"image": [str(tmp_path / "no.png")], "query": ["a"], "prompt": "x"}, "no such image"),
        ({**ask, "query": [""]}, "neither a query nor a mask"),
        ({"image": [path], "query": ["a"]}, "prompt: missing"),
        ({"image": [path], "query": ["a"], "prompt": " "}, "prompt: missing"),
        ({**ask, "query": ["a"], "control": path}, "name one with --controlnet"),
        ({**ask, "query": ["a"], "controlnet": parts.base}, "add --control, or leave it out"),
        ({**ask, "query": ["a"], "control": path, "controlnet": parts.vision}, "ControlNetModel"),
        ({**ask, "query": ["a"], "width": 33}, "multiples of 8 pixels"),
        ({**ask, "query": ["a"], "seed": 2**63 - 1, "pictures": 2}, "seed"),
        ({"model": str(tmp_path)}, "SSR-Encoder"),
        ({"model": "nowhere/at/all"}, "SSR-Encoder"),
    ):
        with pytest.raises(UserError, match=reason) as caught:
            draw(config(root, parts, **settings))
        assert "\n" not in str(caught.value)


def test_evaluation(root: Path, parts: ModelsConfig) -> None:
    from pipeline.evaluation.run import evaluate

    cfg = EvaluateConfig(
        root=str(root),
        models=parts,
        look=LookConfig(clip="miniworld:clip"),
        references=3,
        steps=2,
        batch_size=2,
        unit_pictures=4,
        resamples=200,
        device="cpu",
    )
    storage = Storage(root)
    text = evaluate(cfg, storage, Progress(terminal=False)).text
    folder = root / "evaluation" / "mini"
    methods = json.loads((folder / "scores.json").read_text())["methods"]
    assert list(methods) == ["text-only", "ssr-text", "ssr-mask"]
    assert all(method["means"]["clip_t"]["samples"] == 6 for method in methods.values())
    assert methods["ssr-text"]["means"]["peak_target"]["mean"] is not None
    assert methods["ssr-mask"]["means"]["peak_target"]["mean"] is None
    made = sorted(folder.glob("*/*/*.parquet"))
    assert len(made) == 2 * 3 * 2
    drawn = {
        name: {
            row["key"]: row["image"]
            for path in folder.glob(f"pictures/{name}/*.parquet")
            for row in pq.read_table(path).to_pylist()
        }
        for name in methods
    }
    floor, asked = drawn["text-only"], drawn["ssr-text"]
    assert floor.keys() == asked.keys() and all(floor[k] != asked[k] for k in floor)

    before = [path.stat().st_mtime_ns for path in made]
    assert evaluate(cfg, storage, Progress(terminal=False)).text == text
    assert [path.stat().st_mtime_ns for path in made] == before
