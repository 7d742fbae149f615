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
_NAMES, _BAR = 160, 19


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

    parts = [_frame(title, _HEIGHT)]
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


def histogram(
    title: str,
    edges: Sequence[float],
    rows: Sequence[int],
    x_label: str = "",
    mark: float | None = None,
) -> str:
    """Rows by bin, of equal width whatever the bins' own (their edges are written below); `mark`
    is a bound: what lies below it is drawn as dropped.

    Args:
        edges: one more than `rows`, or as many where the last bin has no upper end.

    Returns "" where there is nothing to draw.
    """
    if not rows or not any(rows) or len(edges) not in (len(rows), len(rows) + 1):
        return ""
    first = next(n for n, count in enumerate(rows) if count)
    last = max(n for n, count in enumerate(rows) if count) + 1
    most, step = max(rows), (_WIDTH - _LEFT - _RIGHT) / (last - first)
    depth, base = _HEIGHT - _TOP - _BOTTOM, _HEIGHT - _BOTTOM
    parts = [_frame(title, _HEIGHT)]
    for tick in _ticks(0, most, 4):
        y = base - depth * tick / most
        parts.append(f'<path d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}" class="g"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" class="y">{_short(tick)}</text>')
    for n in range(first, last):
        tall = depth * rows[n] / most
        low = mark is not None and edges[n] < mark
        parts.append(
            f'<rect x="{_LEFT + (n - first) * step + 1:.1f}" y="{base - tall:.1f}" '
            f'width="{max(step - 2, 1):.1f}" height="{tall:.1f}" '
            f'class="{"dropped" if low else "kept"}"/>'
        )
    every = math.ceil((last - first) / 8)
    for n in range(first, min(last + 1, len(edges)), every):
        x = _LEFT + (n - first) * step
        parts.append(f'<text x="{x:.1f}" y="{_HEIGHT - 10}" class="x">{_short(edges[n])}</text>')
    parts.append(f'<text x="{_WIDTH - _RIGHT}" y="{_TOP - 4}" class="y">{escape(x_label)} →</text>')
    return "".join(parts) + "</svg>"


def bars(title: str, rows: Sequence[tuple[str, Mapping[str, int]]]) -> str:
    """A bar for each name, of parts in the colours of their kinds (kept, failed, transient ...).

    Returns "" where there is nothing to draw.
    """
    most = max((sum(parts.values()) for _, parts in rows), default=0)
    if not most:
        return ""
    height = _TOP + _BAR * len(rows) + 8
    drawn = [_frame(title, height)]
    kinds = list(dict.fromkeys(kind for _, parts in rows for kind, n in parts.items() if n))
    if len(kinds) > 1 or kinds[0] in ("transient", "permanent"):
        drawn.append(f'<text x="{_NAMES}" y="28">')
        drawn += [f'<tspan class="{escape(kind)}">■ {escape(kind)}  </tspan>' for kind in kinds]
        drawn.append("</text>")
    for n, (name, parts) in enumerate(rows):
        y, x, total = _TOP + n * _BAR, float(_NAMES), sum(parts.values())
        short = name if len(name) <= 22 else name[:21] + "…"
        drawn.append(f'<text x="{_NAMES - 6}" y="{y + 11}" class="y">{escape(short)}</text>')
        for kind, count in parts.items():
            width = (_WIDTH - _NAMES - 70) * count / most
            if count:
                drawn.append(
                    f'<rect x="{x:.1f}" y="{y}" width="{max(width, 1):.1f}" height="{_BAR - 5}" '
                    f'class="{escape(kind)}"/>'
                )
            x += width
        drawn.append(f'<text x="{x + 6:.1f}" y="{y + 11}">{total:,}</text>')
    return "".join(drawn) + "</svg>"


def _frame(title: str, height: int) -> str:
    return (
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {height}" role="img" '
        f'aria-label="{escape(title)}"><text x="10" y="16" class="t">{escape(title)}</text>'
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
