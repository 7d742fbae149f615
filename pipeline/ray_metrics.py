"""The counters of a run as Ray metrics, for Prometheus; the driver sets them from the markers.

Ray puts `ray_` before each name, and `_total` behind a counter's. A run that goes on counts on from
what is there: its counters begin at storage's totals, whichever workers were lost.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping

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
        from ray.util.metrics import Counter as RayCounter
        from ray.util.metrics import Gauge

        tags, default = ("run", "stage"), {"run": run}

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"{_PREFIX}_{name}", text, tags).set_default_tags(default)

        def counter(name: str, text: str, *more: str) -> RayCounter:
            made = RayCounter(f"{_PREFIX}_{name}", text, (*tags, *more))
            return made.set_default_tags(default)

        self._units_done = gauge("units_done", "Units committed.")
        self._units = gauge("units", "Units that the run has.")
        self._counters = {
            "rows_in": counter("rows_in", "Rows read by committed units."),
            "rows_kept": counter("rows_kept", "Rows written by committed units."),
            "rows_dropped": counter("rows_dropped", "Rows dropped by a rule.", "reason"),
            "rows_failed": counter("rows_failed", "Rows failed by a cause.", "cause"),
            "bytes": counter("bytes", "Bytes written by committed units."),
        }
        self._told: Counter[tuple[str, ...]] = Counter()

    def publish(self, stage: str, account: Account, units: int) -> None:
        """Bring the metrics of `stage` up to `account`."""
        self._units_done.set(account.units, tags={"stage": stage})
        self._units.set(units, tags={"stage": stage})
        self._raise("rows_in", account.rows_in, stage=stage)
        self._raise("rows_kept", account.kept, stage=stage)
        self._raise("bytes", account.bytes, stage=stage)
        self._raise_each("rows_dropped", "reason", account.dropped, stage)
        self._raise_each("rows_failed", "cause", account.failed, stage)

    def _raise_each(self, name: str, tag: str, counts: Mapping[str, int], stage: str) -> None:
        for key, rows in counts.items():
            self._raise(name, rows, stage=stage, **{tag: key})

    def _raise(self, name: str, total: int, **tags: str) -> None:
        told = (name, *tags.values())
        if total > self._told[told]:
            self._counters[name].inc(total - self._told[told], tags=tags)
            self._told[told] = total
