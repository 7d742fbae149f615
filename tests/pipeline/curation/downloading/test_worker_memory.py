"""A whole unit of hostile links through the download stage: classes, time, and peak memory."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import polars as pl
import pytest

from tests.hostile import HostileSite

pytestmark = pytest.mark.timeout(900)

ROOT = Path(__file__).parents[4]
ROUNDS, THREADS, TIMEOUT_S = 2, 64, 30.0
WORKER = """
import json, sys
from pathlib import Path
from pipeline.config import DownloadConfig
from pipeline.curation.downloading.download import Download
from pipeline.storage import Storage
from pipeline.units import fingerprint, run_unit

root, host, threads, timeout_s = sys.argv[1:]
cfg = DownloadConfig(
    threads=int(threads), per_host=int(threads), retries=1,
    timeout_s=float(timeout_s), connect_timeout_s=float(timeout_s),
    allow_private_hosts=[host], outage_share=2.0,
)
stage = Download(cfg)
tally = run_unit(stage, "train-00000", Storage(root), fingerprint(stage, "up")).tally
status = Path("/proc/self/status").read_text()
peak = int(status.split("VmHWM:")[1].split()[0]) << 10
print(json.dumps([tally.kept, tally.dropped, tally.failed, peak]))
"""


def test_a_worker_on_the_worst_of_the_web_stays_below_1500_mb(tmp_path: Path) -> None:
    """Each path several times, all threads at once; bodies of 19 MB of noise, JPEGs of 18 MB and
    of 3.9 MB, a progressive one of 49 megapixels, bombs, a PNG of 30,000 x 30,000 and
    endless answers among them.
    """
    site = HostileSite()
    paths = [*site.cases] * ROUNDS + ["/noise.jpg", "/endless", "/pixels.png", "/large.jpg"] * 12
    paths += ["/middling.jpg"] * 24
    random.Random(0).shuffle(paths)
    paths.sort(key=lambda path: site.cases[path].cause != "timeout")  # beside them go the others
    (tmp_path / "units").mkdir()
    pl.DataFrame(
        {
            "key": [f"{number:016x}" for number in range(len(paths))],
            "url": [site.url(path) for path in paths],
            "alt_text": ["text"] * len(paths),
            "aesthetic": pl.Series([6.5] * len(paths), dtype=pl.Float32),
            "predictor": ["v2"] * len(paths),
        }
    ).write_parquet(tmp_path / "units/train-00000.parquet")

    began = time.monotonic()
    worker = subprocess.run(
        [sys.executable, "-c", WORKER, str(tmp_path), site.host, str(THREADS), str(TIMEOUT_S)],
        capture_output=True,
        text=True,
        timeout=600,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    site.close()
    assert worker.returncode == 0, worker.stderr[-2000:]
    kept, dropped, failed, peak = json.loads(worker.stdout.splitlines()[-1])

    ends = Counter(site.cases[path].image or site.cases[path].cause for path in paths)
    rules = {case.cause for case in site.cases.values() if case.rule} | {
        "too_many_pixels",
        "too_many_scans",
    }
    assert kept == ends.pop("ok")
    assert dropped == {end: rows for end, rows in sorted(ends.items()) if end in rules}
    assert failed == {end: rows for end, rows in sorted(ends.items()) if end not in rules}
    assert peak < 1_500_000_000, f"{peak / 1e6:.0f} MB"
    # nothing outlasts its time, THREADS at a time; a busy machine needs the rest
    assert time.monotonic() - began < 300 + TIMEOUT_S * len(paths) / THREADS
