"""Line charts and funnel bars as small SVG fragments: no plotting library, no scripts, no fonts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

COLOURS = ("#1a67d2", "#c45800", "#2b8a3e", "#763caa", "#c2255c", "#5f6368")

Points = Sequence[tuple[float, float]]

_WIDTH, _HEIGHT = 460, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 22, 34, 30
_MOST_POINTS = 400


def line_chart(title: str, series: Mapping[str, Points], x_label: str = "step") -> str:
    """One chart of named lines; points that are not finite are left out, long lines thinned.

    Returns an SVG element, or "" when no series has a finite point.
    """
    lines = {name: _finite(points) for name, points in series.items()}
    lines = {name: points for name, points in lines.items() if points}
    if not lines:
        return ""
    xs = [x for points in lines.values() for x, _ in points]
    ys = [y for points in lines.values() for _, y in points]
    x_ticks, y_ticks = _ticks(min(xs), max(xs), 5), _ticks(min(ys), max(ys), 4)
    x_range, y_range = (min(xs), max(xs)), (min(*ys, y_ticks[0]), max(*ys, y_ticks[-1]))

    def px(x: float) -> float:
        share = (x - x_range[0]) / ((x_range[1] - x_range[0]) or 1.0)
        return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)

    def py(y: float) -> float:
        share = (y - y_range[0]) / ((y_range[1] - y_range[0]) or 1.0)
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)

    parts = [
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="{escape(title)}"><text x="{_LEFT}" y="14" class="t">{escape(title)}</text>'
    ]
    for tick in y_ticks:
        y = py(tick)
        parts.append(f'<path d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}" class="g"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" class="y">{_short(tick)}</text>')
    for tick in x_ticks:
        parts.append(f'<text x="{px(tick):.1f}" y="{_HEIGHT - 10}" class="x">{_short(tick)}</text>')
    parts.append(f'<text x="{_WIDTH - _RIGHT}" y="{_TOP - 4}" class="y">{escape(x_label)} →</text>')
    at = _LEFT
    for colour, (name, points) in zip(_cycle(len(lines)), lines.items(), strict=True):
        path = "L".join(f"{px(x):.1f} {py(y):.1f}" for x, y in points)
        parts.append(f'<path d="M{path}" stroke="{colour}" class="l"/>')
        if len(points) == 1:
            x, y = points[0]
            parts.append(f'<circle cx="{px(x):.1f}" cy="{py(y):.1f}" r="3" fill="{colour}"/>')
        if len(lines) > 1:
            parts.append(f'<text x="{at}" y="28" fill="{colour}">{escape(name)}</text>')
            at += 14 + 7 * len(name)
    return "".join(parts) + "</svg>"


def bar(parts: Sequence[tuple[str, int]], full: int) -> str:
    """One bar of the funnel: kept, dropped and failed shares of `full` rows, in their colours."""
    pieces, x = [], 0.0
    for kind, rows in parts:
        width = 100.0 * rows / full if full else 0.0
        pieces.append(
            f'<rect x="{x:.2f}" y="0" width="{width:.2f}" height="10" class="{escape(kind)}"/>'
        )
        x += width
    return (
        '<svg class="bar" viewBox="0 0 100 10" preserveAspectRatio="none" role="img">'
        + "".join(pieces)
        + "</svg>"
    )


def _finite(points: Points) -> list[tuple[float, float]]:
    kept = [(float(x), float(y)) for x, y in points if math.isfinite(x) and math.isfinite(y)]
    stride = math.ceil(len(kept) / _MOST_POINTS) or 1
    thinned = kept[::stride]
    if kept and thinned[-1] != kept[-1]:
        thinned.append(kept[-1])
    return thinned


def _ticks(low: float, high: float, most: int) -> list[float]:
    """About `most` round numbers from at or below `low` on, at most at or above `high`."""
    if high <= low:
        return [low]
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= raw * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)] or [low]


def _short(value: float) -> str:
    if value and (abs(value) >= 100_000 or abs(value) < 0.001):
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:,.4g}" if abs(value) < 10_000 else f"{value / 1000:,.4g}k"


def _cycle(count: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(count)]
