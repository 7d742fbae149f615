"""Rows come back bit for bit from wherever they lie, by few requests; damage is told as damage."""

from collections.abc import Iterator
from pathlib import Path

import boto3
import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline.errors import StoreHiccup, UserError
from pipeline.shards import (
    CLIP_PIXELS,
    LATENT_MEAN,
    Manifest,
    ShardWriter,
    flipped_column,
    layout,
    open_shard,
    read_row_group,
    row_bytes,
    tensor_specs,
    vision_columns,
)
from pipeline.shards_reader import Column, DamagedShard, ShardReader, stack
from pipeline.storage import Storage
from pipeline.storage_faults import PATIENCE_VARIABLE
from tests.faulty_s3 import Fault, FaultyS3, faulty

PATH = "features/train-00000.parquet"
DEPTHS, ROWS = (2, 4, 6), 23
BUCKET = "reader"


def write(
    storage: Storage, codec: str = "float16", rows: int = ROWS, flip: bool = False, wide: int = 48
) -> Manifest:
    """A shard of three row groups, whose rows take a good part of a page."""
    tensors = layout(
        codec, tokens=5, latent=(4, 8, 8), depths=DEPTHS, states=(257, wide), pixels=(64, 32, 3),
        flip=flip,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    columns = {t.name: rng.integers(0, 100, (rows, *t.shape)).astype(t.dtype) for t in tensors}
    text = {name: [f"{name} {i}" for i in range(rows)] for name in ("key", "url", "caption")}
    told = {"aesthetic": [6.5] * rows, "predictor": [None] * rows, "subjects": [["a", "b"]] * rows}
    with storage.publish(PATH) as sink:
        writer = ShardWriter(sink, tensors, 9 * sum(t.nbytes for t in tensors))
        writer.write({**text, **told, **columns})
        writer.close()
    with open_shard(storage, PATH) as file:
        specs = tensor_specs(file.schema_arrow)
    return Manifest([], list(DEPTHS), specs, {}, codec)


def values(column: Column | list) -> np.ndarray | list:
    if isinstance(column, list):
        return column
    return stack([(column, row) for row in range(len(column))])


@pytest.fixture(params=["local", "moto"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "local":
        return Storage(tmp_path)
    return Storage(f"{request.getfixturevalue('bucket')}/{tmp_path.name}")


@pytest.mark.parametrize("codec", ["float16", "int8", "pixels"])
def test_rows_are_those_that_pyarrow_reads(storage: Storage, codec: str) -> None:
    manifest = write(storage, codec, flip=True)
    reader = ShardReader(storage, manifest, PATH)
    assert reader.row_groups == [9, 9, 5]
    names = ["subjects", "key", "token_ids", LATENT_MEAN, *vision_columns(codec, DEPTHS[1:])]
    with open_shard(storage, PATH) as file:
        for index in (2, 0, 1):
            expected = read_row_group(file, index)
            found = reader.read(index, names, verify=True)
            assert list(found) != [] and set(found) == set(names)
            flipped = reader.read(index, names, flip=True)
            for name in names:
                assert np.array_equal(values(found[name]), expected[name])
                twin = expected.get(flipped_column(name), expected[name])
                if name == CLIP_PIXELS:
                    twin = twin[:, :, ::-1]
                assert np.array_equal(values(flipped[name]), twin)
    assert row_bytes(manifest, names) == sum(
        found[name].tensor.nbytes for name in names if isinstance(found[name], Column)
    )


def test_a_local_row_group_is_not_copied(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    reader = ShardReader(storage, write(storage), PATH)
    column = reader.read(0, [LATENT_MEAN])[LATENT_MEAN]
    assert isinstance(column, Column) and not column.data.flags.owndata
    del reader
    again = ShardReader(storage, write(storage), PATH).read(0, [LATENT_MEAN])[LATENT_MEAN]
    assert np.array_equal(values(column), values(again))  # the file may be closed, and even gone


@pytest.mark.parametrize("how", [{"compression": "zstd"}, {"data_page_version": "2.0"}])
def test_shards_that_another_program_wrote_again_are_read_too(
    tmp_path: Path, how: dict[str, str]
) -> None:
    storage = Storage(tmp_path)
    manifest = write(storage)
    with open_shard(storage, PATH) as file:
        expected, table = read_row_group(file, 0), file.read()
    options = {"compression": "none", "row_group_size": 9, **how}
    pq.write_table(table, tmp_path / PATH, **options)
    found = ShardReader(storage, manifest, PATH).read(0, ["key", LATENT_MEAN, "clip_4"])
    for name, column in found.items():
        assert np.array_equal(values(column), expected[name])


def flip_bit(storage: Storage, at: int) -> None:
    data = bytearray(storage.read_bytes(PATH))
    data[at] ^= 0x10
    storage.write_bytes(PATH, bytes(data))


def test_a_flipped_bit_is_found_by_its_checksum(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    manifest = write(storage)
    with open_shard(storage, PATH) as file:
        group = file.metadata.row_group(1)
        chunks = [group.column(i) for i in range(group.num_columns)]
    ends = {c.path_in_schema: c.data_page_offset + c.total_compressed_size for c in chunks}
    flip_bit(storage, ends["clip_4"] - 5)
    reader = ShardReader(storage, manifest, PATH)
    with pytest.raises(DamagedShard, match="not what its checksum says"):
        reader.read(1, ["clip_4"], verify=True)
    reader.read(1, ["clip_4"])  # it passes for a number, where nobody looks
    reader.read(1, ["clip_6"], verify=True)
    reader.read(0, ["clip_4"], verify=True)


def test_whatever_is_damaged_is_told_as_damage(tmp_path: Path) -> None:
    """Bits, bytes and ends of a shard at random: rows, or DamagedShard, and nothing else."""
    storage = Storage(tmp_path)
    manifest = write(storage, wide=2)
    whole, rng, outcomes = storage.read_bytes(PATH), np.random.default_rng(0), set[str]()
    for kind in ("bit", "zeros", "noise", "cut") * 40:
        data, at = bytearray(whole), int(rng.integers(len(whole)))
        if kind == "bit":
            data[-at % 6000 - 1] ^= 1 << int(rng.integers(8))  # the footer, and what is near it
        elif kind == "cut":
            del data[at:]
        else:
            data[at : at + 40] = bytes(40) if kind == "zeros" else rng.bytes(40)
            del data[len(whole) :]
        storage.write_bytes(PATH, bytes(data))
        try:
            reader = ShardReader(storage, manifest, PATH)
            for index in range(len(reader.row_groups)):
                reader.read(index, ["key", "subjects", "token_ids", LATENT_MEAN, "clip_4"])
            outcomes.add("read")
        except DamagedShard as error:
            assert str(error)
            outcomes.add("damaged")
        except UserError as error:  # a bit of the schema: the manifest knows better
            assert "was made again since" in str(error)
    assert outcomes == {"read", "damaged"}


@pytest.fixture(scope="module")
def proxy(s3_server: dict[str, str]) -> Iterator[FaultyS3]:
    with pytest.MonkeyPatch.context() as patch, faulty(s3_server["AWS_ENDPOINT_URL"]) as server:
        for name, value in {**s3_server, "AWS_ENDPOINT_URL": server.url}.items():
            patch.setenv(name, value)
        boto3.client("s3").create_bucket(Bucket=BUCKET)
        yield server
        server.faults.clear()


def test_an_object_store_is_asked_for_the_wanted_columns_alone_side_by_side(
    proxy: FaultyS3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = Storage(f"s3://{BUCKET}/{tmp_path.name}")
    manifest = write(storage, wide=256)
    reader = ShardReader(storage, manifest, PATH)
    asked: list[list[tuple[int, int]]] = []
    fetch = type(reader._file).fetch

    def counted(self: object, spans: list[tuple[int, int]]) -> list[bytes]:
        asked.append(spans)
        return fetch(self, spans)  # type: ignore[arg-type]

    monkeypatch.setattr(type(reader._file), "fetch", counted)
    proxy.requests.clear()
    names = ["key", "caption", "subjects", "token_ids", LATENT_MEAN, "clip_6"]
    reader.read(1, names)
    wanted = 9 * row_bytes(manifest, names)
    (spans,) = asked  # all at once, text and latents in one range, the last scale in another
    assert len(spans) == len(proxy.requests) == 2
    assert wanted < sum(end - start for start, end in spans) < 1.1 * wanted
    monkeypatch.setattr("pipeline.storage_remote._RANGE_BYTES", 200_000)
    proxy.requests.clear()
    pieces = reader.read(1, names)  # a large range is cut into requests
    assert len(proxy.requests) == len(asked[-1]) > 6
    assert np.array_equal(values(pieces["clip_6"]), values(reader.read(1, ["clip_6"])["clip_6"]))


@pytest.mark.parametrize("kind", ["503", "reset", "short"])
def test_a_store_that_falters_is_tried_again_and_is_no_damage(
    proxy: FaultyS3, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = Storage(f"s3://{BUCKET}/{tmp_path.name}")
    reader = ShardReader(storage, write(storage), PATH)
    expected = values(reader.read(0, [LATENT_MEAN, "clip_6"])["clip_6"])
    proxy.faults.append(Fault(kind, "SlowDown", methods="GET", times=5))
    found = reader.read(0, [LATENT_MEAN, "clip_6"])
    assert np.array_equal(values(found["clip_6"]), expected) and proxy.faults[0].met == 5
    monkeypatch.setenv(PATIENCE_VARIABLE, "0.5")
    proxy.faults[0] = Fault(kind, "SlowDown", methods="GET")
    with pytest.raises(StoreHiccup, match="run the same command again"):
        reader.read(0, [LATENT_MEAN])
    proxy.faults.clear()
