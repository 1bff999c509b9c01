"""Line charts as inline SVG: no script, no font and no colour of their own, so that a page holds all it needs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 420, 190
LEFT, RIGHT, TOP, BOTTOM = 52, 8, 8, 22  # margins
MOST_POINTS = 300  # of a line; more are averaged


@dataclass(frozen=True)
class Line:
    """One curve.

    Args:
        name: in the legend.
        x: of its points, rising.
        y: as many.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]


@dataclass(frozen=True)
class Chart:
    """Curves that share their axes.

    Args:
        title: what is shown.
        lines: at least one, each with at least one point.
        band: the healthy range of y; None where there is no saying.
        x_name: what x counts.
    """

    title: str
    lines: Sequence[Line]
    band: tuple[float, float] | None = None
    x_name: str = "rollout"

    def svg(self) -> str:
        """The chart, with its colours by the classes `line-0`, `line-1`, `band`, `grid` and `axis`."""
        lines = [thinned(line) for line in self.lines]
        xs, ys = [x for line in lines for x in line.x], [y for line in lines for y in line.y]
        low, high = y_range(ys, self.band)
        x_low, x_high = min(xs), max(max(xs), min(xs) + 1e-9)

        def px(x: float) -> float:
            return LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)

        def py(y: float) -> float:
            return TOP + (high - y) / (high - low) * (HEIGHT - TOP - BOTTOM)

        parts = []
        if self.band is not None:
            top, bottom = (py(min(max(edge, low), high)) for edge in reversed(self.band))
            size = f'width="{WIDTH - LEFT - RIGHT}" height="{max(bottom - top, 0):.1f}"'
            parts.append(f'<rect class="band" x="{LEFT}" y="{top:.1f}" {size}><title>healthy</title></rect>')
        for tick in ticks(low, high):
            parts.append(
                f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{py(tick):.1f}" y2="{py(tick):.1f}"/>'
            )
            parts.append(
                f'<text class="axis" x="{LEFT - 6}" y="{py(tick) + 4:.1f}" text-anchor="end">{short(tick)}</text>'
            )
        for x, anchor in ((x_low, "start"), (x_high, "end")):
            parts.append(
                f'<text class="axis" x="{px(x):.1f}" y="{HEIGHT - 6}" text-anchor="{anchor}">{short(x)}</text>'
            )
        middle = (LEFT + WIDTH - RIGHT) / 2
        parts.append(
            f'<text class="axis" x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">{escape(self.x_name)}</text>'
        )
        for i, line in enumerate(lines):
            parts += _drawn(line, i, px, py)
        label = f"{self.title}: " + "; ".join(f"{n.name} from {short(n.y[0])} to {short(n.y[-1])}" for n in lines)
        return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'


def _drawn(line: Line, number: int, px: Callable[[float], float], py: Callable[[float], float]) -> list[str]:
    """The curve, and its last point with the value as tooltip."""
    points = [(px(x), py(y)) for x, y in zip(line.x, line.y, strict=True)]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    x, y = points[-1]
    said = escape(f"{line.name}: {short(line.y[-1])} at {short(line.x[-1])}")
    return [
        f'<polyline class="line line-{number}" points="{path}"/>',
        f'<circle class="dot dot-{number}" cx="{x:.1f}" cy="{y:.1f}" r="3"><title>{said}</title></circle>',
    ]


def thinned(line: Line) -> Line:
    """At most `MOST_POINTS` points, each the mean of its neighbours, the last one as it is; finite ones alone."""
    kept = [(x, y) for x, y in zip(line.x, line.y, strict=True) if math.isfinite(x) and math.isfinite(y)]
    size = math.ceil(len(kept) / MOST_POINTS)
    if size > 1:
        chunks = [kept[start : start + size] for start in range(0, len(kept) - 1, size)]
        kept = [(sum(x for x, _ in c) / len(c), sum(y for _, y in c) / len(c)) for c in chunks] + [kept[-1]]
    return Line(line.name, [x for x, _ in kept], [y for _, y in kept])


def y_range(ys: Sequence[float], band: tuple[float, float] | None) -> tuple[float, float]:
    """The least and the greatest y to show: all points, and of the band what lies near them."""
    low, high = min(ys), max(ys)
    if band is not None:
        reach = max(high - low, abs(high), abs(low)) or band[1] - band[0]
        low, high = min(low, max(band[0], low - reach)), max(high, min(band[1], high + reach))
    room = 0.05 * (high - low) or 0.5 * abs(high) or 0.5
    return low - room, high + room


def ticks(low: float, high: float) -> list[float]:
    """Three to six round numbers within."""
    step = 10.0 ** math.floor(math.log10((high - low) / 3))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= 5)
    first = math.ceil(low / step)
    return [step * i for i in range(first, math.floor(high / step) + 1)]


def short(x: float) -> str:
    """Few digits, as an axis has them.

    >>> short(0.30000000000000004), short(1200000.0), short(1543.2), short(2e-5)
    ('0.3', '1.2M', '1543', '2e-05')
    """
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(x) >= size:
            return f"{x / (1e3 if unit == 'k' else size):.3g}{unit}"
    return f"{x:.0f}" if x == int(x) or abs(x) >= 1000 else f"{x:.3g}"
