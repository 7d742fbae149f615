"""The batch at a step depends on (seed, step) alone; every row occurs once per epoch and lane."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.errors import UserError
from pipeline.shards import LATENT_MEAN, Manifest, Shard, ShardWriter, Tensor, open_shard
from pipeline.storage import Storage
from pipeline.training.inputs import validation_batches
from pipeline.training.lanes import LanePlan, Lanes, _Stream
from pipeline.training.read_ahead import ReadAhead
from pipeline.training.row_groups import Loader, RowGroups

LANES, BATCH = 4, 8
ROWS = (37, 23, 41)  # rows per shard: ragged against lanes, windows and row groups


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> tuple[Storage, Manifest]:
    """Rows whose states tell which they are."""
    return sealed(Storage(tmp_path_factory.mktemp("lanes")), [Tensor("clip_2", (3, 2), "float16")])


def sealed(storage: Storage, tensors: list[Tensor]) -> tuple[Storage, Manifest]:
    """Row groups of five rows; column 0 is shard + row / 64, or ones, the next one minus ones."""
    listed: list[Shard] = []
    for number, rows in enumerate(ROWS):
        path = f"features/train-{number:05d}.parquet"
        with storage.publish(path) as sink:
            writer = ShardWriter(sink, tensors, 5 * sum(tensor.nbytes for tensor in tensors))
            keys = [f"{number}-{i}" for i in range(rows)]
            told: dict[str, Any] = dict.fromkeys(("key", "url", "caption", "predictor"), keys)
            told |= {"aesthetic": [None] * rows, "subjects": [[]] * rows}
            first = np.full((rows, *tensors[0].shape), number, np.float16)
            first += (np.arange(rows, dtype=np.float16) / 64)[:, None, None]
            if len(tensors) > 1:
                first[:] = 1
            arrays = {t.name: first * (1, -1)[i] for i, t in enumerate(tensors)}
            writer.write({**told, **arrays})
            writer.close()
        size = storage.size(path)
        listed.append(Shard(path=path, split="train", rows=rows, row_groups=writer.row_groups,
                            bytes=size, sha256=""))  # fmt: skip
    specs = {t.name: {"shape": list(t.shape), "dtype": t.dtype} for t in tensors}
    return storage, Manifest(shards=listed, depths=[2], tensors=specs, encoders={})


@pytest.fixture(scope="module")
def flippable(tmp_path_factory: pytest.TempPathFactory) -> tuple[Storage, Manifest]:
    """The same rows, with latents of ones, and of minus ones in the mirrored images' column."""
    tensors = [Tensor(name, (3, 2), "float16") for name in (LATENT_MEAN, f"{LATENT_MEAN}_flipped")]
    return sealed(Storage(tmp_path_factory.mktemp("flippable")), tensors)


def lanes(
    shards: tuple[Storage, Manifest],
    seed: int = 0,
    columns: tuple[str, ...] = ("key",),
    **settings: Any,
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
        **settings,
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


def test_memory_of_a_batch_is_used_again_when_nobody_holds_it(
    shards: tuple[Storage, Manifest],
) -> None:
    expected = [
        b.columns["clip_2"].copy() for b in lanes(shards, columns=("clip_2",)).batches(0, 9)
    ]
    batches = lanes(shards, columns=("clip_2",)).batches(0, 9)
    first = torch.from_numpy(next(batches).columns["clip_2"])[1:, 0]  # a view of a view
    second = next(batches).columns["clip_2"]
    kept = [first, torch.from_numpy(second)]
    places = {next(batches).columns["clip_2"].ctypes.data for _ in range(5)}
    assert len(places) == 1 and places.isdisjoint(one.data_ptr() for one in kept)
    assert np.array_equal(first.numpy(), expected[0][1:, 0])
    assert np.array_equal(second, expected[1])
    del first, second, kept
    last = [next(batches).columns["clip_2"] for _ in range(2)]
    assert all(np.array_equal(*pair) for pair in zip(last, expected[7:], strict=True))


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


def damaged(shards: tuple[Storage, Manifest], to: Path, groups: Sequence[tuple[int, int]]) -> Any:
    """A copy whose given (shard, row group)s are not what their checksums say; shard -1: all of
    them have no footer.
    """
    storage, manifest = shards
    broken = Storage(to)
    for number, shard in enumerate(manifest.shards):
        data = bytearray(storage.read_bytes(shard["path"]))
        if (-1, 0) in groups:
            data[-200:] = b"\0" * 200
        with open_shard(storage, shard["path"]) as file:
            for _, index in (group for group in groups if group[0] == number):
                column = file.metadata.row_group(index).column(file.metadata.num_columns - 1)
                data[column.data_page_offset + column.total_compressed_size - 1] ^= 1
        broken.write_bytes(shard["path"], bytes(data))
    return broken, manifest


def test_a_damaged_shard_is_named(shards: tuple[Storage, Manifest], tmp_path: Path) -> None:
    broken = damaged(shards, tmp_path, [(-1, 0)])
    with pytest.raises(UserError, match=r"cannot read row group \d+ of .*train-0000\d.parquet"):
        next(lanes(broken).batches(0, 1))
    with pytest.raises(UserError, match="no row group can be read"):
        next(lanes(broken, corrupt="skip").batches(0, 1))


def test_rows_of_a_damaged_row_group_are_replaced_alike_in_every_world(
    shards: tuple[Storage, Manifest], tmp_path: Path
) -> None:
    bad, steps = [(0, 1), (1, 2), (1, 3), (2, 0)], 60
    broken = damaged(shards, tmp_path, bad)
    reading = {"columns": ("key", "clip_2"), "verify": True}
    whole = keys(lanes(shards, **reading), 0, steps)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"row group \d of .*checksum.*corrupt: skip"):
        keys(lanes(broken, **reading), 0, steps)  # type: ignore[arg-type]
    source = lanes(broken, corrupt="skip", **reading)  # type: ignore[arg-type]
    alone = keys(source, 0, steps)
    found = {(int(one.path[-9]), one.row_group, one.rows) for one in source.source.corrupt}
    assert found == {(*group, 5) for group in bad}
    for start, world in ((0, 2), (0, 4), (7, 1), (33, 4), (59, 2)):
        again = lanes(broken, corrupt="skip", **reading)  # type: ignore[arg-type]
        assert keys(again, start, steps, world) == alone[start:]
    gone = {f"{shard}-{5 * group + row}" for shard, group in bad for row in range(5)}
    replaced, at = 0, 0
    plan, standing = source.plan, Counter[str]()
    for before, now in zip(whole, alone, strict=True):
        for old, new in zip(before, now, strict=True):
            lane, step = at % BATCH // 2, at // BATCH
            if old in gone:
                replaced += 1
                epoch = plan.place(lane, 2 * step + at % 2).epoch
                order = [*plan.order(epoch), *plan.order(epoch)]
                groups = groups_of(shards[1])
                bad_one = next(i for i, of in enumerate(groups) if old in of)
                nxt = next(g for g in order[order.index(bad_one) + 1 :] if not groups[g] & gone)
                assert new in groups[nxt]
                standing[new] += 1
            else:
                assert new == old
            at += 1
    batches = lanes(broken, corrupt="skip", **reading).batches(0, steps)  # type: ignore[arg-type]
    assert sum(batch.replaced for batch in batches) == replaced > 0
    assert len(standing) >= 10


def groups_of(manifest: Manifest) -> list[set[str]]:
    """Keys of each row group."""
    return [
        {f"{number}-{row}" for row in range(5 * index, 5 * index + rows)}
        for number, shard in enumerate(manifest.shards)
        for index, rows in enumerate(shard["row_groups"])
    ]


def test_a_mirrored_row_group_is_mirrored_whole_and_alike_in_every_world(
    flippable: tuple[Storage, Manifest],
) -> None:
    """The flipped columns are the others' negatives."""

    def signs(steps: range, world: int = 1, seed: int = 0) -> list[list[tuple[str, bool]]]:
        names = ("key", LATENT_MEAN)
        source = lanes(flippable, seed, names, flip=True)
        shares = [list(source.batches(steps[0], steps[-1] + 1, r, world)) for r in range(world)]
        return [
            [
                (key, bool(value.ravel()[0] < 0))
                for part in parts
                for key, value in zip(part.columns["key"], part.columns[LATENT_MEAN], strict=True)
            ]
            for parts in zip(*shares, strict=True)
        ]

    alone = signs(range(60))
    assert signs(range(60), world=4) == alone and signs(range(31, 60), world=2) == alone[31:]
    assert signs(range(60), seed=1) != alone
    plan = lanes(flippable, flip=True).plan
    groups, at, mirrored = groups_of(flippable[1]), 0, 0
    for batch in alone:
        for key, flipped in batch:
            epoch = plan.place(at % BATCH // 2, 2 * (at // BATCH) + at % 2).epoch
            group = next(i for i, of in enumerate(groups) if key in of)
            assert flipped == plan.flipped(epoch, group)
            mirrored, at = mirrored + flipped, at + 1
    assert 0.3 < mirrored / at < 0.7
    plain = lanes(flippable, columns=("key",))
    assert keys(plain, 0, 60) == [[key for key, _ in batch] for batch in alone]
    assert not any(plain.plan.flipped(0, group) for group in range(len(groups)))


def test_memory_is_bounded_and_told(
    flippable: tuple[Storage, Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = lanes(flippable, columns=("key", LATENT_MEAN), flip=True)
    assert source.row_bytes == 2 * 3 * 2
    loaders: list[Loader] = []
    enter = Loader.__enter__
    monkeypatch.setattr(Loader, "__enter__", lambda self: loaders.append(self) or enter(self))
    most = 0
    for _ in source.batches(0, 60, 0, 2):
        alive = list(loaders[0]._held)
        most = max(most, sum(source.source.sizes[group] for group, _ in alive))
    assert 0.5 * source.memory(2) < most * source.row_bytes <= source.memory(2) < source.memory(1)
    deadline = time.monotonic() + 60
    while loaders[0]._held and time.monotonic() < deadline:
        time.sleep(0.01)  # a reader may be about one yet
    assert not loaders[0]._held, "what nobody reads from is gone"
    # two lanes of two windows of 10 rows each, and row groups of 5 rows at their four ends
    assert source.memory(2) == 2 * (2 * 10 + 4 * 4) * source.row_bytes
    # what there is can be held at most, in both of its forms
    large = Lanes(*flippable, ["key", LATENT_MEAN], lanes=4, global_batch=4, shuffle_rows=900,
                  seed=(0,), flip=True)  # fmt: skip
    assert large.memory(1) == 2 * sum(ROWS) * large.row_bytes


def test_a_seek_waits_for_its_own_batch_alone(
    shards: tuple[Storage, Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row group that is needed later may be as slow as it likes, and so may another lane's."""
    source, read = lanes(shards, readers=2), RowGroups.read
    plan, answers = source.plan, threading.Event()

    def groups(step: int) -> set[int]:
        places = [(lane, plan.place(lane, 2 * step + i)) for lane in range(LANES) for i in range(2)]
        return {int(plan.rows_of(lane, at).group[at.offset]) for lane, at in places}

    first, later = groups(20), set().union(*map(groups, range(21, 24)))
    slow = next(iter(later - first))

    def delayed(self: RowGroups, group: int, flip: bool = False) -> Any:
        if group == slow:
            assert answers.wait(60)
        return read(self, group, flip)

    monkeypatch.setattr(RowGroups, "read", delayed)
    batches = source.batches(20, 60)
    ahead = [next(batches)]
    met = 21
    while slow not in groups(met):  # the other reader goes on with all lanes
        ahead.append(next(batches))
        met += 1
    answers.set()
    ahead += batches
    assert [batch.columns["key"] for batch in ahead] == keys(lanes(shards), 20, 60)


def test_what_is_needed_first_is_read_first_and_once(
    shards: tuple[Storage, Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, read, order = lanes(shards, readers=1), RowGroups.read, list[int]()
    asked, take = threading.Event(), _Stream.take

    def noted(self: RowGroups, group: int, flip: bool = False) -> Any:
        assert asked.wait(60)
        order.append(group)
        return read(self, group, flip)

    def taken_from(self: _Stream, *rest: Any) -> None:
        asked.set()
        take(self, *rest)

    monkeypatch.setattr(RowGroups, "read", noted)
    monkeypatch.setattr(_Stream, "take", taken_from)
    plan = source.plan
    list(source.batches(0, 4))
    places = [(lane, plan.place(lane, at)) for at in range(8) for lane in range(LANES)]
    used = [int(plan.rows_of(lane, at).group[at.offset]) for lane, at in places]
    assert len(order) == len(set(order)) and set(order) >= set(used)
    ranks = [min(i for i, group in enumerate(used) if group == one) for one in dict.fromkeys(used)]
    # the one thread took a group before all lanes had asked; the rest follows the steps
    taken = [order.index(one) for one in dict.fromkeys(used)]
    assert np.corrcoef(ranks, taken)[0, 1] > 0.7


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
