"""The page of one run, `report.html`."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any
from xml.etree.ElementTree import Element

import yaml

from fl_adapters.environments.progress import counted, size_text
from fl_adapters.environments.report.charts import Line, line_chart, series_class, stacked_bars, value_text
from fl_adapters.environments.report.document import SERIES, Content, document, table, tag
from fl_adapters.environments.report.loading import loading_line
from fl_adapters.environments.report.record import FilterUse, RunRecord, SiteRound
from fl_runtime.transport.waiting import duration_text

_CHARTS_SHOWN = 4
_FAINT_SITES = 24  # above it, curves of sites are drawn as one band
_SITES_LISTED = 200
_WARNINGS_LISTED = 50


def run_page(run: RunRecord) -> str:
    """Make the page of a run.

    Args:
        run: The run.

    Returns:
        An HTML document of one file.
    """
    return document(f"{run.name}: report", _head(run), *run_sections(run))


def run_sections(run: RunRecord) -> Iterator[Element]:
    """Yield the sections of a run's page below its title. Sections without content are left out."""
    makers: dict[str, Callable[[RunRecord], list[Element]]] = {
        "Metrics by round": _curves,
        "Time and bytes": _costs,
        "Sites": _sites,
        "Each model on each site's data": _matrix,
        "Filters": _filters,
        "Warnings": _warnings,
        "Use the model": _use,
        "Settings": _settings,
        "Run it again": _repeat,
    }
    for title, make in makers.items():
        if content := make(run):
            yield tag("section", tag("h2", title), content)


def _head(run: RunRecord) -> Element:
    done = [record for number, record in run.rounds.items() if number and record.finished]
    up, down = (sum(size) for size in zip(*((r.bytes_up, r.bytes_down) for r in done), strict=True)) if done else (0, 0)
    tiles = [
        ("rounds", f"{len(done)} of {run.planned}" if run.planned else str(len(done))),
        ("sites", str(len(run.sites))),
        *_best_tiles(run),
        ("time", duration_text(run.last - run.began)),
        ("to the server", size_text(up)),
        ("to the sites", size_text(down)),
    ]
    return tag(
        "header",
        tag("h1", run.name),
        _state(run),
        tag(
            "div",
            [tag("div", tag("span", name), tag("b", value), class_="tile") for name, value in tiles],
            class_="tiles",
        ),
    )


def _state(run: RunRecord) -> Element:
    when = time.strftime("%d %b %Y %H:%M", time.localtime(run.began)) if run.began else "an unknown time"
    kinds = sorted({name for name in run.frameworks.values() if name})
    text = f"Began {when}" + (f", {', '.join(kinds)}. " if kinds else ". ")
    if run.failed:
        return tag("p", text, tag("strong", f"Failed: {run.failed}", class_="bad"))
    end = tag("strong", "Finished.", class_="good") if run.ended else tag("strong", "Not finished.")
    return tag("p", text, end, f" There is no best round: {run.best.missing}." if run.best.missing else None)


def _best_tiles(run: RunRecord) -> list[tuple[str, str]]:
    if run.best.round is None or run.best.round not in run.rounds:
        return []
    metrics = run.rounds[run.best.round].metrics
    shown = [name for name in run.metrics if name in metrics and not name.startswith("train_")][:2]
    return [
        ("best round", str(run.best.round)),
        *((f"{name}, best round", value_text(metrics[name])) for name in shown),
    ]


def _curves(run: RunRecord) -> list[Element]:
    charts = [_metric_chart(run, name) for name in run.metrics if any(_points(run, name))]
    shown, more = charts[:_CHARTS_SHOWN], charts[_CHARTS_SHOWN:]
    made = [tag("div", shown, class_="charts")] if shown else []
    if more:
        summary = tag("summary", f"{counted(len(more), 'more metric')}")
        made.append(tag("details", summary, tag("div", more, class_="charts")))
    return made


def _points(run: RunRecord, metric: str) -> Iterator[Sequence[tuple[float, float]]]:
    yield run.curve(metric)
    yield from (run.curve(metric, site) for site in run.sites)


def _metric_chart(run: RunRecord, metric: str) -> Element:
    curves = {site: points for site in run.sites if (points := run.curve(metric, site))}
    everywhere = Line("all sites", run.curve(metric), "all")
    if len(curves) > _FAINT_SITES:
        lines = [Line("middle site, and lowest to highest", *_band(curves.values()))]
    elif len(curves) > SERIES:
        lines = [Line("", points, "faint") for points in curves.values()]
        lines[0] = Line("each site", lines[0].points, "faint")
    else:
        lines = [Line(site, points, series_class(at)) for at, (site, points) in enumerate(curves.items())]
    return line_chart(metric, [*lines, everywhere], run.best.round if not metric.startswith("train_") else None)


def _band(curves: Any) -> tuple[list[tuple[float, float]], str, list[tuple[float, float, float]]]:
    """The middle site of each round, its style, and the range of all sites."""
    by_round: dict[float, list[float]] = {}
    for points in curves:
        for number, value in points:
            by_round.setdefault(number, []).append(value)
    values = {number: sorted(found) for number, found in sorted(by_round.items())}
    middle = [(number, found[len(found) // 2]) for number, found in values.items()]
    return middle, series_class(0), [(number, found[0], found[-1]) for number, found in values.items()]


def _costs(run: RunRecord) -> list[Element]:
    numbers = [number for number, record in sorted(run.rounds.items()) if number and record.finished]
    if not numbers:
        return []
    records = [run.rounds[number] for number in numbers]
    phases = [_phases(list(record.sites.values()), record.seconds) for record in records]
    seconds = [(name, [phase[name] for phase in phases]) for name in phases[0]]
    sizes = [
        ("to the server", [record.bytes_up / 1e6 for record in records]),
        ("to the sites", [record.bytes_down / 1e6 for record in records]),
    ]
    made = [stacked_bars("Time", seconds, numbers, "s"), stacked_bars("Bytes", sizes, numbers, "MB")]
    return [tag("div", made, class_="charts")]


def _phases(parts: Sequence[SiteRound], whole_s: float) -> dict[str, float]:
    """Where the seconds of a round went, as seen from the server."""
    times = [part.seconds for part in parts if part.status == "used" and part.seconds <= whole_s] or [0.0]
    return {
        "all sites at work": min(times),
        "some have answered, others have not": max(times) - min(times),
        "aggregation": max(0.0, whole_s - max(times)),
    }


def _sites(run: RunRecord) -> list[Element]:
    parts = {name: [r.sites[name] for n, r in run.rounds.items() if n and name in r.sites] for name in run.sites}
    examples = {name: mean([p.num_examples for p in own if p.status] or [0]) for name, own in parts.items()}
    total = sum(examples.values())
    metrics = [name for name in run.metrics if any(run.curve(name, site) for site in run.sites)][:2]
    rows = []
    for name in run.sites[:_SITES_LISTED]:
        own = parts[name]
        used = sum(part.status in ("used", "carried") for part in own)
        last = [value_text(curve[-1][1]) if (curve := run.curve(metric, name)) else "" for metric in metrics]
        known = f"{examples[name]:,.0f}" if examples[name] else ""  # a site's policy may keep it
        share = f"{examples[name] / total:.1%}" if total and all(examples.values()) else ""
        seconds = [part.seconds for part in own if part.status]
        rows.append(
            [
                *(name, known, share, f"{used} of {len(own)}"),
                value_text(mean(seconds)) if seconds else "",
                *(size_text(sum(part.bytes_up for part in own)), size_text(sum(part.bytes_down for part in own))),
                *last,
            ]
        )
    columns = ["site", "examples", "share", "updates used", "s per round", "sent", "received"]
    made = [table([*columns, *(f"last {name}" for name in metrics)], rows)] if rows else []
    if len(run.sites) > _SITES_LISTED:
        made.append(tag("p", f"{len(run.sites) - _SITES_LISTED} more sites are in history.csv.", class_="soft"))
    return made


def _matrix(run: RunRecord) -> list[Element]:
    if not run.matrix:
        return []
    sites = list(dict.fromkeys(site for row in run.matrix.values() for site in row))
    metrics = list(dict.fromkeys(name for row in run.matrix.values() for cell in row.values() for name in cell))
    return [_heat_map(run.matrix, metric, sites) for metric in metrics]


def _heat_map(matrix: Mapping[str, Mapping[str, Mapping[str, float]]], metric: str, sites: Sequence[str]) -> Element:
    """A table with a row for each model and a column for each site's data, coloured by value."""
    values = [cell[metric] for row in matrix.values() for cell in row.values() if metric in cell]
    low, high = min(values), max(values)

    def cell(value: float | None) -> Element:
        if value is None:
            return tag("td")
        strength = 10 + 45 * ((value - low) / (high - low) if high > low else 0.5)
        style = f"background: color-mix(in srgb, var(--c0) {strength:.0f}%, transparent)"
        return tag("td", value_text(value), class_="heat", style=style)

    rows = [
        tag("tr", tag("th", model), [cell(row.get(site, {}).get(metric)) for site in sites])
        for model, row in matrix.items()
    ]
    head = tag("tr", tag("th", "model of"), [tag("th", site, class_="n") for site in sites])
    return tag(
        "figure",
        tag("h3", f"{metric}, on the data of"),
        tag("div", tag("table", head, rows), class_="scroll"),
        class_="chart",
    )


def _filters(run: RunRecord) -> list[Element]:
    if not run.filters:
        return []
    rows: list[list[Content]] = [
        [*_filter_cells(use), _sites_text(use, run.sites), _epsilon_text(use)] for use in run.filters
    ]
    return [table(["filter", "arguments", "sites", "epsilon spent, at most"], rows, numbers_from=3)]


def _filter_cells(use: FilterUse) -> tuple[str, Element]:
    arguments = ", ".join(f"{name}={value}" for name, value in use.settings.items() if name not in ("name", "site"))
    owner = " (the site's policy)" if use.settings.get("site") else ""
    return f"{use.settings.get('name', '')}{owner}"[:200], tag("span", arguments[:1000], class_="long")


def _sites_text(use: FilterUse, sites: Sequence[str]) -> str:
    return "all" if use.sites >= set(sites) else ", ".join(sorted(use.sites)[:20])


def _epsilon_text(use: FilterUse) -> str:
    return value_text(max(use.epsilon.values())) if use.epsilon else ""


def _warnings(run: RunRecord) -> list[Element]:
    return [tag("ul", [tag("li", text) for text in run.warnings[:_WARNINGS_LISTED]])] if run.warnings else []


def _use(run: RunRecord) -> list[Element]:
    lines = []
    for name, what in (("best", "The model of the best round"), ("model", "The final model")):
        if code := loading_line(run.folder / name, Path(name)):
            lines += [tag("p", what), tag("pre", code)]
    return lines


def _settings(run: RunRecord) -> list[Element]:
    return [tag("pre", yaml.safe_dump(dict(run.job), sort_keys=False, allow_unicode=True))] if run.job else []


def _repeat(run: RunRecord) -> list[Element]:
    args = run.command.get("args")
    if not isinstance(args, list) or "app" not in run.job:
        return []
    words = ["fl-adapters", "simulate", *(["-m"] if run.command.get("module") else []), str(run.job["app"])]
    words += ["--job", "job.yml", "--name", f"{run.name}-again", *(["--", *map(str, args)] if args else [])]
    where = tag("p", "In the folder that the run was started in, with its job.yml:", class_="soft")
    return [where, tag("pre", shlex.join(words))]
