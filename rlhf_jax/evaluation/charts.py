"""Small charts as inline SVG: bars with whiskers and lines, drawn for a phone's width and at home in dark mode.

Every chart is 360 units wide, so a phone shows its text at full size; a page lays several side by side. Colours are
names of CSS variables (``var(--ppo)``) that the page defines for light and dark. All text is escaped.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import NamedTuple

WIDTH = 360
LABEL_WIDTH = 106
LABEL_LETTERS = 16
VALUE_WIDTH = 52
ROW = 26


class Bar(NamedTuple):
    """One horizontal bar; `low` and `high` are the whisker, or None."""

    label: str
    value: float
    color: str
    low: float | None = None
    high: float | None = None


class Line(NamedTuple):
    """One line of points (x, y); a dashed line is a reference, without markers.

    With ``smooth > 0`` the line is drawn through the mean of each point and `smooth` neighbours on either side, fewer
    towards the ends, and the points themselves are pale.
    """

    label: str
    color: str
    points: Sequence[tuple[float, float]]
    dashed: bool = False
    smooth: int = 0

    @property
    def trend(self) -> Sequence[tuple[float, float]]:
        """What the line goes through."""
        sides = (min(self.smooth, i, len(self.points) - 1 - i) for i in range(len(self.points)))
        windows = (self.points[i - side : i + side + 1] for i, side in enumerate(sides))
        return [(fmean(x for x, _ in window), fmean(y for _, y in window)) for window in windows]


def percent(value: float) -> str:
    """``0.7342 -> 73%``."""
    return f"{100 * value:.0f}%"


def percent_with_tenths(value: float) -> str:
    """``0.7342 -> 73.4%``."""
    return f"{100 * value:.1f}%"


def decimals(count: int) -> Callable[[float], str]:
    """A formatter with a fixed number of decimals."""
    return lambda value: f"{value:,.{count}f}"


def number(value: float) -> str:
    """A number with about three significant digits and no noise: ``0.123``, ``12.3``, ``1,234``."""
    whole_digits = len(f"{abs(value):.0f}") if abs(value) >= 1 else 0
    return f"{value:,.{max(0, 3 - whole_digits)}f}"


def nice_ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers inside ``low..high``, about `count` of them.

    >>> nice_ticks(0.0, 1.0)
    [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    """
    span = max(high - low, 1e-12)
    unit = 10.0 ** math.floor(math.log10(span / count))
    step = next(unit * m for m in (1, 2, 5, 10) if span / (unit * m) <= count + 1)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def bar_chart(
    bars: Sequence[Bar],
    *,
    title: str,
    maximum: float | None = None,
    reference: float | None = None,
    reference_label: str = "",
    text: Callable[[float], str] = number,
) -> str:
    """Horizontal bars from 0 with 95% whiskers and the value at the right; `reference` draws a dashed upright line."""
    maximum = maximum or _round_up(max([b.high if b.high is not None else b.value for b in bars] + [1e-9]))
    value_width = max([VALUE_WIDTH, *(8 * len(text(b.value)) for b in bars)])
    scale = (WIDTH - LABEL_WIDTH - value_width) / maximum
    top = 22.0 if reference is not None else 6.0
    rows = [_bar(b, top + i * ROW, scale, maximum, text) for i, b in enumerate(bars)]
    height = top + ROW * len(bars) + 4
    if reference is not None:
        x = LABEL_WIDTH + reference * scale
        rows.append(f'<line class="reference" x1="{x:.1f}" x2="{x:.1f}" y1="16" y2="{height - 4}"/>')
        rows.append(f'<text class="tick" x="{x:.1f}" y="11" text-anchor="middle">{html.escape(reference_label)}</text>')
    rows.append(f'<line class="axis" x1="{LABEL_WIDTH}" x2="{LABEL_WIDTH}" y1="{top - 2}" y2="{height - 4}"/>')
    return _svg(title, height, rows)


def line_chart(
    lines: Sequence[Line],
    *,
    title: str,
    x_label: str,
    y_label: str,
    x_range: tuple[float, float] | None = None,
    y_range: tuple[float, float] | None = None,
    text: Callable[[float], str] | None = None,
) -> str:
    """Lines with their points (hover for numbers); ticks are round numbers, axes need not start at 0."""
    points = [p for line in lines for p in line.points]
    x_low, x_high = x_range or _padded([p[0] for p in points], 0.0)
    y_low, y_high = y_range or _padded([p[1] for p in points], 0.08)
    left, right, top, bottom = 46.0, 16.0, 30.0, 190.0

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / (x_high - x_low)
        return left + across * (WIDTH - left - right), bottom - (y - y_low) / (y_high - y_low) * (bottom - top)

    parts = [f'<text class="tick" x="0" y="12">{html.escape(y_label)}</text>']
    for y, label in _tick_labels(y_low, y_high, text):
        parts.append(_grid_line(left, WIDTH - right, place(x_low, y)[1], label))
    counts = all(float(x).is_integer() for x, _ in points)
    for x, label in _tick_labels(x_low, x_high, text if x_range else None):
        if counts and not x.is_integer():
            continue  # there is no epoch 1.5
        parts.append(f'<text class="tick" x="{place(x, y_low)[0]:.1f}" y="208" text-anchor="middle">{label}</text>')
    parts.append(f'<text class="tick" x="{WIDTH - right}" y="225" text-anchor="end">{html.escape(x_label)}</text>')
    parts += [_line(line, place) for line in lines if line.points]
    return _svg(title, 230.0, parts)


def legend(entries: Sequence[tuple[str, str]]) -> str:
    """Names with their colour, as one line of HTML; entries are (label, colour)."""
    items = "".join(f'<span><i style="background:{color}"></i>{html.escape(label)}</span>' for label, color in entries)
    return f'<div class="legend">{items}</div>'


def _svg(title: str, height: float, parts: Sequence[str]) -> str:
    name = html.escape(title)
    return f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{name}">{"".join(parts)}</svg>'


def _bar(bar: Bar, y: float, scale: float, maximum: float, text: Callable[[float], str]) -> str:
    middle, length = y + ROW / 2, max(0.0, min(bar.value, maximum)) * scale
    hover = f"{bar.label}: {text(bar.value)}"
    label = bar.label if len(bar.label) <= LABEL_LETTERS else bar.label[: LABEL_LETTERS - 1] + "…"
    if bar.low is not None and bar.high is not None:
        hover += f" (95% interval {text(bar.low)} to {text(bar.high)})"
    parts = [
        f"<g><title>{html.escape(hover)}</title>",
        f'<text class="label" x="{LABEL_WIDTH - 8}" y="{middle + 4}" text-anchor="end">{html.escape(label)}</text>',
        f'<rect x="{LABEL_WIDTH}" y="{y + 5}" width="{length:.1f}" height="{ROW - 10}" rx="2" fill="{bar.color}"/>',
    ]
    if bar.low is not None and bar.high is not None:
        a, b = (LABEL_WIDTH + max(0.0, min(v, maximum)) * scale for v in (bar.low, bar.high))
        caps = "".join(f"M{x:.1f} {middle - 4}v8" for x in (a, b))
        path = f"M{a:.1f} {middle}H{b:.1f}{caps}"
        # The halo keeps the whisker readable where it crosses its own bar.
        parts.append(f'<path class="halo" d="{path}"/><path class="whisker" d="{path}"/>')
    value = html.escape(text(bar.value))
    parts.append(f'<text class="value" x="{WIDTH - 2}" y="{middle + 4}" text-anchor="end">{value}</text></g>')
    return "".join(parts)


def _line(line: Line, place: Callable[[float, float], tuple[float, float]]) -> str:
    spots = [place(x, y) for x, y in line.points]
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in (place(x, y) for x, y in line.trend))
    pale = ' opacity=".35"' if line.smooth else ""
    if line.dashed:
        return f'<path class="reference" d="{path}"/>'
    marks = [
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{2.6 if len(spots) <= 60 else 1.2}" fill="{line.color}"{pale}>'
        f"<title>{html.escape(f'{line.label}: {number(px)}, {number(py)}')}</title></circle>"
        for (x, y), (px, py) in zip(spots, line.points, strict=True)
    ]
    return f'<path class="line" stroke="{line.color}" d="{path}"/>' + "".join(marks)


def _grid_line(left: float, right: float, y: float, label: str) -> str:
    text = f'<text class="tick" x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{label}</text>'
    return f'<line class="grid" x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>{text}'


def _tick_labels(low: float, high: float, text: Callable[[float], str] | None) -> list[tuple[float, str]]:
    return [(tick, html.escape(text(tick) if text else f"{tick:,.10g}")) for tick in nice_ticks(low, high)]


def _padded(values: Sequence[float], share: float) -> tuple[float, float]:
    low, high = min(values), max(values)
    if low == high:
        return low - 0.5, high + 0.5
    return low - share * (high - low), high + share * (high - low)


def _round_up(value: float) -> float:
    unit = 10.0 ** math.floor(math.log10(value))
    return next(unit * m for m in (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10) if unit * m >= value * (1 - 1e-12))
