"""From samples to a table: means per condition, in JSON and Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

MEASURES = {
    "target_present": "A present",
    "other_absent": "B absent",
    "nearer": "nearer to A",
    "selected": "all three",
    "distance_target": "distance to A",
    "distance_other": "distance to B",
    "peak_target": "peak on A",
    "peak_other": "peak on B",
}
"""Keys of a sample's scores (scores.py defines them), with the titles of the table's columns."""


def summarise(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means of the measures over samples, and their number; None where nothing was measured."""
    out: dict[str, Any] = {"samples": len(samples)}
    for key in MEASURES:
        values = [float(s[key]) for s in samples if s.get(key) is not None]
        out[key] = float(np.mean(values)) if values else None
    return out


def markdown(title: str, rows: Mapping[str, Mapping[str, Any]]) -> str:
    """The conditions' summaries; shares with two digits, distances with none."""
    lines = [_line([title, *MEASURES.values()]), _line(["---"] + ["---:"] * len(MEASURES))]
    for name, summary in rows.items():
        lines.append(_line([name] + [shown(key, summary.get(key)) for key in MEASURES]))
    return "\n".join(lines) + "\n"


def shown(measure: str, value: float | None) -> str:
    """A summary's value as the tables show it."""
    if value is None:
        return "–"
    return f"{value:.0f}" if measure.startswith("distance") else f"{value:.2f}"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
