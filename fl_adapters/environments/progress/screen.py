"""The screen of a run, made with rich: bars of the run, its round and its sites, and the course of the metrics."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from functools import partial

from rich import box
from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fl_adapters.environments.progress.text import counted, ordered_metrics, size_text
from fl_adapters.environments.progress.view import RunView, SiteView
from fl_runtime.transport.waiting import duration_text

_SITES_SHOWN = 24
"""Largest number of sites with a row each. Above it, the table has a row per state."""
METRICS_SHOWN = 3
"""Number of metrics with a line or a column each."""
WIDE = 100
"""Width of the terminal from which on there is room for more columns."""
_NARROW = 80
_COLUMNS = {"site": 0, "state": 0, "round": 0, "loss": 0, "examples": 70, "seconds": 70, "up": WIDE, "down": WIDE}
"""Columns of the table of sites, and the width of the terminal from which on each is shown."""
_WITH_STEPS = {
    **{"site": 0, "state": 0, "progress": 0, "steps": 70, "rate": 70, "left": 0, "loss": 0, "round": WIDE},
    **{"seconds": WIDE, "examples": 120, "up": 120, "down": 120},
}
"""The same for sites that tell their steps within the round."""
_BAR_WIDTHS = {0: 8, 80: 12, 120: 20}
"""Width of the terminal -> width of a site's bar from there on."""
_BLOCKS, _ASCII_BLOCKS = "▁▂▃▄▅▆▇█", "_.-=+*#@"


def run_screen(view: RunView, width: int, *, ascii_only: bool = False) -> RenderableType:
    """Lay out the state of a run.

    Args:
        view: The state.
        width: Columns of the terminal.
        ascii_only: Whether the terminal shows no other characters.

    Returns:
        What rich prints.
    """
    blocks = _ASCII_BLOCKS if ascii_only else _BLOCKS
    metrics = _metric_lines(view, width, blocks)
    lines: list[RenderableType] = [_progress(view, width), *metrics, _sites_table(view, width)]
    if view.folder:
        lines.append(Text(f"results in {view.folder}", style="dim", overflow="fold"))
    return Group(*lines)


def _progress(view: RunView, width: int) -> RenderableType:
    """Name of the run, a bar of what is done of it and one of its round, and the time that is left of each."""
    title = Text(_title(view), style="bold", overflow="ellipsis", no_wrap=True)
    gone = duration_text(round(time.monotonic() - view.began))
    if view.left_s is not None and view.done < 1:
        gone += f", about {_left_text(view.left_s)} left"
    rows = Table.grid(padding=(0, 1))
    bar = partial(ProgressBar, total=1.0, width=min(40, width // 3))
    if view.rounds == 0:
        rows.add_row("run", "", "", gone)
    else:
        rows.add_row("run", bar(completed=view.done), f"{view.done:4.0%}", gone)
    if view.newest.asked:
        answered = f"{len(view.newest.answered)} of {counted(len(view.newest.asked), 'site')}"
        if view.round_left_s is not None:
            answered += f", {'about ' if width >= _NARROW else ''}{_left_text(view.round_left_s)} left"
        rows.add_row(view.unit, bar(completed=view.round_done), f"{view.round_done:4.0%}", answered)
    return Group(title, rows)


def _metric_lines(view: RunView, width: int, blocks: str) -> Iterator[RenderableType]:
    """A line for each of the metrics that matter most: its course and its newest value, green where it is the best."""
    names = dict.fromkeys(name for metrics in view.metrics.values() for name in metrics)
    row = Table.grid(padding=(0, 2))
    for name in ordered_metrics(names, view.best_metric)[:METRICS_SHOWN]:
        course = [(number, metrics[name]) for number, metrics in sorted(view.metrics.items()) if name in metrics]
        newest, value = course[-1]
        best = newest == view.best_round and name == view.best_metric
        row.add_row(
            Text(name, overflow="ellipsis", no_wrap=True),
            Text(sparkline([value for _, value in course][-min(40, width // 3) :], blocks), style="cyan"),
            Text(f"{value:.4g}", style="bold green" if best else ""),
        )
    if row.row_count:
        yield row


def sparkline(values: Sequence[float], blocks: str = _BLOCKS) -> str:
    """Draw values as a line of blocks, from the lowest to the highest one; a blank for each that is not finite.

    Args:
        values: The values, one for each character.
        blocks: Characters of growing height.
    """
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return ""
    low, spread = min(finite), (max(finite) - min(finite)) or 1.0
    steps = len(blocks) - 1
    return "".join(blocks[round((v - low) / spread * steps)] if math.isfinite(v) else " " for v in values)


def _sites_table(view: RunView, width: int) -> Table:
    sites = dict(view.sites)
    tells_steps = any(site.steps is not None for site in sites.values())
    columns = [name for name, least in (_WITH_STEPS if tells_steps else _COLUMNS).items() if width >= least]
    if view.rounds == 0:  # sums have no loss
        columns.remove("loss")
    bar_width = max(cells for least, cells in _BAR_WIDTHS.items() if width >= least)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in columns:
        left = name in ("site", "state", "progress")
        head = view.unit if name == "round" else name
        table.add_column(head, justify="left" if left else "right", no_wrap=True, overflow="ellipsis")
    rows = list(sites.items()) if len(sites) <= _SITES_SHOWN else _by_state(list(sites.values()))
    for name, site in rows:
        bar = ProgressBar(total=1.0, completed=site.done, width=bar_width) if site.steps is not None else ""
        cells: dict[str, RenderableType] = {"site": name, "progress": bar, **_cells(site)}
        table.add_row(*(cells[column] for column in columns), style="red" if site.failed else "")
    return table


def _by_state(sites: list[SiteView]) -> list[tuple[str, SiteView]]:
    """One row per state of sites, labelled with their number."""
    states: dict[str, list[SiteView]] = {}
    for site in sites:
        states.setdefault(site.state, []).append(site)
    return [(f"{len(group)} sites", _combine(state, group)) for state, group in sorted(states.items())]


def _combine(state: str, group: list[SiteView]) -> SiteView:
    """Sites in the same state as one row: newest round, mean loss, longest time, and sums of all else."""
    losses = [site.loss for site in group if site.loss is not None]
    told = [site for site in group if site.steps is not None]
    return SiteView(
        state=state,
        round=max(site.round for site in group),
        loss=sum(losses) / len(losses) if losses else None,
        examples=sum(site.examples or 0 for site in group) or None,
        bytes_up=sum(site.bytes_up for site in group),
        bytes_down=sum(site.bytes_down for site in group),
        seconds=max((site.seconds for site in group if site.seconds is not None), default=None),
        steps=sum(site.steps or 0 for site in told) if told else None,
        of_steps=sum(site.of_steps or 0 for site in told) if all(site.of_steps for site in told) else None,
        train_s=max((site.train_s for site in told if site.train_s is not None), default=None),
    )


def _title(view: RunView) -> str:
    if not view.round:
        return f"{view.job}  waiting for the sites" if view.job else "starting"
    training = f"  training {view.training}" if view.training > 1 else ""
    return f"{view.job}{training}  {view.unit} {view.round}" + (f"/{view.rounds}" if view.rounds else "")


def _cells(site: SiteView) -> dict[str, str]:
    def text_of(value: float | None, form: str) -> str:
        return "" if value is None else form.format(value)

    return {
        "state": site.state,
        "steps": "" if site.steps is None else f"{site.steps:,}" + (f"/{site.of_steps:,}" if site.of_steps else ""),
        "rate": "" if site.rate is None else _rate_text(site.rate),
        "left": "" if not site.left_s else _left_text(site.left_s),
        "round": str(site.round or ""),
        "loss": text_of(site.loss, "{:.4g}"),
        "examples": text_of(site.examples, "{:,}"),
        "seconds": text_of(site.seconds, "{:.2f}"),
        "up": size_text(site.bytes_up),
        "down": size_text(site.bytes_down),
    }


def _left_text(seconds: float) -> str:
    """An estimate, in whole seconds where it is short."""
    return duration_text(max(round(seconds), 1))


def _rate_text(rate: float) -> str:
    """Steps a second, or a minute where they are few."""
    per_s = rate if rate >= 1 else rate * 60
    return f"{f'{per_s:.3g}' if per_s < 100 else f'{per_s:,.0f}'}/{'s' if rate >= 1 else 'min'}"
