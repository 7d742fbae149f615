"""Grids of samples: what is on them, and that training does not notice."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import IMAGES, EventAccumulator

from pipeline.storage import Storage
from pipeline.training.checkpoint import Checkpoints
from pipeline.training.samples import Samples
from tests.pipeline.training.test_loop import STEPS, config, made, metrics, same, weights
from tests.pipeline.training.test_run import config as run_config
from tests.pipeline.training.test_run import work

SAMPLING = {"sample_steps": 3, "sample_rows": 2, "sample_denoising": 2}
FOLDER = "train/multi_scale/samples"


def grids(root: Path) -> dict[str, Image.Image]:
    return {p.stem: Image.open(p).convert("RGB") for p in sorted((root / FOLDER).iterdir())}


def differ(one: Image.Image, other: Image.Image) -> np.ndarray:
    """Columns of pixels in which two grids differ."""
    return (np.asarray(one) != np.asarray(other)).any((0, 2)).nonzero()[0]


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_training_does_not_notice(root: Path, tiny_models: Path, ema: float) -> None:
    """Weights, moving average, generators and records are the same, bit for bit."""
    left = {}
    for sampling in ({}, SAMPLING):
        loop = made(config(root, ema_decay=ema, **sampling), tiny_models)
        loop.run()
        snapshot = Checkpoints(Storage(root).sub("train/multi_scale")).load(STEPS)
        timings = {"samples_per_s", "data_wait"}
        records = [{k: v for k, v in r.items() if k not in timings} for r in metrics(root)]
        left[bool(sampling)] = snapshot, records
        assert (root / FOLDER).exists() == bool(sampling)
        if not sampling:
            Storage(root).delete("train")
    for part in ("trainables", "optimizer", "rng", "ema"):
        assert same(getattr(left[True][0], part), getattr(left[False][0], part)), part
    assert left[True][1] == left[False][1]


def test_a_grid_shows_what_training_changes(root: Path, tiny_models: Path) -> None:
    cfg = config(root, query="caption", queries=1, **SAMPLING)
    made(cfg, tiny_models).run()
    found = grids(root)
    assert list(found) == ["step-00000000", "step-00000003", "step-00000006"]
    first, last = found["step-00000000"], found["step-00000006"]
    assert first.size == last.size
    # column by column of 174 pixels: the reference and the words alone stay, the others do not
    body = [image.crop((0, 60, image.width, image.height)) for image in (first, last)]
    changed = {int((x - 14) // 174) for x in differ(*body)}
    assert changed == {1, 2, 4, 5}
    alone = np.asarray(first.crop((14 + 3 * 174, 60, 14 + 3 * 174 + 160, 230)))
    assert len(np.unique(alone.reshape(-1, 3), axis=0)) > 50, "a picture, not a plain field"
    again = made(cfg, tiny_models)
    Storage(root).delete("train")
    again.run()
    assert {k: v.tobytes() for k, v in grids(root).items()} == {
        k: v.tobytes() for k, v in found.items()
    }
    events = EventAccumulator(str(root / "train/tensorboard/samples"), {IMAGES: 0}).Reload()
    # sorted: files of one second are read by their number's spelling, the tenth before the ninth
    assert sorted(image.step for image in events.Images("multi_scale/samples")) == [0, 3, 6]


def test_the_moving_average_draws(root: Path, tiny_models: Path) -> None:
    loop = made(config(root, ema_decay=0.5, **SAMPLING), tiny_models)
    loop.run()
    drawn = grids(root)["step-00000006"]
    averaged, loop.learner.ema = loop.learner.ema, {}
    assert not same(weights(loop), averaged)
    sampled = []
    for put in (weights(loop), averaged):
        loop = made(loop.cfg, tiny_models)
        loop.learner.ema = {}
        loop.learner._put(put)
        picture = Samples(loop.cfg, loop.learner, loop._sampled)(STEPS)
        assert picture is not None
        sampled.append(picture)
    pictures = [image.crop((0, 60, image.width, 460)) for image in (drawn, *sampled)]
    assert len(differ(pictures[0], pictures[1])) and not len(differ(pictures[0], pictures[2]))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_runs_of_any_kind_are_drawn(
    root: Path, tiny_models: Path, precision: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both stages, the released variant, half precision, checkpointed, without guidance."""
    cfg = run_config(
        root, tiny_models, precision=precision, variant="released", gradient_checkpointing=True,
        **{**SAMPLING, "sample_guidance": 1.0 if precision == "fp32" else 4.0},
        sample_guidance_rescale=0.7,
    )  # fmt: skip
    work(cfg)
    for stage, steps in (("semantic", (0, 3)), ("multi_scale", (0, 2))):
        there = sorted(path.name for path in (root / f"train/{stage}/samples").iterdir())
        assert there == [f"step-{step:08d}.png" for step in steps]
    assert "warning" not in capsys.readouterr().out


def test_without_the_vae_there_is_one_line(
    root: Path, tiny_models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "models"
    shutil.copytree(tiny_models, folder)
    loop = made(config(root, **SAMPLING), folder)
    for weight in (folder / "sd" / "vae").glob("*.safetensors"):
        weight.unlink()
    loop.run()
    told = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    assert len(told) == 1 and "no more grids of samples: cannot load AutoencoderKL" in told[0]
    assert loop.step == STEPS and not (root / FOLDER).exists()


def test_grids_reach_an_object_store(root: Path, tiny_models: Path, bucket: str) -> None:
    away = Storage(f"{bucket}/run")
    away.upload_tree(root / "features", "features")
    made(config(away.url(), **SAMPLING), tiny_models).run()  # type: ignore[arg-type]
    files = away.list(FOLDER)
    assert len(files) == 3
    assert Image.open(io.BytesIO(away.read_bytes(files[-1]))).width > 900
