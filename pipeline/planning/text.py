"""The plan as text for a terminal, as Markdown, and as JSON."""

from __future__ import annotations

import json
import textwrap
from dataclasses import asdict
from typing import Any

from pipeline.errors import UserError
from pipeline.planning import tables
from pipeline.planning.costs import LAYOUTS
from pipeline.planning.plan import Plan, warnings
from pipeline.planning.tables import Table
from pipeline.storage import Storage

_WIDE = 110
"""Characters of a line, but for formulas."""


def text(made: Plan, notes: list[str], explain: bool = False) -> str:
    """For a terminal of 110 columns; `explain` adds every line with its formula. `notes`: what
    calibration has to say.
    """
    parts = ["\n".join(head(made)), *(["\n".join(map(_wrapped, notes))] if notes else [])]
    parts.append(_aligned(tables.steps(made)))
    parts.append(_aligned(tables.saturation(made)))
    parts.append(_aligned(tables.margins(made), words=True))
    parts.append(f"{_aligned(tables.layouts(made))}\n{_wrapped(tables.verdict(made))}")
    warned = [_wrapped(f"warning: {line}") for line in warnings(made)]
    parts.append("\n".join([*sums(made), *warned]))
    if explain:
        parts += [_listed(table) for table in tables.lines(made)]
    return "\n\n".join(parts)


def head(made: Plan) -> list[str]:
    """The cluster and the run, in two lines."""
    cfg, given = made.cfg, made.given
    nodes = -(-cfg.gpus // cfg.gpus_per_node)
    peak = given["peak_tflops"].value
    how = "was measured" if "utilisation" in given.measured else "is assumed"
    epochs = sum(stage.value("epochs") for stage in made.stages)
    return [
        f"{cfg.gpus:,} {cfg.gpu} on {nodes:,} node{'s' * (nodes > 1)}: {peak:,.0f} TFLOP/s each, of"
        f" which training {how} to reach {peak * cfg.utilisation:,.0f}",
        f"{cfg.images:,} images, {cfg.codec}, {cfg.scales} scales: "
        f"{made.value('shards') / 1e12:,.1f} TB of shards, {made.value('images') / 1e12:,.1f} of "
        f"images; {epochs:.1f} epochs",
    ]


def sums(made: Plan) -> list[str]:
    """What all of it takes, in a few lines."""
    download = made.phase("download")
    days = f"{made.value('days'):,.2f} days: curation {made.value('days of curation'):,.2f}"
    if made.stages:
        days += f", training {made.value('days of training'):,.2f}"
    said = [
        f"In all {days}; {made.value('GPU-hours'):,.0f} GPU hours, {made.value('core-hours'):,.0f} "
        "core hours",
        f"Web: {download.value('links'):,.0f} links, {download.value('web requests'):,.0f} "
        f"requests, {download.value('names looked up'):,.0f} names, "
        f"{download.value('bytes fetched') / 1e12:,.1f} TB",
        f"Store: {made.value('bytes that stay') / 1e12:,.1f} TB that stay, "
        f"{made.value('bytes read') / 1e12:,.0f} TB read; {made.value('PUTs'):,.0f} PUT, "
        f"{made.value('GETs'):,.0f} GET, {made.value('LISTs'):,.0f} LIST",
    ]
    if cost := made.value("cost"):
        kept = made.value("cost of storage")
        months = f"{made.cfg.months:g} month{'s' * (made.cfg.months != 1)}"
        said.append(
            f"Cost: {cost:,.0f}" + (f", of it storage for {months} {kept:,.0f}" if kept else "")
        )
    return said


def markdown(made: Plan, notes: list[str]) -> str:
    """A page: the tables, and every line with its formula and source."""
    parts = ["# Plan", *head(made), *notes, *_marked(tables.steps(made))]
    parts += [*_marked(tables.saturation(made)), *_marked(tables.margins(made), words=True)]
    parts += [*_marked(tables.layouts(made)), tables.verdict(made), *sums(made)]
    parts += [f"**Warning**: {line}" for line in warnings(made)]
    for table in tables.lines(made):
        parts += _marked(table, words=True)
    return "\n\n".join(parts) + "\n"


def as_json(made: Plan, notes: list[str]) -> dict[str, Any]:
    """Settings, lines, phases with the use of each resource, layouts."""
    layouts = {layout: made.layout(layout) for layout in LAYOUTS}
    return {
        "settings": asdict(made.cfg),
        "measured": made.given.measured,
        "notes": notes,
        "warnings": warnings(made),
        "phases": [
            {
                "name": phase.name,
                "hours": phase.hours,
                "limit": phase.limit,
                "resources": [
                    {"name": r.name, "size": r.size, "use": phase.use(r), "sets_pace": r.paces}
                    for r in phase.resources
                ],
            }
            for phase in made.phases
        ],
        "layouts": {
            name: {line.name: line.value for line in other.whole} | {"fits": other.fits}
            for name, other in layouts.items()
        },
        "lines": [
            {
                "phase": line.phase,
                "name": line.name,
                "value": line.value,
                "unit": line.unit,
                "formula": line.formula,
                "source": line.source,
                "stands_on": list(line.roots),
            }
            for line in made.lines()
        ],
    }


def write(made: Plan, notes: list[str], out: str) -> str:
    """Write the plan to a file by the ending of its name, whole or not at all; returns where.

    Raises UserError where the store refuses.
    """
    storage, name = Storage.for_path(out)
    if not name:
        raise UserError(f"plan.out is {out}; name a file")
    if name.endswith(".json"):
        data = json.dumps(as_json(made, notes), indent=1, ensure_ascii=False) + "\n"
    else:
        data = markdown(made, notes)
    storage.write_bytes(name, data.encode())
    return storage.url(name)


# --- text ---


def _wrapped(line: str) -> str:
    return textwrap.fill(line, _WIDE, subsequent_indent="  ", break_on_hyphens=False)


def _aligned(table: Table, words: bool = False) -> str:
    """Columns of text: the first to the left, the others to the right unless they are `words`."""
    rows = [table.head, *table.rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if at == 0 or words else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join([table.title, *lines])


def _listed(table: Table) -> str:
    """Rows of which the last columns are long: a line each for the formula and the source."""
    lines = [table.title]
    width = max((len(row[0]) for row in table.rows), default=0)
    for name, value, *rest in table.rows:
        *formula, source = rest
        lines.append(f"  {name.ljust(width)}  {value}")
        lines += [f"      = {each}" for each in formula]
        lines.append(f"      [{source}]")
    return "\n".join(lines)


def _marked(table: Table, words: bool = False) -> list[str]:
    def row(cells: tables.Row) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    rule = ["---", *("---" if words else "---:" for _ in table.head[1:])]
    return [f"## {table.title}", "\n".join(row(cells) for cells in (table.head, rule, *table.rows))]
