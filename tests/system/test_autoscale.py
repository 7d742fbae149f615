"""Curation and training on clusters whose nodes come when they are wanted, and go when they idle.

The nodes are raylets on this machine and their GPUs are told, not there: models run on the CPU.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline.shards import Manifest
from pipeline.storage import Storage
from tests.sealed import write_features
from tests.system.autoscaling import Autoscaled, autoscaled
from tests.system.curating import REPOSITORY, Job
from tests.system.training import command

pytestmark = [pytest.mark.system, pytest.mark.timeout(1500)]
GIB = 2**30
# As KubeRay tells of its groups: GPU nodes offer no CPUs, or downloads would hold their GPUs.
GROUPS = {
    "cpu-spot": {"max_workers": 2, "resources": {"CPU": 2, "memory": 4 * GIB}},
    "gpu-caption": {"max_workers": 2, "resources": {"CPU": 0, "GPU": 1, "memory": 4 * GIB}},
}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Autoscaled]:
    quiet = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(REPOSITORY)}
    with autoscaled(GROUPS, {**os.environ, **quiet}) as cluster:
        yield cluster


def wait_for(reached: Callable[[], bool], seconds: float) -> bool:
    until = time.monotonic() + seconds
    while not reached():
        if time.monotonic() > until:
            return False
        time.sleep(0.5)
    return True


def test_curation_scales_its_groups_apart(
    cluster: Autoscaled, tiny_models: Path, tmp_path: Path
) -> None:
    assert cluster.nodes() == [], "nothing but the head"
    job = Job(tiny_models)
    job.environment |= cluster.environment
    process = job.start(
        str(tmp_path),
        device="cpu",
        download_workers__max_workers=4,
        caption_workers__cpus=0,
        caption_workers__gpus=1,
        features_workers__cpus=0,
        features_workers__gpus=1,
    )
    said, _ = process.communicate(timeout=600)
    assert process.returncode == 0, said
    assert Manifest.load(Storage(tmp_path)).shards

    landed = Counter((worker.group, "GPU" in worker.resources) for worker in cluster.workers())
    assert landed[("cpu-spot", False)] >= 1 and landed[("gpu-caption", True)] >= 2, landed
    assert set(landed) <= {("cpu-spot", False), ("gpu-caption", True), ("", False), ("", True)}
    assert "(autoscaler" not in said, "several a second, for as long as a stage would like more"
    assert wait_for(lambda: cluster.nodes() == [], 300), "idle nodes stay"


def test_training_waits_for_its_nodes(
    cluster: Autoscaled, tiny_models: Path, tmp_path: Path
) -> None:
    """Two workers, for whom no node is there yet; the driver and its controller need no CPU."""
    write_features(tmp_path, tiny_models)
    few = {"semantic.steps": 2, "multi_scale.steps": 0, "validate_steps": 0, "checkpoint_steps": 2}
    words = command(tmp_path, tiny_models, workers=2, use_gpu="false", **few)
    done = subprocess.run(
        words, cwd=REPOSITORY, env=cluster.environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "waiting up to 10 min: training takes 2 CPU workers at least" in done.stdout
    assert "training: 2 CPU workers" in done.stdout
    assert json.loads((tmp_path / "train/semantic/done.json").read_text())


def test_training_says_that_its_nodes_did_not_come(
    cluster: Autoscaled, tiny_models: Path, tmp_path: Path
) -> None:
    """More than the groups may have: the wait ends, with one line, and nothing was trained."""
    write_features(tmp_path, tiny_models)
    words = command(tmp_path, tiny_models, workers=8, lanes=8, wait_minutes=0.05, use_gpu="false")
    done = subprocess.run(
        words, cwd=REPOSITORY, env=cluster.environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 2, done.stdout + done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert "training takes 8 CPU workers at least" in done.stderr
    assert "the same command goes on" in done.stderr
