"""Training on a cluster whose machines go, by surprise or with notice: the same is learned.

`CHAOS_KILLS` (4; `make chaos`: 20) and `CHAOS_SEED` say how many are killed and which.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from tests.sealed import write_features
from tests.system.raylets import REPOSITORY, Raylets, raylets
from tests.system.training import checkpoints, command, trained

KILLS = int(os.environ.get("CHAOS_KILLS", 4))
SEED = int(os.environ.get("CHAOS_SEED", 0))
STAGES = ("semantic", "multi_scale")
SETTINGS = {"semantic.steps": 60, "multi_scale.steps": 60, "validate_steps": 30}
pytestmark = [pytest.mark.system, pytest.mark.long, pytest.mark.timeout(900 + 90 * KILLS)]


class Job:
    """jobs/train.py on the cluster, with two workers unless said otherwise."""

    def __init__(self, cluster: Raylets, root: Path, models: Path, **settings: Any) -> None:
        self.root, self.log, self.environment = root, root / "log", cluster.environment
        self.command = command(root, models, **{"workers": 2, **SETTINGS, **settings})
        self.start()

    def start(self) -> None:
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                self.command, cwd=REPOSITORY, env=self.environment, stdout=log, stderr=log
            )

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(60)

    def said(self) -> str:
        return self.log.read_text()

    def wait_for(self, reached: Callable[[], Any]) -> bool:
        """Until it is so; False where the job ended before."""
        until = time.monotonic() + 600
        while not reached():
            if self.process.poll() is not None:
                return bool(reached())
            assert time.monotonic() < until, self.said()
            time.sleep(0.02)
        return True

    def finish(self) -> None:
        assert self.process.wait(600) == 0, self.said()

    def step(self) -> int:
        """Of the newest checkpoint, both stages together."""
        saved = [name for stage in STAGES for name in checkpoints(self.root, stage)[-1:]]
        return sum(int(name.removeprefix("step-")) for name in saved)

    def losses(self) -> list[tuple[str, int, float]]:
        """(stage, step, loss), as recorded."""
        found = []
        for stage in STAGES:
            lines = (self.root / "train" / stage / "metrics.jsonl").read_text().splitlines()
            records = [record for record in map(json.loads, lines) if "loss" in record]
            found += [(stage, record["step"], record["loss"]) for record in records]
        return found


@pytest.fixture(scope="module")
def cluster() -> Iterator[Raylets]:
    quiet = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(REPOSITORY)}
    with raylets({**os.environ, **quiet}) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def undisturbed(
    cluster: Raylets, tmp_path_factory: pytest.TempPathFactory, tiny_models: Path
) -> Job:
    root = tmp_path_factory.mktemp("undisturbed")
    write_features(root, tiny_models)
    job = Job(cluster, root, tiny_models)
    job.finish()
    return job


def test_what_is_killed_changes_nothing(
    cluster: Raylets,
    undisturbed: Job,
    tmp_path: Path,
    tiny_models: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rng, wanted, began = random.Random(SEED), trained(undisturbed.root), time.monotonic()
    targets = (["worker", "node", "driver"] * KILLS)[:KILLS]
    rng.shuffle(targets)
    number = 0
    while targets:
        number += 1
        root = tmp_path / f"run-{number}"
        write_features(root, tiny_models)
        job, kills = Job(cluster, root, tiny_models), 0
        while targets and kills < 5:
            goal = job.step() + rng.randrange(1, 30)
            if not job.wait_for(lambda job=job, goal=goal: job.step() >= goal):
                break
            time.sleep(rng.uniform(0, 0.5))
            what, at = targets[-1], job.step()
            if what == "driver":
                job.kill()
                job.start()
            else:
                what = cluster.kill_worker(rng) if what == "worker" else cluster.kill_node(rng)
            if what:
                targets.pop()
                kills += 1
                with capsys.disabled():
                    spent = time.monotonic() - began
                    print(f"\n{spent:5.0f} s  run {number}: {at} saved, killed: {what}", flush=True)
        job.finish()
        assert kills, "the run ended before anything could be killed"
        ours = trained(job.root)
        assert ours.keys() == wanted.keys()
        assert all(torch.equal(ours[name], wanted[name]) for name in ours), job.said()
        assert job.losses() == undisturbed.losses()


def test_a_node_that_will_go_is_left_and_others_are_used(
    cluster: Raylets, undisturbed: Job, tmp_path: Path, tiny_models: Path
) -> None:
    """Four workers, then the two that there is room for, then four: of the same batches."""
    write_features(tmp_path, tiny_models)
    job = Job(
        cluster,
        tmp_path,
        tiny_models,
        workers=4,
        min_workers=2,
        resize_minutes=0,
        checkpoint_steps=1000,  # only those who leave save
    )
    assert job.wait_for(lambda: seen(job) > 0), job.said()
    going = cluster.busy_node(random.Random(SEED))
    with held_up(cluster.workers(but=going)):
        cluster.give_notice(going, seconds=90)
        time.sleep(4)  # Ray Train looks every two seconds
    assert job.wait_for(lambda: "2 CPU workers, 4 of 8 samples each" in job.said()), job.said()
    cluster.end_node(going)
    assert job.wait_for(lambda: seen(job) > left(job)[0]), job.said()
    with held_up(cluster.workers()):
        cluster.add_node()
        time.sleep(2)
    job.finish()
    said = job.said()
    sizes = re.findall(r"training: (\d) CPU workers", said)
    assert sizes == ["4", "2", "4"], said
    assert len(left(job)) == 2 and "interrupted" not in said, said

    theirs = undisturbed.losses()
    assert [at[:2] for at in job.losses()] == [at[:2] for at in theirs]
    for (_, _, ours), (_, _, other) in zip(job.losses(), theirs, strict=True):
        assert ours == pytest.approx(other, rel=1e-4)


@contextlib.contextmanager
def held_up(workers: list[psutil.Process]) -> Iterator[None]:
    """One of them, for whom the others wait: so few steps could be over before anything happens."""
    workers[0].suspend()
    try:
        yield
    finally:
        workers[0].resume()


def seen(job: Job) -> int:
    """The step of which the driver knows."""
    progress = job.root / "train/progress.json"
    return int(json.loads(progress.read_text())["step"]) if progress.exists() else 0


def left(job: Job) -> list[int]:
    """Steps at which the workers left."""
    return [int(step) for step in re.findall(r"workers left: .* step (\d+) is saved", job.said())]
