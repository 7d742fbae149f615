import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from pipeline import models
from pipeline.config import FeaturesConfig, ModelsConfig
from pipeline.curation.features import FeaturesStage
from pipeline.errors import UserError
from pipeline.shards import clip_column, open_shard, read_row_group, tensors_of
from pipeline.storage import Storage
from pipeline.units import run_unit

UNIT, SIDE, ROWS = "train-00000", 32, 7
PRINT = "f" * 16


@pytest.fixture(scope="session")
def names(tiny_models: Path) -> ModelsConfig:
    return ModelsConfig(base=str(tiny_models / "sd"), vision=str(tiny_models / "clip"))


def picture(seed: int, side: int = SIDE) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8))


def encoded(image: Image.Image) -> bytes:
    data = io.BytesIO()
    image.save(data, "png")
    return data.getvalue()


def caption(i: int) -> str:
    return "a fish and a cup on sand" if i % 2 else "a red car " * 20


def write_unit(root: Path, sides: dict[int, int] | None = None, missing: int = 0) -> Storage:
    """Seven images, and captions for all but the second; `missing` captions have no image."""
    storage = Storage(str(root))
    images = [encoded(picture(i, (sides or {}).get(i, SIDE))) for i in range(ROWS)]
    keys = [f"k{i}" for i in range(ROWS)]
    urls = [f"http://host/{key}" for key in keys]
    with storage.publish(f"images/{UNIT}.parquet") as sink:
        pq.write_table(pa.table({"key": keys, "url": urls, "image": images}), sink)
    told = [key for i, key in enumerate(keys) if i != 1] + [f"gone{i}" for i in range(missing)]
    captions = [caption(i) for i in range(len(told))]
    subjects = [["a fish", "a cup"]] * len(told)
    table = pa.table({"key": told, "caption": captions, "subjects": subjects})
    with storage.publish(f"captions/{UNIT}.parquet") as sink:
        pq.write_table(table, sink)
    return storage


def stage(names: ModelsConfig, **cfg: object) -> FeaturesStage:
    settings = {"scales": 3, "batch_size": 3, **cfg}
    return FeaturesStage(FeaturesConfig(**settings), names, SIDE, "cpu")  # type: ignore[arg-type]


def read(storage: Storage) -> dict:
    with open_shard(storage, f"features/{UNIT}.parquet") as file:
        groups = [read_row_group(file, i) for i in range(file.metadata.num_row_groups)]
    return {
        name: np.concatenate([group[name] for group in groups])
        if isinstance(groups[0][name], np.ndarray)
        else [value for group in groups for value in group[name]]
        for name in groups[0]
    }


def test_every_column_is_what_its_encoder_gives_alone(names: ModelsConfig, tmp_path: Path) -> None:
    storage = write_unit(tmp_path)
    marker = run_unit(stage(names), UNIT, storage, PRINT)
    assert (marker.tally.rows_in, marker.tally.kept) == (ROWS - 1, ROWS - 1)
    assert marker.tally.extra == {"row_groups": [ROWS - 1], "depths": [2, 4, 6]}
    shard = read(storage)
    assert shard["key"] == ["k0", "k2", "k3", "k4", "k5", "k6"]
    assert shard["url"] == [f"http://host/{key}" for key in shard["key"]]
    assert shard["caption"] == [caption(i) for i in range(ROWS - 1)]
    assert shard["subjects"] == [["a fish", "a cup"]] * (ROWS - 1)

    vision, vae = models.load_vision(names.vision), models.load_vae(names.base)
    processor, tokenizer = (
        models.load_image_processor(names.vision),
        models.load_tokenizer(names.base),
    )
    for row, i in enumerate([0, 2, 3, 4, 5, 6]):
        image = picture(i)
        pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None] / 255 * 2 - 1
        with torch.no_grad():
            posterior = vae.encode(pixels).latent_dist
            states = vision(
                processor(images=[image], return_tensors="pt")["pixel_values"],
                output_hidden_states=True,
            ).hidden_states
        np.testing.assert_allclose(
            shard["latent_mean"][row], posterior.mean[0].numpy(), atol=2e-3, rtol=2e-3
        )
        np.testing.assert_allclose(
            shard["latent_logvar"][row], posterior.logvar[0].numpy(), atol=2e-3, rtol=2e-3
        )
        for depth in (2, 4, 6):
            values = shard[clip_column(depth)][row]
            assert values.dtype == np.float16
            np.testing.assert_allclose(values, states[depth][0].numpy(), atol=4e-3, rtol=2e-3)
        ids = tokenizer(shard["caption"][row], padding="max_length", truncation=True).input_ids
        assert shard["token_ids"][row].tolist() == ids
        assert shard["token_ids"].dtype == np.int32 and len(ids) == tokenizer.model_max_length


def test_row_groups_are_bounded_by_bytes(names: ModelsConfig, tmp_path: Path) -> None:
    storage = write_unit(tmp_path)
    small = stage(names, row_group_mib=0.05)
    marker = run_unit(small, UNIT, storage, PRINT)
    with open_shard(storage, f"features/{UNIT}.parquet") as file:
        groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
        row = sum(tensor.nbytes for tensor in tensors_of(file.schema_arrow))
    assert [group.num_rows for group in groups] == marker.tally.extra["row_groups"]
    assert len(groups) > 1
    assert all(group.num_rows * row <= 0.05 * 2**20 for group in groups)


def test_the_same_unit_gives_the_same_bytes(names: ModelsConfig, tmp_path: Path) -> None:
    first = run_unit(stage(names), UNIT, write_unit(tmp_path / "a"), PRINT)
    second = run_unit(stage(names), UNIT, write_unit(tmp_path / "b"), PRINT)
    assert first.sha256 == second.sha256 and first.bytes > 0


def test_images_of_another_size_and_lost_images_are_counted(
    names: ModelsConfig, tmp_path: Path
) -> None:
    storage = write_unit(tmp_path, sides={3: 16, 4: 64}, missing=2)
    marker = run_unit(stage(names), UNIT, storage, PRINT)
    assert marker.tally.failed == {"wrong_size": 2, "no_image": 2}
    assert read(storage)["key"] == ["k0", "k2", "k5", "k6"]


def test_features_outside_of_float16_never_reach_training(
    names: ModelsConfig, tmp_path: Path
) -> None:
    storage, made = write_unit(tmp_path), stage(names)
    made.open()

    def overflow(_module: object, _inputs: object, output: torch.Tensor) -> torch.Tensor:
        output[0] *= 1e9  # the first row of every batch
        return output

    made._encoders.vae.quant_conv.register_forward_hook(overflow)
    marker = run_unit(made, UNIT, storage, PRINT)
    # batches of three images; k1 has no caption
    assert marker.tally.failed == {"not_finite": 3}
    shard = read(storage)
    assert shard["key"] == ["k2", "k4", "k5"]
    assert np.isfinite(shard["latent_mean"]).all()


def test_a_unit_without_rows_is_an_empty_shard(names: ModelsConfig, tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    strings = {name: pa.array([], pa.string()) for name in ("key", "url", "caption")}
    with storage.publish(f"images/{UNIT}.parquet") as sink:
        pq.write_table(pa.table({**strings, "image": pa.array([], pa.binary())}), sink)
    with storage.publish(f"captions/{UNIT}.parquet") as sink:
        subjects = pa.array([], pa.list_(pa.string()))
        pq.write_table(pa.table({**strings, "subjects": subjects}), sink)
    marker = run_unit(stage(names), UNIT, storage, PRINT)
    assert marker.tally.rows_in == 0 and marker.tally.extra["row_groups"] == []


def test_settings_that_cannot_work_are_one_clear_line(names: ModelsConfig, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"features\.scales is 99"):
        stage(names, scales=99).open()
    odd = FeaturesStage(FeaturesConfig(scales=3), names, SIDE + 1, "cpu")
    with pytest.raises(UserError, match="multiple of"):
        run_unit(odd, UNIT, write_unit(tmp_path), PRINT)


def test_settings_hold_the_encoders_and_not_the_batch_size(names: ModelsConfig) -> None:
    settings = stage(names).settings
    assert settings == stage(names, batch_size=99).settings
    assert settings != stage(names, scales=2).settings
    for role in ("vision", "vae", "text"):
        assert len(settings[role]["sha256"]) == 64
