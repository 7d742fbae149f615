"""The run as one page: root/report.html, made of what lies in storage and of nothing else.

Every part may be missing, half-written or broken: the page shows what is there and names the job
that makes the rest. Pictures are embedded, curves are SVG: the file can be mailed.
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import jinja2

from pipeline import page
from pipeline import report_evaluation as evaluation
from pipeline import report_training as training
from pipeline.curation.overview import contact_sheet, overview
from pipeline.storage import Storage
from pipeline.storage_faults import public

PAGE = "report.html"


def build(storage: Storage, live: bool = False) -> str:
    """Write root/report.html from what the root holds; return where it lies.

    `live` counts the commit markers anew, of a run that goes on; else the summary of a sealed
    curation will do, however many units it has.
    """
    curation = overview(storage, live)
    evaluated = evaluation.overview(storage)
    trained = training.overview(storage)
    headlines = (
        *curation.get("headline", []),
        *training.headline(trained),
        *evaluation.headline(evaluated),
    )
    text = _template().render(
        root=public(storage.url()),
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        headline=headlines,
        grid=page.picture(storage, "grid.png"),
        evaluation=evaluated,
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
