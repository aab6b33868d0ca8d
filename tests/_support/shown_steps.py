"""How far a site is within a round, on the screen of whoever watches the run."""

from __future__ import annotations

import io
import time
from collections.abc import Sequence

from rich.console import Console

from fl_adapters.environments.progress import RunView
from fl_adapters.environments.progress.screen import run_screen
from fl_adapters.testing import LocalFederation
from fl_runtime.types import Event

_PATIENCE_S = 30.0


def wait_for_steps(federation: LocalFederation, site: str, done: int) -> None:
    """Wait until the server has been told that a site has made this number of steps. The site calls it as it trains."""
    until = time.monotonic() + _PATIENCE_S
    while not any(told(event, site, done) for event in federation.events):
        assert time.monotonic() < until, f"{site} has not told {done} steps"
        time.sleep(0.02)


def told(event: Event, site: str, done: int) -> bool:
    return event.kind == "steps" and event.site == site and event.data["done"] == done


def row_of(events: Sequence[Event], site: str, done: int) -> list[str]:
    """The site's row of the screen after it has told this number of steps: site, state, bar, steps, and so on."""
    view = RunView()
    last = next(at for at, event in enumerate(events) if told(event, site, done))
    for event in events[: last + 1]:
        view(event)
    console = Console(file=io.StringIO(), width=100, color_system=None)
    console.print(run_screen(view, 100))
    assert isinstance(console.file, io.StringIO)
    return next(words for line in console.file.getvalue().splitlines() if (words := line.split())[:1] == [site])
