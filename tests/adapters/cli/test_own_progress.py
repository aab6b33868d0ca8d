"""What a site knows of its job: its own steps from the notes of its script, and metrics from the server's status."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fl_adapters.cli.live import LiveRuns
from fl_adapters.cli.site.own_progress import OwnProgress, SiteScreen
from fl_adapters.environments.progress import RunView
from fl_runtime.client.local_training import TrainingNote


class Feed:
    """Stands for the connection of a daemon."""

    def __init__(self, running: dict[str, Any]) -> None:
        self.seen, self.looks = (0.0, running), 0

    def look(self) -> None:
        self.looks += 1


def screen(runs: LiveRuns) -> str:
    console = Console(file=io.StringIO(), width=80, force_terminal=True, color_system=None)
    console.print(runs)
    return console.file.getvalue()  # type: ignore[attr-defined]


def runs_at(width: int) -> LiveRuns:
    return LiveRuns(Console(file=io.StringIO(), width=width, force_terminal=True))


def test_the_screen_of_a_site_has_its_own_steps_and_the_metrics_of_all_sites() -> None:
    running = {"job": "tumour", "training": 1, "newest": {"round": 2, "metrics": {"loss": 0.25}}}
    feed, runs = Feed({"tumour": running}), runs_at(80)
    shown = SiteScreen(runs, feed, "north")  # type: ignore[arg-type]
    shown.show({"tumour": TrainingNote("tumour", 3, 10, True, 30, 120, 6.0), "lung": None})
    text = screen(runs)
    for part in ("tumour  round 3/10", "north", "training", "30/120", "5/s", "18 s", "loss", "0.25", "22%"):
        assert part in text, text
    assert "lung" not in text, "its script has noted nothing yet"
    assert feed.looks == 1
    shown.show({"tumour": TrainingNote("tumour", 3, 10, False, 120, 120, 24.0)})
    assert "waiting" in screen(runs) and "120/120" in screen(runs)
    shown.show({})
    assert "tumour" not in screen(runs), "it has ended"


def test_several_jobs_stand_below_each_other_and_many_are_counted() -> None:
    runs = runs_at(80)
    notes = {f"job-{number}": TrainingNote(f"job-{number}", 1, 5, True) for number in range(7)}
    SiteScreen(runs, Feed({}), "north").show(notes)  # type: ignore[arg-type]
    text = screen(runs)
    assert [f"job-{number}  round 1/5" in text for number in range(7)] == [True] * 4 + [False] * 3
    assert "and 3 more jobs" in text


def test_a_second_training_begins_anew() -> None:
    progress = OwnProgress(RunView(job="cv"), "north")
    assert progress.take_note(TrainingNote("cv", 4, 4, True))
    assert progress.take_note(TrainingNote("cv/2", 1, 4, True))
    assert (progress.view.training, progress.view.round, progress.view.done) == (2, 1, 0.0)


@pytest.mark.parametrize(
    "newest",
    [
        None,
        3,
        {},
        {"round": "1", "metrics": {"a": 1}},
        {"round": 1, "metrics": [1]},
        {"round": 1, "metrics": {"a": "b"}},
    ],
)
def test_a_status_that_cannot_be_read_shows_no_metrics(newest: object) -> None:
    progress = OwnProgress(RunView(job="j"), "north")
    progress.take_note(TrainingNote("j", 2, 4, True))
    progress.take_status({"newest": newest})
    assert not any(progress.view.metrics.values())


def test_metrics_with_names_that_no_metric_has_are_not_shown() -> None:
    progress = OwnProgress(RunView(job="j"), "north")
    progress.take_note(TrainingNote("j", 2, 4, True))
    values = {"\x1b[2J": 1.0, "loss": 0.5, **{f"m{number}": 1.0 for number in range(1000)}}
    progress.take_status({"newest": {"round": 1, "metrics": values}})
    assert "\x1b[2J" not in progress.view.metrics[1] and len(progress.view.metrics[1]) == 100


def test_notes_are_read_as_far_as_they_are_known(tmp_path: Path) -> None:
    assert TrainingNote.read(tmp_path) is None
    note = TrainingNote("j", 1, 2, True, 3, 4, 5.0)
    note.write(tmp_path)
    assert TrainingNote.read(tmp_path) == note
    file = tmp_path / "training.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "later": 1}))
    assert TrainingNote.read(tmp_path) == note
    file.write_text("{")
    assert TrainingNote.read(tmp_path) is None
    note.write(tmp_path / "not-there")
