"""A run's totals as Prometheus gets them from a real cluster's metrics port."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.storage import Storage
from pipeline.units import Ledger
from tests.sealed import write_features

pytestmark = [pytest.mark.system, pytest.mark.timeout(400)]
REPOSITORY = Path(__file__).resolve().parents[2]
UNITS = 5
DRIVER = """
import contextlib, pathlib, sys, time
from functools import partial
import pyarrow as pa, pyarrow.parquet as pq
from pipeline.cluster import connect
from pipeline.config import RayConfig
from pipeline.progress import Progress
from pipeline.runner import StageSpec, run_stages
from pipeline.storage import Storage
from pipeline.units import Tally

root, address, hold, count = sys.argv[1:]

def stage(name, source):
    class Numbers:
        def __init__(self):
            self.name, self.source, self.settings = name, source, {}
        def __call__(self, unit, storage, sink):
            rows = 6 if source else 10
            pq.write_table(pa.table({"n": list(range(6))}), sink)
            if source:
                return Tally(rows, 6)
            return Tally(rows, 6, {"too_small": 1}, {"http_404": 2, "timeout": 1})
    return Numbers()

@contextlib.contextmanager
def held():
    with connect(RayConfig(address=address)) as ray:
        yield ray
        print("done", flush=True)
        while not pathlib.Path(hold).exists():
            time.sleep(0.2)

specs = [StageSpec("images", partial(stage, "images", None)),
         StageSpec("captions", partial(stage, "captions", "images"))]
units = [f"train-{n:05d}" for n in range(int(count))]
with Progress(terminal=False) as progress:
    run_stages(specs, units, Storage(root), progress, connection=held())
"""


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.fixture(scope="module")
def cluster() -> Iterator[tuple[dict[str, str], str, int]]:
    """A cluster of its own: the environment for its clients, its address, its metrics port."""
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # sockets bear no long paths
    environment = {
        **os.environ,
        "HOME": folder,
        "PYTHONPATH": str(REPOSITORY),
        "RAY_TMPDIR": folder,
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_metrics_report_interval_ms": "1000",
    }
    for name in ("RAY_ADDRESS", "RAY_enable_metrics_collection"):
        environment.pop(name, None)  # another test's cluster
    port, metrics = free_port(), free_port()
    head = subprocess.Popen(
        [
            str(Path(sys.executable).with_name("ray")), "start", "--head", "--block",
            "--node-ip-address=127.0.0.1", f"--port={port}", f"--metrics-export-port={metrics}",
            "--include-dashboard=false", "--num-cpus=4", "--object-store-memory=100000000",
        ],
        env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    try:
        for _ in range(600):
            with socket.socket() as knock:
                if knock.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.2)
        yield environment, f"127.0.0.1:{port}", metrics
    finally:
        head.send_signal(signal.SIGTERM)
        try:
            head.wait(8)
        except subprocess.TimeoutExpired:
            os.killpg(head.pid, signal.SIGKILL)
        shutil.rmtree(folder, ignore_errors=True)


def scrape(port: int, root: Path) -> dict[tuple[str, ...], float]:
    """(name, stage, reason or cause) -> value, of the metrics of the run at `root`."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    found: dict[tuple[str, ...], float] = {}
    for name, tags, value in re.findall(r"^(\w*ssr_curate_\w+)\{(.*)\} (\S+)$", text, re.M):
        named = dict(re.findall(r'(\w+)="([^"]*)"', tags))
        why = named.get("reason") or named.get("cause")
        if named["run"] == str(root):
            key = (name, named["stage"], *([why] if why else []))
            assert found.setdefault(key, float(value)) == float(value), f"two values of {key}"
    return found


def trained(port: int, root: Path) -> dict[str, dict[str, float]]:
    """{stage: {metric: value}} of the training at `root`."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    found: dict[str, dict[str, float]] = {}
    for name, tags, value in re.findall(r"^ray_ssr_train_(\w+)\{(.*)\} (\S+)$", text, re.M):
        named = dict(re.findall(r'(\w+)="([^"]*)"', tags))
        if named["run"] == str(root):
            found.setdefault(named["stage"], {})[name] = float(value)
    return found


def wanted(units: int) -> dict[tuple[str, ...], float]:
    found: dict[tuple[str, ...], float] = {
        ("ray_ssr_curate_rows_in", "images"): 10 * units,
        ("ray_ssr_curate_rows_in", "captions"): 6 * units,
        ("ray_ssr_curate_rows_dropped", "images", "too_small"): units,
        ("ray_ssr_curate_rows_failed", "images", "http_404"): 2 * units,
        ("ray_ssr_curate_rows_failed", "images", "timeout"): units,
    }
    for stage in ("images", "captions"):
        found["ray_ssr_curate_units", stage] = units
        found["ray_ssr_curate_units_done", stage] = units
        found["ray_ssr_curate_rows_kept", stage] = 6 * units
    return found


def run_and_scrape(
    cluster: tuple[dict[str, str], str, int], root: Path, hold: Path
) -> dict[tuple[str, ...], float]:
    environment, address, port = cluster
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(root), address, str(hold), str(UNITS)],
        cwd=REPOSITORY, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert driver.stdout is not None
    said = []
    for line in driver.stdout:
        said.append(line)
        if line == "done\n":
            break
    else:
        pytest.fail("".join(said))
    found: dict[tuple[str, ...], float] = {}
    try:
        for _ in range(60):
            found = scrape(port, root)
            if wanted(UNITS).items() <= found.items():
                break
            time.sleep(1)
        time.sleep(3)
        assert scrape(port, root).items() <= found.items(), "further reports add nothing"
    finally:
        hold.touch()
    rest, _ = driver.communicate(timeout=60)
    assert driver.returncode == 0, "".join(said) + rest
    return found


def test_prometheus_gets_the_totals(
    cluster: tuple[dict[str, str], str, int], tmp_path: Path
) -> None:
    root = tmp_path / "run"
    found = run_and_scrape(cluster, root, tmp_path / "hold")
    assert found.items() >= wanted(UNITS).items(), found
    markers = Ledger(Storage(root), "images").done().values()
    written = sum(marker.bytes for marker in markers)
    assert found["ray_ssr_curate_bytes", "images"] == written
    # a second driver goes on with the run, on a cluster that remembers the first one's totals
    Storage(root).delete("captions/_done/train-00004.json")
    Storage(root).delete("images/_done/train-00004.json")
    again = run_and_scrape(cluster, root, tmp_path / "hold-again")
    assert again.items() >= wanted(UNITS).items(), again


def test_prometheus_gets_the_figures_of_training(
    cluster: tuple[dict[str, str], str, int], tmp_path: Path, tiny_models: Path
) -> None:
    environment, address, port = cluster
    write_features(tmp_path, tiny_models)
    steps = 100_000
    settings = {
        "root": tmp_path, "models.base": tiny_models / "sd", "models.vision": tiny_models / "clip",
        "ray.address": address, "workers": 1, "global_batch": 4, "lanes": 4, "heads": 2,
        "head_dim": 8, "semantic.steps": steps, "semantic.warmup_steps": 0, "log_steps": 2,
        "validate_steps": 0, "sample_steps": 0, "checkpoint_steps": steps,
    }  # fmt: skip
    words = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    job = subprocess.Popen(
        [sys.executable, "jobs/train.py", *words],
        cwd=REPOSITORY, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        found: dict[str, float] = {}
        for _ in range(200):
            assert job.poll() is None, job.communicate()[0]
            with contextlib.suppress(urllib.error.URLError):  # its agent is not there yet
                found = trained(port, tmp_path).get("semantic", {})
            if found.get("loss"):
                break
            time.sleep(1)
        record = json.loads((tmp_path / "train/semantic/metrics.jsonl").read_text().split("\n")[0])
        assert found["steps"] == steps and found["step"] >= 2
        assert found["loss"] > 0 and found["samples_per_second"] > 0
        assert 0 <= found["data_wait_ratio"] <= 1
        assert found["learning_rate"] == record["lr"]
        assert {"loss_ldm", "loss_reg", "gradient_norm", "epoch"} <= found.keys()
    finally:
        job.send_signal(signal.SIGINT)
        job.communicate(timeout=120)
