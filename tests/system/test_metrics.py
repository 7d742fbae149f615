"""A run's totals as Prometheus gets them from a real cluster's metrics port."""

import http.client
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline.ray_metrics import METRICS
from pipeline.storage import Storage
from pipeline.training.record import read_metrics
from pipeline.units import Ledger
from tests.ports import free_ports
from tests.sealed import write_features
from tests.system.heads import REPOSITORY, end, start_head
from tests.system.waiting import until

pytestmark = [pytest.mark.system, pytest.mark.timeout(900)]
UNITS = 5
STARTED, FINISHED = ("ray_ssr_curate_started",), ("ray_ssr_curate_finished",)
DRIVER = """
import contextlib, pathlib, sys, time
from functools import partial
import pyarrow as pa, pyarrow.parquet as pq
from pipeline.cluster import connect
from pipeline.config import RayConfig
from pipeline.progress import Progress
from pipeline.ray_metrics import driver
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
        with driver("curate", root):
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
        # gauges are forgotten after two: in that time the last ones have to be looked at
        "RAY_metrics_report_interval_ms": "4000",
    }
    for name in ("RAY_ADDRESS", "RAY_enable_metrics_collection"):
        environment.pop(name, None)  # another test's cluster
    port, metrics = free_ports(2)
    words = ["--node-ip-address=127.0.0.1", f"--port={port}", f"--metrics-export-port={metrics}"]
    words += ["--include-dashboard=false", "--num-cpus=4", "--object-store-memory=100000000"]
    try:
        start_head(words, environment, folder)
        until(lambda: page(metrics))
        yield environment, f"127.0.0.1:{port}", metrics
    finally:
        end(folder)
        shutil.rmtree(folder, ignore_errors=True)


def page(port: int) -> str | None:
    """What is scraped now; None where nobody answers, for the agent is not there yet or is busy."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
            return str(answer.read().decode())
    except (OSError, http.client.HTTPException):
        return None


def scrape(port: int, root: Path, job: str = "curate") -> dict[tuple[str, ...], float] | None:
    """(name, stage, reason or cause) -> value, of the job's metrics of the run at `root`; None
    where nobody answers.
    """
    found: dict[tuple[str, ...], float] = {}
    if (text := page(port)) is None:
        return None
    for name, tags, value in re.findall(rf"^(\w*ssr_{job}_\w+)\{{(.*)\}} (\S+)$", text, re.M):
        named = dict(re.findall(r'(\w+)="([^"]*)"', tags))
        if named["run"] == str(root):
            tags = [named.get(tag) for tag in ("stage", "reason", "cause")]
            key = (name, *(tag for tag in tags if tag))
            assert found.setdefault(key, float(value)) == float(value), f"two values of {key}"
    return found


def trained(port: int, root: Path) -> dict[str, dict[str, float]]:
    """{stage: {metric: value}} of the training at `root`."""
    found: dict[str, dict[str, float]] = {}
    pattern = r"^ray_ssr_train_(\w+)\{(.*)\} (\S+)$"
    for name, tags, value in re.findall(pattern, page(port) or "", re.M):
        named = dict(re.findall(r'(\w+)="([^"]*)"', tags))
        if named["run"] == str(root):
            found.setdefault(named.get("stage", ""), {})[name] = float(value)
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
        found["ray_ssr_curate_units_failed", stage] = 0
        found["ray_ssr_curate_stalled", stage] = 0
        found["ray_ssr_curate_rows_kept", stage] = 6 * units
    return found


def start(
    cluster: tuple[dict[str, str], str, int], root: Path, hold: Path, units: int
) -> subprocess.Popen[str]:
    """The driver, which says so in the file `hold`.said when it is through, and stays connected
    until there is a file `hold`.
    """
    environment, address, _ = cluster
    with hold.with_suffix(".said").open("w") as said:
        return subprocess.Popen(
            [sys.executable, "-c", DRIVER, str(root), address, str(hold), str(units)],
            cwd=REPOSITORY, env=environment, text=True, stdout=said, stderr=said,
        )  # fmt: skip


def run_and_scrape(
    cluster: tuple[dict[str, str], str, int], root: Path, hold: Path
) -> dict[tuple[str, ...], float]:
    driver, said = start(cluster, root, hold, UNITS), hold.with_suffix(".said")
    try:

        def finished(last: dict[tuple[str, ...], float]) -> bool:
            assert driver.poll() is None, said.read_text()
            return "done\n" in said.read_text() and last.get(FINISHED, 0) > 0

        found = last_of(cluster[2], root, finished)  # the run is over, its driver still connected
        hold.touch()
        assert driver.wait(120) == 0, said.read_text()
    finally:
        driver.kill()
        driver.wait()
    assert found[FINISHED] > found[STARTED] > 0, "said before it went"
    return found


def last_of(
    port: int,
    root: Path,
    over: Callable[[dict[tuple[str, ...], float]], bool],
    job: str = "curate",
) -> dict[tuple[str, ...], float]:
    """What the run at `root` said last: looked at all the time, until it is `over` and Ray's agent
    has forgotten its gauges.
    """
    last: dict[tuple[str, ...], float] = {}

    def silent() -> bool:
        ended, found = over(last), scrape(port, root, job)
        last.update(found or {})
        return ended and found == {}

    until(silent, what=lambda: f"gauges that nobody sets are still there, or never were: {last}")
    return last


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


def test_a_driver_that_is_killed_never_said_that_it_finished(
    cluster: tuple[dict[str, str], str, int], tmp_path: Path
) -> None:
    root, hold = tmp_path / "run", tmp_path / "hold"
    driver = start(cluster, root, hold, 500)  # more than it comes to

    def told() -> dict[tuple[str, ...], float]:
        found = scrape(cluster[2], root) or {}
        return found if found.get(STARTED) and FINISHED in found else {}

    try:
        before = until(told, driver)
    finally:
        driver.kill()
        driver.wait()
    # they may be forgotten before the first look
    assert (before | last_of(cluster[2], root, lambda last: True))[FINISHED] == 0


def test_prometheus_gets_an_evaluations_by_its_own_names(
    cluster: tuple[dict[str, str], str, int], tmp_path: Path, tiny_models: Path
) -> None:
    """Two methods, one driver: it finishes once, at the end of both."""
    environment, address, port = cluster
    settings = {
        "root": tmp_path, "models.base": tiny_models / "sd", "models.vision": tiny_models / "clip",
        "ray.address": address, "drawing.max_workers": 1, "device": "cpu", "references": 3,
        "unit_pictures": 2, "steps": 2, "resamples": 100,
    }  # fmt: skip
    words = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    log, methods = tmp_path / "log", ("text-only", "reference-only")
    with log.open("w") as said:
        job = subprocess.Popen(
            [sys.executable, "jobs/evaluate.py", *words, "--methods", *methods],
            cwd=REPOSITORY, env=environment, text=True, stdout=said, stderr=said,
        )  # fmt: skip
    try:
        stages = [f"evaluation/mini/{kind}/{m}" for m in methods for kind in ("pictures", "scores")]
        finished: list[float] = []

        def over(last: dict[tuple[str, ...], float]) -> bool:
            finished.append(last.get(("ray_ssr_evaluate_finished",), 0))
            return job.poll() is not None

        last = last_of(port, tmp_path / "evaluation" / "mini", over, "evaluate")
        assert job.wait() == 0, log.read_text()
        for stage in stages:
            told = {name: value for (name, *of), value in last.items() if of == [stage]}
            assert told["ray_ssr_evaluate_units"] == told["ray_ssr_evaluate_units_done"] == 3
            assert told["ray_ssr_evaluate_rows_in"] == told["ray_ssr_evaluate_rows_kept"] == 6
            assert told["ray_ssr_evaluate_stalled"] == told["ray_ssr_evaluate_units_failed"] == 0
            marks = Ledger(Storage(tmp_path), stage).done().values()
            assert told["ray_ssr_evaluate_bytes"] == sum(mark.bytes for mark in marks)
        assert len({value for value in finished if value}) == 1, "the driver finished once"
        assert last["ray_ssr_evaluate_started",] > 0
        assert scrape(port, tmp_path, "curate") == {}
    finally:
        job.kill()
        job.wait()


NO_NUMBER = """
import sys, time
from pipeline.cluster import connect
from pipeline.config import RayConfig
from pipeline.ray_metrics import TrainingMetrics

root, address = sys.argv[1:]
with connect(RayConfig(address=address)):
    metrics = TrainingMetrics(root)
    while True:
        metrics.publish("semantic", {"step": 5, "loss": 0.5, "validation_loss": float("nan")})
        metrics.publish("multi_scale", {"step": 5, "loss": 0.5})
        time.sleep(0.5)
"""


def test_a_loss_that_is_no_number_is_told_by_a_gauge_that_is_one(
    cluster: tuple[dict[str, str], str, int], tmp_path: Path
) -> None:
    """Ray exports no NaN: the loss's own gauge would only be missing."""
    environment, address, port = cluster
    driver = subprocess.Popen(
        [sys.executable, "-c", NO_NUMBER, str(tmp_path), address], cwd=REPOSITORY, env=environment
    )
    try:
        figures = {"step", "loss", "finite"}

        def whole() -> dict[str, dict[str, float]]:
            found = trained(port, tmp_path)
            return found if [each.keys() for each in found.values()] == [figures] * 2 else {}

        found = until(whole, driver)
        assert found["semantic"] == {"step": 5, "loss": 0.5, "finite": 0}
        assert found["multi_scale"] == {"step": 5, "loss": 0.5, "finite": 1}
    finally:
        driver.kill()
        driver.wait()


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
    names = {metric.key: metric.name.removeprefix("ssr_train_") for metric in METRICS if metric.key}
    every = {name for key, name in names.items() if key != "validation_loss"}  # it does not look

    def whole() -> tuple[dict[str, float], dict[str, float]] | None:
        """All gauges: Ray exports some of them earlier, and forgets those of a starved driver."""
        found = trained(port, tmp_path)
        mine, driver = found.get("semantic", {}), found.get("", {})
        return (mine, driver) if every <= mine.keys() and len(driver) == 2 else None

    log = tmp_path / "log"
    with log.open("w") as said:
        job = subprocess.Popen(
            [sys.executable, "jobs/train.py", *words],
            cwd=REPOSITORY, env=environment, text=True, stdout=said, stderr=said,
        )  # fmt: skip
    try:
        # the file of the figures is written less often than what the gauges are set from
        storage = Storage(tmp_path)
        record = until(lambda: read_metrics(storage, "semantic"), job, what=log.read_text)[0]
        found, driver = until(whole, job, what=lambda: (trained(port, tmp_path), log.read_text()))
        assert found["steps"] == steps and found["step"] >= 2
        assert found["loss"] > 0 and found["samples_per_second"] > 0
        assert 0 <= found["data_wait_ratio"] <= 1
        assert found["learning_rate"] == record["lr"]
        assert (found["checkpoint_step"], found["nonfinite_steps"], found["finite"]) == (0, 0, 1)
        assert found["unsaved"] >= 0 and found["stalled"] >= 0
        assert driver["started"] > 0 and driver["finished"] == 0
    finally:
        job.send_signal(signal.SIGINT)
        job.wait(120)
