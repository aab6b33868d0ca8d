"""The screen of a running simulation and its table at the end, as text, at several widths of the terminal.

The files in tests/fixtures/screens are what a reader has looked at. `UPDATE_SCREENS=1 pytest ...` writes them anew.
"""

from __future__ import annotations

import io
import os
import re
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fl_adapters.cli.live import LiveView, live_table, rounds_table, shown_progress
from fl_adapters.environments.progress import RunView
from fl_adapters.environments.progress.screen import sparkline
from fl_runtime.server import RoundResult
from fl_runtime.types import Event

SCREENS = Path(__file__).parents[2] / "fixtures" / "screens"
ROUNDS = 20


def events(sites: Sequence[str], answered: int, *, tells_steps: bool = False) -> list[Event]:
    """Six whole rounds, and a seventh in which some sites have answered."""
    told: list[Event] = []

    def tell(kind: str, round: int = 0, site: str = "", **data: Any) -> None:
        told.append(Event(kind, 0.0, round, site, data))

    tell("starting", job="tumour-1202", folder="runs/tumour-1202", sites=sites, command="python train.py")
    tell("started", rounds=ROUNDS, sites=sites)
    for number in range(1, 8):
        tell("round_started", number, sites=sites)
        for site in sites:
            tell("task_sent", number, site, bytes=45_000_000)
        for at, site in enumerate(sites if number < 7 else sites[:answered]):
            facts = {"num_examples": 1000 + at, "bytes_up": 45_000_000, "seconds": 12.25}
            if tells_steps:
                tell("steps", number, site, done=40 + at % 7, total=120, train_s=4.0 + at % 3)
            tell("update", number, site, status="used", metrics={"train_loss": 1 / number}, **facts)
        for at, site in enumerate(sites[answered:] if tells_steps and number == 7 else ()):
            tell("steps", number, site, done=40 + at % 7, total=120, train_s=4.0 + at % 3)
        if number < 7:
            sums = {"bytes_up": 45_000_000, "bytes_down": 45_000_000, "missing": ()}
            tell("round_finished", number, seconds=13.5, metrics={"train_loss": 1 / number}, sites=sites, **sums)
            scores = {"loss": 1.25 / number, "accuracy": 1 - 0.4 / number, "auc": 0.6 + number / 50}
            tell("scored", number, metrics=scores, best_round=number, best_metric="accuracy")
    return told


def shown(width: int, sites: Sequence[str], answered: int, *, tells_steps: bool = False) -> str:
    out = io.StringIO()
    console = Console(file=out, width=width, force_terminal=True, color_system=None, force_interactive=False)
    with live_table(console) as listener:
        for event in events(sites, answered, tells_steps=tells_steps):
            listener(event)
        listener.view.began = time.monotonic() - 88
    return re.sub("\x1b\\[[?0-9;]*[a-zA-Z]", "", out.getvalue())  # what moves the cursor


def check(name: str, text: str) -> None:
    text = "\n".join(line.rstrip() for line in text.splitlines()).strip() + "\n"
    path = SCREENS / f"{name}.txt"
    if os.environ.get("UPDATE_SCREENS"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text("utf-8")


@pytest.mark.parametrize("width", [60, 80, 140])
def test_the_screen_of_three_sites(width: int) -> None:
    check(f"three-sites-{width}", shown(width, ["north", "south", "west"], 2))


@pytest.mark.parametrize("width", [60, 80, 140])
@pytest.mark.parametrize(("name", "count", "answered"), [("one-site", 1, 0), ("three-sites", 3, 2)])
def test_the_screen_has_a_bar_for_each_site_that_tells_its_steps(
    width: int, name: str, count: int, answered: int
) -> None:
    sites = ["north", "south", "west"][:count]
    check(f"{name}-steps-{width}", shown(width, sites, answered, tells_steps=True))


@pytest.mark.parametrize("width", [60, 80, 140])
def test_a_thousand_sites_that_tell_their_steps_are_summed_up(width: int) -> None:
    sites = [f"site-{number}" for number in range(1000)]
    check(f"thousand-sites-steps-{width}", shown(width, sites, 600, tells_steps=True))


@pytest.mark.parametrize("width", [60, 140])
def test_the_screen_of_a_thousand_sites(width: int) -> None:
    check(f"thousand-sites-{width}", shown(width, [f"site-{number}" for number in range(1000)], 600))


@pytest.mark.parametrize("width", [60, 80, 140])
def test_the_table_at_the_end_has_room_for_many_metrics(width: int) -> None:
    names = ("train_loss", "train_accuracy", "loss", "accuracy", "auc", "f1_macro", "balanced_accuracy")
    rounds = [
        RoundResult(number, 13.5, dict.fromkeys(names, 1 / number), ("north", "south"), (), 45_000_000, 44_000_000)
        for number in range(1, 6)
    ]
    out = io.StringIO()
    console = Console(file=out, width=width, force_terminal=True, color_system=None)
    console.print(rounds_table(rounds, 4, "tumour-1202", "auc", width))
    check(f"end-{width}", out.getvalue())


def test_a_sparkline_goes_from_the_lowest_to_the_highest_value() -> None:
    assert sparkline([1.0, 2.0, 3.0]) == "▁▅█"
    assert sparkline([2.0, float("nan"), 2.0]) == "▁ ▁"
    assert sparkline([float("inf")]) == sparkline([]) == ""


@pytest.mark.parametrize(
    ("variables", "terminal", "screen"),
    [
        ({}, True, True),
        ({"NO_COLOR": "1"}, True, False),
        ({"CI": "true"}, True, False),
        ({"TERM": "dumb"}, True, False),
        ({"NO_COLOR": "", "CI": ""}, True, True),
        ({}, False, False),
    ],
)
def test_there_are_lines_where_a_screen_cannot_be_or_is_not_wanted(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], terminal: bool, screen: bool
) -> None:
    for name in ("NO_COLOR", "CI", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    out = io.StringIO()
    console = Console(file=out, width=80, force_terminal=terminal)
    with shown_progress(console) as listener:
        assert isinstance(listener, LiveView) == screen
        for event in events(["north"], 1):
            listener(event)
    assert ("\x1b[" in out.getvalue()) == screen
    assert "round 7/20" in out.getvalue() if screen else "round 6/20: " in out.getvalue()


def test_the_best_value_is_green_and_warnings_stand_above_the_bars() -> None:
    out = io.StringIO()
    console = Console(file=out, width=80, force_terminal=True, color_system="standard")
    with live_table(console) as listener:
        for event in events(["north", "south"], 1):
            listener(event)
        listener(Event("warning", 0.0, 7, data={"text": "the loss is not finite"}))
        listener(Event("left", 0.0, 7, "south", {"early": True, "reason": "it has stopped"}))
    last = out.getvalue()[out.getvalue().rindex("the loss is not finite") :]
    assert "south dropped out: it has stopped" in last and last.index("dropped out") < last.rindex("round 7/20")
    assert "\x1b[1;32m0.9333\x1b[0m" in last, "the best accuracy is bold and green"
    assert "\x1b[1;32m0.2083" not in last, "the loss does not decide"


def test_a_terminal_without_unicode_gets_ascii() -> None:
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    console = Console(file=out, width=80, force_terminal=True, color_system=None)
    with live_table(console) as listener:
        for event in events(["north"], 0):
            listener(event)
    out.flush()
    assert b"accuracy" in out.buffer.getvalue()  # type: ignore[attr-defined]


def test_the_end_is_estimated_from_the_rounds_that_are_done() -> None:
    listener = LiveView(Console(file=io.StringIO()))
    for event in events(["north", "south"], 1):
        listener(event)
    assert listener.view.done == pytest.approx(6.5 / ROUNDS)
    assert listener.view.left_s == pytest.approx(13.5 * (ROUNDS - 6.5))


@pytest.mark.parametrize("total", [120, None])
def test_the_bar_of_a_site_is_whole_after_its_update_and_in_the_end(total: int | None) -> None:
    view = RunView()
    for event in events(["clinic"], answered=0):
        view(event)
    assert view.sites["clinic"].done == 0.0
    view(Event("steps", 0.0, 7, "clinic", {"done": 60, "total": total, "train_s": 4.0}))
    assert view.sites["clinic"].done == (0.5 if total else 0.0)
    facts = {"num_examples": 1000, "bytes_up": 1, "seconds": 9.0, "status": "used", "metrics": {}}
    view(Event("update", 0.0, 7, "clinic", facts))
    assert view.sites["clinic"].done == view.round_done == 1.0
    sums = {"bytes_up": 1, "bytes_down": 1, "missing": (), "sites": ["clinic"], "seconds": 9.0}
    view(Event("round_finished", 0.0, 7, "", {"metrics": {"train_loss": 0.1}, **sums}))
    view(Event("task_sent", 0.0, 7, "clinic", {"bytes": 1}))  # the final model
    view(Event("left", 0.0, 7, "clinic", {"early": False, "reason": ""}))
    assert (view.sites["clinic"].state, view.sites["clinic"].done) == ("done", 1.0)


def test_virtual_sites_are_queued_and_the_end_of_their_round_is_estimated() -> None:
    sites = [f"site-{number}" for number in range(1, 41)]
    view = RunView()
    view(Event("starting", 0.0, 0, "", {"job": "j", "folder": "runs/j", "sites": sites, "virtual": True}))
    view(Event("started", 0.0, 0, "", {"rounds": 2, "sites": sites}))

    def answer(number: int, names: Sequence[str]) -> None:
        for name in names:
            view(Event("task_sent", 0.0, number, name, {"bytes": 1}))
            facts = {"num_examples": 1000, "bytes_up": 1, "seconds": 9.0, "status": "used", "metrics": {}}
            view(Event("update", 0.0, number, name, facts))

    def states() -> dict[str, int]:
        return Counter(site.state for site in view.sites.values())

    view(Event("round_started", 0.0, 1, "", {"sites": sites}))
    assert (states(), view.round_done, view.round_left_s, view.left_s) == ({"queued": 40}, 0.0, None, None)
    answer(1, sites[:10])
    view(Event("task_sent", 0.0, 1, sites[10], {"bytes": 1}))
    assert states() == {"waiting": 10, "training": 1, "queued": 29} and view.round_done == 0.25
    view.newest.began = time.monotonic() - 10.0
    assert view.round_left_s == pytest.approx(30.0, rel=0.1)
    assert view.left_s == pytest.approx(70.0, rel=0.1)
    answer(1, sites[10:])
    sums = {"bytes_up": 1, "bytes_down": 1, "missing": (), "sites": sites, "seconds": 40.0, "metrics": {}}
    view(Event("round_finished", 0.0, 1, "", sums))
    view(Event("round_started", 0.0, 2, "", {"sites": sites[:20]}))  # a fraction takes part
    assert states() == {"queued": 20, "waiting": 20} and view.round_done == 0.0


def test_sites_whose_task_is_still_to_come_count_nothing_for_the_round() -> None:
    view = RunView()
    for event in events(["clinic", "lab"], answered=2, tells_steps=True):
        view(event)
    sums = {"bytes_up": 1, "bytes_down": 1, "missing": (), "sites": ["clinic", "lab"], "seconds": 9.0, "metrics": {}}
    view(Event("round_finished", 0.0, 7, "", sums))
    view(Event("round_started", 0.0, 8, "", {"sites": ["clinic", "lab"]}))
    assert (view.round_done, view.done) == (0.0, 7 / ROUNDS)
