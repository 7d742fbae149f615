"""A phase of a run: rows that pass through resources, of which the narrowest sets the pace."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.planning.inputs import STORAGE, UNITS
from pipeline.planning.quantities import Line, Quantity, Sheet, ceil, known, least

BITS, GIGA, KILO = known(8, "bit/B"), known(1e9, ""), known(1e3, "")
HOUR, MIB = known(3600, "s/h"), known(2**20, "B/MiB")
PART_BYTES = known(16 * 2**20, "B", STORAGE)
"""Of an object, that one PUT writes."""
RANGE_BYTES = known(8 * 2**20, "B", STORAGE)
"""Of an object, that one GET reads."""
_PAGE = known(1000, "names", STORAGE)  # of a listing


@dataclass(frozen=True)
class Resource:
    """What a phase needs, and how many rows a second of it there is."""

    name: str
    rate: Quantity
    """Rows/s that it lets through."""
    size: str
    """How large it is: "100 Gbit/s a node"."""
    mend: str
    """What to change where it is short."""
    paces: bool = True
    """False: it is told of, but sets no pace."""


@dataclass(frozen=True)
class Phase:
    """One phase as it goes on the cluster."""

    sheet: Sheet
    resources: tuple[Resource, ...]
    rows: int
    memory: float = 0.0
    """Bytes that it holds on a node at most."""

    @property
    def name(self) -> str:
        return self.sheet.phase

    @property
    def lines(self) -> list[Line]:
        return list(self.sheet)

    def value(self, line: str) -> float:
        """The value of a line; 0 where the phase has none of that name."""
        return self.sheet[line].value if line in self.sheet else 0.0

    @property
    def rate(self) -> float:
        """Rows/s."""
        return self.value("pace")

    @property
    def hours(self) -> float:
        """Wall time."""
        return self.value("wall")

    @property
    def gpu_hours(self) -> float:
        return self.value("GPU-hours")

    @property
    def narrowest(self) -> Resource:
        """What sets the pace."""
        pacing = [resource for resource in self.resources if resource.paces]
        return min(pacing, key=lambda resource: resource.rate.value)

    @property
    def limit(self) -> str:
        """The name of what sets the pace."""
        return self.narrowest.name

    def use(self, resource: Resource) -> float:
        """Share of a resource that is used at this pace; above 1 where it sets none."""
        return self.rate / resource.rate.value

    def resource(self, name: str) -> Resource:
        """The resource of this name."""
        return next(each for each in self.resources if each.name == name)


class StagePlan(Phase):
    """A training stage."""


def resource(
    sheet: Sheet, name: str, rate: Quantity, unit: str, size: str, mend: str, paces: bool = True
) -> Resource:
    """A resource, with a line of what it lets through, `unit` a second."""
    return Resource(name, sheet.put(f"{name} allow", rate, f"{unit}/s"), size, mend, paces)


def bandwidth(gbit: Quantity, row: Quantity) -> Quantity:
    """Rows/s of `row` bytes that so many Gbit/s carry."""
    return gbit * GIGA / (BITS * row)


def in_time(
    sheet: Sheet,
    rows: Quantity,
    unit: str,
    resources: Sequence[Resource],
    gpus: Quantity | None = None,
    cores: Quantity | None = None,
) -> None:
    """The lines of a phase's pace and time, and the hours of GPUs and cores that it holds."""
    pacing = [each.rate for each in resources if each.paces]
    pace = sheet.put("pace", least(*pacing), f"{unit}/s")
    wall = sheet.put("wall", rows / (pace * HOUR), "h")
    if gpus is not None:
        sheet.put("GPU-hours", wall * gpus, "GPU-hours")
    if cores is not None:
        sheet.put("core-hours", wall * cores, "core-hours")


# --- requests ---


def file_puts(size: Quantity) -> Quantity:
    """PUTs that write an object of so many bytes; larger ones are begun and ended besides."""
    if size.value <= PART_BYTES.value:
        return known(1, "PUT", STORAGE)
    return ceil(size / PART_BYTES) + known(2, "PUTs", STORAGE)


def file_gets(size: Quantity) -> Quantity:
    """GETs that read a Parquet file of so many bytes: its size, its footer, its ranges."""
    return ceil(size / RANGE_BYTES) + known(2, "GETs", STORAGE)


def unit_requests(
    sheet: Sheet, units: Quantity, read: Quantity, written: Quantity, also: int = 0
) -> None:
    """The requests of a stage over its units.

    Args:
        sheet: where they are written.
        units: how many there are.
        read: bytes of the upstream file of a unit.
        written: bytes of the file that is made of it.
        also: further small files of a unit.
    """
    marker = known(1 + also, "PUTs", UNITS)
    sheet.put("PUTs", units * (marker + file_puts(written)), "requests")
    markers = known(4, "GETs", UNITS)  # there already? thrice, and the driver's look
    sheet.put("GETs", units * (markers + file_gets(read)), "requests")
    sheet.put("LISTs", ceil(units / _PAGE) * known(2, "times", UNITS), "requests")
