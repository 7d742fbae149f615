"""Fine-tuning as a user does it: a folder of images and captions, weights, three commands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from pipeline.config import TrainConfig, parse
from pipeline.shards import Manifest
from pipeline.storage import Storage
from ssr_model.conditioning import SSREncoder
from ssr_model.weights import load_adapter
from tests.pipeline.training.test_start import saved, shape
from tests.system.jobs import run_job

pytestmark = [pytest.mark.system, pytest.mark.timeout(1800)]

IMAGES, TEST = 21, 4
SCALES = (1, 2, 3, 4, 5, 6)  # as many as the preset stores


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of two kinds, all but one with a caption, and a thing that is none."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for index in range(IMAGES):
        pixels = rng.integers(0, 256, (60, 40 + index, 3), np.uint8)
        kind = ("cats", "jpg") if index % 2 else ("dogs", "png")
        path = folder / kind[0] / f"photo [{index}].{kind[1]}"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(path)
        if index:
            other = "a blue cup" if index % 3 else "a star"
            path.with_suffix(".txt").write_text(f"a red fish and {other}\n")
    (folder / "broken.jpg").write_bytes(b"<html>gone</html>")
    (folder / "broken.txt").write_text("a cup")
    return folder


def run(job: str, folder: Path, *words: str, **settings: Any) -> str:
    models = {"models.base": folder / "sd", "models.vision": folder / "clip"} if not words else {}
    return run_job(job, *words, **{"preset": "finetune-sd15", **models, **settings})


def test_a_folder_of_ones_own(photos: Path, tmp_path: Path, tiny_models: Path) -> None:
    assert parse(TrainConfig, ["--preset", "finetune-sd15"]).tau == 0.001
    root = tmp_path / "run"
    curated = run(
        "curate", tiny_models, root=root, **{
            "folder.path": photos, "filter.test_rows": TEST, "download.image_size": 32,
            "download.min_image_size": 16, "features.row_group_mib": 0.1,
        },
    )  # fmt: skip
    assert f"filter:   kept {IMAGES} of {IMAGES + 1} rows (dropped: no_caption 1)" in curated
    manifest = Manifest.load(Storage(root))
    assert (manifest.rows("train"), manifest.rows("test")) in {  # the broken one is of either
        (IMAGES - 1 - TEST, TEST), (IMAGES - TEST, TEST - 1),
    }  # fmt: skip
    assert tuple(manifest.depths) == SCALES
    tables = [pq.read_table(root / shard["path"]) for shard in manifest.shards]
    told = [row for table in tables for row in table.to_pylist()]
    assert {row["caption"] for row in told} == {
        "a red fish and a star",
        "a red fish and a blue cup",
    }
    assert {row["url"].partition("/")[0] for row in told} == {"dogs", "cats"}
    assert all("a red fish" in row["subjects"] for row in told)

    torch.manual_seed(0)
    before = saved(tmp_path / "weights", shape(tiny_models, depths=SCALES)).state_dict()
    settings = {
        "root": root, "init": tmp_path / "weights", "heads": 2, "head_dim": 8, "workers": 1,
        "global_batch": 8, "precision": "fp32", "multi_scale.steps": 4, "validate_rows": 2,
        "multi_scale.warmup_steps": 0, "checkpoint_steps": 2, "validate_steps": 2, "log_steps": 1,
    }  # fmt: skip
    trained = run("train", tiny_models, **settings)
    assert f"training begins from {tmp_path / 'weights'} (sha256 " in trained
    assert "multi_scale: step 4, " in trained and "semantic" not in trained
    model = SSREncoder.from_pretrained(root / "model")
    after = model.adapter.state_dict()
    assert model.config.depths == SCALES
    for name, value in after.items():  # four small steps away from where it began
        assert 0 < (value - before[name]).abs().max() < 1e-3, name

    out = tmp_path / "early"
    exported = run("train", tiny_models, "export", root=root, stage=2, step=2, out=out)
    assert f"{out} (multi_scale, step 2 of 4)" in exported
    early = load_adapter(out)[0].state_dict()
    assert any(not torch.equal(early[name], after[name]) for name in after)
    assert "nothing was done" in run("train", tiny_models, **settings)
