"""The aesthetic stage on a tiny CLIP and a predictor of the published one's structure."""

import hashlib
import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPModel, CLIPVisionModel

from pipeline import models
from pipeline.config import (
    CaptionConfig,
    CurateConfig,
    ModelsConfig,
    ScoresConfig,
    StageResources,
)
from pipeline.curation.aesthetic import ScoresStage, load_predictor
from pipeline.curation.captioning.caption import CaptionStage
from pipeline.curation.filtering.conditions import SCORE_EDGES
from pipeline.errors import UserError
from pipeline.storage import Storage
from pipeline.units import run_unit
from ssr_model.metrics.aesthetic import PUBLISHED_MD5
from tests.aesthetic_weights import SHAPE, WIDTH, layer_by_layer, state

UNIT, PRINT = "train-00000", "f" * 16


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("predictor") / "predictor.pth"
    torch.save(state(), path)
    return path


@pytest.fixture
def names(tiny_models: Path) -> ModelsConfig:
    folder = str(tiny_models / "clip")
    return ModelsConfig(vision=folder, captioner=str(tiny_models / "blip2"))


def config(weights: Path, **fields: object) -> ScoresConfig:
    md5 = hashlib.md5(weights.read_bytes()).hexdigest()
    given = {"enabled": True, "weights": str(weights), "md5": md5, "batch_size": 3, **fields}
    return ScoresConfig(**given)  # type: ignore[arg-type]


def picture(seed: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8))


def write_images(root: Path, blobs: list[bytes | None] | None = None) -> Storage:
    storage = Storage(str(root))
    if blobs is None:
        blobs = []
        for seed in range(8):
            data = io.BytesIO()
            picture(seed).save(data, "png")
            blobs.append(data.getvalue())
    table = pa.table({"key": [f"k{i}" for i in range(len(blobs))], "image": blobs})
    with storage.publish(f"images/{UNIT}.parquet") as sink:
        pq.write_table(table, sink)
    return storage


def scores(storage: Storage) -> dict[str, float]:
    with storage.open_input(f"scores/{UNIT}.parquet") as file:
        table = pq.read_table(file)
    assert table.schema.types == [pa.string(), pa.float32(), pa.string()]
    return dict(zip(table["key"].to_pylist(), table["aesthetic"].to_pylist(), strict=True))


def test_scores_are_the_predictors_on_the_normalised_image_embedding(
    names: ModelsConfig, weights: Path, tmp_path: Path
) -> None:
    storage = write_images(tmp_path)
    stage = ScoresStage(config(weights, min_aesthetic=-1e9), names, "cpu")
    marker = run_unit(stage, UNIT, storage, PRINT)
    assert (marker.tally.rows_in, marker.tally.kept) == (8, 8)
    clip = CLIPModel.from_pretrained(names.vision)
    processor = models.load_image_processor(names.vision)
    pixels = processor(images=[picture(i) for i in range(8)], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        embeds = clip.visual_projection(clip.vision_model(pixels).pooler_output)
        expected = layer_by_layer(embeds / embeds.norm(dim=-1, keepdim=True))
    found = scores(storage)
    assert list(found) == [f"k{i}" for i in range(8)]
    np.testing.assert_allclose(list(found.values()), expected.numpy(), rtol=1e-3, atol=1e-3)
    assert len({round(score, 3) for score in found.values()}) > 4


def test_low_scores_are_dropped_and_every_row_is_accounted_for(
    names: ModelsConfig, weights: Path, tmp_path: Path
) -> None:
    storage = write_images(tmp_path / "all")
    run_unit(ScoresStage(config(weights, min_aesthetic=-1e9), names, "cpu"), UNIT, storage, PRINT)
    every = scores(storage)
    bound = sorted(every.values())[4]  # itself not greater than the bound
    storage = write_images(tmp_path / "some")
    with storage.open_input(f"images/{UNIT}.parquet") as file:
        blobs = pq.read_table(file)["image"].to_pylist()
    storage = write_images(tmp_path / "some", [*blobs, b"no image", None])
    stage = ScoresStage(config(weights, min_aesthetic=bound), names, "cpu")
    tally = run_unit(stage, UNIT, storage, PRINT).tally
    assert (tally.rows_in, tally.kept) == (10, 3)
    assert tally.dropped == {"low_aesthetic": 5} and tally.failed == {"undecodable": 2}
    assert scores(storage) == pytest.approx({k: v for k, v in every.items() if v > bound})


def test_the_histogram_is_of_every_score(
    names: ModelsConfig, weights: Path, tmp_path: Path
) -> None:
    """Of those that are dropped too; what is outside of the edges in the first or last bin."""
    storage = write_images(tmp_path)
    run_unit(ScoresStage(config(weights, min_aesthetic=-1e9), names, "cpu"), UNIT, storage, PRINT)
    every = np.array(list(scores(storage).values()))
    shift = 5.0 - float(np.median(every))  # into the middle of the edges
    moved = {**state(), "layers.7.bias": state()["layers.7.bias"] + shift}
    file = weights.with_name("moved.pth")
    torch.save(moved, file)
    write_images(tmp_path / "moved")
    storage = Storage(tmp_path / "moved")
    stage = ScoresStage(config(file, min_aesthetic=5.0), names, "cpu")
    tally = run_unit(stage, UNIT, storage, PRINT).tally
    found = tally.extra["scores"]
    assert found["edges"] == SCORE_EDGES and sum(found["rows"]) == 8 > tally.kept
    expected, _ = np.histogram(np.clip(every + shift, 0, 10), SCORE_EDGES)
    assert found["rows"] == expected.tolist()


def test_only_what_was_kept_is_captioned(
    names: ModelsConfig, weights: Path, tmp_path: Path
) -> None:
    storage = write_images(tmp_path)
    run_unit(ScoresStage(config(weights, min_aesthetic=-1e9), names, "cpu"), UNIT, storage, PRINT)
    kept = ["k5", "k2"]
    chosen = pa.table({"key": kept, "aesthetic": [7.0, 8.0], "predictor": ["v2"] * 2})
    with storage.publish(f"scores/{UNIT}.parquet") as sink:
        pq.write_table(chosen, sink)
    plain = CaptionStage(CaptionConfig(max_new_tokens=4), names, "cpu")
    stage = CaptionStage(CaptionConfig(max_new_tokens=4), names, "cpu", source="scores")
    tally = run_unit(stage, UNIT, storage, PRINT).tally
    assert tally.rows_in == 2 and tally.failed == {}
    with storage.open_input(f"captions/{UNIT}.parquet") as file:
        assert set(pq.read_table(file)["key"].to_pylist()) <= set(kept)
    assert stage.settings == {**plain.settings, "scores.enabled": True}


def test_settings_hold_the_weights_and_the_bound(names: ModelsConfig, weights: Path) -> None:
    settings = ScoresStage(config(weights), names).settings
    assert settings == ScoresStage(config(weights, batch_size=9), names).settings
    assert settings != ScoresStage(config(weights, min_aesthetic=5.0), names).settings
    other = weights.with_name("other.pth")
    torch.save({name: tensor * 2 for name, tensor in state().items()}, other)
    assert settings["weights"] != ScoresStage(config(other), names).settings["weights"]
    # the same numbers in another file are the same predictor
    same = weights.with_name("same.safetensors")
    save_file(state(), same)
    assert settings == ScoresStage(config(same, md5=None), names).settings
    # whatever the order of the layers in the file, and the arithmetic of the machine
    digest = hashlib.sha256()
    for i, (rows, columns) in SHAPE.items():
        for part, shape in (("bias", [rows]), ("weight", [rows, columns])):
            digest.update(f"layers.{i}.{part}{shape}".encode())
            digest.update(state()[f"layers.{i}.{part}"].numpy().astype("<f4").tobytes())
    assert settings["weights"] == digest.hexdigest()
    turned = weights.with_name("turned.pth")
    torch.save(dict(reversed(state().items())), turned)
    assert settings == ScoresStage(config(turned), names).settings


def test_files_that_are_no_predictor_are_one_line(
    weights: Path, names: ModelsConfig, tmp_path: Path
) -> None:
    md5 = hashlib.md5(weights.read_bytes()).hexdigest()
    told = rf"scores\.weights .*MD5 is {md5}, not {PUBLISHED_MD5}.* --scores\.md5"
    with pytest.raises(UserError, match=told):
        load_predictor(str(weights), WIDTH)
    assert load_predictor(str(weights), WIDTH, md5.upper()).sha256
    with pytest.raises(UserError, match=r"layer 0 takes 32 values, .* projection gives 31"):
        load_predictor(str(weights), WIDTH - 1, md5)
    with pytest.raises(UserError, match="no such file"):
        load_predictor(str(tmp_path / "absent.pth"), WIDTH)
    (tmp_path / "cut.safetensors").write_bytes(b"nothing")
    cfg = ScoresConfig(enabled=True, weights=str(tmp_path / "cut.safetensors"))
    with pytest.raises(UserError, match="no weights that can be read") as caught:
        ScoresStage(cfg, names, "cpu").settings  # noqa: B018 (reads)
    assert "\n" not in str(caught.value)


def test_a_vision_tower_alone_has_no_embedding(
    names: ModelsConfig, weights: Path, tmp_path: Path
) -> None:
    CLIPVisionModel.from_pretrained(names.vision).save_pretrained(tmp_path / "tower")
    models.load_image_processor(names.vision).save_pretrained(tmp_path / "tower")
    tower = ModelsConfig(vision=str(tmp_path / "tower"))
    with pytest.raises(UserError, match=r"weights lack visual_projection\.weight"):
        ScoresStage(config(weights), tower, "cpu").open()


def test_scores_need_weights() -> None:
    with pytest.raises(UserError, match=r"scores\.enabled needs scores\.weights"):
        ScoresConfig(enabled=True)


def test_the_job_captions_and_stores_what_was_scored(weights: Path) -> None:
    from pipeline.curation.run import stages

    cfg = CurateConfig(scores=config(weights), scores_workers=StageResources(cpus=0.5))
    built = {spec.name: spec.factory() for spec in stages(cfg)}
    assert list(built) == ["images", "scores", "captions", "features"]
    assert [stage.source for stage in built.values()] == ["units", "images", "scores", "captions"]
    assert built["features"].scored  # type: ignore[attr-defined]
    assert stages(cfg)[1].resources.cpus == 0.5
    plain = {spec.name: spec.factory() for spec in stages(CurateConfig())}
    assert [stage.source for stage in plain.values()] == ["units", "images", "captions"]
    assert not plain["features"].scored  # type: ignore[attr-defined]
