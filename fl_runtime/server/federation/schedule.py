"""Which of the jobs that wait starts next: first come, first served within priorities, if its sites are there."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fl_runtime.errors import ConfigError, StoreError
from fl_runtime.server.federation.archive import JobRecord
from fl_runtime.trust.files import write_file
from fl_runtime.types import RunSettings
from fl_runtime.types.needs import GIB, Needs

log = logging.getLogger(__name__)

_TAKES_S = 30.0  # within which a site that was given a job asks for the next one, or its script joins
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


class Attendance:
    """Which sites wait for a job, what room they have, and which are away: they have a daemon that is not connected.

    A site whose daemon has never called may be served by a script that joins by itself, so it never counts as away.
    Guarded by the lock of the queue.

    Attributes:
        rooms: Site -> the room that its daemon has told.

    Args:
        file: Keeps the names of the sites with a daemon, so that a server that starts waits until they call.

    Raises:
        ConfigError: The file cannot be read.
    """

    def __init__(self, file: Path) -> None:
        self.rooms: dict[str, Room] = {}
        self._file = file
        self._waiting: dict[str, threading.Event] = {}  # sites that asked for a job last; set when they are gone
        self._answered_at: dict[str, float] = {}
        self._daemons: set[str] = set()
        if file.exists():
            try:
                self._daemons = set(map(str, json.loads(file.read_bytes())["sites"]))
            except (OSError, ValueError, KeyError, TypeError):
                raise ConfigError(
                    "the list of sites that have a daemon cannot be read",
                    where=str(file),
                    fix="delete it; each site is listed again when its daemon calls",
                ) from None

    @property
    def waiting(self) -> frozenset[str]:
        """Names of the sites that wait for a job at this moment."""
        return frozenset(name for name, left in self._waiting.items() if not left.is_set())

    def waits(self, site: str, left: threading.Event, room: Room | None = None) -> None:
        """Note that a site waits for a job.

        Args:
            site: Name of the site.
            left: Is set when it has ended its call.
            room: The room that its daemon tells, which takes one job after another; None if it tells none.
        """
        self._waiting[site] = left
        if room is not None:
            self.rooms[site] = room
            if site not in self._daemons:
                self._keep(self._daemons | {site})

    def answered(self, site: str, left: threading.Event) -> None:
        """Note that a site has got a job by the call with this event. It is there until it had time to take it."""
        self._answered_at[site] = time.monotonic()
        if self._waiting.get(site) is left:
            del self._waiting[site]

    def joins_by_itself(self, site: str) -> bool:
        """Note that a script of a site joins without a daemon. Returns whether the site was away by what was known."""
        was_away = site in self.away(())
        if was_away:
            self._keep(self._daemons - {site})
        return was_away

    def away(self, at_work: Collection[str]) -> frozenset[str]:
        """Return the sites that have a daemon and are not connected.

        Args:
            at_work: Names of the sites that are connected to a job.
        """
        taking = {site for site, at in self._answered_at.items() if time.monotonic() - at < _TAKES_S}
        return frozenset(self._daemons - self.waiting - taking - set(at_work))

    def _keep(self, daemons: set[str]) -> None:
        self._daemons = daemons
        try:
            write_file(self._file, json.dumps({"sites": sorted(daemons)}).encode())
        except StoreError as error:  # this process remembers it all the same
            log.warning("%s", error)


Work = tuple[RunSettings, Sequence[str]]
"""A job that runs, and the sites that are at work for it."""


def next_to_start(
    queued: Iterable[JobRecord], running: Iterable[Work], rooms: Mapping[str, Room], away: Collection[str] = ()
) -> JobRecord | None:
    """Choose the job to start next.

    Args:
        queued: The jobs that wait.
        running: The jobs that run.
        rooms: Site -> its room. Sites that are not listed run one job at a time.
        away: Names of the sites that are away; a job starts with as many others as its `min_sites`.

    Returns:
        Of the jobs of which enough sites are there and all have room, the one with the highest priority, and among
        these the oldest. None if there is no such job.
    """
    works = list(running)
    for record in sorted(queued, key=lambda item: (-item.priority, item.number)):
        if not shortage(record.settings, works, rooms, away):
            return record
    return None


def shortage(job: RunSettings, running: Sequence[Work], rooms: Mapping[str, Room], away: Collection[str] = ()) -> str:
    """Return why a job cannot start beside those that run.

    Args:
        job: The job.
        running: The jobs that run.
        rooms: Site -> its room.
        away: Names of the sites that are away.

    Returns:
        Text that names the first site without room, else the sites that are away if too few are there; "" if it can
        start.
    """
    for site in job.sites:
        others = [Needs.of(settings.resources) for settings, sites in running if site in sites]
        lacks = rooms.get(site, Room()).shortage(Needs.of(job.resources), others)
        if lacks:
            return f"{site}: {lacks}"
    missing = [site for site in job.sites if site in away]
    return f"sites: {', '.join(missing)}" if len(job.sites) - len(missing) < job.min_sites else ""
