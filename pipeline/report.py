"""The run as one page: root/report.html, made of what lies in storage and of nothing else.

Every part may be missing, half-written or broken: the page shows what is there and names the job
that makes the rest. Pictures are embedded, curves are SVG: the file can be mailed.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2

from pipeline import charts, page
from pipeline.curation.overview import contact_sheet, overview
from pipeline.evaluation import table
from pipeline.storage import Storage
from pipeline.storage_faults import public

PAGE = "report.html"
_MAX_EMBEDDED_BYTES = 8_000_000
# Charts of a stage: title, then each line's name and the metric that it shows.
_CHARTS = {
    "L_LDM": {"training": "ldm", "held out": "validation_ldm"},
    "L_reg": {"training": "reg", "held out": "validation_reg"},
    "Gradient norm": {"training": "grad_norm"},
    "Samples per second": {"training": "samples_per_s"},
}


def build(storage: Storage, live: bool = False) -> str:
    """Write root/report.html from what the root holds; return where it lies.

    `live` counts the commit markers anew, of a run that goes on; else the summary of a sealed
    curation will do, however many units it has.
    """
    curation = overview(storage, live)
    evaluation = _evaluation(storage)
    training = _training(storage)
    text = _template().render(
        root=public(storage.url()),
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        headline=curation.get("headline", []) + _headline(training, evaluation),
        grid=_picture(storage, "grid.png"),
        evaluation=evaluation,
        training=training,
        curation=curation,
        samples=contact_sheet(storage),
    )
    storage.write_bytes(PAGE, text.encode(errors="replace"))
    return storage.url(PAGE)


def _template() -> jinja2.Template:
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, loader=loader)
    return environment.get_template("report.html.j2")


def _headline(
    training: list[dict[str, Any]], evaluation: dict[str, Any] | None
) -> list[tuple[str, str]]:
    figures: list[tuple[str, str]] = []
    steps = sum(stage["steps"] for stage in training)
    if steps:
        figures.append(("training steps", f"{steps:,}"))
    with page.whatever_is_there():
        if evaluation is not None:
            figures.append((f"{evaluation['best']}: all three right", evaluation["best_share"]))
    return figures


def _training(storage: Storage) -> list[dict[str, Any]]:
    stages = []
    for path in page.paths(storage, "train"):
        folder, _, file = path.rpartition("/")
        records = _records(storage, path) if file == "metrics.jsonl" else []
        if records:
            steps = int(max(record["step"] for record in records))
            name = folder.rpartition("/")[2]
            stages.append({"name": name, "steps": steps, "charts": _stage_charts(records)})
    return sorted(stages, key=lambda stage: stage["name"] != "semantic")  # it is the first


def _stage_charts(records: list[dict[str, Any]]) -> list[str]:
    drawn = []
    for title, lines in _CHARTS.items():
        series = {
            name: [(float(r["step"]), float(r[key])) for r in records if _number(r.get(key))]
            for name, key in lines.items()
        }
        drawn.append(charts.line_chart(title, series))
    return [chart for chart in drawn if chart]


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _records(storage: Storage, path: str) -> list[dict[str, Any]]:
    """Whole records of a JSON-lines file by step; a half-written line is skipped."""
    records: dict[tuple[float, frozenset[str]], dict[str, Any]] = {}
    with page.whatever_is_there():
        for line in storage.read_bytes(path).decode(errors="replace").splitlines():
            with page.whatever_is_there():
                record = json.loads(line)
                # training and validation of one step are two records, with other keys
                records[float(record["step"]), frozenset(record)] = record
    return sorted(records.values(), key=lambda record: float(record["step"]))


def _evaluation(storage: Storage) -> dict[str, Any] | None:
    found = page.read_json(storage, "evaluation/scores.json")
    with page.whatever_is_there():
        conditions: dict[str, dict[str, Any]] = found["conditions"]
        best = max(conditions, key=lambda name: conditions[name]["selected"] or 0.0)
        rows = [
            (name, [table.shown(key, summary.get(key)) for key in table.MEASURES])
            for name, summary in conditions.items()
        ]
        return {
            "references": int(found["references"]),
            "titles": list(table.MEASURES.values()),
            "rows": rows,
            "best": best,
            "best_share": table.shown("selected", conditions[best]["selected"]),
            "grid": _picture(storage, "evaluation/grid.png"),
        }
    return None


def _picture(storage: Storage, path: str) -> str | None:
    with page.whatever_is_there():
        if storage.exists(path) and storage.size(path) <= _MAX_EMBEDDED_BYTES:
            return page.embedded(storage.read_bytes(path))
    return None
