"""Which of the jobs that wait starts next: first come, first served within priorities, if its sites have room."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from fl_runtime.server.federation.archive import JobRecord
from fl_runtime.types import RunSettings
from fl_runtime.types.needs import GIB, Needs

_MOST = 2**60


@dataclass(frozen=True)
class Room:
    """What a site has told of its room for jobs.

    Attributes:
        slots: Number of jobs that it runs at a time.
        gpus: Number of GPUs that it divides among them; None if it has not told, so that only the site decides.
        memory_bytes: Size of its memory for jobs; None likewise.
    """

    slots: int = 1
    gpus: int | None = None
    memory_bytes: int | None = None

    @classmethod
    def told(cls, fields: object, most_slots: int) -> Room | None:
        """Read what a site tells.

        Args:
            fields: The field "resources" of its call.
            most_slots: Largest number of slots that counts.

        Returns:
            Its room; None if it tells none.
        """
        if not isinstance(fields, Mapping):
            return None
        numbers = {name: value for name, value in fields.items() if type(value) is int and 0 <= value < _MOST}
        if not numbers.get("slots"):
            return None
        return cls(min(numbers["slots"], most_slots), numbers.get("gpus"), numbers.get("memory_bytes"))

    def shortage(self, needs: Needs, others: Sequence[Needs]) -> str:
        """Return what a job lacks here, beside jobs that run.

        Args:
            needs: What the job needs.
            others: What the jobs need that are at work here.

        Returns:
            Text such as "2 GPUs are needed, 1 of 4 is free"; "" if it has room.
        """
        if len(others) >= self.slots:
            return f"all places for jobs are taken ({self.slots})"
        used = sum(other.memory_bytes for other in others)
        if self.memory_bytes is not None and needs.memory_bytes and used + needs.memory_bytes > self.memory_bytes:
            free = max(self.memory_bytes - used, 0) / GIB
            return f"{needs.memory_bytes / GIB:g} GiB of memory are needed, {free:.1f} are free"
        return self._lacks_gpus(needs, others)

    def _lacks_gpus(self, needs: Needs, others: Sequence[Needs]) -> str:
        if not self.gpus or needs.gpus == 0:
            return f"{needs.gpus} GPUs are needed, it has none" if self.gpus == 0 and needs.gpus else ""
        owned = sum(other.gpus or 0 for other in others)
        if needs.gpus is None:
            return "other jobs have all GPUs for themselves" if owned >= self.gpus else ""
        share = -(-self.gpus // self.slots)  # of a job that does not say what it needs
        free = max(self.gpus - owned - share * sum(other.gpus is None for other in others), 0)
        return f"{needs.gpus} GPUs are needed, {free} of {self.gpus} are free" if needs.gpus > free else ""


Work = tuple[RunSettings, Sequence[str]]
"""A job that runs, and the sites that are at work for it."""


def next_to_start(queued: Iterable[JobRecord], running: Iterable[Work], rooms: Mapping[str, Room]) -> JobRecord | None:
    """Choose the job to start next.

    Args:
        queued: The jobs that wait.
        running: The jobs that run.
        rooms: Site -> its room. Sites that are not listed run one job at a time.

    Returns:
        Of the jobs whose sites all have room, the one with the highest priority, and among these the oldest. None if
        there is no such job.
    """
    works = list(running)
    for record in sorted(queued, key=lambda item: (-item.priority, item.number)):
        if not shortage(record.settings, works, rooms):
            return record
    return None


def shortage(job: RunSettings, running: Sequence[Work], rooms: Mapping[str, Room]) -> str:
    """Return why a job cannot start beside those that run.

    Args:
        job: The job.
        running: The jobs that run.
        rooms: Site -> its room.

    Returns:
        Text that names the first site without room; "" if all have.
    """
    for site in job.sites:
        others = [Needs.of(settings.resources) for settings, sites in running if site in sites]
        lacks = rooms.get(site, Room()).shortage(Needs.of(job.resources), others)
        if lacks:
            return f"{site}: {lacks}"
    return ""
