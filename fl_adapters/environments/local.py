"""Parts that all environments on this machine share: the run's folder, its site processes and its result."""

from __future__ import annotations

import itertools
import shlex
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from fl_adapters.environments.listeners import RunTracker
from fl_adapters.environments.logs import tail
from fl_adapters.environments.outcome import SiteExit, run_error
from fl_adapters.environments.processes import SiteProcesses, common_environment, describe_status
from fl_adapters.environments.processes.forked_processes import ForkedProcesses
from fl_adapters.environments.report import heatmap, write_report
from fl_adapters.environments.report.notebook import NotebookView
from fl_adapters.environments.starting.site_data import DataOfSites, names_of
from fl_adapters.job import EarlierModel, Job, site_names
from fl_runtime.errors import ConfigError, FederationError
from fl_runtime.server import RoundResult
from fl_runtime.server.records.results import RunResult
from fl_runtime.trainings import training_folder
from fl_runtime.types import Event, Listener, RunSettings

_POLL_S = 0.02
_MOST_RESTARTS = 3  # per site and round: whatever kills a site three times will kill it again
_STOP_GRACE_S = 5.0  # between asking a site process to end and killing it
_FAILED_GRACE_S = 10.0  # lets the other sites hear of the failure and write it to their logs


class JobServer(Protocol):
    """Server of a job, in this process (`fl_runtime.server.Server`) or in another (`RemoteJob`)."""

    def site_left(self, name: str, reason: str) -> None:
        """Record that a site is gone, unless it has already left by itself."""
        ...

    def abort(self, reason: str) -> None:
        """End the run early."""
        ...

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait for the end of the run; False if it has not ended within `timeout_s` seconds."""
        ...

    @property
    def training_count(self) -> int:
        """Number of trainings so far."""
        ...

    def result(self, training: int = 1) -> RunResult:
        """Rounds, bytes and error of a training so far."""
        ...

    def export(self, folder: Path, which: Literal["final", "best"] = "final", *, training: int = 1) -> Path | None:
        """Write a global model of a training into `folder`; None if there is no such model."""
        ...


DEFAULT_SITES = 3


def script_command(job: Job, args: Sequence[str], *, module: bool) -> list[str]:
    """The command that runs a job's app at every site. Raises ConfigError if the script does not exist."""
    if module:
        return [sys.executable, "-m", job.app, *args]
    if not Path(job.app).exists():
        raise ConfigError(
            f"there is no script {job.app}", where=str(Path.cwd()), fix="check the path; a module needs -m"
        )
    return [sys.executable, job.app, *args]


def select_sites(job: Job, requested: int | Sequence[str] | None, data: DataOfSites | None = None) -> tuple[str, ...]:
    """Names of the sites: those of the environment, else those of the job, else those of the data, else three.

    Args:
        job: The job. The file of its initial model, if it names one, must exist.
        requested: The environment's sites, as a number or as names; None leaves the choice to the job.
        data: Where the data of each site lie.

    Returns:
        The names, in order.

    Raises:
        ConfigError: Job and environment name different sites, the data name none, or the initial model's file is
            missing.
    """
    chosen = requested if requested is not None else job.sites
    if chosen is None:
        chosen = names_of(data) or DEFAULT_SITES
    sites = site_names(chosen)
    if job.sites is not None and site_names(job.sites) != sites:
        raise ConfigError(
            f"the job names sites {job.sites!r}, the environment {requested!r}",
            where="sites",
            fix="give sites in one of the two only",
        )
    if isinstance(job.initial, str) and not Path(job.initial).is_file():
        raise ConfigError(f"there is no file {job.initial}", where="initial", fix="check the path of the initial model")
    return sites


def with_initial_file(job: Job, runs: Path) -> Job:
    """Replace the name of an earlier job in `initial` by the file that it has left.

    Args:
        job: The job.
        runs: Folder of the runs, in which each has a folder named after its job.

    Returns:
        The job, unchanged if it begins in another way.

    Raises:
        ConfigError: There is no such run, or it has left no such model in tensors.
    """
    if not isinstance(job.initial, EarlierModel):
        return job
    folder = runs / job.initial.job
    file = folder / ("best" if job.initial.model == "best" else "model") / "model.safetensors"
    if not file.is_file():
        missing = f"has left no {job.initial.model} model in tensors" if folder.is_dir() else "is not there"
        raise ConfigError(
            f"the job {job.initial.job} to begin from {missing}",
            where=str(file),
            fix="wait until it has ended, or name another job or a file of tensors in initial",
        )
    return job.model_copy(update={"initial": str(file)})


@dataclass(frozen=True)
class TrainingResult(NotebookView):
    """Result of one training of the sites' scripts. A script that trains k times has k of them.

    Attributes:
        number: Number of the training, from 1.
        folder: Its folder: `runs/<job>` for the first one, then `runs/<job>/2`, and so on.
        rounds: One `RoundResult` per round, in order: metrics, sites, bytes and seconds.
        best_round: Number of the round with the best score, or None if no round has one.
        model: Folder with the final global model, or None if there is none.
        best: Folder with the model of `best_round`, or None if there is none.
        no_best: Why there is no best round, as a human-readable message; "" if there is one.
    """

    number: int
    folder: Path
    rounds: tuple[RoundResult, ...]
    best_round: int | None
    model: Path | None
    best: Path | None
    no_best: str = ""


@dataclass(frozen=True)
class SimulationResult(NotebookView):
    """Result of a finished run on this machine.

    Rounds, models and bytes are those of the first training, and usually the only one. A script that trains more than
    once has a `TrainingResult` for each time in `trainings`.

    Attributes:
        job: Name of the job, which is also the name of its folder.
        folder: The run's folder, `runs/<job>`.
        sites: Names of the sites, in order.
        rounds: One `RoundResult` per round, in order: metrics, sites, bytes and seconds.
        best_round: Number of the round with the best score, or None if no round has one.
        wall_s: Seconds from the call of `run` to the end of the last site's process.
        startup_s: Seconds from the call of `run` to the start of round 1.
        bytes_up: Bytes from sites to the server over all rounds, as counted by the transport.
        bytes_down: Bytes from the server to sites over all rounds, as counted by the transport.
        model: Folder with the final global model, or None if there is none.
        best: Folder with the model of `best_round`, or None if there is none.
        no_best: Why there is no best round, as a human-readable message; "" if there is one.
        trainings: The results of all trainings, in order.
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
    no_best: str = ""
    trainings: tuple[TrainingResult, ...] = ()


@dataclass(frozen=True)
class LocalRun:
    """A run on this machine: its settings, its folder, and the listeners of its events.

    Attributes:
        settings: Settings of the run.
        folder: The run's folder, `runs/<job>`.
        tracker: Listener that the environment itself asks for the state of the sites.
        tell: Listener that passes an event on to all others, `tracker` included.
    """

    settings: RunSettings
    folder: Path
    tracker: RunTracker
    tell: Listener

    def log(self, site: str) -> Path:
        """File for the output of a site's process."""
        return self.folder / "sites" / site / "log.txt"


def starting_event(run: LocalRun, command: Sequence[str], *, virtual: bool = False) -> Event:
    """The event that opens a run: what is run, where, by whom, and whether the sites are virtual."""
    text = shlex.join(["python", *command[1:]])
    marks = {"virtual": True} if virtual else {}
    data = {"job": run.settings.name, "folder": str(run.folder), "sites": run.settings.sites, "command": text, **marks}
    return Event("starting", time.time(), data=data)


@contextmanager
def site_processes(
    server: JobServer, run: LocalRun, command: Sequence[str], *, gpus: Sequence[str | int] = ()
) -> Iterator[SiteProcesses]:
    """Give site processes to this block; none survives it. Ctrl-C asks them to end, a second Ctrl-C kills them.

    Args:
        server: The job's server.
        run: The run.
        command: The command line of every site.
        gpus: CUDA devices of the sites. With them each site's process begins by itself, since imports may ask CUDA for
            its devices, of which a process sees those that its environment names when it asks first.
    """
    sites = len(run.settings.sites)
    alone = gpus or sites < 2
    processes = SiteProcesses(forked=None if alone else ForkedProcesses.of(command, common_environment(sites)))
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
    """Wait until every site's process has ended, and tell the server of sites that ended too early.

    With `exact_restart`, a process that was killed is started again. Returns how each site's process ended.
    """
    exits: list[SiteExit] = []
    restarts: Counter[tuple[str, str]] = Counter()
    failed_at: float | None = None
    while processes.running:
        over = server.wait(_POLL_S)
        for site, status in processes.ended():
            stage = run.tracker.progress_of(site)
            if run.settings.exact_restart and status < 0 and not over and restarts[site, stage] < _MOST_RESTARTS:
                restarts[site, stage] += 1
                processes.start_again(site)
                run.tell(Event("restarted", time.time(), site=site, data={"status": describe_status(status)}))
                continue
            well = len(processes.running) + sum(item.clean for item in exits)
            exits.append(_exited(server, run, site, status, goes_on=well >= run.settings.min_sites))
        if over:
            failed_at = failed_at or (time.monotonic() if server.result(server.training_count).error else None)
            if failed_at and time.monotonic() > failed_at + _FAILED_GRACE_S:
                processes.stop(_STOP_GRACE_S)
            time.sleep(_POLL_S)
    if not server.wait(_FAILED_GRACE_S):
        server.abort("every site's process has ended")
    return exits


def _exited(server: JobServer, run: LocalRun, site: str, status: int, *, goes_on: bool) -> SiteExit:
    server.site_left(site, f"its process ended: {describe_status(status)}")  # no effect if the site has left by itself
    clean = not run.tracker.left_early(site) and status == 0
    log = run.log(site)
    ended = SiteExit(
        site=site,
        status=status,
        joined=site in run.tracker.joined,
        clean=clean,
        first=site == run.tracker.first_dropout,
        when=run.tracker.progress_of(site),
        log=log,
        tail=() if clean else tuple(tail(log)),
    )
    # If the run ends because of this site, the error shows the log. If it continues, this event must.
    lines = list(ended.tail) if goes_on else []
    data = {"clean": clean, "status": describe_status(status), "log": str(log), "tail": lines}
    run.tell(Event("exited", time.time(), site=site, data=data))
    return ended


def _exported(server: JobServer, folder: Path, which: Literal["final", "best"], training: int = 1) -> Path | None:
    """The model as the first site's process wrote it in its framework's format, else as plain safetensors."""
    if not server.result(training).rounds:  # only the initial model exists
        return None
    return folder if folder.exists() or server.export(folder, which, training=training) is not None else None


def remove_models(server: JobServer, run: LocalRun) -> None:
    """Delete the exported models of a run that is about to be resumed: they are outdated."""
    for number in range(1, server.training_count + 1):
        for name in ("model", "best"):
            shutil.rmtree(training_folder(run.folder, number) / name, ignore_errors=True)


def _training_result(server: JobServer, run: LocalRun, number: int) -> TrainingResult:
    folder, result = training_folder(run.folder, number), server.result(number)
    return TrainingResult(
        number=number,
        folder=folder,
        rounds=result.rounds,
        best_round=result.best_round,
        model=_exported(server, folder / "model", "final", number),
        best=_exported(server, folder / "best", "best", number),
        no_best=result.no_best,
    )


def make_result(server: JobServer, run: LocalRun, exits: list[SiteExit] | None, began: float) -> SimulationResult:
    """The result of a finished run.

    Args:
        server: The job's server, after the end of the run.
        run: The run.
        exits: Ends of the site processes; None if sites have no processes of their own.
        began: Start of the run in seconds of `time.monotonic`.

    Returns:
        The result, with paths of the exported models.

    Raises:
        FederationError: The run failed; the error is the cause.
    """
    result = server.result(server.training_count)
    trainings = tuple(_training_result(server, run, number) for number in range(1, server.training_count + 1))
    for training in trainings:
        _drawn(training.folder)
    error = result.error if exits is None else run_error(result.error, exits, run.settings)
    if error is not None:
        raise error
    first, result = trainings[0], server.result()
    return SimulationResult(
        job=run.settings.name,
        folder=run.folder,
        sites=run.settings.sites,
        rounds=first.rounds,
        best_round=first.best_round,
        wall_s=time.monotonic() - began,
        startup_s=(run.tracker.started or time.monotonic()) - began,
        bytes_up=result.bytes_up,
        bytes_down=result.bytes_down,
        model=first.model,
        best=first.best,
        no_best=first.no_best,
        trainings=trainings,
    )


def _drawn(folder: Path) -> None:
    """Write the report and the pictures of a training, whether it failed or not."""
    try:
        heatmap.draw(folder)
        write_report(folder)
    except FederationError as error:
        print(f"fl-adapters: there is no report: {error}", file=sys.stderr)


def make_run_folder(folder: Path, job: Job) -> Path:
    """Make a new folder for this run. A default name that is taken gets a number; a chosen one is an error."""
    is_chosen = "name" in job.model_fields_set
    for number in itertools.count(1):
        path = folder / (job.name if number == 1 else f"{job.name}-{number}")
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            if is_chosen:
                raise ConfigError(
                    f"{path} exists already, from an earlier run",
                    where="name",
                    fix=f"choose another name for the job, or continue that run: fl-adapters job resume {path}",
                ) from None
        except OSError as error:
            raise ConfigError(f"cannot make the folder {path}: {error.strerror}", fix="choose another folder") from None
        else:
            return path
    raise AssertionError
