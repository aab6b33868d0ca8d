"""Live table of a running simulation, and the table of its rounds at the end."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from fl_adapters.environments.progress import RunView, SiteView, metrics_text, size_text, waiting_text
from fl_runtime.types import Event

if TYPE_CHECKING:
    from fl_adapters.environments.local import TrainingResult

_ROUNDS_SHOWN = 30
_SITES_SHOWN = 24
"""Largest number of sites with a row each. Above it, the table has a row per state."""
_COLUMNS = ("site", "state", "round", "loss", "examples", "up", "down", "seconds")


class _LiveView:
    """Listener that updates the view, and prints warnings and log lines of failed sites above the table."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self.view = RunView()

    def __call__(self, event: Event) -> None:
        self.view(event)
        if event.kind == "exited" and event.data["tail"]:
            lines = [f"{event.site}: {event.data['status']}; {event.data['log']} ends with", *event.data["tail"]]
            self._console.print(Text("\n    | ".join(lines), style="yellow"))
        elif event.kind == "waiting":
            self._console.print(Text(waiting_text(event.data), style="yellow"))
        elif event.kind == "warning":
            self._console.print(Text(f"warning: {event.data['text']}", style="yellow"))


@contextmanager
def live_table(console: Console) -> Iterator[_LiveView]:
    """Show a table during this block, and give the block the listener that feeds the table."""
    listener = _LiveView(console)
    with Live(console=console, get_renderable=lambda: _table(listener.view), refresh_per_second=5) as live:
        yield listener
        live.refresh()


def _table(view: RunView) -> RenderableType:
    table = Table(title=_title(view), title_justify="left", title_style="bold")
    for name in _COLUMNS:
        table.add_column(name, justify="left" if name in ("site", "state") else "right", no_wrap=True)
    sites = dict(view.sites)
    rows = list(sites.items()) if len(sites) <= _SITES_SHOWN else _by_state(list(sites.values()))
    for name, site in rows:
        table.add_row(name, *_cells(site))
    lines = [f"{time.monotonic() - view.began:.0f} s"]
    if view.folder:
        lines.append(f"results in {view.folder}")
    finished = max(list(view.metrics), default=None)
    if finished is not None:
        lines.insert(0, f"round {finished}: {metrics_text(view.metrics[finished])}")
    return Group(table, Text("   ".join(lines), style="dim"))


def _by_state(sites: list[SiteView]) -> list[tuple[str, SiteView]]:
    """One row per state of sites, labelled with their number."""
    states: dict[str, list[SiteView]] = {}
    for site in sites:
        states.setdefault(site.state, []).append(site)
    return [(f"{len(group)} sites", _combine(state, group)) for state, group in sorted(states.items())]


def _combine(state: str, group: list[SiteView]) -> SiteView:
    """Sites in the same state as one row: newest round, mean loss, sums of examples and bytes, longest time."""
    losses = [site.loss for site in group if site.loss is not None]
    return SiteView(
        state=state,
        round=max(site.round for site in group),
        loss=sum(losses) / len(losses) if losses else None,
        examples=sum(site.examples or 0 for site in group) or None,
        bytes_up=sum(site.bytes_up for site in group),
        bytes_down=sum(site.bytes_down for site in group),
        seconds=max((site.seconds for site in group if site.seconds is not None), default=None),
    )


def _title(view: RunView) -> str:
    if not view.round:
        return f"{view.job}  waiting for the sites" if view.job else "starting"
    training = f"  training {view.training}" if view.training > 1 else ""
    return f"{view.job}{training}  round {view.round}/{view.rounds}"


def _cells(site: SiteView) -> list[str]:
    def text_of(value: float | None, form: str) -> str:
        return "" if value is None else form.format(value)

    return [
        site.state,
        str(site.round or ""),
        text_of(site.loss, "{:.4g}"),
        text_of(site.examples, "{:,}"),
        size_text(site.bytes_up),
        size_text(site.bytes_down),
        text_of(site.seconds, "{:.2f}"),
    ]


def rounds_table(result: TrainingResult, title: str) -> Table:
    """Table with one row per round of a training, limited to the last rounds."""
    last = result.rounds[-_ROUNDS_SHOWN:]
    metrics = list(dict.fromkeys(name for item in last for name in item.metrics))
    left_out = len(result.rounds) - len(last)
    table = Table(title=title, caption=f"{left_out} earlier rounds are not shown" if left_out else None)
    table.add_column("round", justify="right")
    for name in (*metrics, "sites", "up", "down", "seconds"):
        table.add_column(name, justify="right")
    for item in last:
        table.add_row(
            f"{item.round}{' best' if item.round == result.best_round else ''}",
            *(f"{item.metrics[name]:.4g}" if name in item.metrics else "" for name in metrics),
            str(len(item.sites)),
            size_text(item.bytes_up),
            size_text(item.bytes_down),
            f"{item.seconds:.2f}",
        )
    return table
