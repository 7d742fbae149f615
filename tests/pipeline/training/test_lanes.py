"""The batch at a step depends on (seed, step) alone; every row occurs once per epoch and lane."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import UserError
from pipeline.shards import Manifest, ShardWriter, Tensor
from pipeline.storage import Storage
from pipeline.training.inputs import validation_batches
from pipeline.training.lanes import LanePlan, Lanes
from pipeline.training.read_ahead import ReadAhead

LANES, BATCH = 4, 8
ROWS = (37, 23, 41)  # rows per shard: ragged against lanes, windows and row groups


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> tuple[Storage, Manifest]:
    storage = Storage(tmp_path_factory.mktemp("lanes"))
    tensor = Tensor("clip_2", (3, 2), "float16")
    listed = []
    for number, rows in enumerate(ROWS):
        path = f"features/train-{number:05d}.parquet"
        with storage.publish(path) as sink:
            writer = ShardWriter(sink, [tensor], row_group_bytes=5 * tensor.nbytes)
            keys = [f"{number}-{i}" for i in range(rows)]
            values = np.full((rows, *tensor.shape), number, np.float16)
            values += (np.arange(rows, dtype=np.float16) / 64)[:, None, None]
            scalars = dict.fromkeys(("key", "url", "caption", "predictor"), keys)
            scalars |= {"aesthetic": [None] * rows, "subjects": [[]] * rows}
            writer.write({**scalars, "clip_2": values})
            writer.close()
        listed.append(
            {
                "path": path,
                "split": "train",
                "rows": rows,
                "row_groups": writer.row_groups,
                "bytes": storage.size(path),
                "sha256": "",
            }
        )
    told = {tensor.name: {"shape": list(tensor.shape), "dtype": tensor.dtype}}
    return storage, Manifest(shards=listed, depths=[2], tensors=told, encoders={})  # type: ignore[arg-type]


def lanes(
    shards: tuple[Storage, Manifest], seed: int = 0, columns: tuple[str, ...] = ("key",)
) -> Lanes:
    storage, manifest = shards
    return Lanes(
        storage,
        manifest,
        columns,
        lanes=LANES,
        global_batch=BATCH,
        shuffle_rows=10,
        seed=(seed, 1),
    )


def keys(lanes: Lanes, start: int, stop: int, world: int = 1) -> list[list[str]]:
    """Keys of the global batches, put together from the workers' shares in rank order."""
    shares = [list(lanes.batches(start, stop, rank, world)) for rank in range(world)]
    for rank, share in enumerate(shares):
        assert [batch.step for batch in share] == list(range(start, stop))
        assert all(batch.first == rank * BATCH // world for batch in share)
    steps = zip(*shares, strict=True)
    return [[key for part in parts for key in part.columns["key"]] for parts in steps]


def test_the_world_size_does_not_change_the_batches(shards: tuple[Storage, Manifest]) -> None:
    steps = 60  # almost five epochs
    alone = keys(lanes(shards), 0, steps, world=1)
    assert keys(lanes(shards), 0, steps, world=2) == alone
    assert keys(lanes(shards), 0, steps, world=4) == alone


def test_every_row_once_per_epoch_and_lane(shards: tuple[Storage, Manifest]) -> None:
    rows = sum(ROWS)
    source = lanes(shards)
    batches = keys(source, 0, 60)
    per_lane = BATCH // LANES
    seen: Counter[str] = Counter()
    for lane in range(LANES):
        mine = slice(lane * per_lane, (lane + 1) * per_lane)
        stream = [key for batch in batches for key in batch[mine]]
        length = source.plan.length(lane)
        for epoch in range(4):
            part = stream[epoch * length : (epoch + 1) * length]
            assert len(set(part)) == length
            if epoch == 0:
                seen.update(part)
        assert stream[:length] != stream[length : 2 * length]
    assert len(seen) == rows and set(seen.values()) == {1}


def test_seek_gives_what_was_left_and_the_seed_matters(shards: tuple[Storage, Manifest]) -> None:
    whole = keys(lanes(shards), 0, 60)
    for start in (1, 13, 47, 59):
        assert keys(lanes(shards), start, 60) == whole[start:]
    assert keys(lanes(shards, seed=1), 0, 60) != whole


def test_tensors_stay_with_their_keys(shards: tuple[Storage, Manifest]) -> None:
    for batch in lanes(shards, columns=("key", "clip_2")).batches(0, 15):
        for key, value in zip(batch.columns["key"], batch.columns["clip_2"], strict=True):
            shard, row = key.split("-")
            assert value.shape == (3, 2) and value.dtype == np.float16
            assert (value == np.float16(int(shard)) + np.float16(int(row) / 64)).all()


def test_seek_is_arithmetic_at_any_step() -> None:
    plan = LanePlan([128] * 50_000, lanes=64, shuffle_rows=512, seed=(0,))
    place = plan.place(63, 10**9)
    rows = plan.rows_of(63, place)
    assert place.epoch == 10_000 and len(rows.row) == 512
    assert len(set(zip(rows.group.tolist(), rows.row.tolist(), strict=True))) == 512


def test_refusals(shards: tuple[Storage, Manifest]) -> None:
    with pytest.raises(UserError, match="3 workers do not divide 4 lanes"):
        next(lanes(shards).batches(0, 1, 0, 3))
    with pytest.raises(UserError, match="2 training rows are fewer than 4 lanes"):
        LanePlan([2], 4, 8, (0,))
    storage, manifest = shards
    with pytest.raises(UserError, match="global_batch 6 is not a multiple of lanes 4"):
        Lanes(storage, manifest, ["key"], lanes=4, global_batch=6, shuffle_rows=8, seed=(0,))


def test_a_damaged_shard_is_named(shards: tuple[Storage, Manifest], tmp_path: Path) -> None:
    storage, manifest = shards
    broken = Storage(tmp_path)
    for shard in manifest.shards:
        data = bytearray(storage.read_bytes(shard["path"]))
        data[-200:] = b"\0" * 200
        broken.write_bytes(shard["path"], bytes(data))
    with pytest.raises(UserError, match=r"cannot read row group \d+ of .*train-0000\d.parquet"):
        next(lanes((broken, manifest)).batches(0, 1))


def test_a_shard_that_was_made_again_in_another_way_is_refused(
    shards: tuple[Storage, Manifest], tmp_path: Path
) -> None:
    """A redo that was stopped half-way: numbers of another kind under the name of the old ones."""
    storage, manifest = shards
    storage.download_tree("features", tmp_path / "features")
    again = Tensor("clip_2", (3, 2), "int8")
    scale = Tensor("clip_2_scale", (3,), "float32")
    root = Storage(tmp_path)
    with root.publish(manifest.shards[0]["path"]) as sink:
        writer = ShardWriter(sink, [again, scale], row_group_bytes=5 * again.nbytes)
        rows = ROWS[0]
        told = dict.fromkeys(("key", "url", "caption", "predictor"), ["x"] * rows)
        told |= {"aesthetic": [None] * rows, "subjects": [[]] * rows}
        states = {"clip_2": np.ones((rows, 3, 2)), "clip_2_scale": np.ones((rows, 3))}
        writer.write({**told, **states})
        writer.close()
    listed = [{**manifest.shards[0], "split": split} for split in ("train", "test")]
    redone = replace(manifest, shards=listed)
    line = r"train-00000.* is not as .*manifest\.json says \(clip_2, clip_2_scale differ\)"
    columns = ["key", "clip_2"]
    with pytest.raises(UserError, match=line):
        next(lanes((root, redone), columns=tuple(columns)).batches(0, 1))
    with pytest.raises(UserError, match=line):
        validation_batches(root, redone, Reader(columns), rows=2, batch_rows=2)  # type: ignore[arg-type]


class Reader:
    """What validation asks of its preparer before it has rows."""

    def __init__(self, columns: list[str]) -> None:
        self.columns = columns


def test_read_ahead_keeps_order_bounds_memory_and_passes_errors_on() -> None:
    drawn: list[int] = []

    def numbers() -> object:
        for i in range(1000):
            drawn.append(i)
            yield i

    with ReadAhead(numbers(), lambda i: i * 2, depth=3) as ahead:
        stream = iter(ahead)
        assert [next(stream) for _ in range(5)] == [0, 2, 4, 6, 8]
    assert len(drawn) <= 5 + 3 + 2

    def failing(i: int) -> int:
        if i == 2:
            raise UserError("row 2 is bad")
        return i

    with ReadAhead(range(5), failing) as ahead, pytest.raises(UserError, match="row 2 is bad"):
        list(ahead)
