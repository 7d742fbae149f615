"""Training from each codec of the shards: the same model from the same images, exact resume."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pipeline import models
from pipeline.config import ModelsConfig, OptimConfig, TrainConfig
from pipeline.errors import UserError
from pipeline.shards import (
    CLIP_PIXELS,
    Manifest,
    ShardWriter,
    encode_states,
    layout,
    open_shard,
    read_row_group,
)
from pipeline.storage import Storage
from pipeline.training.loop import StageLoop
from pipeline.training.run import Run
from pipeline.training.stage import World
from pipeline.training.vision import OnlineVision, hidden_states
from tests.sealed import DEPTHS, write_features

CODECS = ("float16", "int8", "pixels")


@pytest.fixture(scope="module")
def curated(tmp_path_factory: pytest.TempPathFactory, tiny_models: Path) -> dict[str, Path]:
    """A root per codec, of the same images: the states are what CLIP makes of the pixels."""
    roots = {codec: tmp_path_factory.mktemp("curated") / codec for codec in CODECS}
    manifest = write_features(roots["pixels"], tiny_models, train=24, test=6, codec="pixels")
    clip = str(tiny_models / "clip")
    vision = OnlineVision(models.load_vision(clip), models.load_image_processor(clip))
    for codec in ("float16", "int8"):
        recode(Storage(roots["pixels"]), Storage(roots[codec]), manifest, codec, vision)
    return roots


def recode(
    source: Storage, target: Storage, manifest: Manifest, codec: str, vision: OnlineVision
) -> None:
    shapes = {name: tuple(spec["shape"]) for name, spec in manifest.tensors.items()}
    tensors = layout(
        codec,
        tokens=shapes["token_ids"][0],
        latent=shapes["latent_mean"],
        depths=DEPTHS,
        states=(65, 48),
        pixels=shapes[CLIP_PIXELS],
    )
    shards = []
    for shard in manifest.shards:
        with target.publish(shard["path"]) as sink, open_shard(source, shard["path"]) as file:
            writer = ShardWriter(sink, tensors, row_group_bytes=200_000)
            for index in range(file.num_row_groups):
                columns = read_row_group(file, index)
                pixels = torch.from_numpy(columns.pop(CLIP_PIXELS).copy())
                states = hidden_states({CLIP_PIXELS: pixels}, DEPTHS, vision)
                stored = encode_states(codec, states)
                writer.write({**columns, **{k: v.numpy() for k, v in stored.items()}})
            writer.close()
        shards.append({**shard, "row_groups": writer.row_groups})
    told = {t.name: {"shape": list(t.shape), "dtype": t.dtype} for t in tensors}
    Manifest(shards, manifest.depths, told, manifest.encoders, codec).save(target)  # type: ignore[arg-type]


def config(root: Path, folder: Path, **fields: Any) -> TrainConfig:
    given: dict[str, Any] = {
        "models": ModelsConfig(base=str(folder / "sd"), vision=str(folder / "clip")),
        "global_batch": 4,
        "lanes": 2,
        "heads": 2,
        "head_dim": 8,
        "semantic": OptimConfig(steps=2, lr=1e-3),
        "multi_scale": OptimConfig(steps=3, lr=1e-3),
        "checkpoint_steps": 2,
        "log_steps": 1,
        "validate_steps": 2,
        "validate_rows": 6,
        "sample_steps": 0,
    }
    return TrainConfig(root=str(root), **{**given, **fields})


def train(cfg: TrainConfig) -> dict[str, torch.Tensor]:
    run = Run(cfg)
    run.take_over()
    run.work(World())
    return load_file(Path(cfg.root) / "model" / "model.safetensors")


def validation(root: Path) -> list[float]:
    path = root / "train" / "multi_scale" / "metrics.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [record["validation_loss"] for record in records if "validation_loss" in record]


@pytest.mark.parametrize(
    ("codec", "precision"), [*((codec, "fp32") for codec in CODECS), ("pixels", "bf16")]
)
def test_a_run_that_was_killed_goes_on_bit_for_bit(
    curated: dict[str, Path],
    tmp_path: Path,
    tiny_models: Path,
    codec: str,
    precision: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("whole", "killed"):
        shutil.copytree(curated[codec], tmp_path / name)
    whole = train(config(tmp_path / "whole", tiny_models, precision=precision))
    step = StageLoop._take

    def killed(self: StageLoop, inputs: Any) -> None:
        if (self.stage.name, self.step) == ("multi_scale", 2):
            raise KeyboardInterrupt
        step(self, inputs)

    with monkeypatch.context() as patch:
        patch.setattr(StageLoop, "_take", killed)
        with pytest.raises(KeyboardInterrupt):
            train(config(tmp_path / "killed", tiny_models, precision=precision))
    rest = train(config(tmp_path / "killed", tiny_models, precision=precision))
    assert all(torch.equal(whole[name], value) for name, value in rest.items())
    assert np.isfinite(validation(tmp_path / "whole")).all()


@pytest.mark.parametrize(("precision", "rounding"), [("fp32", 1e-4), ("bf16", 1e-3)])
def test_the_codecs_train_alike(
    curated: dict[str, Path], tmp_path: Path, tiny_models: Path, precision: str, rounding: float
) -> None:
    """Validation is of the same rows in the same order: the losses differ by the codec's error."""
    losses = {}
    untrained = {"semantic": OptimConfig(steps=0), "multi_scale": OptimConfig(steps=2, lr=0.0)}
    for codec in CODECS:
        shutil.copytree(curated[codec], tmp_path / codec)
        train(config(tmp_path / codec, tiny_models, precision=precision, **untrained))
        losses[codec] = validation(tmp_path / codec)
    assert len(losses["pixels"]) == 2
    assert losses["float16"] == pytest.approx(losses["pixels"], rel=rounding)
    assert losses["int8"] == pytest.approx(losses["pixels"], rel=1e-3 + rounding)
    assert losses["int8"] != losses["pixels"]


def test_the_worker_checks_the_clip_that_it_runs(
    curated: dict[str, Path], tmp_path: Path, tiny_models: Path
) -> None:
    shutil.copytree(curated["pixels"], tmp_path / "run")
    run = Run(config(tmp_path / "run", tiny_models))
    run.take_over()
    run.manifest.encoders["vision"]["sha256"] = "0"
    with pytest.raises(UserError, match=r"vision encoder .* is not the one the shards were made"):
        run.work(World())


def test_only_pixels_load_the_vision_tower(curated: dict[str, Path], tiny_models: Path) -> None:
    for codec in CODECS:
        frozen = Run(config(curated[codec], tiny_models))._frozen(torch.device("cpu"))
        assert (frozen.vision is not None) == (codec == "pixels")
    with pytest.raises(ValueError, match="vision tower is needed"):
        hidden_states({CLIP_PIXELS: torch.empty(0)}, [6], None)
