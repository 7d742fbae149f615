"""What an evaluation leaves for people and programs, made of the scores of its units.

evaluation/<bench>/scores.parquet   every picture's scores (results.py)
evaluation/<bench>/scores.json      means with intervals, what looked, settings
evaluation/<bench>/scores.md        the same as tables
evaluation/<bench>/grid.png         references beside what each method drew
evaluation/<bench>/extremes.png     each method's best and worst pictures
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow.parquet as pq

from pipeline.evaluation import gallery, markdown
from pipeline.evaluation.bootstrap import Interval
from pipeline.evaluation.evaluation import Evaluation
from pipeline.evaluation.exact import MEASURES as EXACT
from pipeline.evaluation.published import DREAMBENCH
from pipeline.evaluation.results import Measure, MethodInfo, Results
from pipeline.evaluation.scoring import LOOKED_FOR, NOT_FOUND, measures_of
from pipeline.generation import png
from pipeline.storage import Storage
from pipeline.units import Ledger

SCORES = "scores.parquet"


@dataclass(frozen=True)
class Published:
    """What was written: the tables as Markdown, and where the files lie under the root."""

    text: str
    folder: str
    results: Results

    @property
    def name(self) -> str:
        """The folder's, under evaluation/: what `compare` calls the bench."""
        return self.folder.rpartition("/")[2]


@dataclass(frozen=True)
class Missing:
    """How many subjects DINO-M looked for in a method's pictures, and how many of them were not
    found and count as 0."""

    looked_for: int
    not_found: int


def publish(asked: Evaluation, storage: Storage, shown: Sequence[str] | None = None) -> Published:
    """Write everything above. shown: the methods in the pictures; None = all."""
    rows, looked = _scores(asked, storage)
    results, missing = _results(asked, rows, looked), _missing(rows)
    results.write(storage, f"{asked.folder}/{SCORES}")
    paper = DREAMBENCH if asked.bench.published else {}
    text = tables(results, asked.bench.title, asked.cfg.resamples, paper, missing)
    storage.write_json(f"{asked.folder}/scores.json", _told(asked, results, paper, missing))
    storage.write_bytes(f"{asked.folder}/scores.md", text.encode())
    methods = [m.name for m in asked.methods if shown is None or m.name in shown]
    pictures = gallery.Pictures(asked, storage, results, methods)
    for name, sheet in (("grid", pictures.sheet()), ("extremes", pictures.extremes())):
        storage.write_bytes(f"{asked.folder}/{name}.png", png.encode(sheet))
    return Published(text, asked.folder, results)


def _scores(
    asked: Evaluation, storage: Storage
) -> tuple[list[dict[str, Any]], dict[str, Mapping[str, Any]]]:
    """The rows of all units, and what looked, by measure."""
    rows: list[dict[str, Any]] = []
    looked: dict[str, Mapping[str, Any]] = {}
    for method in asked.methods:
        stage = f"{asked.folder}/scores/{method.name}"
        markers = Ledger(storage, stage).done()
        for unit in asked.units(method):
            looked |= markers[unit].tally.extra.get("backbones", {})
            with storage.open_input(f"{stage}/{unit}.parquet") as file:
                found = pq.read_table(file).to_pylist()
            rows += [{**row, "method": method.name} for row in found]
    return rows, looked


def _results(
    asked: Evaluation,
    rows: Sequence[Mapping[str, Any]],
    looked: Mapping[str, Mapping[str, Any]],
) -> Results:
    measures = [
        Measure(m.name, m.title, m.better, m.digits, _backbone(looked.get(m.name)))
        for m in measures_of(asked.scorers)
    ]
    methods = {
        method.name: MethodInfo(method.title, method.native, method.settings)
        for method in asked.methods
    }
    return Results.of(rows, asked.bench.settings, measures, methods)


def _missing(rows: Sequence[Mapping[str, Any]]) -> dict[str, Missing]:
    """Of each method for which subjects were looked for."""
    found: dict[str, Missing] = {}
    for row in rows:
        if row.get(LOOKED_FOR):
            before = found.get(row["method"], Missing(0, 0))
            found[row["method"]] = Missing(
                before.looked_for + row[LOOKED_FOR], before.not_found + row[NOT_FOUND]
            )
    return found


def _backbone(described: Mapping[str, Any] | None) -> str | None:
    """What looked, short: its name and the first digits of its weights' hash."""
    if not described:
        return None
    segmenter = described.get("segmenter")
    return _short(described) + (f", found by {_short(segmenter)}" if segmenter else "")


def _short(described: Mapping[str, Any]) -> str:
    return f"{described.get('name')} ({str(described.get('sha256', ''))[:12]})"


def tables(
    results: Results,
    title: str,
    resamples: int,
    paper: Mapping[str, Mapping[str, float]] | None = None,
    missing: Mapping[str, Missing] | None = None,
) -> str:
    """Markdown: the exact measures where there are any, then the metrics, what looked, and how
    many subjects were not found. A measure without a value is left out.
    """
    means = {name: results.means(name, resamples) for name in results.methods}
    measured = [
        measure
        for measure in results.measures
        if any(of[measure.name].mean is not None for of in means.values())
    ]
    parts = [_table(results, some, means, title, paper or {}) for some in groups(measured)]
    parts.append(_note(results, measured, resamples, bool(paper), missing or {}))
    return "\n".join(parts)


def groups(measures: Sequence[Measure]) -> list[list[Measure]]:
    """The exact measures, and the metrics: a table for each that there are any of."""
    exact = {measure.name for measure in EXACT}
    of_both = ([m for m in measures if (m.name in exact) == which] for which in (True, False))
    return [some for some in of_both if some]


def _table(
    results: Results,
    measures: Sequence[Measure],
    means: Mapping[str, Mapping[str, Interval]],
    title: str,
    paper: Mapping[str, Mapping[str, float]],
) -> str:
    lines = []
    for name, method in results.methods.items():
        said = method.title if method.native else f"{method.title} (pictures from a folder)"
        lines.append([said, *(markdown.cell(m, means[name][m.name]) for m in measures)])
    for method_title, figures in paper.items():
        cells = [markdown.number(figures.get(m.name), m.digits) for m in measures]
        lines.append([f"{method_title}, the paper's figures", *cells])
    return markdown.table([title, *map(markdown.heading, measures)], lines)


def _note(
    results: Results,
    measures: Sequence[Measure],
    resamples: int,
    paper: bool,
    missing: Mapping[str, Missing],
) -> str:
    looked = dict.fromkeys(m.backbone for m in measures if m.backbone)
    lines = [
        "In brackets the 95 % interval of the mean over pictures, by bootstrap over references "
        f"({resamples:,} resamples). Arrows: which way is better."
    ]
    if looked:
        lines.append(f"Looked with: {'; '.join(map(markdown.text, looked))}.")
    if missing:
        counts = (
            f"{markdown.text(results.methods[name].title)} {of.not_found:,} of {of.looked_for:,}"
            for name, of in missing.items()
        )
        lines.append(f"DINO-M: subjects that were not found, counted as 0: {'; '.join(counts)}.")
    if paper:
        lines.append(
            "The paper does not say which CLIP and DINO looked: a few hundredths may be theirs."
        )
    return "\n".join(lines) + "\n"


def _told(
    asked: Evaluation,
    results: Results,
    paper: Mapping[str, Mapping[str, float]],
    missing: Mapping[str, Missing],
) -> dict[str, Any]:
    methods = {}
    for name, method in results.methods.items():
        means = results.means(name, asked.cfg.resamples)
        methods[name] = {
            **asdict(method),
            "means": {measure: asdict(interval) for measure, interval in means.items()},
            "missing": asdict(missing[name]) if name in missing else None,
        }
    return {
        "bench": {
            "name": asked.bench.name,
            "title": asked.bench.title,
            "published": asked.bench.published,
            "settings": dict(asked.bench.settings),
        },
        "measures": [asdict(measure) for measure in results.measures],
        "methods": methods,
        "paper": paper,
        "resamples": asked.cfg.resamples,
    }
