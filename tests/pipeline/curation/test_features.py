import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image, ImageOps

from pipeline import models
from pipeline.config import FeaturesConfig, ModelsConfig
from pipeline.curation.features import FeaturesStage
from pipeline.errors import UserError
from pipeline.shards import (
    CLIP_PIXELS,
    LATENT_LOGVAR,
    LATENT_MEAN,
    Manifest,
    clip_column,
    decode_states,
    flipped_column,
    open_shard,
    read_row_group,
    scale_column,
    tensor_specs,
    tensors_of,
)
from pipeline.shards_reader import ShardReader, stack
from pipeline.storage import Storage
from pipeline.training.vision import OnlineVision, hidden_states
from pipeline.units import run_unit
from ssr_model.vision import clip_crop, clip_input

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


def write_unit(
    root: Path, sides: dict[int, int] | None = None, missing: int = 0, mirrored: bool = False
) -> Storage:
    """Seven images, and captions for all but the second; `missing` captions have no image."""
    storage = Storage(str(root))
    pictures = [picture(i, (sides or {}).get(i, SIDE)) for i in range(ROWS)]
    if mirrored:
        pictures = [ImageOps.mirror(one) for one in pictures]
    images = [encoded(one) for one in pictures]
    keys = [f"k{i}" for i in range(ROWS)]
    urls = [f"http://host/{key}" for key in keys]
    scored = {
        "aesthetic": pa.array([6.5, None, *[7.0] * (ROWS - 2)], pa.float32()),
        "predictor": ["v1"] * ROWS,
    }
    with storage.publish(f"images/{UNIT}.parquet") as sink:
        pq.write_table(pa.table({"key": keys, "url": urls, "image": images, **scored}), sink)
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
    assert shard["aesthetic"] == [6.5, *[7.0] * (ROWS - 2)]
    assert shard["predictor"] == ["v1"] * (ROWS - 1)

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


def test_the_three_codecs_hold_the_same_features(names: ModelsConfig, tmp_path: Path) -> None:
    """float16 and pixels agree to float16's rounding, int8 to the error that it states."""
    depths, tally, shards = (2, 4, 6), {}, {}
    for codec in ("float16", "int8", "pixels"):
        storage = write_unit(tmp_path / codec)
        tally[codec] = run_unit(stage(names, codec=codec), UNIT, storage, PRINT).tally
        shards[codec] = read(storage)
    for name in ("key", "token_ids", "latent_mean", "latent_logvar", "aesthetic"):
        first = shards["float16"][name]
        assert all(np.array_equal(first, other[name]) for other in shards.values())

    pixels = shards["pixels"]
    assert pixels[CLIP_PIXELS].dtype == np.uint8 and clip_column(6) not in pixels
    # square images of CLIP's own size are its input as they are
    assert np.array_equal(pixels[CLIP_PIXELS][1], np.asarray(picture(2)))
    tower = models.load_vision(names.vision)
    online = OnlineVision(tower, models.load_image_processor(names.vision))
    stored = {CLIP_PIXELS: torch.from_numpy(pixels[CLIP_PIXELS])}
    computed = hidden_states(stored, depths, online)
    assert list(hidden_states(stored, [6], online)) == [6]
    assert not any(states.requires_grad for states in computed.values())
    half = OnlineVision(tower, online.image_processor, half=True)
    roughly = hidden_states(stored, depths, half)

    decoded = decode_states(shards["int8"], depths)
    for depth in depths:
        states = computed[depth].numpy()
        kept = shards["float16"][clip_column(depth)]
        np.testing.assert_allclose(kept, states, rtol=2**-11, atol=1e-6)
        np.testing.assert_allclose(roughly[depth].float().numpy(), states, rtol=0.02, atol=0.02)
        told = tally["int8"].extra["codec_error"][str(depth)]
        assert 0 < told["relative_rms"] < 0.01 and 0.999 < told["worst_cosine"] < 1
        error = decoded[depth] - states
        relative = np.sqrt((error**2).mean() / (states**2).mean())
        assert relative == pytest.approx(told["relative_rms"], rel=1e-3)
        norms = np.linalg.norm(decoded[depth], axis=-1) * np.linalg.norm(states, axis=-1)
        cosines = (decoded[depth] * states).sum(-1) / norms
        assert cosines.min() == pytest.approx(told["worst_cosine"], abs=2e-6)
    assert "codec_error" not in tally["float16"].extra | tally["pixels"].extra
    assert all(one.extra["depths"] == [2, 4, 6] for one in tally.values())


@pytest.mark.parametrize("codec", ["float16", "int8", "pixels"])
def test_flipped_columns_are_the_features_of_the_mirrored_image(
    names: ModelsConfig, tmp_path: Path, codec: str
) -> None:
    there, mirrored = write_unit(tmp_path / "a"), write_unit(tmp_path / "b", mirrored=True)
    run_unit(stage(names, codec=codec, flip=True), UNIT, there, PRINT)
    run_unit(stage(names, codec=codec), UNIT, mirrored, PRINT)
    shard, expected = read(there), read(mirrored)
    twins = {name.removesuffix("_flipped") for name in shard if name.endswith("_flipped")}
    assert shard.keys() == expected.keys() | {flipped_column(name) for name in twins}
    clip = {clip_column(depth) for depth in (2, 4, 6)}
    clip |= {scale_column(depth) for depth in (2, 4, 6)} if codec == "int8" else set()
    assert twins == {LATENT_MEAN, LATENT_LOGVAR} | (set() if codec == "pixels" else clip)
    for name in twins:
        found, alone = shard[flipped_column(name)], expected[name]
        assert found.dtype == alone.dtype and not np.array_equal(shard[name], found)
        near = {"atol": 1} if found.dtype == np.int8 else {"atol": 2e-3, "rtol": 2e-3}
        np.testing.assert_allclose(found, alone, **near)  # type: ignore[arg-type]
    plain = write_unit(tmp_path / "c")
    run_unit(stage(names, codec=codec), UNIT, plain, PRINT)
    for name, values in read(plain).items():
        assert np.array_equal(values, shard[name])
    if codec == "pixels":  # mirrored when they are read
        columns = tensor_specs(pq.read_schema(tmp_path / "a" / "features" / f"{UNIT}.parquet"))
        manifest = Manifest([], [], columns, {}, codec)
        reader = ShardReader(there, manifest, f"features/{UNIT}.parquet")
        group = reader.read(0, ["key", CLIP_PIXELS, LATENT_MEAN], flip=True)
        assert group["key"] == expected["key"]
        for name in (CLIP_PIXELS, LATENT_MEAN):
            rows = stack([(group[name], row) for row in range(ROWS - 1)])  # type: ignore[misc]
            np.testing.assert_allclose(rows, expected[name], atol=2e-3, rtol=2e-3)


def test_clip_sees_the_centre_whatever_the_shape(names: ModelsConfig) -> None:
    """Rescaling and normalising on the device is what the image processor does."""
    processor = models.load_image_processor(names.vision)
    rng = np.random.default_rng(0)
    for shape in ((50, 33, 3), (32, 32, 3), (64, 200, 3)):
        image = Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8))
        crop = clip_crop(processor, image)
        assert crop.dtype == np.uint8 and crop.shape == (32, 32, 3)
        made = clip_input(processor, torch.from_numpy(crop)[None])
        expected = processor(images=[image], return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(made, expected, rtol=0, atol=1e-6)


def test_scores_of_the_scores_stage_go_into_the_shard(names: ModelsConfig, tmp_path: Path) -> None:
    storage = write_unit(tmp_path)
    keys = [f"k{i}" for i in range(ROWS)]
    scores = pa.table(
        {
            "key": keys,
            "aesthetic": pa.array(range(ROWS), pa.float32()),
            "predictor": ["v2"] * ROWS,
        }
    )
    with storage.publish(f"scores/{UNIT}.parquet") as sink:
        pq.write_table(scores, sink)
    scored = FeaturesStage(FeaturesConfig(scales=3), names, SIDE, "cpu", scored=True)
    run_unit(scored, UNIT, storage, PRINT)
    shard = read(storage)
    assert shard["aesthetic"] == [0.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    assert shard["predictor"] == ["v2"] * (ROWS - 1)


def test_images_of_an_older_download_have_no_predictor(names: ModelsConfig, tmp_path: Path) -> None:
    storage = write_unit(tmp_path)
    path = tmp_path / "images" / f"{UNIT}.parquet"
    pq.write_table(pq.read_table(path).drop_columns(["aesthetic", "predictor"]), path)
    run_unit(stage(names), UNIT, storage, PRINT)
    assert read(storage)["predictor"] == read(storage)["aesthetic"] == [None] * (ROWS - 1)


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
    # batches of three images that have captions; k1 has none
    assert marker.tally.failed == {"not_finite": 2}
    shard = read(storage)
    assert shard["key"] == ["k2", "k3", "k5", "k6"]
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
    assert settings == stage(names, threads=9).settings
    assert settings != stage(names, scales=2).settings
    assert settings != stage(names, codec="int8").settings
    for role in ("vision", "vae", "text"):
        assert len(settings[role]["sha256"]) == 64
