"""The figures of a run as Ray metrics, for Prometheus; the driver sets them from storage: from
curation's markers, from training's progress.

Ray puts `ray_` before each name. They are gauges, for the totals are storage's: a driver that goes
on with a run says the same as the one before it. Counters would be added up, on a cluster that
outlives both: Ray's agent is told what a process adds, and keeps what it was told by earlier ones.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pipeline.accounts import Account

if TYPE_CHECKING:
    from ray.util.metrics import Gauge

_TRAINING = {
    "step": ("step", "Optimizer steps done."),
    "steps": ("steps", "Optimizer steps of the stage."),
    "samples_per_s": ("samples_per_second", "Samples per second, all workers."),
    "data_wait": ("data_wait_ratio", "Share of the time that rank 0 waits for data."),
    "loss": ("loss", "L = L_LDM + tau L_reg, mean since the last log."),
    "validation_loss": ("validation_loss", "The same on the held-out split, at its last look."),
    "ldm": ("loss_ldm", "L_LDM."),
    "reg": ("loss_reg", "L_reg."),
    "grad_norm": ("gradient_norm", "Norm of the gradient, before it is clipped."),
    "lr": ("learning_rate", "Learning rate."),
    "epoch": ("epoch", "Epochs done."),
}
"""Of training's progress: {its key: (metric, what it is)}."""


def collected() -> bool:
    """Whether this process is connected to a cluster that collects metrics.

    A private cluster does not (cluster.py), and a client (`ray://`) has no metrics of its own.
    """
    import ray

    if os.environ.get("RAY_enable_metrics_collection") == "0":  # noqa: SIM112 (Ray's own spelling)
        return False
    return bool(ray.is_initialized() and not ray.util.client.ray.is_connected())


def _gauge(name: str, text: str, run: str, *more: str) -> Gauge:
    from ray.util.metrics import Gauge

    return Gauge(name, text, ("run", "stage", *more)).set_default_tags({"run": run})


class RunMetrics:
    """One curation's metrics, told from other runs' on the cluster by the tag `run`, its root."""

    def __init__(self, run: str) -> None:
        def gauge(name: str, text: str, *more: str) -> Gauge:
            return _gauge(f"ssr_curate_{name}", text, run, *more)

        self._units = gauge("units", "Units that the run has.")
        self._units_done = gauge("units_done", "Units committed.")
        self._rows_in = gauge("rows_in", "Rows read by committed units.")
        self._rows_kept = gauge("rows_kept", "Rows written by committed units.")
        self._bytes = gauge("bytes", "Bytes written by committed units.")
        self._rows_dropped = gauge("rows_dropped", "Rows dropped by a rule.", "reason")
        self._rows_failed = gauge("rows_failed", "Rows failed by a cause.", "cause")

    def publish(self, stage: str, account: Account, units: int) -> None:
        """Bring the metrics of `stage` up to `account`."""
        tags = {"stage": stage}
        self._units.set(units, tags)
        self._units_done.set(account.units, tags)
        self._rows_in.set(account.rows_in, tags)
        self._rows_kept.set(account.kept, tags)
        self._bytes.set(account.bytes, tags)
        for reason, rows in account.dropped.items():
            self._rows_dropped.set(rows, {**tags, "reason": reason})
        for cause, rows in account.failed.items():
            self._rows_failed.set(rows, {**tags, "cause": cause})


class TrainingMetrics:
    """One training's metrics, told from other runs' by the tag `run`, its root."""

    def __init__(self, run: str) -> None:
        self._gauges = {
            key: _gauge(f"ssr_train_{name}", text, run) for key, (name, text) in _TRAINING.items()
        }

    def publish(self, stage: str, progress: Mapping[str, Any]) -> None:
        """Bring the metrics of `stage` up to what rank 0 says of it; what it does not say stays."""
        for key, gauge in self._gauges.items():
            if key in progress:
                gauge.set(float(progress[key]), {"stage": stage})
