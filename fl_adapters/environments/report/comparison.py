"""The page of several runs side by side: what differs in their settings, and their curves on one axis."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any
from xml.etree.ElementTree import Element

from fl_adapters.environments.progress import counted, ordered_metrics, size_text
from fl_adapters.environments.report.charts import Line, line_chart, series_class, value_text
from fl_adapters.environments.report.document import Content, document, filled, table, tag
from fl_adapters.environments.report.record import RunRecord, listed
from fl_runtime.trainings import HISTORY
from fl_runtime.transport.waiting import duration_text

_OWN = ("name",)  # fields of a job that differ between any two runs, and say nothing
_CHARTS_SHOWN = 8
_METRICS_LISTED = 4
_FLAG = "yes"  # value of an option without one


@dataclass(frozen=True)
class Summary:
    """One run in a comparison.

    Attributes:
        name: Name of the run, made unique by its folder where two have the same.
        run: The run.
        settings: Fields of its job file, its sites, and the options of its script.
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
        last = max((number for number, record in run.rounds.items() if record.metrics), default=None)
        shown = run.best.round if run.best.round in run.rounds else last
        made.append(Summary(name, run, _settings(run), run.rounds[shown].metrics if shown is not None else {}))
    return made


def _settings(run: RunRecord) -> dict[str, Any]:
    job = {field: value for field, value in run.job.items() if field not in _OWN}
    rounds = {"rounds": run.planned} if run.planned else {}
    started = {field: run.command[field] for field in ("engine", "workers") if run.command.get(field)}
    return {**rounds, **job, "sites": run.site_argument, **started, **script_options(listed(run.command, "args"))}


def script_options(args: Sequence[str]) -> dict[str, str]:
    """Take the arguments of a script apart, so that runs differ in an option and not in all of the line.

    Args:
        args: The arguments, such as ["--lr", "0.1", "--amp", "data.csv"].

    Returns:
        The value of each option, such as {"--lr": "0.1", "--amp": "data.csv"}: what follows an option counts as its
        value. Further arguments stand under "arguments".
    """
    options: dict[str, str] = {}
    rest: list[str] = []
    name = ""
    for word in args:
        is_option = word.startswith("-") and not word[1:2].isdigit() and len(word) > 1
        if is_option:
            name, _, value = word.partition("=")
            options[name] = value or _FLAG
            name = "" if value else name
        elif name:
            options[name], name = word, ""
        else:
            rest.append(word)
    return {**options, "arguments": " ".join(rest)} if rest else options


def metrics_of(items: Sequence[Summary]) -> list[str]:
    """Return the metrics that any of the runs has, those that matter most first.

    Args:
        items: The runs.
    """
    found = dict.fromkeys(name for item in items for name in item.run.metrics)
    return ordered_metrics(found, next((item.run.best.metric for item in items if item.run.best.metric), ""))


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
    return document(title, tag("h1", title), comparison_sections(items))


def comparison_sections(items: Sequence[Summary]) -> Iterator[Element]:
    """Yield the sections of the page that compares runs, below its title."""
    groups = _alike(items)
    yield tag("section", tag("h2", "Results"), results_table(items, groups, "seed"))
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
    metrics = [metric for metric in metrics_of(items) if any(item.run.curve(metric) for item in items)]
    if metrics:
        charts = [curves_chart(groups, metric, "seed") for metric in metrics[:_CHARTS_SHOWN]]
        left = len(metrics) - len(charts)
        more = tag("p", f"{counted(left, 'further metric')} can be found in {HISTORY} of each run.", class_="soft")
        shown = tag("div", charts, class_="charts")
        yield tag("section", tag("h2", "Metrics by round"), shown, more if left else None)


def results_table(items: Sequence[Summary], groups: Sequence[Sequence[Summary]], label: str) -> Element:
    """Make the table of runs: their frameworks if these differ, metrics, rounds, time and bytes.

    Args:
        items: The runs.
        groups: Runs that repeat each other. Each group of several has a row with mean and standard deviation.
        label: What one of these is called in that row, such as "seed".

    Returns:
        The table.
    """
    found = [name for name in metrics_of(items) if any(name in item.best for item in items)]
    metrics = [name for name in found if not name.endswith("_bytes")][:_METRICS_LISTED]
    frameworks = [", ".join(sorted(set(item.run.frameworks.values()))) for item in items]
    if len(set(frameworks)) == 1:
        frameworks = [""] * len(items)
    rows = []
    for item, framework in zip(items, frameworks, strict=True):
        run = item.run
        done = sum(record.finished for number, record in run.rounds.items() if number)
        sizes = sum(record.bytes_up + record.bytes_down for record in run.rounds.values())
        values = [value_text(item.best[name]) if name in item.best else "" for name in metrics]
        best = "" if run.best.round is None else str(run.best.round)
        rest = (best, str(done), str(len(run.sites)), duration_text(run.last - run.began), size_text(sizes))
        rows.append([item.name, framework, *values, *rest])
    for group in groups:
        spread = [_spread([item.best[name] for item in group if name in item.best]) for name in metrics]
        if any(spread):
            rows.append([f"{group[0].name}: mean of {counted(len(group), label)}", "", *spread, *[""] * 5])
    columns = ["run", "framework", *metrics, "best round", "rounds", "sites", "time", "bytes"]
    return table(*filled(columns, rows))


def _spread(values: Sequence[float]) -> str:
    """Mean and standard deviation."""
    return f"{value_text(mean(values))} \N{PLUS-MINUS SIGN} {value_text(stdev(values))}" if len(values) > 1 else ""


def curves_chart(groups: Sequence[Sequence[Summary]], metric: str, label: str) -> Element:
    """Draw a metric of several runs on one axis.

    Args:
        groups: Runs that repeat each other, each group a line: their mean, with a band of one standard deviation.
        metric: Name of the metric, over all sites.
        label: What a run of a group is called in the legend, such as "seed".

    Returns:
        The chart.
    """
    lines = []
    for at, group in enumerate(groups):
        curves = [dict(item.run.curve(metric)) for item in group]
        rounds = sorted(set(curves[0]).intersection(*curves[1:]))
        values = {number: [curve[number] for curve in curves] for number in rounds}
        points = [(number, mean(found)) for number, found in values.items()]
        name = group[0].name if len(group) == 1 else f"{group[0].name} and {counted(len(group) - 1, f'more {label}')}"
        band = [(n, mean(v) - stdev(v), mean(v) + stdev(v)) for n, v in values.items()] if len(group) > 1 else []
        lines.append(Line(name, points, series_class(at), band))
    return line_chart(metric, lines)


def _alike(items: Sequence[Summary]) -> list[list[Summary]]:
    """Groups of runs whose settings differ in the seed alone. Runs with the same seed, or none, stand by themselves."""
    groups: dict[str, list[Summary]] = {}
    for at, item in enumerate(items):
        rest = {field: value for field, value in item.settings.items() if not _is_seed(field)}
        key = f"{rest}" if len(rest) < len(item.settings) else f"{at}"
        groups.setdefault(key, []).append(item)
    made: list[list[Summary]] = []
    for group in groups.values():
        seeds = [str([value for field, value in item.settings.items() if _is_seed(field)]) for item in group]
        made += [group] if len(set(seeds)) == len(seeds) else [[item] for item in group]
    return made


def _is_seed(field: str) -> bool:
    """Whether a field of a job, or an option of a script, is a seed: "seed", "--seed", "--data-seed"."""
    return field.replace("_", "-").rpartition("-")[2] == "seed"


def _text(value: Any) -> str:
    return "" if value is None else str(value)[:500]
