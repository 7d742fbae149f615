"""Panels of the dashboard: our metrics by name, the runs' and the service's, and any queries."""

from __future__ import annotations

from typing import Any

from pipeline.ray_metrics import METRICS, Metric
from pipeline.serving.metrics import Metrics

SOURCE = {"type": "prometheus", "uid": "${datasource}"}
RUN, STAGE = 'run=~"$run"', 'stage=~"$stage"'
_UNITS = {"seconds": "s", "timestamp": "s", "bytes": "bytes", "ratio": "percentunit"}
_OURS = {metric.name: metric for metric in METRICS}
_SUFFIXES = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}
SERVED = {
    f"{metric.name}{suffix}": metric.documentation
    for metric in Metrics().registry.collect()
    for suffix in _SUFFIXES[metric.type]
}
"""What the service tells, by the names in which it is scraped."""
CLUSTER = 'namespace=~"$namespace",ray_io_cluster=~"$cluster"'

Panel = dict[str, Any]


def ours(name: str, title: str = "", more: str = "") -> Panel:
    """One of our metrics as it is, a line for each run and stage; `more`, another, beside it."""
    metric = _OURS[name]
    legend = " ".join(f"{{{{{label}}}}}" for label in ("stage", *metric.more) if metric.stage)
    queries = [(highest(name), legend or "{{run}}")]
    if metric.unit == "timestamp":  # how long ago; 0 is never
        queries = [(f"time() - ({highest(name)} > 0)", "{{run}}")]
    if more:
        queries.append((highest(more), f"{more.removeprefix('ssr_')} {legend}"))
    unit = _UNITS.get(metric.unit, "short")
    return panel(title or _title(metric), queries, unit, metric.text)


def panel(title: str, queries: list[tuple[str, str]], unit: str, text: str = "") -> Panel:
    """A graph of (PromQL, legend) each."""
    return {
        "type": "timeseries",
        "title": title,
        "description": text,
        "datasource": SOURCE,
        "fieldConfig": {"defaults": {"unit": unit, "custom": {"spanNulls": 60_000}}},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}},
        "targets": [
            {"refId": chr(65 + n), "datasource": SOURCE, "expr": query, "legendFormat": legend}
            for n, (query, legend) in enumerate(queries)
        ],
    }


def highest(name: str) -> str:
    """PromQL: one of our metrics, of the drivers that say it (an old one's last word lasts 20 s)
    the highest.
    """
    return f"max by ({', '.join(_OURS[name].labels)}) ({at(name)})"


def at(name: str) -> str:
    """PromQL: one of our metrics, of the runs and stages that are chosen."""
    where = f"{RUN},{STAGE}" if _OURS[name].stage else RUN
    return f"ray_{name}{{{where}}}"


def served(name: str, *by: str, where: str = "", rate: bool = False) -> str:
    """PromQL: one of the service's figures, or its rate, by cluster and the labels `by`. Each pod
    tells those of the one front: the highest is taken.
    """
    if name not in SERVED:
        raise KeyError(name)
    one = f"{name}{{{CLUSTER}{where}}}"
    return f"max by ({', '.join(('ray_io_cluster', *by))}) ({f'rate({one}[5m])' if rate else one})"


def _title(metric: Metric) -> str:
    job, _, rest = metric.name.removeprefix("ssr_").partition("_")
    ago = " ago" if metric.unit == "timestamp" else ""
    return f"{rest.replace('_', ' ').capitalize()}{ago}" + (f" ({job})" if ago else "")
