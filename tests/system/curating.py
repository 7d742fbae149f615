"""jobs/curate.py as a user runs it, on tiny models and a small mini web."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from pipeline.curation.seal import STAGES
from pipeline.shards import Manifest
from pipeline.storage import Storage
from tests.ports import free_port

REPOSITORY = Path(__file__).resolve().parents[2]


class Job:
    """The job's command line, with everything that all runs of a file of tests share."""

    def __init__(self, models: Path) -> None:
        self.settings = {
            "--models.base": models / "sd",
            "--models.vision": models / "clip",
            "--models.captioner": models / "blip2",
            "--website.port": free_port(),
            "--website.rows": 300,
            "--filter.unit_rows": 24,
            "--filter.test_rows": 12,
            # loaded machines are slow, and an image that came late in one run would be missing
            "--download.timeout_s": 30.0,
            "--features.row_group_mib": 0.1,
            "--caption.max_new_tokens": 6,
        }
        self.environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": str(REPOSITORY),
        }

    def start(self, root: str, **settings: Any) -> subprocess.Popen[str]:
        named = {f"--{key.replace('__', '.')}": value for key, value in settings.items()}
        words = [str(word) for pair in {**self.settings, **named}.items() for word in pair]
        return subprocess.Popen(
            [sys.executable, "jobs/curate.py", "--root", root, *words],
            cwd=REPOSITORY,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, root: str, **settings: Any) -> tuple[int, str]:
        process = self.start(root, **settings)
        said, _ = process.communicate(timeout=900)
        return process.returncode, said


def shards(storage: Storage) -> dict[str, str]:
    """Shard -> hash of its bytes, as sealed."""
    return {shard["path"]: shard["sha256"] for shard in Manifest.load(storage).shards}


def accounted(root: Path) -> dict[str, Any]:
    """The stages as `curation.json` tells them; no row is lost in them, or between two."""
    stages: dict[str, Any] = json.loads((root / "curation.json").read_text())["stages"]
    kept = None
    for name in STAGES:
        stage = stages[name]
        lost = sum(stage["dropped"].values()) + sum(stage["failed"].values())
        assert stage["rows_in"] == stage["kept"] + lost
        assert kept is None or stage["rows_in"] == kept
        kept = stage["kept"]
    return stages
