"""Screen of runs on a terminal while they last; at the end the table of the rounds, and what to do next."""

from __future__ import annotations

import os
import shlex
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from fl_adapters.environments.progress import ProgressLines, RunView, counted, ordered_metrics, size_text, waiting_text
from fl_adapters.environments.progress.screen import METRICS_SHOWN, WIDE, run_screen
from fl_adapters.environments.report import REPORT
from fl_adapters.environments.report.loading import loading_line
from fl_runtime.server.records.results import RoundResult
from fl_runtime.types import Event

_ROUNDS_SHOWN, _RUNS_SHOWN = 30, 4
_DRAWN_PER_S = 2  # takes about 3 ms each time, in the process of the server


class LiveView:
    """Listener that updates the view, and prints what needs attention above it: warnings, and sites that drop out.

    Args:
        console: Where they are printed.

    Attributes:
        view: The state of the run.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self.view = RunView()
        self._failed = False  # sites that leave after a failure are not worth a line

    def __call__(self, event: Event) -> None:
        self.view(event)
        data = event.data
        match event.kind:
            case "exited" if data["tail"]:
                lines = [f"{event.site}: {data['status']}; {data['log']} ends with", *data["tail"]]
                self._print("\n    | ".join(lines))
            case "left" if data["early"] and not self._failed:
                self._print(f"{event.site} dropped out: {data['reason']}")
            case "waiting":
                self._print(waiting_text(data))
            case "warning":
                self._print(f"warning: {data['text']}")
            case "log" if data["level"] == "warning":
                self._print(f"{event.site}: {data['text']}")
            case "failed":
                self._failed = True

    def _print(self, text: str) -> None:
        self._console.print(Text(text, style="yellow"))


class LiveRuns:
    """Screen of the runs of a server or a site daemon: one below the other, while they last.

    Args:
        console: The terminal.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._views: dict[str, RunView] = {}

    def view_of(self, job: str) -> RunView:
        """Return a listener that keeps the view of a job, which is shown from its first event to its end.

        Args:
            job: Name of the job.
        """
        view = self._views[job] = RunView(job=job)
        return view

    def __rich__(self) -> RenderableType:
        width, ascii_only = self._console.width, self._console.options.ascii_only
        self._views = {job: view for job, view in list(self._views.items()) if not view.ended}
        shown = [view for view in self._views.values() if view.sites]
        parts = [run_screen(view, width, ascii_only=ascii_only) for view in shown[:_RUNS_SHOWN]]
        if len(shown) > _RUNS_SHOWN:
            parts.append(Text(f"and {counted(len(shown) - _RUNS_SHOWN, 'more job')}"))
        return Group(*parts)


def has_screen(console: Console) -> bool:
    """Return whether a console can show a screen that changes in place; otherwise there are plain lines.

    That takes a terminal that can move its cursor. The variables NO_COLOR and CI ask for lines, if they are not empty.

    Args:
        console: Where the output goes.
    """
    asked = any(os.environ.get(name) for name in ("NO_COLOR", "CI"))
    return console.is_terminal and not console.is_dumb_terminal and not asked


@contextmanager
def live_table(console: Console) -> Iterator[LiveView]:
    """Show a run during this block.

    Args:
        console: The terminal.

    Yields:
        The listener that feeds the screen.
    """
    listener = LiveView(console)

    def screen() -> RenderableType:
        return run_screen(listener.view, console.width, ascii_only=console.options.ascii_only)

    with Live(console=console, get_renderable=screen, refresh_per_second=_DRAWN_PER_S) as live:
        yield listener
        live.refresh()


@contextmanager
def live_runs(console: Console) -> Iterator[LiveRuns | None]:
    """Show the runs of a server or a site below its lines during this block. Lines go through sys.stderr.

    Args:
        console: The console of sys.stderr.

    Yields:
        The screen, or None if the console cannot show one.
    """
    if not has_screen(console):
        yield None
        return
    runs = LiveRuns(console)
    with Live(
        console=console, get_renderable=lambda: runs, refresh_per_second=2, transient=True, redirect_stdout=False
    ):
        yield runs


@contextmanager
def shown_progress(console: Console) -> Iterator[LiveView | ProgressLines]:
    """Show a run during this block: a screen where that is possible, else lines.

    Args:
        console: Where to show it.

    Yields:
        The listener that does it.
    """
    if not has_screen(console):
        yield ProgressLines(console.file)
        return
    with live_table(console) as view:
        yield view


def rounds_table(
    rounds: Sequence[RoundResult], best_round: int | None, title: str, best_metric: str, width: int
) -> Table:
    """Table with a row per round of a training, limited to the last rounds and the metrics that matter most.

    Args:
        rounds: The rounds.
        best_round: Number of the best one, or None.
        title: Title of the table.
        best_metric: The metric that decides the best round; "" for none.
        width: Columns of the terminal.
    """
    last = rounds[-_ROUNDS_SHOWN:]
    known = dict.fromkeys(name for item in last for name in item.metrics)
    metrics = ordered_metrics(known, best_metric)[: METRICS_SHOWN + (width >= WIDE)]
    table = Table(
        title=title,
        title_justify="left",
        caption_justify="left",
        caption=_caption(rounds, known.keys() - metrics),
        box=box.SIMPLE_HEAD,
    )
    for name in ("round", *metrics, "sites", "seconds"):
        table.add_column(name, justify="right", no_wrap=True, overflow="ellipsis")
    for item in last:
        best = item.round == best_round
        table.add_row(
            f"best  {item.round}" if best else str(item.round),
            *(f"{item.metrics[name]:.4g}" if name in item.metrics else "" for name in metrics),
            str(len(item.sites)),
            f"{item.seconds:.2f}",
            style="green" if best else "",
        )
    return table


def _caption(rounds: Sequence[RoundResult], left_out: Collection[str]) -> str:
    up, down = sum(item.bytes_up for item in rounds), sum(item.bytes_down for item in rounds)
    parts = [f"up {size_text(up)}, down {size_text(down)} in all"]
    if len(rounds) > _ROUNDS_SHOWN:
        parts.append(f"{len(rounds) - _ROUNDS_SHOWN} earlier rounds are not shown")
    if left_out:
        parts.append(f"history.csv has {counted(len(left_out), 'more metric')}")
    return "; ".join(parts)


def print_next(console: Console, folder: Path, exported: Path | None) -> None:
    """Print what opens the model of a training, and what shows its curves.

    Args:
        console: Where to print it.
        folder: Folder of the training.
        exported: Folder of the model, or None.
    """
    if exported is not None and (code := loading_line(exported, Path(short_path(exported)))):
        console.print(f"open     {code}", highlight=False, soft_wrap=True)
    if (folder / REPORT).is_file():
        console.print(f"report   {short_path(folder / REPORT)}", highlight=False, soft_wrap=True)
        again = f"fl-adapters report {shlex.quote(short_path(folder))}"
        console.print(f"again    {again}", highlight=False, soft_wrap=True)
    if (folder / "tensorboard").is_dir():
        curves = shlex.quote(short_path(folder / "tensorboard"))
        console.print(f"curves   tensorboard --logdir {curves}", highlight=False, soft_wrap=True)


def print_path(console: Console, name: str, path: Path | None, note: str = "") -> None:
    """Print where something lies, if it is there.

    Args:
        console: Where to print it.
        name: What it is.
        path: Where it lies, or None.
        note: Text behind the path.
    """
    if path is not None:
        console.print(f"{name:8} {short_path(path)}{note}", highlight=False, soft_wrap=True)


def short_path(path: Path) -> str:
    """Return a path as seen from the current directory, if it lies there."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
