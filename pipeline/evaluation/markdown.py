"""Results as Markdown: a table with a line a method, and cells that say how sure they are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pipeline.evaluation.bootstrap import Interval, Spread
from pipeline.evaluation.results import Measure

NOTHING = "–"


def heading(measure: Measure) -> str:
    """Its title, and which way is better."""
    return f"{measure.title} {'↑' if measure.better == 'higher' else '↓'}"


def cell(measure: Measure, found: Interval) -> str:
    """A mean with its interval, where it has one: "0.90 [0.85, 0.94]"."""
    return number(found.mean, measure.digits) + bounds(found.low, found.high, measure.digits)


def spread_cell(measure: Measure, found: Spread) -> str:
    """A mean over training seeds with their standard deviation: "0.90 ± 0.02"."""
    deviation = found.deviation
    beside = "" if deviation is None else f" ± {number(deviation, measure.digits)}"
    return number(found.mean, measure.digits) + beside


def number(value: float | None, digits: int, signed: bool = False) -> str:
    """A value as tables show it; the minus is one."""
    if value is None:
        return NOTHING
    shown = f"{value:{'+' if signed else ''}.{digits}f}"
    return (
        f"{0:{'+' if signed else ''}.{digits}f}" if float(shown) == 0 else shown.replace("-", "−")
    )


def bounds(low: float | None, high: float | None, digits: int, signed: bool = False) -> str:
    """ " [0.85, 0.94]"; nothing where there is no interval."""
    if low is None or high is None:
        return ""
    return f" [{number(low, digits, signed)}, {number(high, digits, signed)}]"


def table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """The first column to the left, the others, figures, to the right."""
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "".join(_line(cells) for cells in (list(map(text, header)), rule, *_texts(lines)))


def text(said: str) -> str:
    """Said in Markdown as it stands: on one line, without marks that would format or link it."""
    for mark in "\\`*_[]<>|#":
        said = said.replace(mark, f"\\{mark}")
    return " ".join(said.split())


def _texts(lines: Iterable[Sequence[str]]) -> list[list[str]]:
    return [[text(first), *rest] for first, *rest in lines]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |\n"
