"""The totals of a run as Ray metrics, for Prometheus; the driver sets them from the markers.

Ray puts `ray_` before each name. They are gauges, for the totals are storage's: a driver that goes
on with a run says the same as the one before it. Counters would be added up, on a cluster that
outlives both: Ray's agent is told what a process adds, and keeps what it was told by earlier ones.
"""

from __future__ import annotations

import os

from pipeline.accounts import Account

_PREFIX = "ssr_curate"


def collected() -> bool:
    """Whether this process is connected to a cluster that collects metrics.

    A private cluster does not (cluster.py), and a client (`ray://`) has no metrics of its own.
    """
    import ray

    if os.environ.get("RAY_enable_metrics_collection") == "0":  # noqa: SIM112 (Ray's own spelling)
        return False
    return bool(ray.is_initialized() and not ray.util.client.ray.is_connected())


class RunMetrics:
    """One run's metrics, told from other runs' on the cluster by the tag `run`, its root."""

    def __init__(self, run: str) -> None:
        from ray.util.metrics import Gauge

        def gauge(name: str, text: str, *more: str) -> Gauge:
            made = Gauge(f"{_PREFIX}_{name}", text, ("run", "stage", *more))
            return made.set_default_tags({"run": run})

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
