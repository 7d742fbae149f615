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

from pipeline import models, report
from pipeline.config import EvaluateConfig, GenerateConfig, LookConfig, ModelsConfig
from pipeline.errors import UserError
from pipeline.generation import png, studio
from pipeline.progress import Progress
from pipeline.storage import Storage

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.system, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def parts(tiny_models: Path) -> ModelsConfig:
    return ModelsConfig(base=str(tiny_models / "sd"), vision=str(tiny_models / "clip"))


@pytest.fixture(scope="module")
def trained(
    tiny_models: Path, parts: ModelsConfig, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A root with an untrained SSR-Encoder under model/, its weights random and large."""
    import torch

    from ssr_model import weights
    from ssr_model.config import SSRConfig
    from ssr_model.encoder import SSRAdapter

    unet, vision = models.load_unet(parts.base), models.load_vision(parts.vision)
    text = models.load_text_encoder(parts.base)
    config = SSRConfig.from_models(vision.config, text.config, unet, scales=3)
    torch.manual_seed(0)
    adapter = SSRAdapter(config)
    adapter.init_from_unet(unet)
    root = tmp_path_factory.mktemp("root")
    weights.save_adapter(root / "model", adapter)
    return root


@pytest.fixture
def root(trained: Path, tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "model").symlink_to(trained / "model")
    return tmp_path / "run"


def config(root: Path, parts: ModelsConfig, **settings: object) -> GenerateConfig:
    given = {"references": 2, "steps": 2, "device": "cpu", **settings}
    return GenerateConfig(root=str(root), models=parts, **given)  # type: ignore[arg-type]


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
    assert one and other and one["prompt"] != other["prompt"]
    assert one["selections"][0]["query"] in one["prompt"]
    assert one["seed"] == other["seed"] and one["steps"] == 2 and len(one["model"]) == 64
    assert len(about["01-two-subjects.png"]["selections"]) == 2  # type: ignore[index]
    assert about["00-text-only.png"]["selections"] == []  # type: ignore[index]
    pixels = {name: np.asarray(Image.open(root / "generate" / name)) for name in singles}
    assert {p.shape for p in pixels.values()} == {(32, 32, 3)}
    assert (pixels["00-text-only.png"] != pixels["00-text-query-a.png"]).any()
    assert (pixels["00-mask-query-a.png"] != pixels["00-text-query-a.png"]).any()
    assert Image.open(root / "grid.png").width > 9 * 160
    assert "data:image/png" in (root / "report.html").read_text()

    before = {path: path.stat().st_mtime_ns for path in root.glob("**/*.png")}
    again = job("generate", *arguments)
    assert again.returncode == 0 and "up to date" in again.stdout
    assert {path: path.stat().st_mtime_ns for path in root.glob("**/*.png")} == before


def test_an_s3_root(trained: Path, parts: ModelsConfig, bucket: str, tmp_path: Path) -> None:
    storage, said = Storage(f"{bucket}/run"), list[str]()
    storage.upload_tree(trained / "model", "model")
    cfg = config(trained, parts, references=1)
    studio.generate(cfg, storage, said.append)
    studio.generate(cfg, storage, said.append)
    assert "up to date" in said[-1] and "up to date" not in said[0]
    local = Storage(tmp_path)
    local.write_bytes("model/config.json", storage.read_bytes("model/config.json"))
    local.write_bytes("model/model.safetensors", storage.read_bytes("model/model.safetensors"))
    studio.generate(cfg, local, said.append)
    for path in ("grid.png", "generate/00-text-query-a.png"):
        assert storage.read_bytes(path) == local.read_bytes(path)
    assert storage.read_bytes(report.build(storage).rpartition("/")[2])


def test_pictures_that_are_there_are_not_drawn_again(
    root: Path, parts: ModelsConfig, tmp_path: Path
) -> None:
    studio.generate(config(root, parts), Storage(root), lambda _: None)
    folder = root / "generate"
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    whole_grid = (root / "grid.png").read_bytes()
    # as a kill leaves it: some pictures, no grid
    (root / "grid.png").unlink()
    for name in sorted(whole)[4:]:
        (folder / name).unlink()
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    studio.generate(config(root, parts), Storage(root), lambda _: None)
    after = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert len(before) == 4 and before.items() <= after.items() and after.keys() == whole.keys()
    pixels = {n: np.asarray(Image.open(folder / n), int) for n in whole}
    for name, data in whole.items():
        assert abs(pixels[name] - np.asarray(Image.open(io.BytesIO(data)), int)).max() <= 1
    assert png.made_by((root / "grid.png").read_bytes()) == png.made_by(whole_grid)


def test_other_settings_are_drawn_again(root: Path, parts: ModelsConfig) -> None:
    said: list[str] = []
    for seed in (0, 1):
        studio.generate(config(root, parts, references=1, seed=seed), Storage(root), said.append)
    assert not any("up to date" in line for line in said)
    studio.generate(config(root, parts, references=1, seed=1), Storage(root), said.append)
    assert "up to date" in said[-1]


def test_guidance_is_rescaled_where_asked_for(root: Path, parts: ModelsConfig) -> None:
    drawn = []
    for settings in ({}, {"guidance_rescale": 1.0}, {"guidance_rescale": 0.0}):
        cfg = config(root, parts, references=1, **settings)
        studio.generate(cfg, Storage(root), lambda _: None)
        drawn.append(np.asarray(Image.open(root / "generate" / "00-text-only.png"), int))
    assert abs(drawn[0] - drawn[1]).max() > 1
    assert abs(drawn[0] - drawn[2]).max() <= 1


def test_scale_zero_is_the_plain_pipeline(root: Path, parts: ModelsConfig) -> None:
    studio.generate(config(root, parts, references=1, scale=0.0), Storage(root), lambda _: None)
    folder = root / "generate"
    plain = np.asarray(Image.open(folder / "00-text-only.png"))
    assert (np.asarray(Image.open(folder / "00-text-query-a.png")) == plain).all()
    assert (np.asarray(Image.open(folder / "00-mask-query-a.png")) == plain).all()


def test_own_images(root: Path, parts: ModelsConfig, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    photo = Image.fromarray(rng.integers(0, 255, (60, 90, 3), dtype=np.uint8))
    photo.save(tmp_path / "cup.jpg")
    mask = Image.new("L", photo.size)
    mask.paste(255, (30, 10, 60, 50))
    mask.save(tmp_path / "mask.png")
    path = str(tmp_path / "cup.jpg")
    cfg = config(
        root, parts, image=[path, path], query=["a cup", ""], mask=["", str(tmp_path / "mask.png")],
        prompt="a cup and a fish on snow", seed=7,
    )  # fmt: skip
    made = studio.generate(cfg, Storage(root), lambda _: None)
    name = made.grid.removesuffix("-grid.png")
    assert name.startswith("generate/a-cup-and-a-fish-on-snow-seed7-") and made.pictures == 2
    about = png.made_by((root / f"{name}.png").read_bytes())
    assert about and about["prompt"] == cfg.prompt and about["seed"] == 7
    first = about["references"][0]
    assert (first["name"], first["query"], first["mask"]) == ("cup", "a cup", False)
    before = (root / f"{name}.png").stat().st_mtime_ns
    assert studio.generate(cfg, Storage(root), lambda _: None) == made
    assert (root / f"{name}.png").stat().st_mtime_ns == before, "nothing is drawn twice"
    photo.transpose(Image.Transpose.ROTATE_180).save(tmp_path / "cup.jpg")
    assert studio.generate(cfg, Storage(root), lambda _: None).grid != made.grid
    assert not (root / "grid.png").exists(), "the grid of held-out references is left alone"


def test_refusals_are_one_line(root: Path, parts: ModelsConfig, tmp_path: Path) -> None:
    done = job("generate", "--root", str(tmp_path / "empty"))
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert "run jobs/train.py first" in done.stderr
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    ask = {"image": [str(tmp_path / "a.png")], "prompt": "a cup"}
    for settings, reason in (
        ({"prompt": "a cup"}, "add --image"),
        ({"references": 0}, "references"),
        ({"steps": 0}, "steps"),
        ({"guidance_rescale": 1.5}, "guidance_rescale"),
        ({"image": [str(tmp_path / "no.png")], "query": ["a"], "prompt": "x"}, "no such image"),
        ({**ask, "query": [""]}, "neither a query nor a mask"),
        ({"model": str(tmp_path)}, "SSR-Encoder"),
        ({"model": "nowhere/at/all"}, "SSR-Encoder"),
    ):
        with pytest.raises(UserError, match=reason) as caught:
            studio.generate(config(root, parts, **settings), Storage(root), lambda _: None)
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
