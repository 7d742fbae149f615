"""The workers of a stage, and how they wait for each other."""

from __future__ import annotations

import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from pipeline.training.stage import World

LIMIT, WORK = timedelta(seconds=2), 4.0


def _worker(rank: int, size: int, out: str) -> None:
    dist.init_process_group("gloo", f"file://{out}/store", rank=rank, world_size=size)
    world = World(rank, size)
    world.sum(torch.ones(1))
    usual = dist.distributed_c10d.default_pg_timeout
    dist.distributed_c10d._set_pg_timeout(LIMIT, dist.group.WORLD)

    def work() -> None:
        time.sleep(WORK)  # longer than a collective may take
        Path(out, "worked").write_text(str(rank))

    world.first_alone("once", work)
    world.first_alone("twice", lambda: None)
    dist.distributed_c10d._set_pg_timeout(usual, dist.group.WORLD)
    seen = Path(out, "worked").read_text()
    total = world.sum(torch.ones(1)).item()
    Path(out, f"told-{rank}").write_text(f"{seen} {total}")
    dist.destroy_process_group()


def test_the_others_wait_longer_than_a_collective_may(tmp_path: Path) -> None:
    mp.start_processes(_worker, (2, str(tmp_path)), 2, start_method="forkserver")
    assert [(tmp_path / f"told-{rank}").read_text() for rank in range(2)] == ["0 2.0"] * 2


def test_one_worker_waits_for_nobody() -> None:
    done: list[int] = []
    World().first_alone("once", lambda: done.append(1))
    assert done == [1]


def test_what_the_first_fails_of_is_raised_there() -> None:
    with pytest.raises(ZeroDivisionError):
        World().first_alone("once", lambda: 1 / 0)  # type: ignore[arg-type, return-value]
