"""The run as one page: root/report.html, made of what lies in storage and of nothing else.

Every part may be missing, half-written or broken: the page shows what is there and names the job
that makes the rest. Pictures are embedded, curves are SVG: the file can be mailed.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import charts
from pipeline.errors import UserError
from pipeline.evaluation import table
from pipeline.storage import Storage

PAGE = "report.html"
_SAMPLES = 24
_MAX_EMBEDDED_BYTES = 8_000_000
_PART_FAULTS = (
    UserError,
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    pa.ArrowException,
)
_MEDIA = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpeg", b"RIFF": "webp"}
# Charts of a stage: title, then each line's name and the metric that it shows.
_CHARTS = {
    "L_LDM": {"training": "ldm", "held out": "validation_ldm"},
    "L_reg": {"training": "reg", "held out": "validation_reg"},
    "Gradient norm": {"training": "grad_norm"},
    "Samples per second": {"training": "samples_per_s"},
}


def build(storage: Storage, live: bool = False) -> str:
    """Write root/report.html from what the root holds; return where it lies."""
    curation = _json(storage, "curation.json")
    evaluation = _evaluation(storage)
    training = _training(storage)
    page = _template().render(
        root=storage.url(),
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        headline=_headline(curation, training, evaluation),
        grid=_picture(storage, "grid.png"),
        evaluation=evaluation,
        training=training,
        funnel=_funnel(curation),
        samples=_samples(storage),
    )
    storage.write_bytes(PAGE, page.encode())
    return storage.url(PAGE)


def _template() -> jinja2.Template:
    source = (Path(__file__).parent / "report.html.j2").read_text()
    return jinja2.Environment(autoescape=True, trim_blocks=True).from_string(source)


@contextmanager
def _whatever_is_there() -> Iterator[None]:
    """Parts that are absent or broken are left out: a report must never fail a finished job."""
    with suppress(*_PART_FAULTS):
        yield


def _headline(
    curation: dict[str, Any], training: list[dict[str, Any]], evaluation: dict[str, Any] | None
) -> list[tuple[str, str]]:
    figures: list[tuple[str, str]] = []
    with _whatever_is_there():
        stages = list(curation["stages"].values())
        figures.append(("rows of metadata", f"{stages[0]['rows_in']:,}"))
        figures.append(("training samples", f"{stages[-1]['kept']:,}"))
    steps = sum(stage["steps"] for stage in training)
    if steps:
        figures.append(("training steps", f"{steps:,}"))
    with _whatever_is_there():
        if evaluation is not None:
            figures.append((f"{evaluation['best']}: all three right", evaluation["best_share"]))
    return figures


def _funnel(curation: dict[str, Any]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    with _whatever_is_there():
        for name, stage in (curation.get("stages") or {}).items():
            dropped, failed = dict(stage["dropped"]), dict(stage["failed"])
            parts = [
                ("kept", stage["kept"]),
                ("dropped", sum(dropped.values())),
                ("failed", sum(failed.values())),
            ]
            reasons = ", ".join(f"{reason} {n:,}" for reason, n in (dropped | failed).items() if n)
            rows.append(
                {
                    "name": name,
                    "rows_in": f"{stage['rows_in']:,}",
                    "kept": f"{stage['kept']:,}",
                    "bar": charts.bar(parts, stage["rows_in"]),
                    "reasons": reasons or "none",
                    "rate": f"{stage.get('rows_per_second') or 0:,.0f}",
                }
            )
    return rows


def _training(storage: Storage) -> list[dict[str, Any]]:
    stages = []
    for path in _paths(storage, "train"):
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
    with _whatever_is_there():
        for line in storage.read_bytes(path).decode(errors="replace").splitlines():
            with _whatever_is_there():
                record = json.loads(line)
                # training and validation of one step are two records, with other keys
                records[float(record["step"]), frozenset(record)] = record
    return sorted(records.values(), key=lambda record: float(record["step"]))


def _evaluation(storage: Storage) -> dict[str, Any] | None:
    found = _json(storage, "evaluation/scores.json")
    with _whatever_is_there():
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


def _samples(storage: Storage) -> list[dict[str, str]]:
    """The first images of the first unit that has captions, with them."""
    samples: list[dict[str, str]] = []
    units = [p for p in _paths(storage, "captions") if p.endswith(".parquet")]
    for path in sorted(units, key=lambda p: "/train" not in p)[:2]:
        with _whatever_is_there():
            captions = {row["key"]: row["caption"] for row in _head(storage, path, ["caption"])}
            image_path = path.replace("captions/", "images/", 1)
            for row in _head(storage, image_path, ["image"]):
                if row["key"] in captions and len(samples) < _SAMPLES:
                    sample = {"image": _embedded(row["image"]), "caption": captions[row["key"]]}
                    samples.append(sample)
    return samples


def _head(storage: Storage, path: str, columns: list[str]) -> list[dict[str, Any]]:
    with storage.open_input(path) as file:
        batches = pq.ParquetFile(file).iter_batches(4 * _SAMPLES, columns=["key", *columns])
        return next((batch.to_pylist() for batch in batches), [])


def _paths(storage: Storage, prefix: str) -> list[str]:
    with _whatever_is_there():
        return storage.list(prefix)
    return []


def _json(storage: Storage, path: str) -> dict[str, Any]:
    with _whatever_is_there():
        if storage.exists(path):
            found = storage.read_json(path)
            return found if isinstance(found, dict) else {}
    return {}


def _picture(storage: Storage, path: str) -> str | None:
    with _whatever_is_there():
        if storage.exists(path) and storage.size(path) <= _MAX_EMBEDDED_BYTES:
            return _embedded(storage.read_bytes(path))
    return None


def _embedded(data: bytes) -> str:
    """A data: URL; raises ValueError for bytes that are no picture a browser shows."""
    kind = next((name for magic, name in _MEDIA.items() if data.startswith(magic)), None)
    if kind is None:
        raise ValueError("not a png, jpg or webp")
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
