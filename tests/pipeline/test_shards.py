import io
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from pipeline.errors import UserError
from pipeline.shards import (
    Manifest,
    Shard,
    ShardWriter,
    Tensor,
    clip_column,
    decode_states,
    encode_states,
    from_bytes,
    layout,
    open_shard,
    read_row_group,
    scale_column,
    tensors_of,
    vision_columns,
)
from pipeline.storage import Storage

TENSORS = [
    Tensor("token_ids", (5,), "int32"),
    Tensor("latent_mean", (4, 2, 2), "float16"),
    Tensor(clip_column(2), (3, 8), "float16"),
    Tensor(clip_column(4), (3, 8), "float16"),
]
ROW_BYTES = 5 * 4 + 16 * 2 + 2 * 24 * 2


def rows(count: int, seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)
    columns = {
        "key": [f"{i:016x}" for i in range(count)],
        "url": [f"http://host/{i}.jpg" for i in range(count)],
        "caption": ["a fish and a cup on sand"] * count,
        "aesthetic": [6.25, None, 7.5][:count] + [6.5] * max(0, count - 3),
        "predictor": ["v2", None][:count] + ["v2"] * max(0, count - 2),
        "subjects": [["a fish", "a cup"], ["été"]][:count] + [[]] * max(0, count - 2),
    }
    for tensor in TENSORS:
        values = rng.normal(size=(count, *tensor.shape)) * 100
        columns[tensor.name] = values.astype(tensor.dtype)
    return columns


def write(
    columns: dict, batches: list[int], row_group_bytes: int, tensors: list[Tensor] = TENSORS
) -> tuple[bytes, list[int]]:
    sink = io.BytesIO()
    writer = ShardWriter(sink, tensors, row_group_bytes)
    start = 0
    for count in batches:
        writer.write({name: values[start : start + count] for name, values in columns.items()})
        start += count
    writer.close()
    return sink.getvalue(), writer.row_groups


def test_arrays_come_back_bit_for_bit_by_row_group_and_column() -> None:
    columns = rows(11)
    data, groups = write(columns, [4, 7], row_group_bytes=3 * ROW_BYTES)
    assert groups == [3, 3, 3, 2]
    file = pq.ParquetFile(io.BytesIO(data))
    assert [file.metadata.row_group(i).num_rows for i in range(4)] == groups
    start = 0
    for index, count in enumerate(groups):
        read = read_row_group(file, index)
        for name, values in columns.items():
            expected = values[start : start + count]
            if isinstance(values, np.ndarray):
                assert read[name].dtype == values.dtype and read[name].shape == expected.shape
                assert read[name].tobytes() == expected.tobytes()
            else:
                assert read[name] == expected
        start += count
    only = read_row_group(file, 0, ["key", clip_column(4)])
    assert set(only) == {"key", clip_column(4)}


def test_bytes_do_not_depend_on_how_rows_are_handed_in() -> None:
    columns = rows(11)
    whole = write(columns, [11], 3 * ROW_BYTES)
    assert write(columns, [1] * 11, 3 * ROW_BYTES) == whole
    assert write(columns, [2, 0, 9], 3 * ROW_BYTES) == whole


def test_a_row_larger_than_the_bound_gets_a_group_of_its_own() -> None:
    assert write(rows(3), [3], row_group_bytes=1)[1] == [1, 1, 1]


def test_no_rows_give_a_readable_shard() -> None:
    data, groups = write(rows(0), [0], 1000)
    file = pq.ParquetFile(io.BytesIO(data))
    assert groups == [] and file.metadata.num_rows == 0
    assert tensors_of(file.schema_arrow) == TENSORS


DEPTHS, STATES, PIXELS = (2, 4), (3, 8), (6, 6, 3)
CODECS = ("float16", "int8", "pixels")


def of_codec(codec: str, count: int = 5) -> tuple[dict, list[Tensor], dict[int, torch.Tensor]]:
    """Rows of a codec, its tensors, and the states that they were made from."""
    tensors = layout(codec, tokens=5, latent=(4, 2, 2), depths=DEPTHS, states=STATES, pixels=PIXELS)
    generator = torch.Generator().manual_seed(0)
    states = {d: torch.randn(count, *STATES, generator=generator) * 3 for d in DEPTHS}
    scalars = {k: v for k, v in rows(count).items() if not isinstance(v, np.ndarray)}
    rng = np.random.default_rng(1)
    columns = {
        tensor.name: rng.integers(0, 200, (count, *tensor.shape)).astype(tensor.dtype)
        for tensor in tensors
    }
    if codec != "pixels":
        columns |= {k: v.numpy() for k, v in encode_states(codec, states).items()}
    return {**scalars, **columns}, tensors, states


def test_a_sample_takes_the_bytes_that_the_formats_table_says() -> None:
    """CLIP ViT-L/14, six scales, Stable Diffusion 1.5 at 512 pixels."""
    models = {
        "tokens": 77, "latent": (4, 64, 64), "states": (257, 1024), "pixels": (224, 224, 3),
    }  # fmt: skip
    six = (4, 8, 12, 16, 20, 24)
    taken = {
        codec: sum(t.nbytes for t in layout(codec, depths=six, **models)) - 77 * 4  # type: ignore[arg-type]
        for codec in CODECS
    }
    latents = 2 * 4 * 64 * 64 * 2
    assert taken == {
        "float16": latents + 6 * 257 * 1024 * 2,
        "int8": latents + 6 * (257 * 1024 + 257 * 4),
        "pixels": latents + 224 * 224 * 3,
    }
    docs = (Path(__file__).parents[2] / "docs").rglob("*.md")
    text = "".join(page.read_text() for page in docs)
    assert all(f"{size:,}" in text for size in taken.values())


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("reader", ["duckdb", "polars", "pandas"])
def test_other_readers_open_every_codec(codec: str, reader: str, tmp_path: Path) -> None:
    columns, tensors, _ = of_codec(codec)
    path = tmp_path / "a.parquet"
    path.write_bytes(write(columns, [5], 1 << 20, tensors)[0])
    names = [*(t.name for t in tensors), "key", "aesthetic", "predictor", "subjects"]
    if reader == "duckdb":
        import duckdb

        found = duckdb.sql(f"select {', '.join(names)} from '{path}'").fetchall()
        read: dict = dict(zip(names, zip(*found, strict=True), strict=True))
    elif reader == "polars":
        import polars

        read = polars.read_parquet(path).to_dict(as_series=False)
    else:
        import pandas

        frame = pandas.read_parquet(path)
        frame["aesthetic"] = (
            frame["aesthetic"].astype(object).where(frame["aesthetic"].notna(), None)
        )
        read = {name: frame[name].tolist() for name in names}
    for tensor in tensors:
        values = from_bytes(read[tensor.name], tensor.shape, tensor.dtype)
        assert values.dtype == columns[tensor.name].dtype
        assert np.array_equal(values, columns[tensor.name])
    for name in ("key", "aesthetic", "predictor"):
        assert list(read[name]) == columns[name]
    assert [list(subjects) for subjects in read["subjects"]] == columns["subjects"]


def test_int8_is_within_half_a_step_of_each_token() -> None:
    columns, _, states = of_codec("int8")
    decoded = decode_states(columns, DEPTHS)
    for depth in DEPTHS:
        true, scale = states[depth].numpy(), columns[scale_column(depth)]
        assert columns[clip_column(depth)].dtype == np.int8 and scale.dtype == np.float32
        assert np.allclose(scale, np.abs(true).max(-1) / 127)
        assert (np.abs(columns[clip_column(depth)]).max(-1) == 127).all()
        assert decoded[depth].dtype == np.float32
        assert (np.abs(decoded[depth] - true) <= 0.5001 * scale[..., None]).all()
        assert not np.array_equal(decoded[depth], true)
    on_device = decode_states(
        {k: torch.from_numpy(columns[k]) for k in columns if "clip" in k}, [4]
    )
    assert np.array_equal(on_device[4].numpy(), decoded[4])


def test_a_token_of_zeros_survives_int8() -> None:
    columns = encode_states("int8", {2: torch.zeros(1, *STATES)})
    assert torch.equal(decode_states(columns, [2])[2], torch.zeros(1, *STATES))


def test_float16_states_are_the_stored_ones() -> None:
    columns, _, states = of_codec("float16")
    decoded = decode_states(columns, [4])
    assert list(decoded) == [4] and decoded[4] is columns["clip_4"]
    assert np.array_equal(decoded[4], states[4].numpy().astype(np.float16))


def test_a_reader_asks_only_for_the_columns_of_its_depths() -> None:
    assert vision_columns("float16", [4]) == ["clip_4"]
    assert vision_columns("int8", [2, 4]) == ["clip_2", "clip_4", "clip_2_scale", "clip_4_scale"]
    assert vision_columns("pixels", [2, 4]) == ["clip_pixels"]
    for codec in CODECS:
        columns, tensors, _ = of_codec(codec)
        file = pq.ParquetFile(io.BytesIO(write(columns, [5], 1 << 20, tensors)[0]))
        wanted = vision_columns(codec, [4])
        assert set(read_row_group(file, 0, wanted)) == set(wanted)


def test_tensors_are_stored_plain_and_carry_no_statistics() -> None:
    data, _ = write(rows(40), [40], 1 << 20)
    group = pq.ParquetFile(io.BytesIO(data)).metadata.row_group(0)
    seen = set()
    for i in range(group.num_columns):
        column = group.column(i)
        seen.add(column.path_in_schema.split(".")[0])
        if column.path_in_schema in {tensor.name for tensor in TENSORS}:
            assert column.compression == "UNCOMPRESSED" and not column.is_stats_set
            assert "PLAIN" in column.encodings and not column.has_dictionary_page
    assert {tensor.name for tensor in TENSORS} <= seen


def test_wrong_columns_and_shapes_are_refused() -> None:
    writer = ShardWriter(io.BytesIO(), TENSORS, 1000)
    columns = rows(2)
    with pytest.raises(ValueError, match="url"):
        writer.write({name: value for name, value in columns.items() if name != "url"})
    with pytest.raises(ValueError, match="latent_mean"):
        writer.write({**columns, "latent_mean": np.zeros((2, 4, 2, 3), np.float16)})


def manifest() -> Manifest:
    shard = Shard(
        path="features/train-00000.parquet",
        split="train",
        rows=5,
        row_groups=[3, 2],
        bytes=10,
        sha256="ab",
    )
    test = Shard(**{**shard, "path": "features/test-00000.parquet", "split": "test", "rows": 2})
    return Manifest(
        shards=[shard, test],
        depths=[2, 4],
        tensors={"clip_2": {"shape": [3, 8], "dtype": "float16"}},
        encoders={"vision": {"name": "miniworld:clip", "sha256": "11"}},
        codec="int8",
        codec_error={"4": {"relative_rms": 0.01, "worst_cosine": 0.99}},
    )


def test_the_manifest_survives_storage_and_counts_splits(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    manifest().save(storage)
    loaded = Manifest.load(storage)
    assert loaded == manifest()
    assert loaded.rows("train") == 5 and loaded.rows("test") == 2
    assert loaded.size() == "2 test, 5 train rows, 0.0 MiB"
    assert [shard["path"] for shard in loaded.split("test")] == ["features/test-00000.parquet"]


def test_a_missing_or_foreign_manifest_is_one_clear_line(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    with pytest.raises(UserError, match="curate"):
        Manifest.load(storage)
    manifest().save(storage)
    path = tmp_path / "features" / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema_version": 99}))
    with pytest.raises(UserError, match=r"version 99, .* curate it again under another --root"):
        Manifest.load(storage)


@pytest.mark.parametrize(
    "change", [{"shards": [1]}, {"shards": [{"path": "features/x"}]}, {"shards": 3}, {"tensors": 0}]
)
def test_a_manifest_that_sealing_did_not_write_is_one_line(
    tmp_path: Path, change: dict[str, object]
) -> None:
    storage = Storage(str(tmp_path))
    manifest().save(storage)
    path = tmp_path / "features" / "manifest.json"
    said = {**json.loads(path.read_text()), **change}
    if change == {"tensors": 0}:
        del said["tensors"]
    path.write_text(json.dumps(said))
    with pytest.raises(UserError, match="is not what sealing writes"):
        Manifest.load(storage)


def test_a_manifest_names_nothing_outside_of_its_root(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    foreign = Storage(tmp_path / "root")
    for path in ("../secret", "features/../../secret"):
        with pytest.raises(UserError, match="leaves the root"):
            manifest().open(foreign, path)
    with pytest.raises(UserError, match="no such file"):  # "/" is the root's own
        manifest().open(foreign, str(tmp_path / "secret"))


def test_shards_of_other_encoders_are_refused() -> None:
    same = {"vision": {"name": "elsewhere/clip", "sha256": "11"}}
    manifest().check_encoders(same)
    with pytest.raises(UserError, match="vision encoder other/clip") as caught:
        manifest().check_encoders({"vision": {"name": "other/clip", "sha256": "22"}})
    assert "\n" not in str(caught.value)


def test_open_shard_reads_from_storage(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    columns = rows(3)
    storage.write_bytes("features/a.parquet", write(columns, [3], 1 << 20)[0])
    with open_shard(storage, "features/a.parquet") as file:
        read = read_row_group(file, 0, ["latent_mean"])
    assert np.array_equal(read["latent_mean"], columns["latent_mean"])
