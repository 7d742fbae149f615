"""What the phases cost, where prices are given, and what all of them take together."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.planning.inputs import Inputs
from pipeline.planning.phases import GIGA, KILO, Phase
from pipeline.planning.quantities import Quantity, Sheet, known, largest, total

COST = "cost"
_TB, _DAY = known(1e12, "B/TB"), known(24, "h/day")
_PRICED = (
    # what is summed, the price of it, how many of them the price is for
    (("GPU-hours",), "gpu_hour_price", None),
    (("core-hours",), "core_hour_price", None),
    (("PUTs", "LISTs"), "put_price", KILO),
    (("GETs",), "get_price", KILO),
    (("bytes read",), "egress_gb_price", GIGA),
)


def add_costs(given: Inputs, phases: Sequence[Phase]) -> None:
    """A line for each part of a phase's cost, and one for all of it."""
    for phase in phases:
        sheet, parts = phase.sheet, list[Quantity]()
        for names, price, by in _PRICED:
            found = [sheet[name] for name in names if name in sheet]
            if found and getattr(given.cfg, price):
                cost = total(found) * given[price]
                what = " and ".join(name for name in names if name in sheet)
                parts.append(sheet.put(f"cost of {what}", cost / by if by else cost, ""))
        if parts:
            sheet.put(COST, total(parts), "")


def totals(given: Inputs, curation: Sequence[Phase], training: Sequence[Phase]) -> Sheet:
    """Hours, requests, bytes that stay, days and money of the whole run."""
    sheet, phases = Sheet("in all"), [*curation, *training]
    for name, unit in (
        ("GPU-hours", "GPU-hours"), ("core-hours", "core-hours"), ("PUTs", "requests"),
        ("LISTs", "requests"), ("GETs", "requests"), ("bytes read", "B"),
    ):  # fmt: skip
        if found := [phase.sheet[name] for phase in phases if name in phase.sheet]:
            sheet.put(name, total(found), unit)
    _stored(sheet, curation, training)
    _days(sheet, curation, training)
    costs = [phase.sheet[COST] for phase in phases if COST in phase.sheet]
    if given.cfg.tb_month_price:
        kept = sheet["bytes that stay"] / _TB * given["months"] * given["tb_month_price"]
        costs.append(sheet.put("cost of storage", kept, ""))
    if costs:
        sheet.put(COST, total(costs), "")
    return sheet


def _stored(sheet: Sheet, curation: Sequence[Phase], training: Sequence[Phase]) -> None:
    of = {phase.name: phase.sheet for phase in [*curation, *training]}
    parts = [sheet.put("images", of["download"]["bytes written"], "B")]
    if "features" in of:
        parts.append(sheet.put("shards", of["features"]["bytes written"], "B"))
    kept = [phase.sheet["bytes of checkpoints that stay"] for phase in training]
    if kept:
        parts.append(sheet.put("checkpoints", total(kept), "B"))
    sheet.put("bytes that stay", total(parts), "B")


def _days(sheet: Sheet, curation: Sequence[Phase], training: Sequence[Phase]) -> None:
    """The GPUs take captions and features in turns, while the download goes on."""
    wall = {phase.name: phase.sheet["wall"] for phase in [*curation, *training]}
    gpus = total([wall[name] for name in ("captions", "features") if name in wall])
    beside = [wall[name] for name in ("metadata scan", "seal") if name in wall]
    hours = total([largest(wall["download"], gpus), *beside])
    days = [sheet.put("days of curation", hours / _DAY, "days")]
    if training:
        hours = total([wall[phase.name] for phase in training])
        days.append(sheet.put("days of training", hours / _DAY, "days"))
    sheet.put("days", total(days), "days")
