"""The page of several runs side by side: what differs in their settings, and their curves on one axis."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any
from xml.etree.ElementTree import Element

from fl_adapters.environments.progress import size_text
from fl_adapters.environments.report.charts import Line, line_chart, series_class, value_text
from fl_adapters.environments.report.document import Content, document, table, tag
from fl_adapters.environments.report.record import RunRecord
from fl_runtime.transport.waiting import duration_text

_SEED = "seed"
_OWN = ("name",)  # fields of a job that differ between any two runs, and say nothing
_CHARTS_SHOWN = 8


@dataclass(frozen=True)
class Summary:
    """One run in a comparison.

    Attributes:
        name: Name of the run, made unique by its folder where two have the same.
        run: The run.
        settings: Fields of its job file, and arguments of its script.
        best: Metrics of its best round, or of its last one if it has no best.
    """

    name: str
    run: RunRecord
    settings: Mapping[str, Any]
    best: Mapping[str, float]


def summaries(runs: Sequence[RunRecord]) -> list[Summary]:
    """Sum up runs for a comparison.

    Args:
        runs: The runs.

    Returns:
        A summary for each, in order.
    """
    names = [run.name for run in runs]
    made = []
    for run in runs:
        name = run.name if names.count(run.name) == 1 else str(run.folder)
        job = {field: value for field, value in run.job.items() if field not in _OWN}
        args = run.command.get("args")
        settings = {**job, "arguments": " ".join(map(str, args))} if isinstance(args, list) and args else job
        last = max((number for number, record in run.rounds.items() if record.metrics), default=None)
        shown = run.best.round if run.best.round in run.rounds else last
        made.append(Summary(name, run, settings, run.rounds[shown].metrics if shown is not None else {}))
    return made


def different_settings(items: Sequence[Summary]) -> dict[str, list[str]]:
    """Return the settings in which runs differ.

    Args:
        items: The runs.

    Returns:
        By setting, its value in each run; "" where a run does not name it.
    """
    fields = dict.fromkeys(field for item in items for field in item.settings)
    values = {field: [_text(item.settings.get(field)) for item in items] for field in fields}
    return {field: found for field, found in values.items() if len(set(found)) > 1}


def comparison_page(items: Sequence[Summary]) -> str:
    """Make the page that compares runs.

    Runs whose settings differ in nothing but the seed are one curve: their mean, with a band of one standard deviation.

    Args:
        items: The runs.

    Returns:
        An HTML document of one file.
    """
    title = f"Comparison of {len(items)} runs"
    return document(title, tag("h1", title), _sections(items))


def _sections(items: Sequence[Summary]) -> Iterator[Element]:
    yield tag("section", tag("h2", "Results"), _results(items))
    differences = different_settings(items)
    if differences:
        rows: list[list[Content]] = [
            [field, *(tag("span", value, class_="long") for value in values)] for field, values in differences.items()
        ]
        columns = ["setting", *(item.name for item in items)]
        content: Element = table(columns, rows, numbers_from=len(columns))
    else:
        content = tag("p", "All settings that are on record are the same.")
    yield tag("section", tag("h2", "Settings that differ"), content)
    charts = [_chart(items, metric) for metric in _metrics(items) if any(item.run.curve(metric) for item in items)]
    if charts:
        yield tag("section", tag("h2", "Metrics by round"), tag("div", charts[:_CHARTS_SHOWN], class_="charts"))


def _metrics(items: Sequence[Summary]) -> list[str]:
    return list(dict.fromkeys(name for item in items for name in item.run.metrics))


def _results(items: Sequence[Summary]) -> Element:
    metrics = [name for name in _metrics(items) if any(name in item.best for item in items)][:4]
    rows = []
    for item in items:
        run = item.run
        done = sum(record.finished for number, record in run.rounds.items() if number)
        sizes = sum(record.bytes_up + record.bytes_down for record in run.rounds.values())
        values = [value_text(item.best[name]) if name in item.best else "" for name in metrics]
        best = "" if run.best.round is None else str(run.best.round)
        rows.append(
            [
                item.name,
                *values,
                best,
                str(done),
                str(len(run.sites)),
                duration_text(run.last - run.began),
                size_text(sizes),
            ]
        )
    return table(["run", *metrics, "best round", "rounds", "sites", "time", "bytes"], rows)


def _chart(items: Sequence[Summary], metric: str) -> Element:
    groups = _alike(items)
    lines = []
    for at, group in enumerate(groups):
        curves = [dict(item.run.curve(metric)) for item in group]
        rounds = sorted(set(curves[0]).intersection(*curves[1:]))
        values = {number: [curve[number] for curve in curves] for number in rounds}
        points = [(number, mean(found)) for number, found in values.items()]
        label = group[0].name if len(group) == 1 else f"{group[0].name} and {len(group) - 1} more seeds"
        band = [(n, mean(v) - stdev(v), mean(v) + stdev(v)) for n, v in values.items()] if len(group) > 1 else []
        lines.append(Line(label, points, series_class(at), band))
    return line_chart(metric, lines)


def _alike(items: Sequence[Summary]) -> list[list[Summary]]:
    """Groups of runs whose settings differ in the seed alone. Runs with the same seed, or none, stand by themselves."""
    groups: dict[str, list[Summary]] = {}
    for at, item in enumerate(items):
        rest = {field: value for field, value in item.settings.items() if field != _SEED}
        key = f"{rest}" if _SEED in item.settings else f"{at}"
        groups.setdefault(key, []).append(item)
    made: list[list[Summary]] = []
    for group in groups.values():
        seeds = [item.settings.get(_SEED) for item in group]
        made += [group] if len(set(map(str, seeds))) == len(seeds) else [[item] for item in group]
    return made


def _text(value: Any) -> str:
    return "" if value is None else str(value)[:500]
