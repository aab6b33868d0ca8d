"""Charts in SVG: lines over rounds, and stacked bars. They scale with the page and take its colours."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar
from xml.etree.ElementTree import Element

from fl_adapters.environments.report.document import SERIES, tag
from fl_runtime.text import printable

_Point = TypeVar("_Point")

_WIDTH, _HEIGHT = 480.0, 260.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 52.0, 12.0, 10.0, 34.0
_MOST_POINTS = 300  # of a line; more cannot be told apart at this width
_MOST_POINTS_IN_ALL = 4000  # of a chart
_MOST_DOTS = 400  # in a chart; each has a text that shows under the pointer
_LABEL_CHARS = 80
_MOST_MARKERS = 40  # of a line; beyond, its dots are there for the pointer alone
_MOST_HIDDEN = 80  # of a line; closer ones cannot be told apart by a pointer
_TICKS = 5  # about so many parts of an axis; 3 to 8


@dataclass(frozen=True)
class Line:
    """A line of a chart.

    Attributes:
        label: Its name in the legend; "" for a line that has none there.
        points: Rounds and values, in the order of rounds.
        style: Its classes in the style sheet, such as "s0" or "all".
        band: Round, lowest and highest value around the line, such as one standard deviation; empty without a band.
    """

    label: str
    points: Sequence[tuple[float, float]]
    style: str
    band: Sequence[tuple[float, float, float]] = ()


def series_class(index: int) -> str:
    """Class of the style sheet that gives a series its colour."""
    return f"s{index % SERIES}"


def line_chart(title: str, lines: Sequence[Line], mark: float | None = None) -> Element:
    """Draw lines over rounds.

    Args:
        title: What the values are.
        lines: The lines; the last one lies on top.
        mark: Round to mark as the best, or None.

    Returns:
        The chart with its title and legend.
    """
    drawn = [replace(line, label=printable(line.label, _LABEL_CHARS)) for line in lines if line.points]
    xs = [x for line in drawn for x, _ in line.points]
    ys = [y for line in drawn for _, y in line.points] + [y for line in drawn for b in line.band for y in b[1:]]
    plot = _Plot(xs, ys, "round")
    dotted = [line for line in drawn if "faint" not in line.style]
    if sum(min(len(line.points), _MOST_HIDDEN) for line in dotted) > _MOST_DOTS:
        dotted = []
    most = min(_MOST_POINTS, _MOST_POINTS_IN_ALL // max(1, len(drawn)))
    marked = None
    if mark is not None and plot.x_low <= mark <= plot.x_high:
        marked = tag("line", x1=plot.x(mark), x2=plot.x(mark), y1=_TOP, y2=_HEIGHT - _BOTTOM, class_="mark")
    svg = _svg(
        _spoken(title, drawn),
        plot.axes(),
        [_band(plot, line, most) for line in drawn if line.band],
        marked,
        [_polyline(plot, line, most) for line in drawn],
        [dot for line in dotted for dot in _dots(plot, line)],
    )
    legend = [(line.label, line.style) for line in drawn if line.label]
    return _chart(title, svg, legend if marked is None else [*legend, (f"best round: {mark:g}", "mark")])


def stacked_bars(title: str, parts: Sequence[tuple[str, Sequence[float]]], rounds: Sequence[int], unit: str) -> Element:
    """Draw a bar of parts for each round.

    Args:
        title: What the values are.
        parts: Label and values of each part; a value for each round, at least 0.
        rounds: Numbers of the rounds, one after the other.
        unit: Unit of the values.

    Returns:
        The chart with its title and legend.
    """
    step = max(1, math.ceil(len(rounds) / _MOST_POINTS))  # one bar in `step` is drawn
    totals = [sum(values[at] for _, values in parts) for at in range(0, len(rounds), step)]
    plot = _Plot([rounds[0] - 0.5, rounds[-1] + 0.5], [0.0, *totals], "round")
    width = max(0.8, (plot.x(1) - plot.x(0)) * step * 0.72)
    bars: list[Element] = []
    for at in range(0, len(rounds), step):
        below = 0.0
        for index, (label, values) in enumerate(parts):
            top, bottom = plot.y(below + values[at]), plot.y(below)
            tip = tag("title", f"round {rounds[at]}, {label}: {value_text(values[at])} {unit}")
            place = {"x": plot.x(rounds[at]) - width / 2, "y": top, "width": width, "height": bottom - top}
            bars.append(tag("rect", tip, class_=f"bar {series_class(index)}", **place))
            below += values[at]
    spoken = f"{title}: bars for rounds {rounds[0]} to {rounds[-1]}, up to {value_text(max(totals))} {unit}"
    legend = [(label, series_class(index)) for index, (label, _) in enumerate(parts)]
    return _chart(f"{title}, {unit}", _svg(spoken, plot.axes(), bars), legend)


def value_text(value: float) -> str:
    """A value in four digits."""
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e9 else f"{value:.4g}"


class _Plot:
    """Scales and axes of a chart, from the values in it."""

    def __init__(self, xs: Sequence[float], ys: Sequence[float], x_label: str) -> None:
        self.x_low, self.x_high = (min(xs), max(xs)) if xs else (0.0, 1.0)
        low, high = (min(ys), max(ys)) if ys else (0.0, 1.0)
        margin = (high - low) * 0.04 or abs(high) * 0.1 or 0.5
        self._low, self._high = low - (margin if low else 0.0), high + margin
        self._x_label = x_label

    def x(self, value: float) -> float:
        share = (value - self.x_low) / (self.x_high - self.x_low) if self.x_high > self.x_low else 0.5
        return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        return _HEIGHT - _BOTTOM - (value - self._low) / (self._high - self._low) * (_HEIGHT - _TOP - _BOTTOM)

    def axes(self) -> list[Element]:
        made: list[Element] = []
        for value in ticks(self._low, self._high):
            made.append(tag("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=self.y(value), y2=self.y(value), class_="grid"))
            made.append(tag("text", tick_text(value), x=_LEFT - 6, y=self.y(value) + 4, text_anchor="end"))
        for value in ticks(self.x_low, self.x_high, whole=True):
            made.append(tag("text", f"{value:.0f}", x=self.x(value), y=_HEIGHT - _BOTTOM + 16, text_anchor="middle"))
        base = _HEIGHT - _BOTTOM
        made.append(tag("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=base, y2=base, class_="axis"))
        made.append(tag("text", self._x_label, x=_WIDTH - _RIGHT, y=_HEIGHT - 4, text_anchor="end"))
        return made


def ticks(low: float, high: float, *, whole: bool = False) -> Iterator[float]:
    """Yield round numbers from `low` to `high`: multiples of 1, 2 or 5 times a power of ten.

    Args:
        low: Lower end.
        high: Upper end.
        whole: Yield whole numbers only.
    """
    if not high > low:
        yield low
        return
    rough = (high - low) / _TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = min((power * factor for factor in (1, 2, 5, 10)), key=lambda step: abs(math.log(step / rough)))
    step = max(1.0, step) if whole else step
    first = math.ceil(low / step - 1e-9)
    for number in range(first, math.floor(high / step + 1e-9) + 1):
        yield number * step


def tick_text(value: float) -> str:
    """A round number, short enough for an axis: "0.25", "1.5k", "20M"."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size * 0.9999 and abs(value) < size * 1e3:
            return f"{value / size:.4g}{letter}"
    return f"{value:.4g}"


def _thinned(points: Sequence[_Point], most: int) -> list[_Point]:
    """At most about `most` of the points, the last one among them."""
    step = max(1, math.ceil(len(points) / max(2, most)))
    return [*points[:-1:step], points[-1]]


def _polyline(plot: _Plot, line: Line, most: int) -> Element:
    points = " ".join(f"{plot.x(x):.1f},{plot.y(y):.1f}" for x, y in _thinned(line.points, most))
    tip = tag("title", line.label) if line.label else None
    return tag("polyline", tip, points=points, class_=f"line {line.style}")


def _band(plot: _Plot, line: Line, most: int) -> Element:
    band = _thinned(line.band, most)
    upper = [f"{plot.x(x):.1f},{plot.y(high):.1f}" for x, _, high in band]
    lower = [f"{plot.x(x):.1f},{plot.y(low):.1f}" for x, low, _ in reversed(band)]
    return tag("polygon", points=" ".join(upper + lower), class_=f"band {line.style}")


def _dots(plot: _Plot, line: Line) -> Iterator[Element]:
    many = len(line.points) > _MOST_MARKERS
    hidden = " hidden" if many else ""
    for x, y in _thinned(line.points, _MOST_HIDDEN) if many else line.points:
        tip = tag("title", f"{line.label}, round {x:g}: {value_text(y)}")
        style = f"dot {line.style}{hidden}"
        yield tag("circle", tip, cx=plot.x(x), cy=plot.y(y), r=3 if "all" in line.style else 2.4, class_=style)


def _spoken(title: str, lines: Sequence[Line]) -> str:
    """What a screen reader says in place of the picture."""
    ends = [
        f"{line.label} from {value_text(line.points[0][1])} to {value_text(line.points[-1][1])}"
        for line in lines
        if line.label
    ]
    return f"{title} by round: {'; '.join(ends[:12])}"


def _svg(spoken: str, *content: Element | Sequence[Element] | None) -> Element:
    return tag("svg", *content, viewBox=f"0 0 {_WIDTH:g} {_HEIGHT:g}", role="img", aria_label=spoken)


def _chart(title: str, svg: Element, legend: Sequence[tuple[str, str]]) -> Element:
    entries = [tag("span", tag("i", class_=style, aria_hidden="true"), label) for label, style in legend]
    return tag("figure", tag("h3", title), svg, tag("div", entries, class_="legend"), class_="chart")
