"""kill -9 of the driver, of workers and of nodes at random moments: the result is the same bytes.

`CHAOS_KILLS` (6; `make chaos`: 20) and `CHAOS_SEED` say how many and which; a table is printed.
"""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from pipeline.curation.seal import STAGES
from tests.ports import free_port
from tests.system.curating import accounted
from tests.system.raylets import REPOSITORY, Raylets, raylets

KILLS = int(os.environ.get("CHAOS_KILLS", 6))
SEED = int(os.environ.get("CHAOS_SEED", 0))
KILLS_PER_RUN = 5
pytestmark = [pytest.mark.system, pytest.mark.timeout(900 + 90 * KILLS)]


@dataclass
class Job:
    """jobs/curate.py on tiny models and a mini web of its own."""

    models: Path
    port: int
    environment: dict[str, str]

    def start(self, root: Path) -> subprocess.Popen[str]:
        settings = {
            "root": root,
            "models.base": self.models / "sd",
            "models.vision": self.models / "clip",
            "models.captioner": self.models / "blip2",
            "website.port": self.port,
            "website.rows": 200,
            "filter.unit_rows": 8,
            "filter.test_rows": 8,
            "download.timeout_s": 60.0,
            "features.row_group_mib": 0.1,
            "caption.max_new_tokens": 6,
        }
        words = [f"--{name}={value}" for name, value in settings.items()]
        return subprocess.Popen(
            [sys.executable, "jobs/curate.py", *words],
            cwd=REPOSITORY,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )


@dataclass
class Run:
    """One root on its way to its seal, whatever is killed."""

    job: Job
    root: Path
    process: subprocess.Popen[str] = field(init=False)
    done: dict[Path, tuple[int, str]] = field(default_factory=dict)
    """What was committed when something was killed: marker and file -> time and hash."""

    def __post_init__(self) -> None:
        self.process = self.job.start(self.root)

    def progress(self) -> int:
        """Committed units of all stages."""
        return len(list(self.root.glob("*/_done/*.json")))

    def note(self) -> None:
        """Remember what is committed: it must not be made again."""
        for marker in self.root.glob("*/_done/*.json"):
            made = marker.parent.parent / f"{marker.stem}.parquet"
            for path in (marker, made):
                if path.exists() and path not in self.done:
                    self.done[path] = _state(path)

    def kill_driver(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.communicate(timeout=300)
        self.process = self.job.start(self.root)

    def finish(self) -> str:
        said, _ = self.process.communicate(timeout=900)
        assert self.process.returncode == 0, said
        return said


@pytest.fixture(scope="module")
def cluster() -> Iterator[Raylets]:
    quiet = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(REPOSITORY)}
    with raylets({**os.environ, **quiet}) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def job(cluster: Raylets, tiny_models: Path) -> Job:
    return Job(tiny_models, free_port(), cluster.environment)


class Table:
    """What happened, as it happens."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys, self.started = capsys, time.monotonic()

    def add(self, line: str) -> None:
        with self.capsys.disabled():
            print(f"\n{time.monotonic() - self.started:5.0f} s  {line}", end="", flush=True)


@pytest.mark.long
def test_what_is_killed_changes_nothing(
    job: Job, cluster: Raylets, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = random.Random(SEED)
    calm = Run(job, tmp_path / "calm")
    calm.finish()
    wanted, whole = sealed(calm.root), calm.progress()
    targets = (["driver", "worker", "node"] * KILLS)[:KILLS]
    rng.shuffle(targets)
    table = Table(capsys)
    table.add(f"seed {SEED}, {KILLS} kills, {whole} units of all stages in a run")
    number = 0
    while targets:
        number += 1
        run, kills = Run(job, tmp_path / f"run-{number}"), 0
        while targets and kills < KILLS_PER_RUN and wait(run, rng, whole):
            run.note()
            before, what = run.progress(), targets[-1]
            if what == "driver":
                run.kill_driver()
            else:
                what = cluster.kill_worker(rng) if what == "worker" else cluster.kill_node(rng)
            if what:
                targets.pop()
                kills += 1
                table.add(f"run {number}: {before:2d} of {whole} done, killed: {what}")
        said = run.finish()
        assert sealed(run.root) == wanted, said
        again = [path for path, state in run.done.items() if _state(path) != state]
        assert not again, f"made again: {again}\n{said}"
        assert left_over(run.root) == [], said
        if not kills:
            break
        table.add(f"run {number}: the same bytes after {kills} kills")
    assert not targets, "runs ended before anything could be killed"


def wait(run: Run, rng: random.Random, whole: int) -> bool:
    """Let the run work until some moment; whether it is still at it."""
    here = run.progress()
    goal = here + rng.randrange(max((whole - here) // 2, 1))
    until = time.monotonic() + 300
    while run.process.poll() is None and run.progress() < goal and time.monotonic() < until:
        time.sleep(0.02)
    time.sleep(rng.uniform(0, 2))
    return run.process.poll() is None


def sealed(root: Path) -> dict[str, object]:
    """The sealed result: manifest and shards as bytes, and what became of every row."""
    stages = accounted(root)
    counts = ("units", "rows_in", "kept", "dropped", "failed", "bytes")
    manifest = (root / "features/manifest.json").read_bytes()
    shards = {
        shard["path"]: hashlib.sha256((root / shard["path"]).read_bytes()).hexdigest()
        for shard in json.loads(manifest)["shards"]
    }
    assert shards == {s["path"]: s["sha256"] for s in json.loads(manifest)["shards"]}
    return {
        "manifest": manifest,
        "shards": shards,
        "counts": {name: {key: stages[name][key] for key in counts} for name in STAGES},
    }


def left_over(root: Path) -> list[str]:
    """Files that no run should leave: half-written ones, and the lease."""
    names = (path.relative_to(root) for path in root.rglob("*") if path.is_file())
    return sorted(str(name) for name in names if name.name.endswith(".tmp") or "_run" in name.name)


def _state(path: Path) -> tuple[int, str]:
    return path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest()
