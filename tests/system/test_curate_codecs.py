"""Scores and codecs as jobs: turned on by a redo, killed half-way, gone on with, trained from."""

import hashlib
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.shards import MANIFEST, Manifest
from pipeline.storage import Storage
from pipeline.units import Ledger
from tests.system.curating import REPOSITORY, Job

pytestmark = [pytest.mark.system, pytest.mark.timeout(1200)]
WIDTH = 32  # the tiny CLIP's projection


@pytest.fixture(scope="module")
def job(tiny_models: Path) -> Job:
    return Job(tiny_models)


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Settings that turn scores on, of a predictor that every image passes or fails by itself."""
    path = tmp_path_factory.mktemp("predictor") / "predictor.pth"
    draw = torch.Generator().manual_seed(0)
    state = {"layers.0.weight": torch.randn(1, WIDTH, generator=draw) * 40}
    state["layers.0.bias"] = torch.tensor([5.0])
    torch.save(state, path)
    return {
        "scores__enabled": "true",
        "scores__weights": path,
        "scores__md5": hashlib.md5(path.read_bytes()).hexdigest(),
        "scores__min_aesthetic": 0.0,
    }


def look(root: Path, job: Job) -> str:
    done = subprocess.run(
        [sys.executable, "jobs/curate.py", "status", "--root", str(root)],
        cwd=REPOSITORY, env=job.environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def train(root: Path, job: Job, models: Path, **settings: Any) -> tuple[int, str]:
    given = {
        "root": root, "models.base": models / "sd", "models.vision": models / "clip",
        "workers": 1, "global_batch": 4, "lanes": 2, "heads": 2, "head_dim": 8,
        "semantic.steps": 2, "multi_scale.steps": 2, "validate_rows": 4, **settings,
    }  # fmt: skip
    words = [word for key, value in given.items() for word in (f"--{key}", str(value))]
    done = subprocess.run(
        [sys.executable, "jobs/train.py", *words],
        cwd=REPOSITORY, env=job.environment, text=True, timeout=600,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    return done.returncode, done.stdout


def stages(said: str) -> list[str]:
    """The stages that a status shows."""
    lines = said.splitlines()
    first = next(n for n, line in enumerate(lines) if line.startswith("stage "))
    return [line.split()[0] for line in lines[first + 1 : lines.index("", first)]]


def kill_half_way(job: Job, root: Path, **settings: Any) -> None:
    """Kill the job as soon as it has made its first shards of int8."""
    ledger, process = Ledger(Storage(root), "features"), job.start(str(root), **settings)
    while process.poll() is None:
        codecs = [marker.settings["codec"] for marker in ledger.done().values()]
        if "int8" in codecs:
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=300)
    assert process.returncode == -signal.SIGKILL, "it ended before it could be killed"
    time.sleep(3.0)  # orphaned workers notice that their driver is gone


def kept_rows(root: Path) -> dict[str, int]:
    """Shard -> its rows, as sealed."""
    return {shard["path"]: shard["rows"] for shard in Manifest.load(Storage(root)).shards}


@pytest.mark.long
def test_scores_and_codecs_are_turned_on_by_redo_and_trained_from(
    job: Job, scored: dict[str, Any], tiny_models: Path, tmp_path: Path
) -> None:
    root = tmp_path / "run"
    code, said = job.run(str(root))
    assert code == 0, said
    told = look(root, job)
    assert ": sealed, " in told and stages(told) == ["units", "images", "captions", "features"]
    plain = json.loads((root / "curation.json").read_text())["stages"]

    code, said = job.run(str(root), **scored)
    assert code == 2 and "scores.enabled" in said.splitlines()[-1], said
    assert (root / MANIFEST).exists(), "a refused setting costs no seal"
    code, said = job.run(str(root), redo='["captions","features"]', **scored)
    assert code == 0, said
    told = look(root, job)
    order = ["units", "images", "scores", "captions", "features"]
    assert ": sealed, " in told and stages(told) == order
    found = json.loads((root / "curation.json").read_text())["stages"]
    low = found["scores"]["dropped"]["low_aesthetic"]
    assert 0 < low < plain["images"]["kept"]
    assert found["captions"]["rows_in"] == found["scores"]["kept"]
    assert sum(found["scores"]["scores"]["rows"]) == found["scores"]["rows_in"]
    page = (root / "report.html").read_text()
    assert 'aria-label="Aesthetic score of the images"' in page

    rows = kept_rows(root)
    int8 = {"features__codec": "int8", "redo": "features", **scored}
    kill_half_way(job, root, **int8)
    told = look(root, job)
    assert ": not sealed; " in told and not (root / MANIFEST).exists()
    code, said = train(root, job, tiny_models)
    assert code == 2 and "no sealed features" in said.splitlines()[-1], said
    code, said = job.run(str(root), **int8)
    assert code == 0, said
    assert ": sealed, " in look(root, job)
    assert kept_rows(root) == rows, "another codec holds the same rows"
    assert json.loads((root / MANIFEST).read_text())["codec"] == "int8"
    code, said = train(root, job, tiny_models)
    assert code == 0 and "multi_scale: step 2" in said, said
