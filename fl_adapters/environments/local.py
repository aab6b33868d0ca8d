"""What environments on this machine share: a run's folder, its site processes, its end and its result."""

from __future__ import annotations

import itertools
import shlex
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from fl_adapters.environments import heatmap
from fl_adapters.environments.outcome import SiteExit, verdict
from fl_adapters.environments.processes import SiteProcesses, describe_status, tail
from fl_adapters.environments.watch import Watch
from fl_adapters.job import Job, site_names
from fl_runtime.errors import ConfigError
from fl_runtime.server import RoundResult
from fl_runtime.server.records.results import RunResult
from fl_runtime.types import Event, Listener, RunSettings

_POLL_S = 0.02
_MOST_RESTARTS = 3  # of a site in one round: whatever kills it comes again
_STOP_GRACE_S = 5.0  # between asking a site process to end and killing it
_FAILED_GRACE_S = 10.0  # for the other sites to hear that the run has failed and to say so in their logs


class JobServer(Protocol):
    """A job's server, in this process or in another. See fl_runtime.server.Server."""

    def site_left(self, name: str, reason: str) -> None: ...
    def abort(self, reason: str) -> None: ...
    def wait(self, timeout_s: float | None = None) -> bool: ...
    def result(self) -> RunResult: ...
    def export(self, folder: Path, which: Literal["final", "best"] = "final") -> Path | None: ...


DEFAULT_SITES = 3


def script_command(job: Job, args: Sequence[str], *, module: bool) -> list[str]:
    """The command that runs a job's app, once per site. ConfigError if there is no such script."""
    if module:
        return [sys.executable, "-m", job.app, *args]
    if not Path(job.app).exists():
        raise ConfigError(
            f"there is no script {job.app}", where=str(Path.cwd()), fix="check the path; a module needs -m"
        )
    return [sys.executable, job.app, *args]


def sites_of(job: Job, wanted: int | Sequence[str] | None) -> tuple[str, ...]:
    """The names of the sites: the environment's, else the job's, else 3. ConfigError where both say, and differ."""
    found = wanted if wanted is not None else job.sites
    sites = site_names(DEFAULT_SITES if found is None else found)
    if job.sites is not None and site_names(job.sites) != sites:
        raise ConfigError(
            f"the job is for sites {job.sites!r}, the environment for {wanted!r}",
            where="sites",
            fix="leave one of the two out",
        )
    if job.initial is not None and not Path(job.initial).is_file():
        raise ConfigError(f"there is no file {job.initial}", where="initial", fix="check the path")
    return sites


@dataclass(frozen=True)
class SimulationResult:
    """What a run on this machine gives back when it has finished.

    folder: `runs/<job>`. wall_s: from the call of `run` to the end of the last site's process; startup_s: to the
    start of round 1. bytes_up, bytes_down: of all sites and rounds, counted by the transport, up is site to server.
    model, best: folders with the final and the best round's model; None if there is none.
    """

    job: str
    folder: Path
    sites: tuple[str, ...]
    rounds: tuple[RoundResult, ...]
    best_round: int | None
    wall_s: float
    startup_s: float
    bytes_up: int
    bytes_down: int
    model: Path | None
    best: Path | None


@dataclass(frozen=True)
class LocalRun:
    """A run's settings and folder, and who hears of it."""

    settings: RunSettings
    folder: Path
    watch: Watch
    tell: Listener

    def log(self, site: str) -> Path:
        return self.folder / "sites" / site / "log.txt"


def starting(run: LocalRun, command: Sequence[str]) -> Event:
    shown = shlex.join(["python", *command[1:]])
    data = {"job": run.settings.name, "folder": str(run.folder), "sites": run.settings.sites, "command": shown}
    return Event("starting", time.time(), data=data)


@contextmanager
def site_processes(server: JobServer, run: LocalRun) -> Iterator[SiteProcesses]:
    """The site processes; none is left when this is over. Ctrl-C asks them to end, a second one kills them."""
    processes = SiteProcesses()
    try:
        yield processes
    except KeyboardInterrupt:
        server.abort("stopped by Ctrl-C")
        processes.stop(_STOP_GRACE_S)
        _exported(server, run.folder / "model", "final")
        raise
    finally:
        processes.close()


def follow(server: JobServer, processes: SiteProcesses, run: LocalRun) -> list[SiteExit]:
    """Wait until every site's process has ended; tell the server of those that ended before their work was done.

    With `exact_restart` a process that was killed is started again.
    """
    exits: list[SiteExit] = []
    restarts: Counter[tuple[str, str]] = Counter()
    failed_at: float | None = None
    while processes.running:
        over = server.wait(_POLL_S)
        for site, status in processes.ended():
            stage = run.watch.stage(site)
            if run.settings.exact_restart and status < 0 and not over and restarts[site, stage] < _MOST_RESTARTS:
                restarts[site, stage] += 1
                processes.start_again(site)
                run.tell(Event("restarted", time.time(), site=site, data={"status": describe_status(status)}))
                continue
            well = len(processes.running) + sum(item.clean for item in exits)
            exits.append(_exited(server, run, site, status, goes_on=well >= run.settings.min_sites))
        if over:
            failed_at = failed_at or (time.monotonic() if server.result().error else None)
            if failed_at and time.monotonic() > failed_at + _FAILED_GRACE_S:
                processes.stop(_STOP_GRACE_S)
            time.sleep(_POLL_S)
    if not server.wait(_FAILED_GRACE_S):
        server.abort("every site's process has ended")
    return exits


def _exited(server: JobServer, run: LocalRun, site: str, status: int, *, goes_on: bool) -> SiteExit:
    server.site_left(site, f"its process ended: {describe_status(status)}")  # nothing new if it has left itself
    clean = not run.watch.left_early(site) and status == 0
    log = run.log(site)
    found = SiteExit(
        site=site,
        status=status,
        joined=site in run.watch.joined,
        clean=clean,
        first=site == run.watch.first_out,
        when=run.watch.stage(site),
        log=log,
        tail=() if clean else tuple(tail(log)),
    )
    # where the run ends because of it, the error shows the log; where it goes on, nobody else would
    shown = list(found.tail) if goes_on else []
    data = {"clean": clean, "status": describe_status(status), "log": str(log), "tail": shown}
    run.tell(Event("exited", time.time(), site=site, data=data))
    return found


def _exported(server: JobServer, folder: Path, which: Literal["final", "best"]) -> Path | None:
    """What the first site's process has written in its framework's format, else plain safetensors."""
    if not server.result().rounds:  # there is nothing but the initial model
        return None
    return folder if folder.exists() or server.export(folder, which) is not None else None


def result_of(server: JobServer, run: LocalRun, exits: list[SiteExit] | None, began: float) -> SimulationResult:
    """The result of a run that finished. Raises the error of one that did not. exits: None where no site has a process
    of its own."""
    result = server.result()
    model, best = _exported(server, run.folder / "model", "final"), _exported(server, run.folder / "best", "best")
    error = result.error if exits is None else verdict(result.error, exits, run.settings)
    if error is not None:
        raise error
    heatmap.draw(run.folder)
    return SimulationResult(
        job=run.settings.name,
        folder=run.folder,
        sites=run.settings.sites,
        rounds=result.rounds,
        best_round=result.best_round,
        wall_s=time.monotonic() - began,
        startup_s=(run.watch.started or time.monotonic()) - began,
        bytes_up=result.bytes_up,
        bytes_down=result.bytes_down,
        model=model,
        best=best,
    )


def make_run_folder(folder: Path, job: Job) -> Path:
    """A folder of this run's own. A name that nobody chose gets a number if it is taken."""
    chosen = "name" in job.model_fields_set
    for number in itertools.count(1):
        path = folder / (job.name if number == 1 else f"{job.name}-{number}")
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            if chosen:
                raise ConfigError(
                    f"{path} exists already, from an earlier run",
                    where="name",
                    fix=f"choose another name for the job, or go on with that run: fl-adapters job resume {path}",
                ) from None
        except OSError as error:
            raise ConfigError(f"{path} cannot be made: {error.strerror}", fix="choose another folder") from None
        else:
            return path
    raise AssertionError
