"""A federation on this machine: the server in this process, and a process per site that runs the user's script."""

from __future__ import annotations

import itertools
import secrets
import shlex
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fl_adapters import heatmap
from fl_adapters.environments.outcome import SiteExit, verdict
from fl_adapters.environments.processes import SiteProcesses, describe_status, free_ports, site_environment, tail
from fl_adapters.environments.progress import ProgressLines
from fl_adapters.environments.watch import FanOut, Watch
from fl_adapters.job import Job, site_names
from fl_adapters.kit import Kit
from fl_runtime.errors import ConfigError
from fl_runtime.server import RoundResult, Server
from fl_runtime.server.history import History
from fl_runtime.types import Event, Listener, RunSettings

DEFAULT_SITES = 3
_POLL_S = 0.02
_STOP_GRACE_S = 5.0  # between asking a site process to end and killing it
_FAILED_GRACE_S = 10.0  # for the other sites to hear that the run has failed and to say so in their logs


@dataclass(frozen=True)
class SimulationResult:
    """What a finished simulation gives back.

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
class Simulation:
    """Runs a job's app once per site on this machine, over real gRPC on the loopback.

    sites: how many, or their names; None takes the job's, else 3. args: arguments of the script.
    module: the job's app is a module (`python -m`). gpus: devices to deal out to the sites in turn.
    folder: where `runs/<job>` goes. port: of the server, 0 for a free one.
    listeners: called with each Event, one at a time, from threads of the server.
    quiet: print nothing; else a line per round goes to stderr.
    """

    sites: int | Sequence[str] | None = None
    args: Sequence[str] = ()
    module: bool = False
    gpus: Sequence[str | int] = ()
    folder: str | Path = "runs"
    port: int = 0
    listeners: Sequence[Listener] = ()
    quiet: bool = False

    def run(self, job: Job) -> SimulationResult:
        """Run `job` to its end. Raises FederationError if it fails; Ctrl-C ends all site processes first."""
        began = time.monotonic()
        command = self._command(job)
        sites = self._sites(job)
        job.settings(sites)  # what is wrong with the job shows before a folder is made
        folder = _make_run_folder(Path(self.folder).resolve(), job)
        job = job.model_copy(update={"name": folder.name})
        (folder / "job.yml").write_text(job.to_yaml(), encoding="utf-8")
        shown: tuple[Listener, ...] = () if self.quiet else (ProgressLines(sys.stderr),)
        watch = Watch()
        run = _Run(job.settings(sites), folder, watch, FanOut((watch, *self.listeners, *shown)))
        with _server(run, self.port) as (server, tokens, address), _processes(server, run) as processes:
            run.tell(_starting(run, command))
            self._start_sites(processes, command, run, tokens, address)
            exits = _follow(server, processes, run)
            result = _result(server, run, exits, began)
        heatmap.draw(run.folder)
        return result

    def _command(self, job: Job) -> list[str]:
        if self.module:
            return [sys.executable, "-m", job.app, *self.args]
        if not Path(job.app).exists():
            raise ConfigError(
                f"there is no script {job.app}", where=str(Path.cwd()), fix="check the path; a module needs -m"
            )
        return [sys.executable, job.app, *self.args]

    def _sites(self, job: Job) -> tuple[str, ...]:
        wanted = self.sites if self.sites is not None else job.sites
        sites = site_names(DEFAULT_SITES if wanted is None else wanted)
        if job.sites is not None and site_names(job.sites) != sites:
            raise ConfigError(
                f"the job is for sites {job.sites!r}, the simulation for {self.sites!r}",
                where="sites",
                fix="leave one of the two out",
            )
        if job.initial is not None and not Path(job.initial).is_file():
            raise ConfigError(f"there is no file {job.initial}", where="initial", fix="check the path")
        return sites

    def _start_sites(
        self, processes: SiteProcesses, command: list[str], run: _Run, tokens: dict[str, str], address: str
    ) -> None:
        sites = run.settings.sites
        ports = free_ports(len(sites))
        for index, site in enumerate(sites):
            kit = Kit(
                job=run.settings.name,
                site=site,
                index=index,
                count=len(sites),
                server=address,
                token=tokens[site],
                run=str(run.folder),
                simulated=True,
            )
            kit_folder = kit.save(run.folder / "sites" / site / "kit")
            gpu = str(self.gpus[index % len(self.gpus)]) if self.gpus else None
            environment = site_environment(kit_folder, len(sites), ports[index], gpu)
            processes.start(site, command, environment, run.log(site))


@dataclass(frozen=True)
class _Run:
    settings: RunSettings
    folder: Path
    watch: Watch
    tell: Listener

    def log(self, site: str) -> Path:
        return self.folder / "sites" / site / "log.txt"


def _starting(run: _Run, command: Sequence[str]) -> Event:
    shown = shlex.join(["python", *command[1:]])
    data = {"job": run.settings.name, "folder": str(run.folder), "sites": run.settings.sites, "command": shown}
    return Event("starting", time.time(), data=data)


@contextmanager
def _server(run: _Run, port: int) -> Iterator[tuple[Server, dict[str, str], str]]:
    tokens = {site: secrets.token_urlsafe(24) for site in run.settings.sites}
    history = History(run.folder)
    address = ""
    try:
        server = Server(run.settings, run.folder, tokens, port=port, listeners=[history, run.tell])
        try:
            address = server.start()
            yield server, tokens, address
        finally:
            server.close()  # delivers the last events
    finally:
        history.close()
        if not address:  # nothing has run: the name stays free
            shutil.rmtree(run.folder, ignore_errors=True)


@contextmanager
def _processes(server: Server, run: _Run) -> Iterator[SiteProcesses]:
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


def _follow(server: Server, processes: SiteProcesses, run: _Run) -> list[SiteExit]:
    """Wait until every site's process has ended; tell the server of those that ended before their work was done."""
    exits: list[SiteExit] = []
    failed_at: float | None = None
    while processes.running:
        over = server.wait(_POLL_S)
        for site, status in processes.ended():
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


def _exited(server: Server, run: _Run, site: str, status: int, *, goes_on: bool) -> SiteExit:
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


def _exported(server: Server, folder: Path, which: Literal["final", "best"]) -> Path | None:
    """What the first site's process has written in its framework's format, else plain safetensors."""
    if not server.result().rounds:  # there is nothing but the initial model
        return None
    return folder if folder.exists() or server.export(folder, which) is not None else None


def _result(server: Server, run: _Run, exits: list[SiteExit], began: float) -> SimulationResult:
    """The result of a run that finished. Raises the error of one that did not."""
    result = server.result()
    model, best = _exported(server, run.folder / "model", "final"), _exported(server, run.folder / "best", "best")
    error = verdict(result.error, exits, run.settings)
    if error is not None:
        raise error
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


def _make_run_folder(folder: Path, job: Job) -> Path:
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
                    fix="choose another name for the job, or delete that folder",
                ) from None
        except OSError as error:
            raise ConfigError(f"{path} cannot be made: {error.strerror}", fix="choose another folder") from None
        else:
            return path
    raise AssertionError
