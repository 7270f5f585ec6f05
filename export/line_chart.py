"""Draw a line chart as a few kilobytes of SVG, without a plotting library."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from math import ceil, floor, log2

_WIDTH, _HEIGHT = 720, 420
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 176, 40, 48
_COLOURS = (
    *("#0b6e99", "#d9480f", "#2b8a3e", "#862e9c", "#c92a2a"),
    *("#5c940d", "#495057", "#e67700", "#15aabf", "#e64980"),
)


@dataclass(frozen=True)
class Line:
    """One line of a chart.

    Attributes:
        name: what the legend calls it.
        points: (x, y), x ascending.
        whiskers: (lowest, highest) y of each point; none are drawn where there are none.
    """

    name: str
    points: Sequence[tuple[float, float]]
    whiskers: Sequence[tuple[float, float]] = ()


@dataclass(frozen=True)
class Axes:
    """What the axes say.

    Attributes:
        x: label.
        y: label.
        logarithmic: x doubles from tick to tick, and each point's x is a tick.
    """

    x: str
    y: str
    logarithmic: bool = False


def line_chart(title: str, axes: Axes, lines: Sequence[Line]) -> str:
    """Draw a chart.

    Args:
        title: above it.
        axes: their labels.
        lines: at least one, with at least one point.

    Returns:
        The SVG document.
    """
    xs = sorted({x for line in lines for x, _ in line.points})
    ys = [y for line in lines for _, y in line.points]
    ys += [y for line in lines for pair in line.whiskers for y in pair]
    y_step = _round_step((max(ys) - min(ys)) or 1.0)
    low, high = floor(min(ys) / y_step) * y_step, ceil(max(ys) / y_step) * y_step
    if high == low:
        high = low + y_step

    def across(x: float) -> float:
        a, b, c = (log2(v) if axes.logarithmic else v for v in (xs[0], x, xs[-1]))
        return _LEFT + (b - a) / ((c - a) or 1.0) * (_WIDTH - _LEFT - _RIGHT)

    def up(y: float) -> float:
        return _HEIGHT - _BOTTOM - (y - low) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)

    x_ticks = xs if axes.logarithmic else _ticks(xs[0], xs[-1])
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        'font-family="sans-serif" font-size="12" fill="#343a40">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
        f'<text x="{_LEFT}" y="22" font-size="15">{escape(title)}</text>',
    ]
    right = _WIDTH - _RIGHT
    for tick in _ticks(low, high, y_step):
        parts.append(
            f'<path d="M{_LEFT} {up(tick):.1f}H{right}" stroke="#dee2e6"/>'
            f'<text x="{_LEFT - 8}" y="{up(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>'
        )
    for tick in x_ticks:
        parts.append(
            f'<text x="{across(tick):.1f}" y="{_HEIGHT - _BOTTOM + 18}" text-anchor="middle">'
            f"{tick:g}</text>"
        )
    middle = (_LEFT + right) / 2
    parts.append(
        f'<text x="{middle:.0f}" y="{_HEIGHT - 10}" text-anchor="middle">{escape(axes.x)}</text>'
        f'<text transform="translate(16 {(_HEIGHT - _BOTTOM + _TOP) / 2:.0f}) rotate(-90)" '
        f'text-anchor="middle">{escape(axes.y)}</text>'
    )
    for number, line in enumerate(lines):
        colour = _COLOURS[number % len(_COLOURS)]
        parts += _draw(line, colour, [(across(x), up(y)) for x, y in line.points])
        for (x, _), (bottom, top) in zip(line.points, line.whiskers, strict=False):
            parts.append(
                f'<path d="M{across(x):.1f} {up(bottom):.1f}V{up(top):.1f}" stroke="{colour}"/>'
            )
        parts.append(_legend(line, colour, number))
    return "\n".join([*parts, "</svg>", ""])


def _draw(line: Line, colour: str, points: Sequence[tuple[float, float]]) -> list[str]:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    drawn = [f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.8"/>']
    if len(points) <= 12:
        drawn += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in points]
    return drawn


def _legend(line: Line, colour: str, number: int) -> str:
    x, y = _WIDTH - _RIGHT + 16, _TOP + 8 + 18 * number
    return (
        f'<path d="M{x} {y}h22" stroke="{colour}" stroke-width="1.8"/>'
        f'<text x="{x + 28}" y="{y + 4}">{escape(line.name)}</text>'
    )


def _round_step(span: float) -> float:
    """Return a step of 1, 2 or 5 times a power of ten that gives about six ticks."""
    rough = span / 6
    power = 10.0 ** floor(log2(rough) / log2(10))
    return power * next(factor for factor in (1, 2, 5, 10) if factor * power >= rough)


def _ticks(low: float, high: float, step: float | None = None) -> list[float]:
    step = step or _round_step((high - low) or 1.0)
    first, last = ceil(low / step - 1e-9), floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]
