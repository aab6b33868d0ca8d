"""The runs below a folder. Of their events, only what is new is read again."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from fl_adapters.environments.report.charts import value_text
from fl_adapters.environments.report.record import RunReader, RunRecord
from fl_runtime.errors import ConfigError
from fl_runtime.store.lock import lock_owner
from fl_runtime.text import printable
from fl_runtime.trainings import EVENTS

_KEPT = 8
"""Records kept in memory, those that were looked at last: one of 50 sites, 200 rounds and 10 metrics takes 20 MB."""
_MOST_RUNS = 1_000
_MOST_TRAININGS = 200


@dataclass(frozen=True)
class Overview:
    """A run in the list of runs.

    Attributes:
        name: Its path below the folder, such as "study", or "study/2" for the second training of a script.
        state: "running", "finished", "failed", or "not finished" for one whose process is gone.
        finished: Number of rounds that have a model.
        planned: Number of rounds that it will have, or None if that is not known.
        best: The metric of the best round, as text; "" without one.
        sites: Number of sites that took part.
        began: Time of the first event, in seconds since the epoch; 0 without events.
        last: Time of the last event, in seconds since the epoch.
    """

    name: str
    state: str
    finished: int
    planned: int | None
    best: str
    sites: int
    began: float
    last: float


class RunsFolder:
    """The runs below a folder. May be used by any thread.

    Args:
        folder: Folder that holds those of runs, such as `runs`, or the folder of one run. It need not exist yet.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = threading.RLock()
        self._readers: OrderedDict[str, RunReader] = OrderedDict()
        self._overviews: dict[str, tuple[str, Overview]] = {}

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Keep all records as they are until the block ends: other threads that ask for one wait meanwhile."""
        with self._lock:
            yield

    def overviews(self) -> list[Overview]:
        """Return all runs, the newest first. Of those that have not changed, nothing is read."""
        found = {name: self.version(name) for name in self.names()}
        with self._lock:
            return list(self._overviews_of(found))

    def _overviews_of(self, found: Mapping[str, str]) -> Iterator[Overview]:
        """Yield the overviews of runs, by name and version. Those that cannot be read are left out."""
        self._overviews = {name: kept for name, kept in self._overviews.items() if name in found}
        for name, version in found.items():
            known = self._overviews.get(name, ("", None))
            overview = known[1] if known[0] == version else None
            if overview is None:
                with suppress(ConfigError, OSError):
                    overview = _overview(name, self.record(name))
            if overview is not None:
                self._overviews[name] = version, overview
                yield overview

    def names(self) -> list[str]:
        """Return the paths of the runs below the folder, the newest first; "." if the folder is that of one run."""
        if (self.folder / EVENTS).is_file():
            return [".", *(name for name, _ in _below(self.folder, ""))]
        jobs = sorted(_below(self.folder, ""), key=lambda item: -item[1])[:_MOST_RUNS]
        return [name for job, _ in jobs for name in (job, *(n for n, _ in _below(self.folder / job, f"{job}/")))]

    def trainings(self, name: str) -> dict[int, str]:
        """Return the trainings of a run's script, by number: their paths below the folder.

        Args:
            name: Path of one of them, such as "study" or "study/2".

        Returns:
            The first 200; just this one if the script trains once.
        """
        above, _, last = name.rpartition("/")
        is_later = last.isdecimal() and (self.folder / above / EVENTS).is_file()
        job = (above or ".") if is_later else name
        below = [path for path, _ in _below(self.folder / job, "" if job == "." else f"{job}/")]
        later = sorted((int(number), path) for path in below if (number := path.rpartition("/")[2]).isdecimal())
        return {1: job, **dict(later[: _MOST_TRAININGS - 1])}

    def version(self, name: str) -> str:
        """Return a text that changes with the events of a run; "" if there is no such run."""
        try:
            state = (self._place(name) / EVENTS).stat()
        except (ConfigError, OSError):
            return ""
        return f"{state.st_ino}.{state.st_size}.{_is_running(self._place(name))}"

    def record(self, name: str) -> RunRecord:
        """Return the record of a run as it is now. It must only be read, and within `unchanged`, else it may grow.

        Args:
            name: Path of the run below the folder.

        Raises:
            ConfigError: There is no such run.
        """
        place = self._place(name)
        with self._lock:
            reader = self._readers.pop(name, None) or RunReader(place)
            self._readers[name] = reader
            while len(self._readers) > _KEPT:
                self._readers.popitem(last=False)
            return reader.read()

    def state(self, run: RunRecord) -> str:
        """Return what a run does, in a word or two; see `Overview`."""
        return _state(run)

    def logs(self, name: str) -> dict[str, Path]:
        """Return the files with the output of each site of a run."""
        place = self._place(name)
        job = place.parent if place.name.isdecimal() and (place.parent / EVENTS).is_file() else place
        return {path.parent.name: path for path in sorted(job.glob("sites/*/log.txt"))}

    def _place(self, name: str) -> Path:
        """The folder of a run. Raises ConfigError for a path that leads elsewhere."""
        with suppress(OSError, ValueError):  # a name that no file system takes
            place = (self.folder / name).resolve()
            if place.is_relative_to(self.folder.resolve()) and (place / EVENTS).is_file():
                return place
        shown = printable(name, 200)
        raise ConfigError(f"there is no run {shown!r}", where=str(self.folder), fix="choose one from the list")


def _below(folder: Path, prefix: str) -> Iterator[tuple[str, float]]:
    """Names and times of the folders below one that are those of runs."""
    try:
        entries = list(os.scandir(folder))
    except OSError:
        return
    for entry in sorted(entries, key=lambda entry: entry.name):
        with suppress(OSError):
            if entry.is_dir():
                yield prefix + entry.name, os.stat(os.path.join(entry.path, EVENTS)).st_mtime


def _overview(name: str, run: RunRecord) -> Overview:
    done = sum(record.finished for number, record in run.rounds.items() if number)
    best = ""
    if run.best.round in run.rounds:
        metrics = run.rounds[run.best.round].metrics
        shown = run.best.metric or next(iter(metrics), "")
        best = f"{shown} {value_text(metrics[shown])}" if shown in metrics else ""
    return Overview(name, _state(run), done, run.planned, best, len(run.sites), run.began, run.last)


def _state(run: RunRecord) -> str:
    if run.ended:
        return "failed" if run.failed else "finished"
    return "running" if _is_running(run.folder) else "not finished"


def _is_running(place: Path) -> bool:
    """Whether the process that last ran a run is there."""
    owner = lock_owner(place / "server") or lock_owner(place.parent / "server")
    if not owner:
        return False
    try:
        os.kill(owner, 0)
    except PermissionError:
        return True
    except (OSError, OverflowError):
        return False
    return True
