"""Draws how many rows of each label a site has, as SVG."""

from __future__ import annotations

from collections.abc import Mapping
from xml.etree import ElementTree

from fl_adapters.environments.report.document import tag

_COLOURS = (
    "#4269d0",
    "#efb118",
    "#ff725c",
    "#6cc5b0",
    "#3ca951",
    "#ff8ab7",
    "#a463f2",
    "#97bbf5",
    "#9c6b4e",
    "#9498a0",
)
_BAR, _GAP, _WIDTH, _LEFT, _LEGEND = 18, 6, 640, 120, 150
_MOST_SITES = 60


def draw(title: str, counts: Mapping[str, Mapping[str, int]]) -> str:
    """Draw a bar for each site, with a piece for each label.

    Args:
        title: What is shown.
        counts: Site -> label -> number of rows; at most ten labels, the same at all sites. Of many sites the first 60
            are drawn.

    Returns:
        The picture as SVG. The tooltip of a piece says its number.
    """
    shown = dict(list(counts.items())[:_MOST_SITES])
    labels = list(next(iter(shown.values())))
    largest = max((sum(numbers.values()) for numbers in shown.values()), default=0) or 1
    scale = (_WIDTH - _LEFT - _LEGEND) / largest
    parts: list[ElementTree.Element] = [tag("text", title, x=0, y=14, font_weight="bold")]
    for row, (site, numbers) in enumerate(shown.items()):
        top, x = 28 + row * (_BAR + _GAP), float(_LEFT)
        parts.append(tag("text", site[:16], x=_LEFT - 8, y=top + 13, text_anchor="end"))
        for index, label in enumerate(labels):
            width = numbers[label] * scale
            tip = tag("title", f"{site}, {label}: {numbers[label]} of {sum(numbers.values())}")
            if width:
                parts.append(tag("rect", tip, x=x, y=top, width=width, height=_BAR, fill=_COLOURS[index]))
            x += width
        parts.append(tag("text", str(sum(numbers.values())), x=x + 5, y=top + 13, opacity=0.7))
    for index, label in enumerate(labels):
        top, x = 28 + index * 20, float(_WIDTH - _LEGEND + 55)
        parts.append(tag("rect", x=x, y=top, width=12, height=12, fill=_COLOURS[index]))
        parts.append(tag("text", label[:12], x=x + 18, y=top + 11))
    rows = max(len(shown), len(labels))
    more = len(counts) - len(shown)
    if more:
        parts.append(tag("text", f"and {more} more sites", x=_LEFT, y=40 + rows * (_BAR + _GAP)))
    height = 60 + rows * (_BAR + _GAP)
    style: dict[str, str | float] = {"font_family": "sans-serif", "font_size": 12, "fill": "currentColor"}
    box = tag(
        "svg", *parts, xmlns="http://www.w3.org/2000/svg", viewBox=f"0 0 {_WIDTH} {height}", width=_WIDTH, **style
    )
    return ElementTree.tostring(box, encoding="unicode")
