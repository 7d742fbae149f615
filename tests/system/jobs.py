"""A job as a user runs it, to its good end."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]


def run_job(job: str, *words: str, **settings: Any) -> str:
    """What jobs/<job>.py prints; a key of `settings` may have dots. It fails on a fault, and on
    anything that a user would stumble over.
    """
    given = [str(word) for key, value in settings.items() for word in (f"--{key}", value)]
    done = subprocess.run(
        [sys.executable, f"jobs/{job}.py", *words, *given],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr and "Warning" not in done.stderr, done.stderr
    return done.stdout
