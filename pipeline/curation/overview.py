"""Curation's part of the report: made of markers, or of the summary that sealing made of them.

Only the contact sheet opens data files. Every part may be absent or broken.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any
from urllib.parse import urlsplit

import pyarrow.parquet as pq

from pipeline import charts, page
from pipeline.curation.seal import STAGES, SUMMARY
from pipeline.curation.status import accounts_of
from pipeline.shards import MANIFEST
from pipeline.storage import Storage
from pipeline.storage_faults import scrubbed

_SAMPLES = 24
_TINY = 64
"""Pixels: up to this a picture is shown with its pixels, not blurred."""
_READ_BYTES = 1 << 20
_HOSTS = 10
_CAUSES = 16

Entry = Mapping[str, Any]


def overview(storage: Storage, live: bool) -> dict[str, Any]:
    """What the template shows of curation; {} where there is none.

    `live` reads the markers as they are now; else the summary of the sealed run will do.
    """
    stages, going = _stages(storage, live)
    if not stages:
        return {}
    units, images = stages.get("units", {}), stages.get("images", {})
    scored, captions = stages.get("scores", {}), stages.get("captions", {})
    return {
        "going": going,
        "headline": _headline(stages),
        "funnel": _funnel(stages),
        "charts": [
            chart
            for chart in (
                _histogram(units, "scores", "Aesthetic score of the metadata", "score", _bound),
                _histogram(scored, "scores", "Aesthetic score of the images", "score", _bound),
                _histogram(images, "sizes", "Shorter side as it came", "pixels"),
                _rates(stages),
                _histogram(captions, "words", "Length of the captions", "words"),
                _subjects(captions),
            )
            if chart
        ],
        "failures": [chart for name in stages if (chart := _failures(name, stages[name]))],
        "hosts": _hosts(images),
        "schemas": _schemas(units),
        "settings": _settings(stages),
    }


def _stages(storage: Storage, live: bool) -> tuple[dict[str, Entry], str]:
    """Every stage's totals, and a sentence on a run that is not through."""
    with page.whatever_is_there():
        found = {} if live else page.read_json(storage, SUMMARY).get("stages")
        if found:
            return dict(found), ""
        accounts, total = accounts_of(storage)
        stages: dict[str, Entry] = {
            name: account.to_json() for name, account in accounts.items() if account.units
        }
        through = accounts[STAGES[-1]].units
        sealed = storage.exists(MANIFEST) and total == through
        of = f" of {total:,}" if total is not None else ""
        going = "" if sealed else f"Not sealed yet: {through:,}{of} units are through every stage."
        return stages, going if stages else ""
    return {}, ""


def _headline(stages: Mapping[str, Entry]) -> list[tuple[str, str]]:
    figures: list[tuple[str, str]] = []
    with page.whatever_is_there():
        entries = list(stages.values())
        figures.append(("rows of metadata", f"{entries[0]['rows_in']:,}"))
        figures.append(("training samples", f"{entries[-1]['kept']:,}"))
    return figures


def _funnel(stages: Mapping[str, Entry]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    with page.whatever_is_there():
        for name, stage in stages.items():
            dropped, failed = dict(stage["dropped"]), dict(stage["failed"])
            parts = [
                ("kept", stage["kept"]),
                ("dropped", sum(dropped.values())),
                ("failed", sum(failed.values())),
            ]
            reasons = ", ".join(f"{reason} {n:,}" for reason, n in (dropped | failed).items() if n)
            again = f"; {stage['retried']:,} rows were tried again" if stage.get("retried") else ""
            rows.append(
                {
                    "name": name,
                    "rows_in": f"{stage['rows_in']:,}",
                    "kept": f"{stage['kept']:,}",
                    "bar": charts.bar(parts, stage["rows_in"]),
                    "reasons": (reasons or "none") + again,
                    "rate": f"{stage.get('rows_per_second') or 0:,.0f}",
                }
            )
    return rows


def _bound(stage: Entry) -> float | None:
    bound = (stage.get("settings") or {}).get("min_aesthetic")
    return float(bound) if bound is not None else None


def _histogram(stage: Entry, name: str, title: str, label: str, mark: Any = None) -> str:
    with page.whatever_is_there():
        found = stage.get(name) or {}
        if found and sum(found["rows"]):
            bound = mark(stage) if mark is not None else None
            return charts.histogram(title, found["edges"], found["rows"], label, bound)
    return ""


def _rates(stages: Mapping[str, Entry]) -> str:
    """Rows per second of every stage since the run's first commit, pauses included."""
    with page.whatever_is_there():
        drawn = {name: stage for name, stage in stages.items() if len(stage["timeline"]) > 1}
        begun = {name: _moment(stage["first"]) / 3600 for name, stage in drawn.items()}
        lines = {
            name: [(begun[name] - min(begun.values()) + at, rate) for at, rate in stage["timeline"]]
            for name, stage in drawn.items()
        }
        longest = max((at for points in lines.values() for at, _ in points), default=0.0)
        scale, unit = (1.0, "hours") if longest > 2 else (60.0, "minutes")
        scaled = {name: [(at * scale, y) for at, y in points] for name, points in lines.items()}
        return charts.line_chart("Rows per second over time", scaled, unit)
    return ""


def _moment(iso: str) -> float:
    return datetime.fromisoformat(iso).timestamp()


def _subjects(stage: Entry) -> str:
    with page.whatever_is_there():
        found = list((stage.get("subjects") or {}).items())[:_CAUSES]
        named = [(page.visible(name, 40), {"kept": rows}) for name, rows in found]
        return charts.bars("Most frequent subjects", named)
    return ""


def _failures(name: str, stage: Entry) -> str:
    """Failed rows by cause; those that another try may bring in their own colour, where known."""
    with page.whatever_is_there():
        transient = stage.get("transient")
        causes: list[tuple[str, dict[str, int]]] = []
        for cause, rows in list(stage["failed"].items())[:_CAUSES]:
            if transient is None:
                causes.append((cause, {"failed": rows}))
            else:
                again = min(rows, transient.get(cause, 0))
                causes.append((cause, {"permanent": rows - again, "transient": again}))
        return charts.bars(f"Failed in {name}", causes)
    return ""


def _hosts(stage: Entry) -> dict[str, list[tuple[str, str, str, str]]]:
    """The hosts with most rows, and those that lost most: host, rows, came, share that came."""
    with page.whatever_is_there():
        hosts = (stage.get("hosts") or {}).items()  # "" are a folder's files
        found = [(host, int(n), int(ok)) for host, (n, ok) in hosts if host]
        largest = sorted(found, key=lambda host: (-host[1], host[0]))[:_HOSTS]
        losing = [host for host in found if host[2] < host[1]]
        worst = sorted(losing, key=lambda host: (host[2] - host[1], host[0]))[:_HOSTS]
        tables = {"Most rows": largest, "Most rows lost": worst}
        return {
            title: [
                (page.visible(host, 60), f"{n:,}", f"{ok:,}", f"{ok / max(n, 1):.0%}")
                for host, n, ok in hosts
            ]
            for title, hosts in tables.items()
            if hosts
        }
    return {}


def _schemas(stage: Entry) -> list[dict[str, str]]:
    shown: list[dict[str, str]] = []
    with page.whatever_is_there():
        for schema in stage.get("schemas") or []:
            columns = ", ".join(f"{ours} = {found}" for ours, found in schema["columns"].items())
            shown.append(
                {
                    "files": f"{int(schema['files']):,}",
                    "example": page.visible(schema["example"], 80),
                    "columns": page.visible(columns, 1000),
                    "missing": page.visible(", ".join(schema["missing"]) or "none", 400),
                    "unused": page.visible(", ".join(schema["unused"]) or "none", 400),
                }
            )
    return shown


def _settings(stages: Mapping[str, Entry]) -> list[tuple[str, list[tuple[str, str]]]]:
    """What shaped each stage's output, as its markers say; credentials never."""
    shown = []
    for name, stage in stages.items():
        with page.whatever_is_there():
            flat = [
                (key, page.visible(scrubbed(str(value)), 200))
                for key, value in page.flat(stage["settings"])
            ]
            shown.append((name, flat))
    return [entry for entry in shown if entry[1]]


# --- the contact sheet ------------------------------------------------------------------


def contact_sheet(storage: Storage) -> list[dict[str, Any]]:
    """The first images of the first units that have captions: picture, caption, subjects, alt
    text, host and url; all text made visible.
    """
    samples: list[dict[str, Any]] = []
    units = [path for path in page.paths(storage, "captions") if path.endswith(".parquet")]
    for path in sorted(units, key=lambda name: "/train" not in name)[:2]:
        with page.whatever_is_there():
            captions = {row["key"]: row for row in _head(storage, path, ["caption", "subjects"])}
            image_path = path.replace("captions/", "images/", 1)
            for row in _head(storage, image_path, ["image", "url", "alt_text"]):
                if row["key"] in captions and len(samples) < _SAMPLES:
                    with page.whatever_is_there():
                        samples.append(_sample({**row, **captions[row["key"]]}))
    return samples


def _sample(row: Mapping[str, Any]) -> dict[str, Any]:
    url = str(row.get("url") or "")
    host = ""
    with page.whatever_is_there():
        host = urlsplit(url).hostname or ""
    return {
        "image": page.thumbnail(row["image"]),
        "tiny": max(page.size(row["image"])) <= _TINY,
        "caption": page.visible(row["caption"], 300),
        "subjects": [page.visible(name, 60) for name in (row.get("subjects") or [])[:8]],
        "alt_text": page.visible(row.get("alt_text") or "", 120),
        "host": page.visible(host, 60),
        "url": page.visible(scrubbed(url), 100),
    }


def _head(storage: Storage, path: str, columns: Sequence[str]) -> list[dict[str, Any]]:
    """The first rows of a file, of those `columns` that it has, and `key`; read as a stream."""
    with storage.open_input(path) as file:
        parquet = pq.ParquetFile(file, buffer_size=_READ_BYTES, pre_buffer=False)
        wanted = ["key", *(name for name in columns if name in parquet.schema_arrow.names)]
        batches = parquet.iter_batches(4 * _SAMPLES, columns=wanted)
        return next((batch.to_pylist() for batch in batches), [])
