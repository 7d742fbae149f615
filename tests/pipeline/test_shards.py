import io
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline.errors import UserError
from pipeline.shards import (
    Manifest,
    Shard,
    ShardWriter,
    Tensor,
    clip_column,
    open_shard,
    read_row_group,
    tensors_of,
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
        "subjects": [["a fish", "a cup"], ["été"]][:count] + [[]] * max(0, count - 2),
    }
    for tensor in TENSORS:
        values = rng.normal(size=(count, *tensor.shape)) * 100
        columns[tensor.name] = values.astype(tensor.dtype)
    return columns


def write(columns: dict, batches: list[int], row_group_bytes: int) -> tuple[bytes, list[int]]:
    sink = io.BytesIO()
    writer = ShardWriter(sink, TENSORS, row_group_bytes)
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


def test_other_readers_open_it() -> None:
    import polars

    columns = rows(4)
    data, _ = write(columns, [4], 1 << 20)
    frame = polars.read_parquet(io.BytesIO(data))
    assert frame["subjects"].to_list() == columns["subjects"]
    values = np.frombuffer(frame["latent_mean"][1], dtype="<f2").reshape(4, 2, 2)
    assert np.array_equal(values, columns["latent_mean"][1])


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
    with pytest.raises(UserError, match="version 99"):
        Manifest.load(storage)


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
