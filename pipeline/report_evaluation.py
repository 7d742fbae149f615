"""Evaluation's part of the report: each bench's tables, charts and pictures, from its files.

    evaluation/<bench>/scores.json, grid.png, extremes.png, ablation.json
    evaluation/<bench>/comparisons/<name>/comparison.json

Every part may be absent, broken or hostile. No torch here: a report is made where nothing is
evaluated, too.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline import charts, page
from pipeline import report_differences as differences
from pipeline import report_figures as figures
from pipeline.evaluation.bootstrap import FEW_CLUSTERS
from pipeline.evaluation.results import Measure
from pipeline.report_figures import Figure, Table, figure, mapping, words
from pipeline.storage import Storage

FOLDER = "evaluation"
_LEADING = (
    "selected", "dino_m", "clip_t", "clip_es", "dino", "clip_i", "distance_target", "aesthetic",
)  # fmt: skip
"""Measures that are drawn, the first of these that are there."""
_CHARTS, _CHART_LINES = 4, 30
_SSR = ("ssr-text", "ssr-mask")
_HEADLINES = 2
_TRIAL = re.compile(r"(.+)-s\d+")
_MOST_JSON, _MOST_BENCHES, _MOST_COMPARISONS, _MOST_SETTINGS = 16 << 20, 20, 20, 40
_SHEETS = (
    ("grid", "Reference, mask, where the query looks, and what each method drew"),
    ("extremes", "Best and worst pictures of each method"),
)


@dataclass(frozen=True)
class _Method:
    name: str
    title: str
    native: bool
    """False = its pictures came from a folder."""
    settings: Mapping[str, Any]
    means: Mapping[str, Figure]
    missing: str
    """How many subjects were not found; empty where none was looked for."""

    @property
    def pictures(self) -> int:
        return max((found.samples for found in self.means.values()), default=0)

    @property
    def references(self) -> int:
        return max((found.clusters for found in self.means.values()), default=0)


def overview(storage: Storage) -> list[dict[str, Any]]:
    """What the template shows of each bench; [] where there is none."""
    sizes: dict[str, int] = {}
    with page.whatever_is_there():
        sizes = storage.sizes(FOLDER)
    benches = dict.fromkeys(path.split("/")[1] for path in sizes if path.count("/") > 1)
    found = []
    for name in list(benches)[:_MOST_BENCHES]:
        with page.whatever_is_there():
            found.append(_bench(storage, sizes, name))
    return found


def headline(benches: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """The figures at the top of the page."""
    return [pair for bench in benches for pair in bench["headline"]][:_HEADLINES]


def _bench(storage: Storage, sizes: Mapping[str, int], name: str) -> dict[str, Any]:
    folder = f"{FOLDER}/{name}"
    told = _json(storage, sizes, f"{folder}/scores.json")
    about, methods = mapping(told.get("bench")), _methods(told)
    measures = figures.measures(told.get("measures"))
    ablation = differences.ablation(_json(storage, sizes, f"{folder}/ablation.json"))
    trials = bool(ablation) and all(_is_trial(method, ablation) for method in methods)
    return {
        "name": words(name),
        "title": words(about.get("title") or name, 160),
        "told": _told(methods, told),
        "few": _few(methods),
        "most_few": FEW_CLUSTERS,
        "tables": _tables(methods, measures, _paper(told)),
        "paper": bool(_paper(told)),
        "missing": any(method.missing for method in methods),
        "trials": trials,
        "charts": _arm_charts(ablation) if trials else _charts(methods, measures),
        "ablation": ablation,
        "sheets": _sheets(storage, sizes, folder),
        "comparisons": _comparisons(storage, sizes, folder, methods),
        "settings": _settings(about, methods),
        "headline": _headline(ablation, methods if not trials else []),
    }


def _json(storage: Storage, sizes: Mapping[str, int], path: str) -> dict[str, Any]:
    """A JSON object; {} where there is none, or none of a sensible size."""
    return page.read_json(storage, path) if 0 < sizes.get(path, 0) <= _MOST_JSON else {}


def _methods(told: Mapping[str, Any]) -> list[_Method]:
    found = []
    for name, each in list(mapping(told.get("methods")).items())[: figures.MOST_LINES]:
        of = mapping(each)
        means = {measure: figure(mean) for measure, mean in mapping(of.get("means")).items()}
        title, native = words(of.get("title") or name), of.get("native") is not False
        missing = _missing(mapping(of.get("missing")))
        found.append(_Method(name, title, native, mapping(of.get("settings")), means, missing))
    return found


def _missing(told: Mapping[str, Any]) -> str:
    looked_for, not_found = (figures.count(told.get(n)) for n in ("looked_for", "not_found"))
    if not 0 <= not_found <= looked_for or not looked_for:
        return ""
    return f"{not_found:,} of {looked_for:,} not found"


def _is_trial(method: _Method, ablation: Mapping[str, Any]) -> bool:
    """Whether it is one seed of an arm, which the ablation's tables sum up."""
    match = _TRIAL.fullmatch(method.name)
    return bool(match and match[1] in ablation["titles"])


# --- words ------------------------------------------------------------------------------


def _told(methods: Sequence[_Method], told: Mapping[str, Any]) -> list[str]:
    """Sentences on what was evaluated."""
    if not any(method.pictures for method in methods):
        return []
    pictures = _range([method.pictures for method in methods])
    references = _range([method.references for method in methods])
    sentences = [f"{references} references, {pictures} pictures of each method"]
    if resamples := figures.count(told.get("resamples")):
        sentences.append(f"intervals by {resamples:,} resamples of references")
    if left := len(mapping(told.get("methods"))) - len(methods):
        sentences.append(f"{left:,} further methods are in scores.json")
    return sentences


def _range(counts: Sequence[int]) -> str:
    least, most = min(counts), max(counts)
    return f"{most:,}" if least == most else f"{least:,} to {most:,}"


def _few(methods: Sequence[_Method]) -> int:
    """References, where they are so few that intervals are too narrow; else 0."""
    counts = [method.references for method in methods if method.references]
    return min(counts) if counts and min(counts) < FEW_CLUSTERS else 0


def _headline(ablation: Mapping[str, Any], methods: Sequence[_Method]) -> list[tuple[str, str]]:
    """What an SSR method reaches: all three right, else DINO-M or DINO with CLIP-T."""
    means, title = _leader(ablation, methods)
    selected = means.get("selected", figures.NOTHING).mean
    if selected is not None:
        return [(f"{title}: all three right", f"{100 * selected:.0f} %")]
    pairs = []
    for names in ((("dino_m", "DINO-M"), ("dino", "DINO")), (("clip_t", "CLIP-T"),)):
        known = [(n, s) for n, s in names if means.get(n, figures.NOTHING).mean is not None]
        for name, said in known[:1]:
            pairs.append((f"{title}: {said}", figures.shown(means[name].mean, 3)))
    return pairs


def _leader(
    ablation: Mapping[str, Any], methods: Sequence[_Method]
) -> tuple[Mapping[str, Figure], str]:
    """Figures and title of the SSR method that the page begins with."""
    for kind in _SSR:
        for method in methods:
            if method.settings.get("method") == kind:
                return method.means, method.title
    full = ablation.get("means", {}).get("full", {})
    return full, f"SSR ({ablation['titles']['full']})" if full else ""


def _settings(
    about: Mapping[str, Any], methods: Sequence[_Method]
) -> list[tuple[str, list[tuple[str, str]]]]:
    """What the bench is, and what each method drew with; credentials never."""
    tables = [("bench", mapping(about.get("settings")))]
    tables += [(method.title, method.settings) for method in methods]
    shown = []
    for title, settings in tables:
        with page.whatever_is_there():
            lines = page.flat(settings)[:_MOST_SETTINGS]
            shown.append((title, [(words(key, 60), words(value, 120)) for key, value in lines]))
    return [(title, lines) for title, lines in shown if lines]


# --- tables -----------------------------------------------------------------------------


def _paper(told: Mapping[str, Any]) -> dict[str, dict[str, Figure]]:
    """The paper's figures by its method."""
    lines = list(mapping(told.get("paper")).items())[: figures.MOST_LINES]
    return {
        words(title): {name: figure({"mean": value}) for name, value in mapping(found).items()}
        for title, found in lines
    }


def _tables(
    methods: Sequence[_Method],
    measures: Sequence[Measure],
    paper: Mapping[str, Mapping[str, Figure]],
) -> list[Table]:
    tables = []
    for title, group in figures.groups(measures, [method.means for method in methods]):
        best = {measure.name: leaders(measure, methods) for measure in group}
        lines: list[dict[str, Any]] = [
            {
                "title": method.title,
                "tag": "" if method.native else "pictures from a folder",
                "cells": [_cell(m, method, method.name in best[m.name]) for m in group],
            }
            for method in methods
        ]
        for name, found in paper.items():
            of = [found.get(measure.name, figures.NOTHING).mean for measure in group]
            if any(mean is not None for mean in of):
                cells = [
                    {"mean": figures.shown(mean, measure.digits)}
                    for mean, measure in zip(of, group, strict=True)
                ]
                lines.append({"title": name, "tag": "the paper’s", "paper": True, "cells": cells})
        head = ["Method", *map(figures.heading, group)]
        looked = figures.looked(group)
        tables.append({"title": title, "head": head, "lines": lines, "looked": looked})
    return tables


def leaders(measure: Measure, methods: Sequence[Any]) -> set[str]:
    """Methods of a column that are marked: the best mean, and all whose intervals overlap its own,
    which the figures do not tell apart. None where that is all of them.
    """
    found = {method.name: method.means.get(measure.name, figures.NOTHING) for method in methods}
    found = {name: of for name, of in found.items() if of.mean is not None}
    if not found:
        return set()
    first = max(found.values(), key=lambda of: measure.sign * (of.mean or 0.0))
    marked = {name for name, of in found.items() if of.overlaps(first)}
    return marked if len(marked) < len(found) else set()


def _cell(measure: Measure, method: _Method, best: bool) -> dict[str, Any]:
    found = method.means.get(measure.name, figures.NOTHING)
    some = 0 < found.samples < method.pictures
    notes = [
        f"of {found.samples:,}" if some else "",
        method.missing if measure.name == "dino_m" and found.samples else "",
    ]
    return {
        "mean": figures.shown(found.mean, measure.digits),
        "small": figures.interval(found, measure.digits),
        "note": "; ".join(note for note in notes if note),
        "best": best,
    }


# --- pictures ---------------------------------------------------------------------------


def _charts(methods: Sequence[_Method], measures: Sequence[Measure]) -> list[str]:
    return _drawn(measures, [(method.title, method.means) for method in methods])


def _arm_charts(ablation: Mapping[str, Any]) -> list[str]:
    titles = ablation["titles"]
    return _drawn(
        ablation["measures"], [(titles[arm], of) for arm, of in ablation["means"].items()]
    )


def _drawn(
    measures: Sequence[Measure], lines: Iterable[tuple[str, Mapping[str, Figure]]]
) -> list[str]:
    """The leading measures, with a whisker for each line that has a figure."""
    known = {measure.name: measure for measure in measures}
    shown, drawn = list(lines)[:_CHART_LINES], []
    for measure in (known[name] for name in _LEADING if name in known):
        rows = [
            (title, found.mean, found.low, found.high)
            for title, means in shown
            if (found := means.get(measure.name, figures.NOTHING)).mean is not None
        ]
        better = f"{measure.title}: {measure.better} is better"
        drawn.append(charts.intervals(better, rows))
    return [chart for chart in drawn if chart][:_CHARTS]


def _sheets(storage: Storage, sizes: Mapping[str, int], folder: str) -> list[dict[str, Any]]:
    """Sheets of pictures that are there; those that cannot be embedded only by where they lie."""
    return [
        {
            "title": title,
            "image": page.picture(storage, f"{folder}/{name}.png"),
            "path": words(f"{folder}/{name}.png", 300),
            "open": name == "grid",
        }
        for name, title in _SHEETS
        if f"{folder}/{name}.png" in sizes
    ]


def _comparisons(
    storage: Storage, sizes: Mapping[str, int], folder: str, methods: Sequence[_Method]
) -> list[dict[str, Any]]:
    titles = {method.name: method.title for method in methods}
    pattern = re.compile(rf"{re.escape(folder)}/comparisons/[^/]+/comparison\.json")
    paths = [path for path in sizes if pattern.fullmatch(path)]
    told = (_json(storage, sizes, path) for path in paths[:_MOST_COMPARISONS])
    return [shown for each in told if (shown := differences.comparison(each, titles))]
