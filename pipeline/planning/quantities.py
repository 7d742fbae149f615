"""A figure of the plan: its value, and how it came about, which are made together.

Arithmetic on a `Quantity` reckons the value and writes the formula in one go, so no formula can say
another thing than was reckoned:

    rows, size = known(10_000_000, "images", "paper"), known(120_000, "B", "measured")
    sheet.put("stored", rows * size, "B")     # 1.2e12, "10,000,000 images × 120,000 B"
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

ATOM, PRODUCT, SUM = 0, 1, 2
"""How tightly a formula holds together: what is looser is put in brackets."""


@dataclass(frozen=True)
class Quantity:
    """A value with the formula that it came by, numbers put in, and where those numbers are from.

    Operands that are plain numbers stand for themselves: they need no source.
    """

    value: float
    formula: str
    sources: tuple[str, ...] = ()
    """Of the numbers in the formula: what they stand on, or the line that they are."""
    roots: tuple[str, ...] = ()
    """What all of it stands on in the end, through every line."""
    binding: int = ATOM

    def __mul__(self, other: Quantity | float) -> Quantity:
        right = _quantity(other)
        text = f"{self._within(PRODUCT)} × {right._within(PRODUCT)}"
        return self._with(right, self.value * right.value, text, PRODUCT)

    def __truediv__(self, other: Quantity | float) -> Quantity:
        right = _quantity(other)
        text = f"{self._within(PRODUCT)} / {right._within(ATOM)}"
        return self._with(right, self.value / right.value, text, PRODUCT)

    def __add__(self, other: Quantity | float) -> Quantity:
        right = _quantity(other)
        return self._with(right, self.value + right.value, f"{self.formula} + {right.formula}", SUM)

    def _within(self, binding: int) -> str:
        return self.formula if self.binding <= binding else f"({self.formula})"

    def _with(self, other: Quantity, value: float, formula: str, binding: int) -> Quantity:
        return Quantity(value, formula, *_union(self, other), binding)


def known(value: float, unit: str, source: str = "") -> Quantity:
    """A number that formulas show as it is. `unit` is one word."""
    sources = (source,) if source else ()
    return Quantity(value, measure(value, unit), sources, sources)


def least(*of: Quantity) -> Quantity:
    return _chosen("min", *of)


def largest(*of: Quantity) -> Quantity:
    return _chosen("max", *of)


def ceil(of: Quantity) -> Quantity:
    """To whole pieces, upwards; what is whole but for rounding stays, and some is one at least."""
    whole = math.ceil(of.value - 1e-9 * min(1.0, of.value))
    return Quantity(whole, f"ceil({of.formula})", of.sources, of.roots)


def floor(of: Quantity) -> Quantity:
    """To whole pieces, downwards; what is whole but for rounding stays."""
    return Quantity(math.floor(of.value + 1e-9), f"floor({of.formula})", of.sources, of.roots)


def total(of: list[Quantity]) -> Quantity:
    """The sum of one or more."""
    first, *rest = of
    for each in rest:
        first = first + each
    return first


def figure(value: float) -> str:
    """A number as formulas show it: seven digits, whole ones in full."""
    if math.isfinite(value) and (value == int(value) or abs(value) >= 1e6) and abs(value) < 1e18:
        return f"{value:,.0f}"
    return f"{value:,.7g}"


def measure(value: float, unit: str) -> str:
    """A number with its unit, of one thing in the singular."""
    if value == 1 and unit.endswith("s") and "/" not in unit:
        unit = unit[:-1]
    return f"{figure(value)} {unit}".rstrip()


def _chosen(name: str, *of: Quantity) -> Quantity:
    if len(of) == 1:
        return of[0]
    value = {"min": min, "max": max}[name](each.value for each in of)
    return Quantity(value, f"{name}({', '.join(each.formula for each in of)})", *_union(*of))


def _quantity(value: Quantity | float) -> Quantity:
    return value if isinstance(value, Quantity) else known(value, "")


def _union(*of: Quantity) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Sources and roots of several, each once, in the order in which they are met."""
    sources = dict.fromkeys(source for each in of for source in each.sources)
    roots = dict.fromkeys(root for each in of for root in each.roots)
    return tuple(sources), tuple(roots)


@dataclass(frozen=True)
class Line:
    """What the plan says in one line."""

    phase: str
    name: str
    value: float
    unit: str
    formula: str
    sources: tuple[str, ...]
    roots: tuple[str, ...]

    @property
    def source(self) -> str:
        """Where the formula's numbers are from; lines of the same phase by their names alone."""
        return "; ".join(self.sources).replace(f"line {self.phase}: ", "line ")


class Sheet:
    """The lines of one phase, in the order in which they were reckoned."""

    def __init__(self, phase: str) -> None:
        self.phase = phase
        self._lines: dict[str, Line] = {}

    def put(self, name: str, of: Quantity, unit: str) -> Quantity:
        """Write a line. Returns it as a number of its own, which other formulas show by its value
        and unit, not by its formula.
        """
        if name in self._lines:
            raise ValueError(f"{self.phase} has two lines {name!r}")
        line = Line(self.phase, name, of.value, unit, of.formula, of.sources, of.roots)
        self._lines[name] = line
        return self[name]

    def __getitem__(self, name: str) -> Quantity:
        line = self._lines[name]
        of = (f"line {self.phase}: {name}",)
        return Quantity(line.value, measure(line.value, line.unit), of, line.roots)

    def __contains__(self, name: str) -> bool:
        return name in self._lines

    def __iter__(self) -> Iterator[Line]:
        return iter(self._lines.values())
