"""jobs/train.py as a user runs it: killed and gone on with, two workers, refusals. A root on S3 is
in test_submit.py and test_policies.py.
"""

from __future__ import annotations

import contextlib
import json
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from tests.sealed import write_features
from tests.system.training import (
    EVERY,
    REPOSITORY,
    STEPS,
    checkpoints,
    command,
    environment,
    trained,
)

pytestmark = [pytest.mark.system, pytest.mark.timeout(1800)]


def run(*arguments: Any, code: int = 0, **settings: Any) -> str:
    done = subprocess.run(
        command(*arguments, **settings),
        cwd=REPOSITORY,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


class Job:
    """The job in a process of its own, to be disturbed."""

    def __init__(self, arguments: list[str], log: Path) -> None:
        self.log = log
        with log.open("w") as file:
            self.process = subprocess.Popen(
                arguments, cwd=REPOSITORY, env=environment(), stdout=file, stderr=file
            )

    def wait_for(self, reached: Callable[[], Any]) -> None:
        deadline = time.monotonic() + 900
        while not reached():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, "the job did not get there"
            time.sleep(0.02)

    def workers(self) -> list[psutil.Process]:
        """The two processes that train."""
        workers = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):  # it has just ended
                if "RayTrainWorker" in " ".join(process.cmdline()):
                    workers.append(process)
        assert len(workers) == 2
        return workers

    def lose_power(self) -> None:
        """kill -9 of the job and of all that Ray started for it."""
        processes = [self.process, *psutil.Process(self.process.pid).children(recursive=True)]
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait(120)

    def end(self, how: signal.Signals) -> int:
        self.process.send_signal(how)
        return self.process.wait(120)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, tiny_models: Path) -> tuple[Path, str]:
    """A run of two workers that nobody disturbed, and what it printed."""
    root = tmp_path_factory.mktemp("undisturbed")
    write_features(root, tiny_models)
    return root, run(root, tiny_models, 2)


def test_two_workers_through_both_stages(undisturbed: tuple[Path, str], tiny_models: Path) -> None:
    root, printed = undisturbed
    for stage, depths in (("semantic", {"6"}), ("multi_scale", {"2", "4", "6"})):
        assert checkpoints(root, stage) == ["step-00000036", "step-00000040"]
        lines = (root / "train" / stage / "metrics.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        assert [r["step"] for r in records if "loss" in r] == list(range(EVERY, STEPS + 1, EVERY))
        assert [r["step"] for r in records if "validation_loss" in r] == [0, 20, 40]
        last = load_file(
            root / "train" / stage / "checkpoints/step-00000040/trainables.safetensors"
        )
        scales = {name.split(".")[2] for name in last if name.startswith("encoder.to_v.")}
        assert scales == depths
        assert f"{stage}: step {STEPS}," in printed
    assert list((root / "train" / "tensorboard").rglob("events*"))
    assert "next:     python jobs/generate.py" in printed
    assert "Traceback" not in printed and "Warning" not in printed
    told = re.findall(rf"/{STEPS} in (\d+):(\d\d)", printed)
    seconds = max(60 * int(minutes) + int(rest) for minutes, rest in told) + 1
    assert len(told) <= 2 * (1 + seconds / 5), "a line in 5 s of a stage, and one at its end"
    assert len(printed.splitlines()) - len(told) < 20, printed

    from ssr_model.conditioning import SSREncoder

    model = SSREncoder.from_pretrained(root / "model")
    assert model.config.depths == (2, 4, 6) and model.metadata["stage"] == "multi_scale"
    for name, value in model.adapter.state_dict().items():
        assert torch.equal(value, last[name])


def test_a_finished_run_does_nothing_twice(
    undisturbed: tuple[Path, str], tiny_models: Path
) -> None:
    root, _ = undisturbed
    before = {p: p.stat().st_mtime_ns for p in root.rglob("*") if p.is_file()}
    assert "finished before; nothing was done" in run(root, tiny_models, 2)
    after = {p: p.stat().st_mtime_ns for p in root.rglob("*") if p.is_file()}
    assert {p for p in after if after[p] != before.get(p)} <= {root / "report.html"}


def test_killed_again_and_again_then_the_same_command(
    undisturbed: tuple[Path, str], tmp_path: Path, tiny_models: Path
) -> None:
    """What comes out is bit for bit what comes out undisturbed."""
    write_features(tmp_path, tiny_models)
    arguments = command(tmp_path, tiny_models, 2)
    log = tmp_path / "log"

    job = Job(arguments, log)
    job.wait_for(lambda: checkpoints(tmp_path, "semantic"))
    job.workers()[1].kill()  # the job starts its workers again, and goes on
    job.wait_for(lambda: checkpoints(tmp_path, "multi_scale"))
    job.lose_power()
    assert "warning: training was interrupted" in log.read_text()
    assert (tmp_path / "train/semantic/done.json").exists()

    before = checkpoints(tmp_path, "multi_scale")
    job = Job(arguments, log)
    job.wait_for(
        lambda: (
            "multi_scale: " in log.read_text() and checkpoints(tmp_path, "multi_scale") != before
        )
    )
    for worker in job.workers():
        worker.suspend()  # or so few steps could end before the signal is seen
    refused = run(tmp_path, tiny_models, 2, code=2).strip()
    assert "is in use by a run" in refused and len(refused.splitlines()) == 1, refused
    assert job.end(signal.SIGINT) == 130
    assert "stopped; the same command goes on" in log.read_text()
    assert not (tmp_path / "train/done.json").exists()

    assert "are there already" in run(tmp_path, tiny_models, 2)
    ours, theirs = trained(tmp_path), trained(undisturbed[0])
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    for stage in ("semantic", "multi_scale"):
        lines = (tmp_path / "train" / stage / "metrics.jsonl").read_text().splitlines()
        steps = [json.loads(line)["step"] for line in lines]
        assert steps == sorted(steps) and len(steps) == 13


def test_a_fault_in_a_worker_is_one_line(tmp_path: Path, tiny_models: Path) -> None:
    write_features(tmp_path, tiny_models)
    (tmp_path / "features/train-00001.parquet").unlink()
    lines = run(tmp_path, tiny_models, 1, code=2).strip().splitlines()
    assert lines[-1].startswith("error: cannot open") and "train-00001.parquet" in lines[-1]
    # how the training went is told as often as its pace asks for; the fault once
    told = [
        line for line in lines if not line.startswith(("training: ", "semantic: ", "(RayTrain"))
    ]
    assert told == [lines[-1]], lines


def test_refusals_are_one_line(
    undisturbed: tuple[Path, str], tmp_path: Path, tiny_models: Path
) -> None:
    root, _ = undisturbed

    def refused(*arguments: Any, **settings: Any) -> str:
        printed = run(*arguments, code=2, **settings).strip()
        assert len(printed.splitlines()) == 1 and printed.startswith("error: "), printed
        return printed

    assert "multi_scale.lr is 0.5, but multi_scale" in refused(
        root, tiny_models, 2, **{"multi_scale.lr": 0.5}
    )
    assert "seed is 7, but semantic" in refused(root, tiny_models, 2, seed=7)
    assert "no sealed features" in refused(tmp_path / "nothing", tiny_models, 1)
    assert "both 0" in refused(
        root, tiny_models, 1, **{"semantic.steps": 0, "multi_scale.steps": 0}
    )
    assert "not a multiple of lanes" in refused(root, tiny_models, 1, global_batch=9)
    write_features(tmp_path / "run", tiny_models)
    manifest = tmp_path / "run/features/manifest.json"
    manifest.write_text(manifest.read_text().replace('"sha256": "', '"sha256": "0', 10))
    assert "is not the one the shards were made with" in refused(tmp_path / "run", tiny_models, 1)
