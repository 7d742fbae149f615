"""The figures of a run as Ray metrics, for Prometheus; the driver sets them from storage: from
units' markers, from training's progress.

`METRICS` declares them all: the gauges here, the dashboard and the alerts' checks
(infra/components/monitoring) are made from it. Ray puts `ray_` before each name. They are gauges,
for the totals are storage's: a driver that goes on with a run says the same as the one before it.
Counters would be added up, on a cluster that outlives both: Ray's agent is told what a process
adds, and keeps what it was told by earlier ones.

A gauge that is not set again is forgotten by the agent after two of its intervals (20 s), the last
value of a driver that ends reaches it before, and one that is not a number never does. So what is
scraped is what goes on: a stage that is over or a driver that is dead says nothing, and an alert on
it ends by itself. That a driver is missing is told by what it said last, see `driver`.
"""

from __future__ import annotations

import contextlib
import math
import os
import threading
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline.accounts import Account

if TYPE_CHECKING:
    from ray.util.metrics import Gauge

_STEADY_S = 1.0


class Metric(NamedTuple):
    """One metric as it is declared."""

    name: str
    """As set; scraped as `ray_<name>`."""
    text: str
    """What it is, one line."""
    unit: str = ""
    """seconds, timestamp (seconds since the epoch), bytes, rows, ratio (0 to 1), or "": a number
    of what the name says."""
    more: tuple[str, ...] = ()
    """Labels besides `run` (the run's root) and `stage`."""
    key: str = ""
    """Of training's progress, see training/record.py."""
    stage: bool = True
    """Whether it is told by stage."""

    @property
    def labels(self) -> tuple[str, ...]:
        return ("run", *(("stage",) if self.stage else ()), *self.more)


def _of_driver(job: str) -> tuple[Metric, Metric]:
    return (
        Metric(f"ssr_{job}_started", "When the driver began.", "timestamp", stage=False),
        Metric(
            f"ssr_{job}_finished",
            "When the driver came to the run's end; 0 before.",
            "timestamp",
            stage=False,
        ),
    )


def _of_units(job: str) -> tuple[Metric, ...]:
    """Of stages of units (runner.py)."""
    return (
        Metric(f"ssr_{job}_units", "Units that the run has."),
        Metric(f"ssr_{job}_units_done", "Units committed."),
        Metric(
            f"ssr_{job}_units_failed", "Units given up by this driver; the next one tries again."
        ),
        Metric(f"ssr_{job}_rows_in", "Rows read by committed units.", "rows"),
        Metric(f"ssr_{job}_rows_kept", "Rows written by committed units.", "rows"),
        Metric(f"ssr_{job}_bytes", "Bytes written by committed units.", "bytes"),
        Metric(
            f"ssr_{job}_stalled",
            "For how long the stage has had units to do and has committed none; 0 while it waits "
            "for the stage before it and when it is through.",
            "seconds",
        ),
    )


METRICS = (
    *_of_driver("curate"),
    *_of_units("curate"),
    Metric("ssr_curate_rows_dropped", "Rows dropped by a rule.", "rows", ("reason",)),
    Metric("ssr_curate_rows_failed", "Rows failed by a cause.", "rows", ("cause",)),
    *_of_driver("evaluate"),
    *_of_units("evaluate"),
    *_of_driver("train"),
    Metric("ssr_train_step", "Optimizer steps done.", key="step"),
    Metric("ssr_train_steps", "Optimizer steps of the stage.", key="steps"),
    Metric("ssr_train_epoch", "Epochs done.", key="epoch"),
    Metric("ssr_train_samples_per_second", "Samples per second, all workers.", key="samples_per_s"),
    Metric(
        "ssr_train_data_wait_ratio",
        "Share of the time that rank 0 waits for data.",
        "ratio",
        key="data_wait",
    ),
    Metric("ssr_train_loss", "L = L_LDM + tau L_reg, mean since the last log.", key="loss"),
    Metric(
        "ssr_train_validation_loss",
        "The same on the held-out split, at its last look.",
        key="validation_loss",
    ),
    Metric("ssr_train_loss_ldm", "L_LDM.", key="ldm"),
    Metric("ssr_train_loss_reg", "L_reg.", key="reg"),
    Metric(
        "ssr_train_gradient_norm", "Norm of the gradient, before it is clipped.", key="grad_norm"
    ),
    Metric("ssr_train_learning_rate", "Learning rate.", key="lr"),
    Metric(
        "ssr_train_finite",
        "Whether all that the last log says is a number: 1 or 0. What is not is not exported.",
        key="finite",
    ),
    Metric(
        "ssr_train_nonfinite_steps",
        "Steps of this attempt whose loss or gradient was not a number.",
        key="nonfinite",
    ),
    Metric("ssr_train_checkpoint_step", "Step of the newest whole checkpoint.", key="checkpoint"),
    Metric(
        "ssr_train_unsaved",
        "For how long this attempt has trained without a new checkpoint: what a crash would cost.",
        "seconds",
        key="unsaved",
    ),
    Metric(
        "ssr_train_stalled",
        "For how long no step was logged; stage `starting`: since the workers were asked for.",
        "seconds",
        key="stalled",
    ),
)
"""Every metric of ours, in the order in which it is shown."""

STARTING = "starting"
"""The stage of a training whose workers have said nothing yet."""


def collected() -> bool:
    """Whether this process is connected to a cluster that collects metrics.

    A private cluster does not (cluster.py), and a client (`ray://`) has no metrics of its own.
    """
    import ray

    if os.environ.get("RAY_enable_metrics_collection") == "0":  # noqa: SIM112 (Ray's own spelling)
        return False
    return bool(ray.is_initialized() and not ray.util.client.ray.is_connected())


def _gauges(job: str, run: str) -> dict[str, Gauge]:
    """{name after `ssr_<job>_`: gauge} of one job's metrics, with the run's root as tag."""
    from ray.util.metrics import Gauge

    prefix = f"ssr_{job}_"
    return {
        metric.name.removeprefix(prefix): Gauge(
            metric.name, metric.text, metric.labels
        ).set_default_tags({"run": run})
        for metric in METRICS
        if metric.name.startswith(prefix)
    }


@contextlib.contextmanager
def driver(job: str, run: str) -> Iterator[None]:
    """Say, in the block, that the driver of `job` (curate, evaluate, train) works on the run at
    `run`; when it ends without an exception, that the run came to its end.

    An alert finds a run whose newest `started` is younger than its newest `finished`, and that says
    nothing any more: killed, lost with its node, or ended by an error.
    """
    if not collected():
        yield
        return
    gauges, started = _gauges(job, run), time.time()
    stop = threading.Event()

    def say(finished: float = 0.0) -> None:
        gauges["started"].set(started)
        gauges["finished"].set(finished)

    def go_on() -> None:
        while not stop.wait(_STEADY_S):
            say()

    say()
    thread = threading.Thread(target=go_on, name="metrics", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
    say(time.time())


class RunMetrics:
    """Metrics of the stages of one run of `job` (curate, evaluate), told from other runs' on the
    cluster by the tag `run`: its root, or an evaluation's folder.
    """

    def __init__(self, job: str, run: str) -> None:
        self._gauges = _gauges(job, run)

    def publish(
        self, stage: str, account: Account, units: int, failed: int = 0, stalled: float = 0.0
    ) -> None:
        """Bring the metrics of `stage` up to `account`, of a run of `units`, `failed` of which the
        stage gave up; it has been idle beside work for `stalled` seconds.
        """
        tags = {"stage": stage}
        for name, value in {
            "units": units,
            "units_done": account.units,
            "units_failed": failed,
            "rows_in": account.rows_in,
            "rows_kept": account.kept,
            "bytes": account.bytes,
            "stalled": stalled,
        }.items():
            self._gauges[name].set(value, tags)
        for reason, rows in account.dropped.items():
            self._gauges["rows_dropped"].set(rows, {**tags, "reason": reason})
        for cause, rows in account.failed.items():
            self._gauges["rows_failed"].set(rows, {**tags, "cause": cause})


class TrainingMetrics:
    """One training's metrics, told from other runs' by the tag `run`, its root."""

    def __init__(self, run: str) -> None:
        gauges = _gauges("train", run)
        self._gauges = {
            metric.key: gauges[metric.name.removeprefix("ssr_train_")]
            for metric in METRICS
            if metric.key
        }

    def publish(self, stage: str, progress: Mapping[str, Any]) -> None:
        """Bring the metrics of `stage` up to what rank 0 says of it; what it does not say goes."""
        said = {key: float(progress[key]) for key in self._gauges if key in progress}
        finite = {key: value for key, value in said.items() if math.isfinite(value)}
        finite["finite"] = float(len(finite) == len(said))
        for key, value in finite.items():
            self._gauges[key].set(value, {"stage": stage})
