"""The run as one page: root/report.html, made of what lies in storage and of nothing else.

Every part may be missing, half-written or broken: the page shows what is there and names the job
that makes the rest. Pictures are embedded, curves are SVG: the file can be mailed.
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2

from pipeline import page
from pipeline import report_training as training
from pipeline.curation.overview import contact_sheet, overview
from pipeline.evaluation import table
from pipeline.storage import Storage
from pipeline.storage_faults import public

PAGE = "report.html"
_MAX_EMBEDDED_BYTES = 8_000_000


def build(storage: Storage, live: bool = False) -> str:
    """Write root/report.html from what the root holds; return where it lies.

    `live` counts the commit markers anew, of a run that goes on; else the summary of a sealed
    curation will do, however many units it has.
    """
    curation = overview(storage, live)
    evaluation = _evaluation(storage)
    trained = training.overview(storage)
    text = _template().render(
        root=public(storage.url()),
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        headline=curation.get("headline", []) + training.headline(trained) + _headline(evaluation),
        grid=_picture(storage, "grid.png"),
        evaluation=evaluation,
        training=trained,
        curation=curation,
        samples=contact_sheet(storage),
    )
    storage.write_bytes(PAGE, text.encode(errors="replace"))
    return storage.url(PAGE)


def _template() -> jinja2.Template:
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, loader=loader)
    return environment.get_template("report.html.j2")


def _headline(evaluation: dict[str, Any] | None) -> list[tuple[str, str]]:
    figures: list[tuple[str, str]] = []
    with page.whatever_is_there():
        if evaluation is not None:
            figures.append((f"{evaluation['best']}: all three right", evaluation["best_share"]))
    return figures


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
