"""Other programs read sealed shards, here and on S3: the same values as the pipeline's reader."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline.errors import UserError
from pipeline.shards import Manifest, read_row_group
from pipeline.shards_tables import FeatureShards
from pipeline.storage import Storage
from tests.sealed import write_features

COLUMNS = ["key", "caption", "subjects", "token_ids", "latent_mean", "clip_4", "clip_4_scale"]


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory, tiny_models: Path) -> Path:
    root = tmp_path_factory.mktemp("sealed")
    write_features(root, tiny_models, train=40, test=6, codec="int8")
    return root


@pytest.fixture(scope="module", params=["folder", "s3"])
def root(request: pytest.FixtureRequest, local: Path) -> str:
    if request.param == "folder":
        return str(local)
    away = Storage(f"{request.getfixturevalue('bucket')}/sealed")
    away.upload_tree(local, "")
    return away.url()


def expected(root: Path | str, split: str = "train") -> dict[str, Any]:
    """All rows of a split, by the pipeline's own reader."""
    storage = Storage(root)
    manifest = Manifest.load(storage)
    found: dict[str, list[Any]] = {name: [] for name in COLUMNS}
    for shard in manifest.split(split):
        with manifest.open(storage, shard["path"]) as file:
            for index in range(file.num_row_groups):
                for name, values in read_row_group(file, index, COLUMNS).items():
                    found[name].extend(values)
    return found


def same(read: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert list(read) == COLUMNS
    for name, values in wanted.items():
        if isinstance(values[0], np.ndarray):
            stacked = np.stack(values)
            assert read[name].dtype == stacked.dtype and np.array_equal(read[name], stacked), name
        else:
            assert [list(v) if name == "subjects" else v for v in read[name]] == values, name


def by_pyarrow(files: list[str]) -> Any:
    import fsspec
    import pyarrow as pa

    def read(file: str) -> Any:
        fs, path = fsspec.core.url_to_fs(file)
        return pq.read_table(path, columns=COLUMNS, filesystem=fs)

    return pa.concat_tables(map(read, files))


def by_pandas(files: list[str]) -> Any:
    import pandas

    return pandas.concat(pandas.read_parquet(file, columns=COLUMNS) for file in files)


def by_polars(files: list[str]) -> Any:
    import polars

    return polars.read_parquet(files, columns=COLUMNS)


def by_duckdb(files: list[str]) -> Any:
    import duckdb
    import fsspec

    connection = duckdb.connect()
    if files[0].startswith("s3://"):
        connection.register_filesystem(fsspec.filesystem("s3"))
    wanted = ", ".join(COLUMNS)
    return connection.sql(f"select {wanted} from read_parquet({files})").fetchnumpy()


def by_duckdb_arrow(files: list[str]) -> Any:
    import duckdb
    import fsspec

    connection = duckdb.connect()
    if files[0].startswith("s3://"):
        connection.register_filesystem(fsspec.filesystem("s3"))
    return connection.sql(f"select {', '.join(COLUMNS)} from read_parquet({files})").arrow()


def by_arrow_batch(files: list[str]) -> Any:
    (batch,) = by_pyarrow(files).combine_chunks().to_batches()
    return batch


def by_duckdb_polars(files: list[str]) -> Any:
    import duckdb
    import fsspec

    connection = duckdb.connect()
    if files[0].startswith("s3://"):
        connection.register_filesystem(fsspec.filesystem("s3"))
    return connection.sql(f"select {', '.join(COLUMNS)} from read_parquet({files})").pl()


@pytest.mark.parametrize(
    "read",
    [
        by_pyarrow, by_arrow_batch, by_pandas, by_polars, by_duckdb, by_duckdb_polars,
        by_duckdb_arrow,
    ],
)  # fmt: skip
def test_what_they_read_becomes_the_same_arrays(
    root: str, read: Callable[[list[str]], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ALLOW_HTTP", "true")  # polars, of a store without TLS
    shards = FeatureShards(root)
    same(shards.arrays(read(shards.files("train"))), expected(root))


def test_datasets_streams_the_rows(root: str) -> None:
    pytest.importorskip("datasets")
    import datasets

    made = FeatureShards(root).dataset("train", COLUMNS)
    assert made.features["clip_4"] == datasets.Array2D((65, 48), "int8")
    assert made.features["latent_mean"] == datasets.Array3D((16, 8, 8), "float16")
    assert made.num_shards == 2
    rows = list(made)
    read = {name: [row[name] for row in rows] for name in COLUMNS}
    for name in ("latent_mean", "clip_4", "clip_4_scale", "token_ids"):
        dtype = FeatureShards(root).tensors[name].numpy_dtype
        read[name] = np.stack([np.asarray(value, dtype) for value in read[name]])
    same(read, expected(root))


def test_datasets_own_parquet_reader(root: str, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    shards = FeatureShards(root)
    rows = datasets.load_dataset(
        "parquet", data_files=shards.files("test"), split="train", streaming=True,
        cache_dir=tmp_path,
    )  # fmt: skip
    read = [shards.row(row) for row in rows.select_columns(COLUMNS)]
    same(
        {
            name: np.stack([row[name] for row in read])
            if name in shards.tensors
            else [row[name] for row in read]
            for name in COLUMNS
        },
        expected(root, "test"),
    )


def test_what_cannot_be_read_is_one_line(local: Path, tmp_path: Path) -> None:
    shards = FeatureShards(local)
    with pytest.raises(UserError, match="clip_4: a row of 3 bytes, and 3120 by"):
        shards.arrays({"clip_4": [b"abc"]})
    assert shards.arrays({"clip_4": []})["clip_4"].shape == (0, 65, 48)
    import duckdb
    import polars

    files = shards.files("test")
    for query in (polars.scan_parquet(files), duckdb.read_parquet(files), [{"clip_4": b"abc"}]):
        with pytest.raises(UserError, match="holds no columns that have been read; give a table"):
            shards.arrays(query)
    pytest.importorskip("datasets")
    with pytest.raises(UserError, match="have no column 'clip_5'; there are: key, url, "):
        shards.dataset(columns=["clip_5"])
    with pytest.raises(UserError, match="no rows in the split 'validation'"):
        shards.dataset("validation")
    with pytest.raises(UserError, match="no sealed features"):
        FeatureShards(tmp_path)


def test_neither_torch_nor_ray_is_imported(local: Path) -> None:
    script = f"""if True:
        import sys
        from pipeline.shards_tables import FeatureShards
        import pyarrow.parquet as pq
        shards = FeatureShards({str(local)!r})
        print(shards.arrays(pq.read_table(shards.files("test")[0]))["clip_2"].shape)
        print(sorted({{"torch", "ray", "transformers", "datasets"}} & set(sys.modules)))
    """
    ran = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=180
    )
    assert ran.stdout.splitlines() == ["(6, 65, 48)", "[]"], ran.stderr
