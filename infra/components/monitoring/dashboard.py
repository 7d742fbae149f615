"""Grafana's dashboard, from the metrics that pipeline/ray_metrics.py (runs) and
pipeline/serving/metrics.py (the service) declare.

python -m infra.components.monitoring.dashboard      # writes dashboard.json beside this file

The classic JSON model, which Grafana imports since version 8.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from infra.components.monitoring.panels import (
    CLUSTER,
    RUN,
    SERVED,
    SOURCE,
    STAGE,
    Panel,
    at,
    highest,
    ours,
    panel,
    served,
)

FILE = Path(__file__).with_name("dashboard.json")
WIDTH, HEIGHT = 24, 7


def dashboard() -> dict[str, Any]:
    """The dashboard as Grafana's JSON."""
    return {
        "uid": "ssr-on-ray",
        "title": "SSR on Ray",
        "tags": ["ssr", "ray"],
        "schemaVersion": 39,
        "editable": True,
        "graphTooltip": 1,  # one cursor over all panels
        "refresh": "30s",
        "time": {"from": "now-6h", "to": "now"},
        "templating": {"list": list(_variables())},
        "annotations": {"list": []},
        "panels": _placed(
            {
                "Runs": [ours(f"ssr_{job}_started") for job in ("curate", "train", "evaluate")],
                "Curation": _curation(),
                "Training": _training(),
                "Evaluation": _evaluation(),
                "Service": _service(),
                "Nodes": _nodes(),
            }
        ),
    }


def _curation() -> list[Panel]:
    share = f"ssr:curate_failed_ratio:30m{{{RUN},{STAGE}}}"
    pace = f"sum by (run, stage) (deriv({at('ssr_curate_rows_in')}[10m]))"
    done = f"{highest('ssr_curate_units_done')} / {highest('ssr_curate_units')}"
    return [
        panel("Progress", [(done, "{{stage}}")], "percentunit", "Units committed, of all units."),
        panel("Rows per second", [(pace, "{{stage}}")], "short", "Of committed units, 10 minutes."),
        ours("ssr_curate_stalled"),
        panel("Failed, of the last 30 minutes", [(share, "{{stage}} {{cause}}")], "percentunit"),
        *map(ours, ("ssr_curate_rows_failed", "ssr_curate_rows_dropped")),
        ours("ssr_curate_rows_in", "Rows in, kept", "ssr_curate_rows_kept"),
        *map(ours, ("ssr_curate_bytes", "ssr_curate_units_failed", "ssr_curate_finished")),
    ]


def _training() -> list[Panel]:
    done = f"{highest('ssr_train_step')} / {highest('ssr_train_steps')}"
    return [
        panel("Progress", [(done, "{{stage}}")], "percentunit", "Steps done, of the stage's."),
        ours("ssr_train_samples_per_second"),
        ours("ssr_train_data_wait_ratio"),
        ours("ssr_train_loss", "Loss, training and held out", "ssr_train_validation_loss"),
        ours("ssr_train_loss_ldm", "Its parts", "ssr_train_loss_reg"),
        *map(ours, ("ssr_train_gradient_norm", "ssr_train_learning_rate", "ssr_train_epoch")),
        ours("ssr_train_nonfinite_steps", more="ssr_train_finite"),
        ours("ssr_train_unsaved", "Without a new checkpoint"),
        ours("ssr_train_checkpoint_step", "Saved, and reached", "ssr_train_step"),
        *map(ours, ("ssr_train_stalled", "ssr_train_finished")),
    ]


def _evaluation() -> list[Panel]:
    done = f"{highest('ssr_evaluate_units_done')} / {highest('ssr_evaluate_units')}"
    return [
        panel("Progress", [(done, "{{stage}}")], "percentunit", "Units committed, of all units."),
        ours("ssr_evaluate_rows_in", "Pictures in, kept", "ssr_evaluate_rows_kept"),
        *map(ours, ("ssr_evaluate_stalled", "ssr_evaluate_units_failed")),
        *map(ours, ("ssr_evaluate_bytes", "ssr_evaluate_finished")),
    ]


def _service() -> list[Panel]:
    asked = ',route!~"/(healthz|readyz|metrics)"'  # by people and programs, not by probes
    answers = served("ssr_requests_total", "route", "method", "status", where=asked, rate=True)
    took = served("ssr_request_seconds_bucket", "le", where=',route="/v1/pictures"', rate=True)
    together = " / ".join(served(f"ssr_batch_pictures_{of}", rate=True) for of in ("sum", "count"))
    return [
        panel(
            "Answers per second",
            [(f"sum by (route, status) ({answers})", "{{route}} {{status}}")],
            "reqps",
            "Of API and page; 429: a full queue, 503: no replica, 504: too late.",
        ),
        panel(
            "Seconds to a picture",
            [(f"histogram_quantile({q}, {took})", f"{q:.0%}") for q in (0.5, 0.95)],
            "s",
            "From a request of /v1/pictures to the end of its answer: so many took no longer.",
        ),
        panel(
            "Pictures",
            [(served("ssr_waiting"), "waiting"), (served("ssr_drawing"), "being drawn")],
            "short",
            f"{SERVED['ssr_waiting']}; {SERVED['ssr_drawing'].lower()}.",
        ),
        panel(
            "Denoising steps per second",
            [(served("ssr_steps_total", rate=True), "{{ray_io_cluster}}")],
            "short",
            f"{SERVED['ssr_steps_total']}.",
        ),
        panel(
            "Pictures a batch",
            [(together, "{{ray_io_cluster}}")],
            "short",
            f"{SERVED['ssr_batch_pictures_sum']}; mean.",
        ),
        panel(
            "Pods that answer",
            [(f'sum by (ray_io_cluster) (up{{ssr_role="serve",{CLUSTER}}})', "{{ray_io_cluster}}")],
            "short",
            "To Prometheus. Two clusters are there while one takes over from the other.",
        ),
    ]


def _nodes() -> list[Panel]:
    def by_pod(name: str, more: str = "") -> list[tuple[str, str]]:
        return [(f"avg by (pod) ({name}{{{CLUSTER}{more}}})", "{{pod}}")]

    spilled = by_pod("ray_object_store_memory", ',Location="SPILLED"')
    return [
        panel("GPU busy", by_pod("ray_node_gpus_utilization"), "percent"),
        panel("CPU busy", by_pod("ray_node_cpu_utilization"), "percent"),
        panel("Memory used", by_pod("ray_node_mem_used"), "bytes"),
        panel("Disk used", by_pod("ray_node_disk_utilization_percentage"), "percent"),
        panel("Spilled to disk", spilled, "bytes"),
        panel("Received", by_pod("ray_node_network_receive_speed"), "Bps"),
    ]


def _variables() -> Iterator[dict[str, Any]]:
    yield {"type": "datasource", "name": "datasource", "label": "Prometheus", "query": "prometheus"}
    for name, query in {
        "namespace": "label_values(ray_node_mem_used, namespace)",
        "cluster": 'label_values(ray_node_mem_used{namespace=~"$namespace"}, ray_io_cluster)',
        "run": 'label_values({__name__=~"ray_ssr_.*_started"}, run)',
        "stage": 'label_values({__name__=~"ray_ssr_.*_stalled",run=~"$run"}, stage)',
    }.items():
        yield {
            "type": "query",
            "name": name,
            "datasource": SOURCE,
            "query": {"query": query, "refId": name},
            "refresh": 2,  # whenever the time range changes
            "multi": True,
            "includeAll": True,
            "allValue": ".*",
            "current": {"text": ["All"], "value": ["$__all"]},
        }


def _placed(rows: dict[str, list[Panel]]) -> list[Panel]:
    """Panels three abreast under the heading of their row, with ids."""
    placed: list[Panel] = []
    y = 0
    for title, panels in rows.items():
        where = {"x": 0, "y": y, "w": WIDTH, "h": 1}
        placed.append({"type": "row", "title": title, "collapsed": False, "gridPos": where})
        y += 1
        for n, one in enumerate(panels):
            column, w = n % 3, WIDTH // 3
            where = {"x": w * column, "y": y + HEIGHT * (n // 3), "w": w, "h": HEIGHT}
            placed.append({**one, "gridPos": where})
        y += HEIGHT * -(-len(panels) // 3)
    return [{"id": n, **one} for n, one in enumerate(placed, 1)]


def text() -> str:
    """The file's content."""
    return json.dumps(dashboard(), indent=1) + "\n"


if __name__ == "__main__":
    FILE.write_text(text())
