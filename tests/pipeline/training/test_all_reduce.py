"""The smoke test of the network: real workers, real sums; slow and wrong ones are named."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from pipeline.config import AllReduceConfig
from pipeline.errors import UserError
from pipeline.training import all_reduce
from pipeline.training.all_reduce import GRADIENT_BYTES, Measured, Peer, Timing, faults, slow, table
from pipeline.training.elastic import Sizes

REPOSITORY = Path(__file__).resolve().parents[3]
pytestmark = pytest.mark.timeout(900)  # a busy machine starts Ray in minutes


def start(*words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "pipeline.training.all_reduce", "--use_gpu", "false", *words],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, list[str]]:
    """Its status, what it said, and its lines of errors: Ray and torch may warn beside them."""
    said, errors = process.communicate(timeout=800)
    lines = errors.splitlines()
    assert not any(line.startswith("Traceback") for line in lines), errors
    return process.returncode, said, [line for line in lines if line.startswith("error:")]


@pytest.mark.system
def test_workers_add_up_and_a_floor_is_told() -> None:
    workers, few = 3, ["--mib", "0.1", "1", "--repeats", "2"]
    code, said, errors = finish(start("--workers", str(workers), "--floor_gbit", "1000000", *few))
    assert code == 1 and len(errors) == 1, (said, errors)
    assert errors[0].startswith("error: the bus bandwidth is ")
    assert "at 102 MB (gradient), below the floor of 1e+06" in errors[0]
    rows = [line.split() for line in said.splitlines() if line.endswith(("right", "wrong"))]
    assert [row[:-4] for row in rows] == [["0.1", "MiB"], ["1", "MiB"], ["102", "MB", "(gradient)"]]
    assert all(row[-1] == "right" for row in rows)
    for row in rows:
        algorithm, bus = float(row[-3]), float(row[-2])
        assert bus == pytest.approx(algorithm * 2 * (workers - 1) / workers, abs=0.02)
    assert f"all-reduce of {workers} workers (cpu) on 1 node, gloo" in said
    assert "GLOO_SOCKET_IFNAME=lo" in said
    assert f"ranks 0 to {workers - 1}, " in said


def test_without_a_floor_it_ends_well(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = measured([0.01] * 4)
    monkeypatch.setattr("sys.argv", ["all_reduce"])
    monkeypatch.setattr(all_reduce, "connect", lambda cfg: contextlib.nullcontext())
    monkeypatch.setattr(all_reduce, "measure", lambda cfg: made)
    all_reduce.main()
    assert table(made) in capsys.readouterr().out


@pytest.mark.system
def test_a_worker_that_is_missing_or_lost_is_one_line() -> None:
    code, said, errors = finish(start("--workers", "5", "--ray.num_cpus", "2"))
    assert (code, said) == (1, "")
    assert errors == [
        "error: training takes 5 CPU workers at least, and the cluster has room for 2; lower "
        "workers"
    ]
    process = start("--workers", "2", "--mib", "1", "--repeats", "100000")
    worker = _worker(process)
    time.sleep(1)
    worker.send_signal(signal.SIGKILL)
    code, _, errors = finish(process)
    assert code == 1 and len(errors) == 1, errors
    assert "one of 2 CPU workers failed or did not answer" in errors[0]
    assert "look at its node" in errors[0]


def _worker(process: subprocess.Popen[str]) -> psutil.Process:
    until = time.monotonic() + 600
    while time.monotonic() < until:
        for child in psutil.Process(process.pid).children(recursive=True):
            try:
                if "RayTrainWorker" in " ".join(child.cmdline()) and child.cpu_times().user > 2:
                    return child
            except psutil.Error:
                continue
        time.sleep(0.2)
    raise AssertionError("no worker came")


def test_bad_settings_are_refused_before_anything_starts() -> None:
    process = start("--workers", "1")
    said = process.communicate(timeout=800)
    assert process.returncode == 2
    assert said == ("", "error: all_reduce.workers is 1; it must be at least 2\n")
    with pytest.raises(UserError, match="sizes must be more than 0"):
        AllReduceConfig(mib=[1.0, 0.0])


def test_as_many_as_there_are_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker per GPU; what it waits for is what jobs/train.py would."""
    asked: list[tuple[Sizes, Any]] = []

    def wait(sizes: Sizes, cfg: Any) -> int:
        asked.append((sizes, cfg))
        raise UserError("enough")

    for name in ("pipeline.training.all_reduce.room", "pipeline.training.elastic.room"):
        monkeypatch.setattr(name, lambda kind: {"GPU": 16, "CPU": 96}[kind])
    monkeypatch.setattr(Sizes, "wait", wait)
    for cfg in (AllReduceConfig(), AllReduceConfig(workers=24), AllReduceConfig(use_gpu=False)):
        with pytest.raises(UserError, match="enough"):
            all_reduce.measure(cfg)
    assert [sizes for sizes, _ in asked] == [
        Sizes((16,), "GPU"),
        Sizes((24,), "GPU"),
        Sizes((2,), "CPU"),
    ]
    assert asked[1][1].wait_minutes == 10


def _one_adds_wrongly(rank: int, rendezvous: str, found: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    right = dist.all_reduce

    def wrong(numbers: torch.Tensor) -> None:
        right(numbers)
        numbers[-1] += rank  # rank 0 stays right

    dist.all_reduce = wrong
    timing = all_reduce._time(4096, 1, torch.device("cpu"))
    peer = all_reduce._exchange(f"node-{rank}", torch.device("cpu"))
    if rank == 0:
        torch.save([timing, peer], found)
    dist.destroy_process_group()


def test_a_wrong_sum_is_found_and_named(tmp_path: Path) -> None:
    found = str(tmp_path / "found")
    arguments = (str(tmp_path / "rendezvous"), found)
    mp.start_processes(_one_adds_wrongly, arguments, nprocs=2, start_method="forkserver")
    timing, peer = torch.load(found, weights_only=False)
    assert timing.wrong == (1,) and timing.seconds > 0
    assert (peer.node, peer.source, peer.across) == ("node-0", 1, True) and peer.seconds > 0
    other = replace(peer, node="node-1", source=0)
    assert faults(Measured("gloo", (timing,), (peer, other)), 0.0) == [
        "wrong sums of 0.003906 MiB at rank 1 on node-1: take the node out"
    ]


def measured(seconds: list[float], per_node: int = 2) -> Measured:
    """Workers on nodes of `per_node`, whose exchanges with the next node took so long."""
    nodes = [f"node-{at // per_node}" for at in range(len(seconds))]
    peers = [
        Peer(node, "H800", ("NCCL_SOCKET_IFNAME=eth0",), at, True, took)
        for at, (node, took) in enumerate(zip(nodes, seconds, strict=True))
    ]
    return Measured("nccl", (Timing(GRADIENT_BYTES, 0.01, ()),), tuple(peers))


def test_a_slow_node_is_named() -> None:
    made = measured([0.01, 0.011, 0.03, 0.012, 0.01, 0.01])
    assert slow(made.peers) == [2]
    assert "node-1: ranks 2 to 3, 27.30 to 68.24 Gbit/s; rank 2 across nodes SLOW" in table(made)
    (line,) = faults(made, floor_gbit=200)
    assert line == (
        "the bus bandwidth is 136 Gbit/s at 102 MB (gradient), below the floor of 200; slow: rank "
        "2 on node-1"
    )
    assert faults(made, floor_gbit=100) == []
    even = measured([0.01] * 6)
    assert faults(even, 200)[0].endswith("no worker is slower than the others")


def test_workers_within_a_node_are_compared_among_themselves() -> None:
    peers = measured([0.001, 0.01, 0.001, 0.01]).peers
    mixed = [replace(peer, across=peer.seconds > 0.005) for peer in peers]
    assert slow(mixed) == []


def test_each_sends_to_its_like_on_the_next_node() -> None:
    assert all_reduce._shift(["a"] * 8 + ["b"] * 8) == 8
    assert all_reduce._shift(["a"] * 8) == 1
    assert all_reduce._shift(["a", "a", "b"]) == 1


def test_settings_that_differ_are_told_apart() -> None:
    made = measured([0.01] * 4)
    odd = replace(made.peers[3], settings=())
    text = table(replace(made, peers=(*made.peers[:3], odd)))
    assert "set (ranks 0, 1, 2): NCCL_SOCKET_IFNAME=eth0\n" in text
    assert "set (ranks 3): no NCCL_*, GLOO_*, UCX_* or FI_*" in text
