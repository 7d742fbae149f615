"""Line charts, bars and intervals as small SVG: no plotting library, no scripts, no fonts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

RAMP = (
    "#440154", "#482878", "#3e4a89", "#31688e", "#26828e", "#1f9e89", "#35a36b", "#6aa82f",
    "#a39a00", "#c98a00",
)  # fmt: skip
"""Ten colours of an order, all legible on white."""
COLOURS = ("#1a67d2", "#c45800", "#2b8a3e", "#763caa", "#c2255c", "#5f6368")

Points = Sequence[tuple[float, float]]

_WIDTH, _HEIGHT = 460, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 22, 34, 30
_MOST_POINTS, _FEW_POINTS = 400, 20
_MOST_TICKS = 6
_NAMES, _BAR = 160, 19
_LONG_NAMES, _LINE = 184, 24


def line_chart(
    title: str,
    series: Mapping[str, Points],
    x_label: str = "step",
    *,
    log: bool = False,
    smooth: bool = False,
    colours: Sequence[str] = COLOURS,
) -> str:
    """One chart of named lines; points that are not finite are left out, long lines thinned.

    Args:
        log: a logarithmic scale, which has no place for what is not above zero.
        smooth: each line stands behind its moving average, pale.

    Returns an SVG element, or "" when no series has a point to draw.
    """
    lines = {
        name: _finite(points, above=0.0 if log else -math.inf) for name, points in series.items()
    }
    lines = {name: points for name, points in lines.items() if points}
    if not lines:
        return ""
    xs = [x for points in lines.values() for x, _ in points]
    ys = [y for points in lines.values() for _, y in points]
    x_ticks = _ticks(min(xs), max(xs), 5)
    y_ticks = _log_ticks(min(ys), max(ys)) if log else _ticks(min(ys), max(ys), 4)
    x_range = (min(xs), max(xs))
    scale = math.log if log else float
    y_range = (scale(min(*ys, y_ticks[0])), scale(max(*ys, y_ticks[-1])))

    def px(x: float) -> float:
        share = (x - x_range[0]) / ((x_range[1] - x_range[0]) or 1.0)
        return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)

    def py(y: float) -> float:
        low, high = y_range
        share = (scale(y) - low) / (high - low) if high > low else 0.5
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)

    def path(points: Points) -> str:
        return "L".join(f"{px(x):.1f} {py(y):.1f}" for x, y in _thinned(points))

    parts = [_frame(title, _HEIGHT)]
    for tick in y_ticks:
        y = py(tick)
        parts.append(f'<path d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}" class="g"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" class="y">{_short(tick)}</text>')
    for tick in x_ticks:
        parts.append(f'<text x="{px(tick):.1f}" y="{_HEIGHT - 10}" class="x">{_short(tick)}</text>')
    parts.append(f'<text x="{_WIDTH - _RIGHT}" y="{_TOP - 4}" class="y">{escape(x_label)} →</text>')
    at = _LEFT
    for colour, (name, points) in zip(_cycle(len(lines), colours), lines.items(), strict=True):
        smoothed = smoothly(points) if smooth else points
        if smoothed is not points:
            parts.append(f'<path d="M{path(points)}" stroke="{colour}" class="l pale"/>')
        parts.append(f'<path d="M{path(smoothed)}" stroke="{colour}" class="l"/>')
        if len(points) == 1:
            x, y = points[0]
            parts.append(f'<circle cx="{px(x):.1f}" cy="{py(y):.1f}" r="3" fill="{colour}"/>')
        if len(lines) > 1:
            parts.append(f'<text x="{at}" y="28" fill="{colour}">{escape(name)}</text>')
            at += 14 + 7 * len(name)
    return "".join(parts) + "</svg>"


def smoothly(points: Points) -> Points:
    """The line's moving average, which forgets by half in a fortieth of the line; lines of less
    than twenty points stay as they are.
    """
    if len(points) < _FEW_POINTS:
        return points
    keep = 0.5 ** (40 / len(points))
    total = weight = 0.0
    smoothed = []
    for x, y in points:
        total, weight = keep * total + y, keep * weight + 1
        smoothed.append((x, total / weight))
    return smoothed


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


def intervals(title: str, rows: Sequence[tuple[str, float, float | None, float | None]]) -> str:
    """Means on one scale, one line below another: a dot for each, with a whisker from the low end
    of its interval to the high one, where it has one.

    Args:
        rows: name, mean, low and high end; a mean that is not finite is left out.

    Returns "" where there is nothing to draw.
    """
    rows = [row for row in rows if math.isfinite(row[1])]
    if not rows:
        return ""
    whiskers = [_whisker(low, high) for _, _, low, high in rows]
    ends = [mean for _, mean, _, _ in rows] + [end for pair in whiskers for end in pair]
    low, high = min(ends), max(ends)
    right, base = _WIDTH - _RIGHT, _TOP + _LINE * len(rows)

    def px(value: float) -> float:
        share = (value - low) / (high - low) if high > low else 0.5
        return _LONG_NAMES + 4 + share * (right - _LONG_NAMES - 4)

    drawn = [_frame(title, base + _BOTTOM)]
    for tick in _ticks(low, high, 4):
        drawn.append(f'<path d="M{px(tick):.1f} {_TOP - 6}V{base}" class="g"/>')
        drawn.append(f'<text x="{px(tick):.1f}" y="{base + 18}" class="x">{_short(tick)}</text>')
    for n, ((name, mean, _, _), whisker) in enumerate(zip(rows, whiskers, strict=True)):
        y = _TOP + _LINE * n + _LINE / 2 - 3
        short = name if len(name) <= 24 else name[:23] + "…"
        drawn.append(
            f'<text x="{_LONG_NAMES - 8}" y="{y + 4:.1f}" class="y">{escape(short)}</text>'
        )
        if whisker:
            start, end = map(px, whisker)
            ticks = "".join(f"M{x:.1f} {y - 4:.1f}v8" for x in (start, end))
            across = f"M{start:.1f} {y:.1f}H{end:.1f}"
            drawn.append(f'<path d="{across}{ticks}" stroke="{COLOURS[0]}" class="l"/>')
        drawn.append(f'<circle cx="{px(mean):.1f}" cy="{y:.1f}" r="4" fill="{COLOURS[0]}"/>')
    return "".join(drawn) + "</svg>"


def _whisker(low: float | None, high: float | None) -> tuple[float, ...]:
    """Both ends, or none."""
    if low is None or high is None or not (math.isfinite(low) and math.isfinite(high)):
        return ()
    return (low, high) if low <= high else ()


def _frame(title: str, height: int) -> str:
    return (
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {height}" role="img" '
        f'aria-label="{escape(title)}"><text x="10" y="16" class="t">{escape(title)}</text>'
    )


def _finite(points: Points, above: float) -> list[tuple[float, float]]:
    found = ((float(x), float(y)) for x, y in points)
    return [(x, y) for x, y in found if math.isfinite(x) and math.isfinite(y) and y > above]


def _thinned(points: Points) -> list[tuple[float, float]]:
    thinned = list(points[:: math.ceil(len(points) / _MOST_POINTS) or 1])
    if thinned[-1] != points[-1]:
        thinned.append(points[-1])
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


def _log_ticks(low: float, high: float) -> list[float]:
    """Up to about six of 1, 2, 5, 10, ... from `low` to `high`, or powers of ten over decades;
    within a narrow range round numbers.
    """
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1, 1.5, 2, 3, 4, 5, 7), (1, 2, 5), (1, 3), (1,)):
        ticks = [step * 10.0**power for power in powers for step in steps]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) <= _MOST_TICKS:
            return ticks if len(ticks) > 1 else _ticks(low, high, 4)
    return ticks[:: math.ceil(len(ticks) / _MOST_TICKS)]


def _short(value: float) -> str:
    if value and (abs(value) >= 100_000 or abs(value) < 0.001):
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:,.4g}" if abs(value) < 10_000 else f"{value / 1000:,.4g}k"


def _cycle(count: int, colours: Sequence[str]) -> list[str]:
    return [colours[i % len(colours)] for i in range(count)]
