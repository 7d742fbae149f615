"""The plan in tables: steps, what saturates, the layouts side by side, every line with its formula.

A table is a title, a head and rows of text, which text and Markdown show alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from pipeline.planning.costs import LAYOUTS
from pipeline.planning.inputs import ASSUMED
from pipeline.planning.phases import Phase
from pipeline.planning.plan import Plan
from pipeline.planning.quantities import Line, measure

Row = Sequence[str]
_SCALES = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
_COLUMNS = (
    ("GPUs", ("GPUs",)), ("cores", ("download cores", "cores", "driver")), ("web", ("web link",)),
    ("store", ("store",)), ("network", ("network",)), ("CPU", ("decode CPU", "node CPU")),
    ("requests", ("PUTs a prefix", "GETs a prefix")),
)  # fmt: skip
"""Columns of what saturates, and the resources that they show."""


@dataclass(frozen=True)
class Table:
    """Text in columns; of the first the words begin together, of the others the figures end so."""

    title: str
    head: Row
    rows: Sequence[Row]


def steps(made: Plan) -> Table:
    """Each phase: rows, bytes, Gbit/s, pace, what limits it, hours, money."""
    head = [
        "step", "rows", "read", "written", "Gbit/s", "rows/s", "limited by", "held", "wall",
    ]  # fmt: skip
    priced = any(phase.value("cost") for phase in made.phases)
    rows = [_step(phase) for phase in made.phases]
    if priced:
        head.append("cost")
        rows = [[*row, _money(p.value("cost"))] for row, p in zip(rows, made.phases, strict=True)]
    return Table(
        "What each step takes; Gbit/s are those that keep its cores or GPUs fed", head, rows
    )


def _step(phase: Phase) -> list[str]:
    feed = phase.value("Gbit/s to feed")
    gpus, cores = phase.gpu_hours, phase.value("core-hours")
    held = f"{gpus:,.0f} GPU h" if gpus else f"{cores:,.1f} core h" if cores else ""
    read = phase.value("bytes read") or phase.value("bytes fetched")
    return [
        phase.name, _short(phase.rows), _bytes(read), _bytes(phase.value("bytes written")),
        f"{feed:,.1f}" if feed else "", _short(phase.rate), phase.limit, held, clock(phase.hours),
    ]  # fmt: skip


def saturation(made: Plan) -> Table:
    """The share of every resource that each phase uses at its pace."""
    head, rows = ["step"], [[phase.name] for phase in made.phases]
    for title, names in _COLUMNS:
        cells = [_use(phase, names) for phase in made.phases]
        if any(cells):
            head.append(title)
            rows = [[*row, cell] for row, cell in zip(rows, cells, strict=True)]
    memory = made.cfg.node_memory_gib * 2**30
    cells = [f"{phase.memory / memory:.0%}" if phase.memory else "" for phase in made.phases]
    if any(cells):
        head.append("memory")
        rows = [[*row, cell] for row, cell in zip(rows, cells, strict=True)]
    return Table("What saturates: share that is used at the pace of the narrowest", head, rows)


def _use(phase: Phase, names: tuple[str, ...]) -> str:
    found = [phase.use(each) for each in phase.resources if each.name in names]
    return _share(found[0]) if found else ""


def margins(made: Plan) -> Table:
    """Of each phase: what sets its pace, what comes next and how near it is, what to change."""
    rows = [[phase.name, *_margin(phase)] for phase in made.phases]
    return Table("What limits each step", ["step", "limited by", "next to it", "faster by"], rows)


def _margin(phase: Phase) -> tuple[str, str, str]:
    first = phase.narrowest
    others = [each for each in phase.resources if each is not first]
    after = max(others, key=phase.use, default=None)
    following = f"{after.name}, {_share(phase.use(after))} of {after.size}" if after else ""
    return f"{first.name}, {first.size}", following, first.mend


def layouts(made: Plan) -> Table:
    """The same run with the features in each layout."""
    head = [
        "layout", "stored", "made in", "Gbit/s", "GPU h of training", "all GPU h", "days",
        "GiB a node", "limited by",
    ]  # fmt: skip
    each = [made.layout(layout) for layout in LAYOUTS]
    rows = [_layout(other) for other in each]
    if any(other.value("cost") for other in each):
        head.append("cost")
        rows = [[*row, _money(other.value("cost"))] for row, other in zip(rows, each, strict=True)]
    return Table("Layouts of the features", head, rows)


def _layout(made: Plan) -> list[str]:
    stages = made.stages
    features = sum(phase.gpu_hours for phase in made.curation if phase.name == "features")
    feed = max((stage.value("Gbit/s to feed") for stage in stages), default=0.0)
    memory = max((stage.memory for stage in stages), default=0.0) / 2**30
    limits = dict.fromkeys(stage.limit for stage in stages)
    return [
        made.cfg.codec, _bytes(made.value("shards") or made.value("images")),
        f"{features:,.0f} GPU h" if features else "", f"{feed:,.1f}",
        f"{sum(stage.gpu_hours for stage in stages):,.0f}", f"{made.value('GPU-hours'):,.0f}",
        f"{made.value('days'):,.2f}", f"{memory:,.0f}{'' if made.fits else ' (too much)'}",
        ", ".join(limits) if made.fits else "memory",
    ]  # fmt: skip


def verdict(made: Plan) -> str:
    """The cheapest and the fastest of the layouts that jobs/train.py has, on this cluster."""
    each = [made.layout(layout) for layout in LAYOUTS if layout != "images"]
    fitting = [other for other in each if other.fits]
    if not fitting:
        return "No layout fits the nodes' memory: lower shuffle_rows or lanes."
    priced = any(other.value("cost") for other in fitting)
    said = [_best("Cheapest" if priced else "Fewest GPU hours", fitting, _priced(priced))]
    said += [_best("fastest", fitting, lambda other: (other.value("days"), "days"))]
    least = min(fitting, key=lambda other: other.value("shards"))
    said += [f"smallest: {least.cfg.codec} ({_bytes(least.value('shards'))})"]
    return f"{'; '.join(said)}."


def _priced(priced: bool) -> Callable[[Plan], tuple[float, str]]:
    if priced:
        return lambda other: (other.value("cost"), "")
    return lambda other: (other.value("GPU-hours"), "GPU hours")


def _best(what: str, of: list[Plan], by: Callable[[Plan], tuple[float, str]]) -> str:
    """The least of them, and those that are as good but for half a percent."""
    least, unit = min(by(other) for other in of)
    names = [other.cfg.codec for other in of if by(other)[0] <= 1.005 * least]
    shown = _money(least) if unit != "days" else f"{least:,.2f}"
    return f"{what}: {' and '.join(names)} ({f'{shown} {unit}'.rstrip()})"


def lines(made: Plan) -> Iterator[Table]:
    """Every line with its formula and source, a table a phase; and the settings they stand on."""
    for sheet in (*(phase.sheet for phase in made.phases), made.whole):
        rows = [_line(line) for line in sheet]
        yield Table(sheet.phase, ["line", "value", "formula", "source"], rows)
    asked = [[f"--{name}", value, source] for name, value, source in made.given.asked()]
    yield Table("What this stands on", ["setting", "value", "source"], asked)


def _line(line: Line) -> Row:
    assumed = ASSUMED in line.roots and ASSUMED not in line.sources
    rests = "; rests on an assumption" if assumed else ""
    return [line.name, measure(line.value, line.unit), line.formula, line.source + rests]


# --- figures for people ---


def clock(hours: float) -> str:
    """Wall time."""
    if hours >= 48:
        return f"{hours / 24:,.1f} days"
    return f"{hours:.1f} h" if hours >= 1 else f"{max(1, math.ceil(hours * 60))} min"


def _share(use: float) -> str:
    return f"{use:.0%}" if use >= 0.005 else "<1%"


def _money(cost: float) -> str:
    return "" if cost == 0 else f"{cost:,.0f}" if cost >= 10 else f"{cost:,.2f}"


def _bytes(value: float) -> str:
    return f"{_short(value)}B" if value else ""


def _short(value: float) -> str:
    """Three digits and a scale: 1.28 M."""
    for scale, letter in _SCALES:
        if value >= scale:
            part = value / scale
            return f"{part:.3g} {letter}" if part < 999.5 else f"{part:,.0f} {letter}"
    return f"{value:,.0f} "
