"""The course that a run takes: chosen by its strategy, or by how its sites are given, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from federation_bench import settings

from fl_runtime.server.courses.base import Course
from fl_runtime.server.courses.buffered import Buffered
from fl_runtime.server.courses.joining import Joining
from fl_runtime.server.courses.swarm import Swarm
from fl_runtime.server.courses.synchronous import Synchronous
from fl_runtime.server.courses.virtual import Virtual, VirtualSites
from fl_runtime.server.records.events import Events
from fl_runtime.server.run import Run
from fl_runtime.store.stores import FolderStore
from fl_runtime.types import Terms

Make = Callable[..., Run]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """Make a run in a new folder."""
    events = Events([])
    runs: list[Run] = []

    def run(strategy: str | None = None, virtual: VirtualSites | None = None) -> Run:
        runs.append(
            Run(settings(2, strategy=strategy), tmp_path / str(len(runs)), events, FolderStore(), virtual=virtual)
        )
        return runs[-1]

    yield run
    for made in runs:
        made.state.halt()
        made.state.journal.close()
    events.close()


def agreed(run: Run, terms: Terms | None = None) -> Course:
    """Return the course of a run once its sites have agreed."""
    with run.state.lock:
        run.state.agree(terms or Terms())
        run.state.journal.agreed(2, run.state.plan.terms)
    run.recover()
    return run.course


@pytest.mark.parametrize(
    ("strategy", "course"),
    [("fedavg", Synchronous), ("cyclic", Synchronous), ("fedbuff:k=2", Buffered), ("swarm", Swarm)],
)
def test_the_strategy_decides_once_the_sites_have_agreed(make: Make, strategy: str, course: type) -> None:
    run = make(strategy)
    assert type(run.course) is Joining
    assert type(agreed(run)) is course


@pytest.mark.parametrize(("strategy", "course"), [("fedavgm", Synchronous), ("fedbuff:k=2", Buffered)])
def test_a_strategy_that_the_sites_name_decides_too(make: Make, strategy: str, course: type) -> None:
    assert type(agreed(make(), Terms(strategy=strategy))) is course


def test_virtual_sites_need_no_handshake(make: Make) -> None:
    run = make("fedavg", VirtualSites({"w": np.zeros(2)}, None))  # type: ignore[arg-type]
    assert type(run.course) is Virtual
    assert type(agreed(run)) is Virtual


@pytest.mark.parametrize("strategy", ["fedavg", "fedbuff:k=2", "swarm"])
def test_no_course_takes_an_update_before_there_is_a_task(make: Make, strategy: str) -> None:
    run = make(strategy)
    for course in (run.course, agreed(run)):
        with run.state.lock:
            assert course.admit("site-1", 1, 0, "") == "duplicate"
            assert course.admit("site-1", 1, 1, "") == "late"
