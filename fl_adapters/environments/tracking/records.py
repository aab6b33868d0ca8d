"""What a tracker receives: the begin of a run, its metrics, and its end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, TypeAlias

EndState = Literal["finished", "failed", "killed"]
"""How a run ended; "killed" means that somebody stopped it."""


@dataclass(frozen=True)
class TrackedRun:
    """One training of a job, which is one run for a tracking tool.

    Attributes:
        name: Name of the training: the job's, then "job/2" and so on for scripts that train more than once.
        identity: Text that no other run has. A run that is resumed has the same one.
    """

    name: str
    identity: str


@dataclass(frozen=True)
class Begin:
    """A run begins, or goes on after it was resumed.

    Attributes:
        run: The run.
        params: The job's settings, as text.
    """

    run: TrackedRun
    params: Mapping[str, str]


@dataclass(frozen=True)
class Point:
    """One value of a metric.

    Attributes:
        name: `loss` over all sites, `site/north/loss` at one site, or `round/seconds`, `round/bytes_up` and
            `round/bytes_down`.
        value: The value, which may be NaN or infinite.
        round: Number of the round, the step of the curve.
        time: When it was known, in seconds since the epoch.
    """

    name: str
    value: float
    round: int
    time: float


@dataclass(frozen=True)
class Metrics:
    """Values that have become known since the last record of the run.

    Attributes:
        run: The run.
        points: The values, in the order in which they became known.
    """

    run: TrackedRun
    points: tuple[Point, ...]


@dataclass(frozen=True)
class End:
    """A run has ended.

    Attributes:
        run: The run.
        state: How it ended.
        folder: Folder with what the run has left: report.html, history.csv, events.jsonl, job.yml, and the exported
            models in `model` and `best`. Not every run leaves each of them.
    """

    run: TrackedRun
    state: EndState
    folder: Path


Record: TypeAlias = Begin | Metrics | End


class Tracker(Protocol):
    """Receives the records of a run, one at a time and in order, in a thread of its own.

    An OSError (a server or a disk that fails) makes the same record come again later. After any other exception the
    record counts as lost. Neither stops nor slows the run.

    Args:
        record: The next record.
    """

    def __call__(self, record: Record) -> None: ...
