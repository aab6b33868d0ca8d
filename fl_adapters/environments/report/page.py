"""The page of one run, `report.html`."""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any
from xml.etree.ElementTree import Element

import yaml

from fl_adapters.environments.progress import counted, size_text
from fl_adapters.environments.report.charts import Line, line_chart, series_class, stacked_bars, value_text
from fl_adapters.environments.report.comparison import curves_chart, metrics_of, results_table, summaries
from fl_adapters.environments.report.document import SERIES, Content, document, filled, table, tag
from fl_adapters.environments.report.loading import loading_line
from fl_adapters.environments.report.phases import Phases, mean_phases, phases_by_site
from fl_adapters.environments.report.privacy import privacy_parts
from fl_adapters.environments.report.record import FilterUse, RunRecord, listed
from fl_adapters.participant.local_work.dp_sgd import EPSILON_METRIC
from fl_runtime.trainings import EVENTS, HISTORY, job_of, training_folder
from fl_runtime.transport.waiting import duration_text

_CHARTS_SHOWN = 4
# What follows keeps the page below 2 MB, whatever a run has.
_CHARTS_IN_ALL = 16
_FAINT_SITES = 24  # above it, curves of sites are drawn as one band
_SITES_LISTED = 200
_CELLS_SHOWN = 40  # of a row and of a column of a cross-site matrix
_MATRICES_SHOWN = 4
_FILTERS_LISTED = 100
_WARNINGS_LISTED = 50
_TRAININGS_LISTED = 50
_OTHERS = " for other sites"


def run_page(run: RunRecord, trainings: Sequence[RunRecord] = ()) -> str:
    """Make the page of a run.

    Args:
        run: The run.
        trainings: All trainings of the job, if its script trains more than once.

    Returns:
        An HTML document of one file.
    """
    return document(
        f"{run.name}: report",
        tag("header", tag("h1", run.name), run_summary(run)),
        _trainings(trainings),
        *run_sections(run),
    )


def _trainings(runs: Sequence[RunRecord]) -> Element | None:
    """All trainings of a script, such as those of a cross-validation, side by side."""
    if len(runs) < 2:
        return None
    items = summaries(runs[:_TRAININGS_LISTED])
    metrics = [name for name in metrics_of(items) if sum(bool(run.curve(name)) for run in runs) > 1][:2]
    charts = [curves_chart([[item] for item in items], name, "training") for name in metrics]
    text = (
        f"The script trains {len(runs)} times. What follows below is about the first; "
        f"each has its own report, such as {training_folder(Path(), 2) / 'report.html'}."
    )
    title = tag("h2", "All trainings of the script")
    return tag(
        "section",
        title,
        tag("p", text),
        results_table(items, [items], "training"),
        tag("div", charts, class_="charts"),
    )


def run_sections(run: RunRecord, titles: Collection[str] = ()) -> Iterator[Element]:
    """Yield the sections of a run's page below its title. Sections without content are left out.

    Args:
        run: The run.
        titles: Titles of the sections to make; all of them if there are none.

    Yields:
        Each section, with its title.
    """
    makers: dict[str, Callable[[RunRecord], list[Element]]] = {
        "Metrics by round": _curves,
        "Time and bytes": _costs,
        "Sites": _sites,
        "Each model on each site's data": _matrix,
        "Filters": _filters,
        "Privacy spent": lambda run: privacy_parts(run.filters.privacy.found, run.sites),
        "Warnings": _warnings,
        "Use the model": _use,
        "Settings": _settings,
        "Run it again": _repeat,
    }
    for title, make in makers.items():
        if (not titles or title in titles) and (content := make(run)):
            yield tag("section", tag("h2", title), content)


def run_summary(run: RunRecord, *, open_state: str = "not finished") -> list[Element]:
    """Return what stands below the title of a run's page: when it began, how it ended, and its main numbers.

    Args:
        run: The run.
        open_state: What it does if it has not ended.

    Returns:
        The elements.
    """
    done = [record for number, record in run.rounds.items() if number and record.finished]
    up, down = (sum(size) for size in zip(*((r.bytes_up, r.bytes_down) for r in done), strict=True)) if done else (0, 0)
    tiles = [
        ("sums" if run.is_sums else "rounds", f"{len(done)} of {run.planned}" if run.planned else str(len(done))),
        ("sites", str(len(run.sites))),
        *_best_tiles(run),
        ("time", duration_text(run.last - run.began)),
        ("sent in all", size_text(up + down)),
    ]
    made = [tag("div", tag("span", name), tag("b", value), class_="tile") for name, value in tiles]
    return [_state(run, open_state), tag("div", made, class_="tiles")]


def _state(run: RunRecord, open_state: str) -> Element:
    when = time.strftime("%d %b %Y %H:%M", time.localtime(run.began)) if run.began else "an unknown time"
    kinds = sorted({name for name in run.frameworks.values() if name})
    text = f"Began {when}" + (f", {', '.join(kinds)}. " if kinds else ". ")
    if run.failed:
        return tag("p", text, tag("strong", f"Failed: {run.failed}", class_="bad"))
    end = tag("strong", "Finished.", class_="good") if run.ended else tag("strong", f"{open_state.capitalize()}.")
    return tag("p", text, end, f" There is no best round: {run.best.missing}." if run.best.missing else None)


def _best_tiles(run: RunRecord) -> list[tuple[str, str]]:
    if run.best.round is None or run.best.round not in run.rounds:
        return []
    metrics = run.rounds[run.best.round].metrics
    names = [name for name in run.metrics if name in metrics and name != EPSILON_METRIC]
    shown = [name for name in names if not name.startswith("train_")][:2]
    return [
        ("best round", str(run.best.round)),
        *((f"{name}, best round", value_text(metrics[name])) for name in shown),
    ]


def _curves(run: RunRecord) -> list[Element]:
    everywhere = {name: run.curve(name) for name in run.metrics if name != EPSILON_METRIC}
    names = [name for name, points in everywhere.items() if points or run.site_curves(name)]
    charts = [_metric_chart(run, name) for name in names[:_CHARTS_IN_ALL]]
    shown, more = charts[:_CHARTS_SHOWN], charts[_CHARTS_SHOWN:_CHARTS_IN_ALL]
    made = [tag("div", shown, class_="charts")] if shown else []
    if more:
        summary = tag("summary", f"{counted(len(more), 'more metric')}")
        made.append(tag("details", summary, tag("div", more, class_="charts")))
    if len(names) > len(charts):
        made.append(_soft(f"{counted(len(names) - len(charts), 'further metric')} can be found in {HISTORY}."))
    return made


def _metric_chart(run: RunRecord, metric: str) -> Element:
    curves = run.site_curves(metric)
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
    phases = [mean_phases(phases_by_site(r).values()) or Phases(None, 0.0, 0.0, r.seconds) for r in records]
    seconds = _phase_columns(phases)
    sizes = [
        ("to the server", [record.bytes_up / 1e6 for record in records]),
        ("to the sites", [record.bytes_down / 1e6 for record in records]),
    ]
    made = [stacked_bars("Time of a site", seconds, numbers, "s"), stacked_bars("Bytes", sizes, numbers, "MB")]
    return [tag("div", made, class_="charts")]


def _phase_columns(phases: Sequence[Phases]) -> list[tuple[str, list[float]]]:
    """Label and seconds of each phase. Training and exchange are one phase if a site has not told them apart."""
    told = [each.training for each in phases if each.training is not None]
    if len(told) == len(phases):
        columns = [("training", told), ("exchange", [each.exchange for each in phases])]
    else:
        columns = [("training and exchange", [each.exchange + (each.training or 0.0) for each in phases])]
    return [
        *columns,
        (f"waiting{_OTHERS}", [each.waiting for each in phases]),
        ("aggregation", [each.aggregation for each in phases]),
    ]


def _sites(run: RunRecord) -> list[Element]:
    rounds = [record for number, record in run.rounds.items() if number]
    parts = {name: [record.sites[name] for record in rounds if name in record.sites] for name in run.sites}
    examples = {name: fmean([p.num_examples for p in own if p.status] or [0]) for name, own in parts.items()}
    total = sum(examples.values()) if all(examples.values()) else 0  # a site's policy may keep it
    if run.is_sums:
        examples, total = dict.fromkeys(examples, 0.0), 0  # a sum says nothing of how many rows are behind it
    curves = list(islice(((name, found) for name in run.metrics if (found := run.site_curves(name))), 2))
    phases = [phases_by_site(record) for record in rounds if record.finished]
    by_site = {name: mean_phases(each[name] for each in phases if name in each) for name in run.sites}
    spent = dict(_phase_columns([each or Phases(None, 0.0, 0.0, 0.0) for each in by_site.values()])[:-1])
    rows = []
    for at, name in enumerate(run.sites[:_SITES_LISTED]):
        own = parts[name]
        known = f"{examples[name]:,.0f}" if examples[name] else ""
        share = f"{examples[name] / total:.1%}" if total else ""
        used = sum(part.status in ("used", "carried") for part in own)
        last = [value_text(found[name][-1][1]) if name in found else "" for _, found in curves]
        rows.append(
            [
                *(name, known, share, f"{used} of {len(own)}"),
                *(value_text(seconds[at]) if by_site[name] else "" for seconds in spent.values()),
                *(size_text(sum(part.bytes_up for part in own)), size_text(sum(part.bytes_down for part in own))),
                *last,
            ]
        )
    columns = [
        *("site", "examples", "share", "updates used"),
        *(f"{phase.removesuffix(_OTHERS)}, s" for phase in spent),
        *("sent", "received"),
        *(f"last {metric}" for metric, _ in curves),
    ]
    made = [table(*filled(columns, rows))] if rows else []
    if len(run.sites) > _SITES_LISTED:
        made.append(_soft(f"{len(run.sites) - _SITES_LISTED} more sites are in {HISTORY}."))
    if any(by_site.values()):
        made.append(_soft("Seconds are means of a round."))
    return made


def _matrix(run: RunRecord) -> list[Element]:
    if not run.matrix:
        return []
    sites = list(dict.fromkeys(site for row in run.matrix.values() for site in row))
    metrics = list(dict.fromkeys(name for row in run.matrix.values() for cell in row.values() for name in cell))
    rows = dict(list(run.matrix.items())[:_CELLS_SHOWN])
    maps = [_heat_map(rows, metric, sites[:_CELLS_SHOWN]) for metric in metrics[:_MATRICES_SHOWN]]
    made = [tag("div", maps, class_="charts")]
    if max(len(sites), len(run.matrix)) > _CELLS_SHOWN or len(metrics) > _MATRICES_SHOWN:
        made.append(
            _soft(f"cross_site.csv has all {len(run.matrix)} models, {len(sites)} sites and {len(metrics)} metrics.")
        )
    return made


def _heat_map(matrix: Mapping[str, Mapping[str, Mapping[str, float]]], metric: str, sites: Sequence[str]) -> Element:
    """A table with a row for each model and a column for each site's data, coloured by value."""
    found = [cell[metric] for row in matrix.values() for cell in row.values() if metric in cell]
    values = [value for value in found if math.isfinite(value)]
    low, high = min(values, default=0.0), max(values, default=0.0)

    def cell(value: float | None) -> Element:
        if value is None or not math.isfinite(value):
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
    if not run.filters.used:
        return []
    rows: list[list[Content]] = [
        [*_filter_cells(use), _sites_text(use, run.sites)] for use in run.filters.used[:_FILTERS_LISTED]
    ]
    made = [table(["filter", "arguments", "runs at"], rows, numbers_from=3)]
    if len(run.filters.used) > _FILTERS_LISTED:
        made.append(_soft(f"{len(run.filters.used) - _FILTERS_LISTED} more are in {EVENTS}."))
    return made


def _filter_cells(use: FilterUse) -> tuple[str, Element]:
    arguments = ", ".join(f"{name}={value}" for name, value in use.settings.items() if name not in ("name", "site"))
    owner = " (the site's policy)" if use.settings.get("site") else ""
    return f"{use.settings.get('name', '')}{owner}"[:200], tag("span", arguments[:1000], class_="long")


def _sites_text(use: FilterUse, sites: Sequence[str]) -> str:
    return "all sites" if use.sites >= set(sites) else ", ".join(sorted(use.sites)[:20])


def _warnings(run: RunRecord) -> list[Element]:
    if not run.warnings:
        return []
    made = [tag("ul", [tag("li", text) for text in run.warnings[:_WARNINGS_LISTED]])]
    if len(run.warnings) > _WARNINGS_LISTED:
        made.append(_soft(f"{len(run.warnings) - _WARNINGS_LISTED} more are in {EVENTS}."))
    return made


def _use(run: RunRecord) -> list[Element]:
    lines = []
    for name, what in (("best", "The model of the best round"), ("model", "The final model")):
        if code := loading_line(run.folder / name, Path(name)):
            lines += [tag("p", what), tag("pre", code)]
    return [_soft("In the folder of the run:"), *lines] if lines else []


def _settings(run: RunRecord) -> list[Element]:
    return [tag("pre", yaml.safe_dump(dict(run.job), sort_keys=False, allow_unicode=True))] if run.job else []


def _repeat(run: RunRecord) -> list[Element]:
    if "app" not in run.job:
        return []
    if not run.command:
        again = "Give the job another name in job.yml, and submit it again:"
        return [_soft(again), tag("pre", "fl-adapters job submit job.yml --kit ADMIN_KIT")]
    started = run.command
    words = ["fl-adapters", "simulate", *(["-m"] if started.get("module") else []), str(run.job["app"])]
    words += ["--job", str(_below(started.get("directory"), run.job_folder / "job.yml"))]
    words += ["--name", f"{job_of(run.name)}-again"]
    data = started.get("data")
    if isinstance(data, Mapping) and data:
        words += [word for site, place in data.items() for word in ("--data", f"{site}={place}")]
    elif "sites" not in run.job:
        words += ["--sites", run.site_argument]
    if gpus := listed(started, "gpus"):
        words += ["--gpus", ",".join(gpus)]
    for option in ("engine", "workers"):
        if started.get(option):
            words += [f"--{option}", str(started[option])]
    if args := listed(started, "args"):
        words += ["--", *args]
    return [
        _soft(f"In {started.get('directory') or 'the folder that the run was started in'}:"),
        tag("pre", shlex.join(words)),
    ]


def _below(directory: Any, path: Path) -> Path:
    """A path as one would write it in a directory."""
    whole = path.resolve()
    above = Path(str(directory)) if directory else None
    return whole.relative_to(above) if above and whole.is_relative_to(above) else whole


def _soft(text: str) -> Element:
    return tag("p", text, class_="soft")
