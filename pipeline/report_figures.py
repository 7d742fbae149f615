"""Figures of an evaluation as its files have them: checked, and as cells of the report's tables.

Whoever wrote the files may be an enemy: a figure that is none counts as absent, text is made
visible, and what would flood the page is cut.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline import page
from pipeline.evaluation import markdown
from pipeline.evaluation.results import Measure
from pipeline.storage_faults import scrubbed

MOST_MEASURES, MOST_LINES = 40, 100
"""Columns and lines of a table."""
_HUGE = 1e9
_TITLE, _LONG = 80, 10_000

Table = dict[str, Any]
"""What the template shows: title, head, lines of cells, and notes."""


@dataclass(frozen=True)
class Figure:
    """A mean with what is known of it; None = it was not measured, or cannot be."""

    mean: float | None = None
    low: float | None = None
    high: float | None = None
    """95 % interval: both, or neither."""
    deviation: float | None = None
    """Over training seeds."""
    samples: int = 0
    clusters: int = 0

    def overlaps(self, other: Figure) -> bool:
        """Whether the intervals do; what has none may lie anywhere."""
        if self.low is None or self.high is None or other.low is None or other.high is None:
            return True
        return self.low <= other.high and other.low <= self.high


NOTHING = Figure()


def figure(found: Any, mean: str = "mean") -> Figure:
    """From a JSON object of an interval, a spread or a difference, whose mean is called `mean`."""
    if not isinstance(found, Mapping) or number(found.get(mean)) is None:
        return NOTHING
    low, high = number(found.get("low")), number(found.get("high"))
    if low is None or high is None or low > high:
        low = high = None
    return Figure(
        number(found.get(mean)),
        low,
        high,
        number(found.get("deviation")),
        count(found.get("samples")),
        count(found.get("clusters")),
    )


def number(value: Any) -> float | None:
    """A figure that a table can show."""
    return float(value) if page.is_number(value) and abs(value) < _HUGE else None


def count(value: Any) -> int:
    return int(number(value) or 0)


def mapping(value: Any) -> Mapping[str, Any]:
    """The JSON object that it should be; an empty one instead of anything else."""
    return value if isinstance(value, Mapping) else {}


def objects(value: Any, most: int = MOST_LINES) -> list[Mapping[str, Any]]:
    """The list of JSON objects that it should be, without what is none."""
    found = value if isinstance(value, list) else []
    return [item for item in found[:most] if isinstance(item, Mapping)]


def words(value: Any, most: int = _TITLE) -> str:
    """Text from a file, on one line, without credentials."""
    return page.visible(scrubbed(" ".join(str(value)[:_LONG].split())), most)


def measures(found: Any) -> list[Measure]:
    """Those that are whole."""
    known: dict[str, Measure] = {}
    for item in objects(found):
        with page.whatever_is_there():
            better, digits, backbone = item["better"], item["digits"], item.get("backbone")
            if better in ("higher", "lower") and type(digits) is int and 0 <= digits <= 9:
                looked = None if backbone is None else words(backbone, 160)
                measure = Measure(item["name"], words(item["title"]), better, digits, looked)
                known.setdefault(measure.name, measure)
    return list(known.values())[:MOST_MEASURES]


def groups(
    of: Sequence[Measure], lines: Iterable[Mapping[str, Figure]]
) -> list[tuple[str, list[Measure]]]:
    """Measures by table: those that need no backbone are exact, the others metrics. What no line
    has a figure of is left out.
    """
    measured = {name for line in lines for name, found in line.items() if found.mean is not None}
    known = [measure for measure in of if measure.name in measured]
    both = (
        ("Exact measures", [measure for measure in known if measure.backbone is None]),
        ("Metrics", [measure for measure in known if measure.backbone is not None]),
    )
    return [(title, group) for title, group in both if group]


def looked(of: Sequence[Measure]) -> list[str]:
    """What looked, and at which measures: "miniworld:clip (0f3a): CLIP-T, CLIP-I"."""
    by: dict[str, list[str]] = {}
    for measure in of:
        if measure.backbone is not None:
            by.setdefault(measure.backbone, []).append(measure.title)
    return [f"{backbone}: {', '.join(titles)}" for backbone, titles in by.items()]


def interval(found: Figure, digits: int, signed: bool = False) -> str:
    """ "[0.85, 0.94]", or nothing."""
    return markdown.bounds(found.low, found.high, digits, signed).strip()


def shown(value: float | None, digits: int, signed: bool = False) -> str:
    return markdown.number(value, digits, signed)


def heading(measure: Measure) -> str:
    """Its title, with which way is better on the line of its last word."""
    return "\u00a0".join(markdown.heading(measure).rsplit(" ", 1))
