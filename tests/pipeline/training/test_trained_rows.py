"""The rows that training really takes: the same at every step, in any world, after any restart."""

from __future__ import annotations

import gc
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from pipeline.config import ModelsConfig, OptimConfig, TrainConfig
from pipeline.errors import UserError
from pipeline.shards import Manifest, open_shard
from pipeline.storage import Storage
from pipeline.training.lanes import LanePlan
from pipeline.training.loop import StageLoop
from pipeline.training.run import Run
from pipeline.training.stage import World
from tests.sealed import write_features

LANES, BATCH, ROWS = 4, 8, 30
STEPS = {"semantic": 13, "multi_scale": 10}  # three epochs and a half, and two and a half
Batches = dict[tuple[str, int], list[str]]
"""(stage, step) -> keys of the global batch, in order."""


def config(root: Path, folder: Path, **fields: Any) -> TrainConfig:
    given: dict[str, Any] = {
        "models": ModelsConfig(base=str(folder / "sd"), vision=str(folder / "clip")),
        "global_batch": BATCH, "lanes": LANES, "shuffle_rows": 5, "heads": 2, "head_dim": 8,
        "semantic": OptimConfig(steps=STEPS["semantic"], lr=1e-3),
        "multi_scale": OptimConfig(steps=STEPS["multi_scale"], lr=1e-3),
        "checkpoint_steps": 4, "log_steps": 5, "validate_steps": 0, "sample_steps": 0,
    }  # fmt: skip
    return TrainConfig(root=str(root), **{**given, **fields})


@contextmanager
def recording(file: Path, killed_at: tuple[str, int] | None = None) -> Iterator[None]:
    """Every batch that a step is taken on goes to `file`; before one of them, the run dies."""
    step = StageLoop._take

    def recorded(self: StageLoop, inputs: Any) -> None:
        if (self.stage.name, self.step) == killed_at:
            raise KeyboardInterrupt
        step(self, inputs)
        with file.open("a") as out:
            out.write(json.dumps([self.stage.name, self.step, inputs.keys]) + "\n")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StageLoop, "_take", recorded)
        yield


def work(run: Run, world: World, file: Path, kills: list[tuple[str, int]], finish: bool) -> None:
    """The run, killed and begun again, and in the end finished, or not."""
    for at in kills:
        with recording(file, at), pytest.raises(KeyboardInterrupt):
            run.work(world)
    if finish:
        with recording(file):
            run.work(world)


def _worker(rank: int, size: int, run: Run, out: str, *how: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{out}/store-{size}", rank=rank, world_size=size)
    work(run, World(rank, size), Path(out) / f"{size}-{rank}.jsonl", *how)
    gc.collect()
    dist.destroy_process_group()


def in_a_world(size: int, run: Run, out: Path, *how: Any) -> list[Batches]:
    """The steps taken, in a list of the runs that they were taken in."""
    run.take_over()
    if size == 1:
        work(run, World(), out / "1-0.jsonl", *how)
    else:
        mp.start_processes(_worker, (size, run, str(out), *how), size, start_method="forkserver")
    runs: list[Batches] = [defaultdict(list)]
    for rank in range(size):
        taken, at = 0, ("", 0)
        for line in (out / f"{size}-{rank}.jsonl").read_text().splitlines():
            stage, step, keys = json.loads(line)
            if stage == at[0] and step <= at[1]:  # begun again
                taken += 1
                if len(runs) == taken:
                    runs.append(defaultdict(list))
            runs[taken][stage, step].extend(keys)
            at = stage, step
    return runs


@pytest.fixture(scope="module")
def curated(tmp_path_factory: pytest.TempPathFactory, tiny_models: Path) -> Callable[[str], Path]:
    """New roots of the same features."""

    def make(name: str) -> Path:
        root = tmp_path_factory.mktemp("rows") / name
        write_features(root, tiny_models, train=ROWS, test=2)
        return root

    return make


@pytest.fixture(scope="module")
def alone(
    curated: Callable[[str], Path], tiny_models: Path, tmp_path_factory: pytest.TempPathFactory
) -> Batches:
    """What one worker trains on that nobody stops."""
    out = tmp_path_factory.mktemp("alone")
    torch.set_num_threads(1)
    run = Run(config(curated("one"), tiny_models))
    (batches,) = in_a_world(1, run, out, [], True)
    return batches


def test_every_row_is_trained_on_once_per_epoch_and_lane(alone: Batches) -> None:
    assert list(alone) == [(s, step + 1) for s, steps in STEPS.items() for step in range(steps)]
    streams: dict[tuple[str, int], list[str]] = defaultdict(list)
    for (stage, _), keys in alone.items():
        assert len(keys) == BATCH
        for row, key in enumerate(keys):
            streams[stage, row // (BATCH // LANES)].append(key)
    lengths = {(s, lane): ROWS * (lane + 1) // LANES - ROWS * lane // LANES for s, lane in streams}
    for stage, steps in STEPS.items():
        for epoch in range(BATCH * steps // ROWS):
            seen: Counter[str] = Counter()
            for lane in range(LANES):
                length = lengths[stage, lane]
                seen.update(streams[stage, lane][epoch * length : (epoch + 1) * length])
            assert len(seen) == ROWS and set(seen.values()) == {1}, (stage, epoch)
    assert [alone["semantic", step] for step in (1, 2)] != [
        alone["multi_scale", step] for step in (1, 2)
    ]


@pytest.mark.parametrize("size", [1, 2])
def test_other_worlds_and_restarts_train_on_the_same_batches(
    alone: Batches, curated: Callable[[str], Path], tiny_models: Path, tmp_path: Path, size: int
) -> None:
    """Killed in the midst of an epoch of each stage, and begun again; with two workers first, the
    rest with four.
    """
    run = Run(config(curated(f"again-{size}"), tiny_models))
    kills = [("semantic", 7), ("multi_scale", 5)]
    if size == 1:
        runs = in_a_world(1, run, tmp_path, kills, True)
    else:
        runs = in_a_world(2, run, tmp_path, kills[:1], False)
        runs += in_a_world(4, run, tmp_path, kills[1:], True)
    starts = [next(iter(one)) for one in runs]
    assert starts == [("semantic", 1), ("semantic", 5), ("multi_scale", 5)]
    trained: Batches = {}
    for one in runs:
        for at, keys in one.items():
            assert keys == alone[at], at
            trained[at] = keys
    assert trained == alone


def break_a_page(root: Path, number: int, index: int) -> set[str]:
    """Damage a row group of a training shard; its keys."""
    storage = Storage(root)
    path = Manifest.load(storage).split("train")[number]["path"]
    with open_shard(storage, path) as file:
        column = file.metadata.row_group(index).column(file.metadata.num_columns - 1)
        keys = file.read_row_group(index, columns=["key"])["key"].to_pylist()
    data = bytearray(storage.read_bytes(path))
    start = column.data_page_offset
    data[start : start + 8] = b"\xff" * 8
    storage.write_bytes(path, bytes(data))
    return set(keys)


def test_a_damaged_row_group_stops_training_or_is_replaced_told_and_counted(
    alone: Batches,
    curated: Callable[[str], Path],
    tiny_models: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    root = curated("broken")
    gone = break_a_page(root, 1, 0)
    path, line = "features/train-00001.parquet", r"row group 0 of .*train-00001\.parquet"
    with pytest.raises(UserError, match=f"cannot read {line}"):
        in_a_world(1, Run(config(root, tiny_models)), tmp_path, [], True)
    (tmp_path / "1-0.jsonl").unlink(missing_ok=True)
    # to skip is no other training: it goes on from where the first one stopped
    run = Run(config(root, tiny_models, corrupt="skip", checkpoint_steps=5))
    runs = in_a_world(1, run, tmp_path, [("semantic", 7)], True)
    replaced = dict.fromkeys(STEPS, 0)
    for one in runs:
        for at, keys in one.items():
            for key, expected in zip(keys, alone[at], strict=True):
                assert key not in gone and (key == expected or expected in gone)
    for (stage, _), keys in alone.items():
        replaced[stage] += sum(key in gone for key in keys)
    said = capsys.readouterr().out.replace("\n", " ")
    for stage in STEPS:
        folder = root / "train" / stage
        (told,) = [json.loads(one) for one in (folder / "corrupt.jsonl").read_text().splitlines()]
        assert (told["path"], told["row_group"], told["rows"]) == (path, 0, len(gone))
        records = [json.loads(one) for one in (folder / "metrics.jsonl").read_text().splitlines()]
        assert sum(record.get("replaced_rows", 0) for record in records) == replaced[stage] > 0
    assert said.count("warning: row group 0 of") == len(STEPS) and told["error"] in said


def test_data_that_do_not_fit_are_refused_on_a_store_and_told_elsewhere(
    curated: Callable[[str], Path],
    tiny_models: Path,
    monkeypatch: pytest.MonkeyPatch,
    bucket: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    root = curated("small")
    steps = {"semantic": OptimConfig(steps=1), "multi_scale": OptimConfig(steps=1)}
    in_a_world(1, Run(config(root, tiny_models, **steps)), tmp_path, [], True)
    told = "semantic: 4 lanes a worker, 10,432 bytes a row, up to 0.3 MiB in memory on this node"
    out = capsys.readouterr().out
    assert told in out and "multi_scale: 4 lanes a worker, 22,912 bytes" in out
    monkeypatch.setattr("pipeline.training.memory.memory_gib", lambda: 1e-4)
    away = Storage(f"{bucket}/small")
    away.upload_tree(root / "features", "features")
    with pytest.raises(UserError, match=told + ".*lower shuffle_rows or lanes"):
        in_a_world(1, Run(config(away.url(), tiny_models, **steps)), tmp_path, [], True)  # type: ignore[arg-type]
    # what only the second stage has no room for is refused before the first is trained
    monkeypatch.setattr("pipeline.training.memory.memory_gib", lambda: 0.4 / 1024)
    with pytest.raises(UserError, match=r"^multi_scale: .*lower shuffle_rows or lanes"):
        in_a_world(1, Run(config(away.url(), tiny_models, **steps)), tmp_path, [], True)  # type: ignore[arg-type]
    assert not away.list("train/semantic/checkpoints")


@pytest.mark.parametrize("codec", ["int8", "pixels"])
def test_mirrored_rows_are_trained_on_where_the_shards_hold_them(
    tiny_models: Path, tmp_path: Path, codec: str
) -> None:
    root = tmp_path / "run"
    write_features(root, tiny_models, train=ROWS, test=2, codec=codec)
    with pytest.raises(UserError, match=r"no features of mirrored images: .*--features.flip true"):
        Run(config(root, tiny_models, flip=True))
    write_features(root, tiny_models, train=ROWS, test=2, codec=codec, flip=True)
    run = Run(config(root, tiny_models, flip=True))
    run.take_over()
    taken: list[tuple[str, str, bool]] = []
    step = StageLoop._take

    def noted(self: StageLoop, inputs: Any) -> None:
        step(self, inputs)
        for key, latent in zip(inputs.keys, inputs.latent_logvar, strict=True):
            taken.append((self.stage.name, key, bool(latent.mean() > 0)))  # drawn around -4

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StageLoop, "_take", noted)
        run.work(World())
    sizes = [rows for shard in run.manifest.split("train") for rows in shard["row_groups"]]
    shards = [(shard["path"][9:20], shard["row_groups"]) for shard in run.manifest.split("train")]
    group: dict[str, int] = {}
    for unit, groups in shards:
        first = len(set(group.values()))
        for row in range(sum(groups)):
            group[f"{unit}-{row}"] = first + int(np.searchsorted(np.cumsum(groups), row, "right"))
    plan = LanePlan(sizes, LANES, 5, (0, 0), flip=True)
    epoch = [one for one in taken if one[0] == "semantic"][: 3 * BATCH]
    assert len(set(group.values())) == len(sizes) > 1
    assert all(flipped == plan.flipped(0, group[key]) for _, key, flipped in epoch)
    assert {flipped for *_, flipped in taken} == {True, False}
