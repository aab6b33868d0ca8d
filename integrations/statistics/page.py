"""The page of a result: tables and histograms in one HTML file, which needs no network and runs no script."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from xml.etree.ElementTree import Element

from fl_adapters.environments.report.charts import series_class, tick_text, ticks, value_text
from fl_adapters.environments.report.document import document, table, tag

from .result import Categorical, Histogram, Numeric, Statistics

_WIDTH, _HEIGHT = 300.0, 130.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 44.0, 8.0, 8.0, 24.0
_MOST_COLUMNS, _MOST_SITES, _MOST_TEXTS = 200, 24, 20
_MOST_CORRELATED = 30
_ALL = "all sites"


def page(found: Statistics, title: str = "statistics") -> str:
    """Make the page of a result.

    Args:
        found: What `describe` has found.
        title: Title of the page.

    Returns:
        An HTML document of one file.
    """
    sites = list(found.per_site)[:_MOST_SITES]
    shown = list(found.features.items())[:_MOST_COLUMNS]
    return document(
        title,
        tag("header", tag("h1", title), tag("p", _summary(found), class_="soft")),
        _absences(found),
        _section("Columns of numbers", [_numbers(found)] if _of(found, Numeric) else []),
        _section("Columns of categories", [_texts(found)] if _of(found, Categorical) else []),
        _section("By column", [_column(name, feature, found, sites) for name, feature in shown]),
        _left_out(len(found.features) - len(shown), "columns"),
        _section("Correlations", _correlations(found.correlations)),
    )


def _of(found: Statistics, kind: type) -> list[str]:
    return [name for name, feature in found.features.items() if isinstance(feature, kind)]


def _section(title: str, content: Sequence[Element]) -> Element | None:
    return tag("section", tag("h2", title), content) if content else None


def _left_out(count: int, what: str) -> Element | None:
    return tag("p", f"{count} more {what} are in the JSON file.", class_="soft") if count > 0 else None


def _summary(found: Statistics) -> str:
    sites = f"{len(found.sites)} site{'' if len(found.sites) == 1 else 's'}: {', '.join(found.sites[:12])}"
    more = f" and {len(found.sites) - 12} more" if len(found.sites) > 12 else ""
    noise = ", ".join(f"{site} (epsilon {epsilon:g})" for site, epsilon in found.noise.items())
    return f"{found.rows:,} rows of {sites}{more}." + (f" With noise: {noise}." if noise else "")


def _absences(found: Statistics) -> Element | None:
    if not found.absences:
        return None
    rows = [(absence.site, absence.feature or "every column", absence.reason) for absence in found.absences]
    listed = table(("site", "column", "why"), rows[:_MOST_COLUMNS], 3, wrap=True)
    return tag("section", tag("h2", "What is not in it"), listed, _left_out(len(rows) - _MOST_COLUMNS, "lines"))


def _numbers(found: Statistics) -> Element:
    levels = sorted({level for f in found.features.values() if isinstance(f, Numeric) for level in f.quantiles})
    heads = ("column", "count", "missing", "mean", "std", "min", *(f"{level * 100:g}%" for level in levels), "max")
    rows = []
    for name, f in found.features.items():
        if isinstance(f, Numeric):
            values = (f.mean, f.std, f.min, *(f.quantiles.get(level) for level in levels), f.max)
            rows.append((name, f"{f.count:,}", f"{f.missing:,}", *map(_text, values)))
    return table(heads, rows)


def _texts(found: Statistics) -> Element:
    rows = []
    for name, f in found.features.items():
        if isinstance(f, Categorical):
            top = next(iter(f.categories.items()), ("", 0))
            share = f"{top[1] / f.count:.0%}" if f.count else ""
            number = str(len(f.categories)) + (" and others" if f.other else "")
            rows.append((name, top[0][:60], f"{f.count:,}", f"{f.missing:,}", number, share))
    return table(("column", "most frequent", "count", "missing", "categories", "its share"), rows, 2)


def _column(name: str, feature: Numeric | Categorical, found: Statistics, sites: Sequence[str]) -> Element:
    """A column: its picture over all sites, then one for each site, at the same scale."""
    own = {site: found.per_site[site].features.get(name) for site in sites}
    parts = [(_ALL, feature), *((site, part) for site, part in own.items() if part is not None)]
    if isinstance(feature, Numeric):
        linear = [_bars(site, part.histogram, at) for at, (site, part) in _numeric(parts)]
        logarithmic = [_bars(site, part.histogram, at, log=True) for at, (site, part) in _numeric(parts)]
        pictures = [
            tag("div", linear, class_="charts"),
            _details("log scale", tag("div", logarithmic, class_="charts")),
        ]
        facts = f"{_text(feature.mean)} on average, from {_text(feature.min)} to {_text(feature.max)}"
    else:
        texts = list(feature.categories)[:_MOST_TEXTS]
        drawn = [_shares(site, part, texts, at) for at, (site, part) in _categorical(parts)]
        more = _left_out(len(feature.categories) - len(texts), "categories")
        pictures = [tag("div", drawn, class_="charts"), *([] if more is None else [more])]
        facts = f"{len(feature.categories)} categories"
    missing = (
        f"{feature.missing / (feature.count + feature.missing):.1%} missing" if feature.missing else "none missing"
    )
    return tag(
        "section",
        tag("h3", name),
        tag("p", f"{facts}; {missing}.", class_="soft"),
        pictures,
        style="margin-top: 1.6rem",
    )


def _numeric(parts: Iterable[tuple[str, object]]) -> Iterator[tuple[int, tuple[str, Numeric]]]:
    return ((at, (site, part)) for at, (site, part) in enumerate(parts) if isinstance(part, Numeric))


def _categorical(parts: Iterable[tuple[str, object]]) -> Iterator[tuple[int, tuple[str, Categorical]]]:
    return ((at, (site, part)) for at, (site, part) in enumerate(parts) if isinstance(part, Categorical))


def _details(title: str, *content: Element) -> Element:
    return tag("details", tag("summary", title), content)


def _style(at: int) -> str:
    return "all" if at == 0 else series_class(at - 1)


def _bars(site: str, histogram: Histogram | None, at: int, *, log: bool = False) -> Element:
    """A histogram: the width of a bar is that of its bin, its height the number of values."""
    if histogram is None or not any(histogram.counts):
        return tag("figure", tag("h3", site), tag("p", "no values to show", class_="soft"), class_="chart")
    low, high = histogram.edges[0], histogram.edges[-1]
    most = max(histogram.counts)
    top = math.log10(most) + 0.05 if log else most * 1.04

    def x(value: float) -> float:
        return _LEFT + (value - low) / (high - low) * (_WIDTH - _LEFT - _RIGHT)

    def y(count: float) -> float:
        share = (math.log10(count) + 0.3) / (top + 0.3) if log and count > 0 else count / top
        return _HEIGHT - _BOTTOM - max(0.0, share) * (_HEIGHT - _TOP - _BOTTOM)

    bars = []
    for left, right, count in zip(histogram.edges, histogram.edges[1:], histogram.counts, strict=False):
        if count:
            tip = tag("title", f"{value_text(left)} to {value_text(right)}: {count:,}")
            place = {"x": x(left), "y": y(count), "width": max(0.5, x(right) - x(left) - 0.6)}
            bars.append(tag("rect", tip, class_=f"bar {_style(at)}", height=y(0) - y(count), **place))
    levels = [10.0**power for power in range(int(math.log10(most)) + 1)] if log else list(ticks(0.0, most))
    axes = [_tick_y(y(level), tick_text(level)) for level in levels[:: max(1, len(levels) // 4)]]
    axes += [_tick_x(x(low), value_text(low), "start"), _tick_x(x(high), value_text(high), "end")]
    axes.append(tag("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=y(0), y2=y(0), class_="axis"))
    spoken = (
        f"histogram of {site}: {len(histogram.counts)} bins, {value_text(low)} to {value_text(high)}, up to {most:,}"
    )
    other = f"{histogram.other:,} values in no bin" if histogram.other else None
    svg = tag("svg", axes, bars, viewBox=f"0 0 {_WIDTH:g} {_HEIGHT:g}", role="img", aria_label=spoken)
    return tag("figure", tag("h3", site), svg, tag("p", other, class_="soft") if other else None, class_="chart")


def _tick_y(at: float, text: str) -> Element:
    line = tag("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=at, y2=at, class_="grid")
    return tag("g", line, tag("text", text, x=_LEFT - 5, y=at + 4, text_anchor="end"))


def _tick_x(at: float, text: str, anchor: str) -> Element:
    return tag("text", text, x=at, y=_HEIGHT - 6, text_anchor=anchor)


def _shares(site: str, feature: Categorical, texts: Sequence[str], at: int) -> Element:
    """Bars of the share of each category among the rows of a site."""
    known = {text: feature.categories.get(text, 0) for text in texts}
    rest = feature.count - sum(known.values())
    counts = {**known, **({"others": rest} if rest else {})}
    most = max([*counts.values(), 1])
    height = 20.0 * len(counts) + 6
    rows = []
    for number, (text, count) in enumerate(counts.items()):
        y, share = 20.0 * number + 4, count / max(1, feature.count)
        tip = tag("title", f"{text}: {count:,}, {share:.1%}")
        rows.append(tag("text", _shortened(text), tip, x=104, y=y + 12, text_anchor="end"))
        width = count / most * 130
        rows.append(tag("rect", class_=f"bar {_style(at)}", x=110, y=y, width=width, height=15))
        rows.append(tag("text", f"{share:.1%}", x=116 + width, y=y + 12))
    spoken = f"categories of {site}: " + ", ".join(f"{text} {count:,}" for text, count in list(counts.items())[:8])
    svg = tag("svg", rows, viewBox=f"0 0 {_WIDTH:g} {height:g}", role="img", aria_label=spoken)
    return tag("figure", tag("h3", site), svg, class_="chart")


def _shortened(text: str) -> str:
    return text if len(text) <= 15 else f"{text[:14]}…"


def _correlations(found: Mapping[str, Mapping[str, float | None]]) -> list[Element]:
    names = list(found)[:_MOST_CORRELATED]
    if len(names) < 2:
        return []
    rows = [(one, *(_cell(1.0 if one == other else found[one].get(other)) for other in names)) for one in names]
    more = _left_out(len(found) - len(names), "columns")
    return [table(("", *names), rows), *([] if more is None else [more])]


def _cell(value: float | None) -> Element | str:
    if value is None:
        return ""
    strength = round(abs(value) * 45)
    colour = "var(--c0)" if value > 0 else "var(--c1)"
    style = f"background: color-mix(in srgb, {colour} {strength}%, transparent); padding: 0 .3rem"
    return tag("span", f"{value:+.2f}", style=style)


def _text(value: float | None) -> str:
    return "" if value is None else value_text(value)
