"""Small charts as inline SVG: bars with whiskers, and lines through points.

Every chart is 360 units wide, so that its text has full size on a phone; wider pages put several
side by side. Colours are CSS variables of ``pages/page.css``, such as ``var(--ppo)``, with one
value for the light and one for the dark theme. This file computes coordinates;
``pages/charts.svg.jinja`` writes the elements and escapes all text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any, NamedTuple

from rlhf_jax import pages

TEMPLATE = "pages/charts.svg.jinja"

WIDTH = 360
LABEL_WIDTH = 106
LABEL_LETTERS = 16
VALUE_WIDTH = 52
ROW = 26
LINE_CHART_HEIGHT = 230

Point = tuple[float, float]
Format = Callable[[float], str]


class Bar(NamedTuple):
    """One horizontal bar; `low` and `high` are the ends of its whisker, or None."""

    label: str
    value: float
    color: str
    low: float | None = None
    high: float | None = None


class Line(NamedTuple):
    """One line through points (x, y). A dashed line is a reference and has no markers.

    With ``smooth > 0`` the line goes through the mean of each point and `smooth` neighbours on
    either side, fewer towards the ends, and the points themselves are pale.
    """

    label: str
    color: str
    points: Sequence[Point]
    dashed: bool = False
    smooth: int = 0

    @property
    def trend(self) -> list[Point]:
        """The points that the line goes through."""
        means = []
        last = len(self.points) - 1
        for i in range(len(self.points)):
            # Symmetric around each point: a one-sided window would pull the ends of a rising curve.
            side = min(self.smooth, i, last - i)
            window = self.points[i - side : i + side + 1]
            means.append((fmean(x for x, _ in window), fmean(y for _, y in window)))
        return means


def percent(value: float) -> str:
    """``0.7342 -> 73%``."""
    return f"{100 * value:.0f}%"


def percent_with_tenths(value: float) -> str:
    """``0.7342 -> 73.4%``."""
    return f"{100 * value:.1f}%"


def decimals(count: int) -> Format:
    """A formatter with a fixed number of decimals."""
    return lambda value: f"{value:,.{count}f}"


def number(value: float) -> str:
    """A number with about three significant digits: ``0.123``, ``12.3``, ``1,234``."""
    whole_digits = len(f"{abs(value):.0f}") if abs(value) >= 1 else 0
    return f"{value:,.{max(0, 3 - whole_digits)}f}"


def nice_ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers inside ``low..high``, about `count` of them.

    >>> nice_ticks(0.0, 1.0)
    [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    """
    # Above 0, as the ends may be equal and the logarithm must be finite.
    span = max(high - low, 1e-12)
    unit = 10.0 ** math.floor(math.log10(span / count))
    # The first round step that makes at most `count` + 1 intervals.
    step = next(unit * m for m in (1, 2, 5, 10) if span / (unit * m) <= count + 1)
    # The tolerance keeps the last tick if the end of the axis misses it by rounding only.
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


# ----------------------------------------------------------------------------------- bar charts


def bar_chart(
    bars: Sequence[Bar],
    *,
    title: str,
    maximum: float | None = None,
    reference: float | None = None,
    reference_label: str = "",
    text: Format = number,
) -> str:
    """Horizontal bars from 0, with whiskers and with each value at the right.

    Args:
      bars: from top to bottom.
      title: description of the chart for screen readers.
      maximum: value at the right end of the axis; None takes a round number above the largest bar
        or whisker.
      reference: value of a dashed line, or None.
      reference_label: label above that line.
      text: formatter of the values.

    Returns:
      An ``svg`` element as markup, which a template writes as it is.
    """
    maximum = maximum or _round_up(max([_farthest(bar) for bar in bars] + [1e-9]))
    # About 8 units for each character, so that a long value is not cut off.
    value_width = max([VALUE_WIDTH, *(8 * len(text(bar.value)) for bar in bars)])
    axis = _Axis(maximum, (WIDTH - LABEL_WIDTH - value_width) / maximum)
    # The label of the reference line stands above the bars.
    top = 6.0 if reference is None else 22.0
    bottom = top + ROW * len(bars)
    marked = None
    if reference is not None:
        marked = {"x": axis.place(reference), "label": reference_label}
    return pages.macro(
        TEMPLATE,
        "bar_chart",
        title=title,
        width=WIDTH,
        height=round(bottom + 4),
        bars=[_bar(bar, top + i * ROW, axis, text) for i, bar in enumerate(bars)],
        axis={"x": LABEL_WIDTH, "y1": top - 2, "y2": bottom},
        reference=marked,
    )


class _Axis(NamedTuple):
    """The horizontal axis ``0..maximum`` of a bar chart; `scale` is length per unit of value."""

    maximum: float
    scale: float

    def length(self, value: float) -> float:
        """Length of a bar; a value beyond the axis is cut at its end."""
        return max(0.0, min(value, self.maximum)) * self.scale

    def place(self, value: float) -> float:
        """Horizontal coordinate."""
        return round(LABEL_WIDTH + self.length(value), 1)


def _farthest(bar: Bar) -> float:
    return bar.value if bar.high is None else bar.high


def _bar(bar: Bar, y: float, axis: _Axis, text: Format) -> dict[str, Any]:
    middle = y + ROW / 2
    label = bar.label
    if len(label) > LABEL_LETTERS:
        label = label[: LABEL_LETTERS - 1] + "…"
    hover, whisker = f"{bar.label}: {text(bar.value)}", ""
    if bar.low is not None and bar.high is not None:
        hover += f" (95% interval {text(bar.low)} to {text(bar.high)})"
        low, high = axis.place(bar.low), axis.place(bar.high)
        whisker = f"M{low} {middle}H{high}M{low} {middle - 4}v8M{high} {middle - 4}v8"
    return {
        "label": label,
        "hover": hover,
        "value": text(bar.value),
        "color": bar.color,
        "whisker": whisker,
        "middle": middle,
        "x": LABEL_WIDTH,
        "y": y + 5,
        "length": round(axis.length(bar.value), 1),
        "height": ROW - 10,
    }


def _round_up(value: float) -> float:
    """The smallest of some round numbers that is not below `value`."""
    # The power of ten below the value, of which the steps are multiples.
    unit = 10.0 ** math.floor(math.log10(value))
    steps = (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10)
    return next(unit * m for m in steps if unit * m >= value * (1 - 1e-12))


# ---------------------------------------------------------------------------------- line charts


def line_chart(
    lines: Sequence[Line],
    *,
    title: str,
    x_label: str,
    y_label: str,
    x_range: Point | None = None,
    y_range: Point | None = None,
    text: Format | None = None,
) -> str:
    """Lines and their points, with values shown on hovering; ticks are round numbers.

    Args:
      lines: drawn in order; a line without points is left out.
      title: description of the chart for screen readers.
      x_label: name of the horizontal axis.
      y_label: name of the vertical axis.
      x_range: ends of the horizontal axis; None takes those of the points.
      y_range: ends of the vertical axis; None takes those of the points, with some room.
      text: formatter of the ticks of the vertical axis, and of an axis with `x_range`.

    Returns:
      An ``svg`` element as markup, which a template writes as it is.
    """
    points = [point for line in lines for point in line.points]
    across = x_range or _padded([x for x, _ in points], 0.0)
    up = y_range or _padded([y for _, y in points], 0.08)
    frame = _Frame(across, up)
    x_ticks = _ticks(across, frame.x, text if x_range else None)
    if all(float(x).is_integer() for x, _ in points):
        # An axis of integers, such as epochs, must not have a tick at 1.5.
        x_ticks = [tick for tick in x_ticks if tick["value"].is_integer()]
    return pages.macro(
        TEMPLATE,
        "line_chart",
        title=title,
        width=WIDTH,
        height=LINE_CHART_HEIGHT,
        frame=frame,
        x_label=x_label,
        y_label=y_label,
        x_ticks=x_ticks,
        y_ticks=_ticks(up, frame.y, text),
        curves=[_curve(line, frame) for line in lines if line.points],
    )


class _Frame(NamedTuple):
    """The rectangle in which lines are drawn, and the values at its edges."""

    across: Point
    up: Point
    left: float = 46.0
    right: float = WIDTH - 16.0
    top: float = 30.0
    bottom: float = 190.0

    def x(self, value: float) -> float:
        """Horizontal coordinate of a value."""
        low, high = self.across
        return round(self.left + (value - low) / (high - low) * (self.right - self.left), 1)

    def y(self, value: float) -> float:
        """Vertical coordinate of a value."""
        low, high = self.up
        return round(self.bottom - (value - low) / (high - low) * (self.bottom - self.top), 1)


def _curve(line: Line, frame: _Frame) -> dict[str, Any]:
    marks = []
    for x, y in line.points:
        hover = f"{line.label}: {number(x)}, {number(y)}"
        marks.append({"x": frame.x(x), "y": frame.y(y), "hover": hover})
    return {
        "path": "M" + "L".join(f"{frame.x(x)} {frame.y(y)}" for x, y in line.trend),
        "color": line.color,
        "dashed": line.dashed,
        "pale": line.smooth > 0,
        # Many marks of full size would touch each other.
        "radius": 2.6 if len(marks) <= 60 else 1.2,
        "marks": marks,
    }


def _ticks(
    ends: Point,
    place: Callable[[float], float],
    text: Format | None,
) -> list[dict[str, Any]]:
    write = text or (lambda value: f"{value:,.10g}")
    ticks = nice_ticks(*ends)
    return [{"value": value, "at": place(value), "label": write(value)} for value in ticks]


def _padded(values: Sequence[float], share: float) -> Point:
    low, high = min(values), max(values)
    # An axis needs an extent also for a single value.
    if low == high:
        return low - 0.5, high + 0.5
    return low - share * (high - low), high + share * (high - low)
