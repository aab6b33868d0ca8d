"""What a site daemon has done since its start, and where its jobs stand: for those who watch it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from fl_adapters.cli.site.jobs import Phase, SiteJob
from fl_adapters.cli.site.records import JobState
from fl_adapters.participant.departure import ScriptNote


@dataclass(frozen=True)
class Standing:
    """Where the jobs of a daemon stand at one moment.

    Attributes:
        at: When that was, in monotonic seconds.
        phases: Number of jobs in each phase.
        slots: Number of jobs that may run at a time.
        slots_free: How many of these places no job occupies.
    """

    at: float
    phases: Counter[Phase]
    slots: int
    slots_free: int


class Activity:
    """Counts what one daemon does. The daemon's thread writes it, and others read it.

    Attributes:
        standing: Where its jobs stand; None before the daemon has looked.
        ended: Number of jobs that have ended here, by how.
        restarts: Number of scripts that were started again after they had died.
        bytes_up: Bytes of updates that its scripts have sent.
        bytes_down: Bytes of tasks that its scripts have received.
    """

    def __init__(self) -> None:
        self.standing: Standing | None = None
        self.ended: Counter[JobState] = Counter()
        self.restarts = self.bytes_up = self.bytes_down = 0
        self._counted: dict[str, tuple[int, int]] = {}

    def look(self, jobs: Iterable[SiteJob], slots: int) -> None:
        """Note where the jobs stand.

        Args:
            jobs: The jobs that have not ended.
            slots: Number of jobs that may run at a time.
        """
        jobs = list(jobs)
        occupied = sum(job.place is not None for job in jobs)
        phases = Counter(job.phase for job in jobs)
        self.standing = Standing(time.monotonic(), phases, slots, max(slots - occupied, 0))

    def begin_job(self, job: str, note: ScriptNote | None) -> None:
        """Count a job's bytes from here on: its note may have counted some before this daemon was started.

        Args:
            job: Name of the job.
            note: What its script has left, if anything.
        """
        self._counted.setdefault(job, _bytes_in(note))

    def count_bytes(self, job: str, note: ScriptNote | None) -> None:
        """Add what a job's scripts have sent and received since the last call for it.

        Args:
            job: Name of the job.
            note: What its script has left, if anything.
        """
        (up, down), (before_up, before_down) = _bytes_in(note), self._counted.get(job, (0, 0))
        self.bytes_up += max(up - before_up, 0)
        self.bytes_down += max(down - before_down, 0)
        self._counted[job] = up, down

    def end_job(self, job: str, how: JobState) -> None:
        """Count a job that is over here.

        Args:
            job: Name of the job.
            how: How it ended.
        """
        self.ended[how] += 1
        self._counted.pop(job, None)


def _bytes_in(note: ScriptNote | None) -> tuple[int, int]:
    return (note.bytes_up, note.bytes_down) if note else (0, 0)
