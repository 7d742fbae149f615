"""Jobs on clusters whose nodes come when they are wanted, and go when they idle.

The nodes are raylets on this machine and their GPUs are told, not there: models run on the CPU.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline.command_line import load
from pipeline.config import EvaluateConfig
from pipeline.shards import Manifest
from pipeline.storage import Storage
from tests.sealed import write_features
from tests.system.autoscaling import Autoscaled, autoscaled
from tests.system.curating import REPOSITORY, Job
from tests.system.training import command

pytestmark = [pytest.mark.system, pytest.mark.timeout(3000)]
GIB = 2**30
# As KubeRay tells of its groups: GPU nodes offer no CPUs, or downloads would hold their GPUs.
GROUPS = {
    "cpu-spot": {"max_workers": 2, "resources": {"CPU": 2, "memory": 4 * GIB}},
    "gpu-caption": {"max_workers": 2, "resources": {"CPU": 0, "GPU": 1, "memory": 4 * GIB}},
}


ENVIRONMENT = {
    **os.environ,
    **{"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(REPOSITORY)},
}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Autoscaled]:
    with autoscaled(GROUPS, ENVIRONMENT) as cluster:
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
    said, _ = process.communicate(timeout=1200)
    assert process.returncode == 0, said
    assert Manifest.load(Storage(tmp_path)).shards

    landed = Counter((worker.group, "GPU" in worker.resources) for worker in cluster.workers())
    assert landed[("cpu-spot", False)] >= 1 and landed[("gpu-caption", True)] >= 2, landed
    assert set(landed) <= {("cpu-spot", False), ("gpu-caption", True), ("", False), ("", True)}
    assert "(autoscaler" not in said, "several a second, for as long as a stage would like more"
    assert wait_for(lambda: cluster.nodes() == [], 300), "idle nodes stay"


@pytest.mark.long
def test_an_evaluation_brings_its_nodes(tiny_models: Path, tmp_path: Path) -> None:
    """The preset's workers on the group of infra/jobs/evaluate.yaml, from no node at all."""
    cfg = load(EvaluateConfig, ["--preset", "sd15-bench"])
    group = {"max_workers": 2, "resources": {"CPU": 7, "GPU": 1, "memory": 4 * GIB}}
    pools = {"drawing": cfg.drawing, "scoring": cfg.scoring}
    words = [sys.executable, "jobs/evaluate.py", "--root", str(tmp_path), "--device", "cpu"]
    words += ["--models.base", f"{tiny_models}/sd", "--models.vision", f"{tiny_models}/clip"]
    words += ["--references", "2", "--unit_pictures", "2", "--steps", "2", "--resamples", "100"]
    words += ["--methods", "text-only", "reference-only"]
    for name, pool in pools.items():
        for setting, value in vars(pool).items():
            words += [f"--{name}.{setting}", str(value)]
    with autoscaled({"gpu-evaluate": group}, ENVIRONMENT) as cluster:
        done = subprocess.run(
            words, cwd=REPOSITORY, env=cluster.environment, capture_output=True, text=True,
            timeout=1200,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        took = {tuple(sorted(worker.resources.items())) for worker in cluster.workers()}
        assert took == {(("CPU", 2.0), ("GPU", 1.0))}
        assert {worker.group for worker in cluster.workers()} <= {"gpu-evaluate", ""}
        assert wait_for(lambda: cluster.nodes() == [], 300), "idle nodes stay"
    assert json.loads((tmp_path / "evaluation/mini/scores.json").read_text())


def test_training_waits_for_its_nodes(
    cluster: Autoscaled, tiny_models: Path, tmp_path: Path
) -> None:
    """Two workers, for whom no node is there yet; the driver and its controller need no CPU."""
    write_features(tmp_path, tiny_models)
    few = {"semantic.steps": 2, "multi_scale.steps": 0, "validate_steps": 0, "checkpoint_steps": 2}
    words = command(tmp_path, tiny_models, workers=2, use_gpu="false", **few)
    done = subprocess.run(
        words, cwd=REPOSITORY, env=cluster.environment, capture_output=True, text=True, timeout=1200
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
        words, cwd=REPOSITORY, env=cluster.environment, capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 2, done.stdout + done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert "training takes 8 CPU workers at least" in done.stderr
    assert "the same command goes on" in done.stderr
