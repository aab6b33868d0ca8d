"""Simulates a federation on this machine: the server in this process, the user's script in a process per site."""

from __future__ import annotations

import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from fl_adapters.environments.listeners import FanOut, RunTracker
from fl_adapters.environments.local import (
    LocalRun,
    SimulationResult,
    follow,
    make_result,
    make_run_folder,
    remove_models,
    script_command,
    select_sites,
    site_processes,
    starting_event,
    with_initial_file,
)
from fl_adapters.environments.processes import SiteProcesses, free_ports, site_environment
from fl_adapters.environments.processes.function_script import function_script
from fl_adapters.environments.processes.gpus import visible_devices
from fl_adapters.environments.progress.notebook import progress_listener
from fl_adapters.environments.starting import resuming
from fl_adapters.environments.starting.local_environment import LocalEnvironment
from fl_adapters.environments.starting.resuming import StartArguments
from fl_adapters.environments.starting.site_data import places_of
from fl_adapters.environments.tracking import Tracking
from fl_adapters.environments.tracking.targets import make_trackers
from fl_adapters.job import Job
from fl_adapters.participant.kit import Kit
from fl_runtime.errors import ConfigError
from fl_runtime.server import Server
from fl_runtime.transport.malloc import use_one_arena
from fl_runtime.types import Listener

if TYPE_CHECKING:
    from fl_adapters.environments.virtual.function import InitialWeights, SiteFunction
    from fl_adapters.environments.virtual.simulation import Engine, VirtualSimulation

_SCRIPT = "script.py"


@dataclass(frozen=True)
class Simulation(LocalEnvironment):
    """Runs a job's script once per site on this machine, each in a process of its own.

    Sites and server talk over real gRPC on the loopback. Models above 1 MiB lie in files that all processes map into
    memory.

    With an `engine`, sites are virtual: the job's app names a function, `train.py:train` or `package.module:train`,
    and a few workers call `train(task, site)` for every site and round (docs/simulation.md).

    Attributes:
        sites: Number of sites, or their names. None takes the job's sites, else those of `data`, else `site-1` to
            `site-3`.
        args: Arguments of the script.
        module: Whether the job's app is a module to run with `python -m`.
        gpus: CUDA devices that the sites get in turn, counted within `CUDA_VISIBLE_DEVICES` where that is set. Empty
            leaves the variable alone.
        folder: Folder that the run's own folder, named after the job, is made in.
        port: TCP port of the server; 0 takes a free one.
        listeners: Functions that are called with each `Event`, one at a time, from threads of the server.
        quiet: Print nothing. Otherwise one line per round goes to stderr.
        share: Whether large models lie in shared files. False sends them through the sockets, as between machines;
            the results are the same.
        engine: None for a process per site. "processes" or "ray" for virtual sites with worker processes on this
            machine or on a Ray cluster.
        workers: Number of workers for virtual sites. None starts one per CPU core.
        function: Function for virtual sites, in place of the one that the app names. With "processes", workers are
            then forked copies of this process.
        initial: First weights for `function`: a dict of name to NumPy array, or a function that returns one.
        script: Function that every site runs in place of the app's script, such as one of a notebook that trains. It
            is called without arguments in each site's process, which it reaches by its source (docs/notebooks.md).
        data: Where the data of each site lie, for `fl_adapters.site().data`: `{"north": "a.csv", "south": "b.csv"}`, or
            a pattern such as `"parts/{site}.csv"`, from which the names of the sites follow. Addresses such as
            `"s3://bucket/{site}"` are passed on as they are.
        trackers: Where the run is tracked, beside the job's `track`: texts such as "mlflow:URI", or functions that are
            called with each record (docs/tracking.md).

    Example:
        >>> result = Job(app="train.py", rounds=5).run(Simulation(sites=3))
        >>> result.rounds[-1].metrics
    """

    share: bool = True
    engine: Engine | None = None
    workers: int | None = None
    function: SiteFunction | None = None
    initial: InitialWeights | None = None
    script: Callable[[], object] | None = None

    def run(self, job: Job) -> SimulationResult:
        """Run a job to its end. Ctrl-C ends all site processes before it is raised again.

        Args:
            job: The job. Its `app` is the script that every site runs, or the function of virtual sites.

        Returns:
            The result of the finished run.

        Raises:
            ConfigError: Job and simulation do not fit together, data are not there, or the run's folder exists. Nothing
                was started.
            FederationError: The run failed; the error names the cause and the log to read.
        """
        began = time.monotonic()
        virtual = self._virtual()
        source = self._source()
        command = [] if virtual or source else script_command(job, self.args, module=self.module)
        job = with_initial_file(job, Path(self.folder).resolve())
        sites = select_sites(job, self.sites, self.data)
        places = places_of(self.data, sites)
        settings = job.settings(sites)  # reports mistakes in the job before a folder is made
        visible_devices(self.gpus)
        trackers = make_trackers((*job.track, *self.trackers))  # reports what is missing before a folder is made
        if virtual:
            virtual.check(job, settings)
        folder = make_run_folder(Path(self.folder).resolve(), job)
        job = job.model_copy(update={"name": folder.name})
        if source:
            job, command = self._written(job, folder, source)
        (folder / "job.yml").write_text(job.to_yaml(), encoding="utf-8")
        gpus = tuple(map(str, self.gpus))
        args = tuple(self.args)
        resuming.save(folder, StartArguments(sites, args, self.module, gpus, self.engine, self.workers, places))
        return replace(self, trackers=trackers)._run(job, sites, folder, command, places, began)

    def resume(self, folder: str | Path) -> SimulationResult:
        """Continue a run that failed or was killed where it stopped. Updates that the server acknowledged count.

        Job, sites and arguments are those that the run was started with. Of this object, only `port`, `listeners`,
        `quiet`, `share`, `function`, `initial`, `script` and `trackers` are used. The script decides what it restores
        of its own state.

        Args:
            folder: The run's folder, `runs/<job>`.

        Returns:
            The result of the finished run, with all of its rounds.

        Raises:
            ConfigError: The folder holds no simulation, or one that has finished or belongs to another directory.
            FederationError: The run failed again; the error names the cause.
        """
        began = time.monotonic()
        folder = Path(folder).resolve()
        started, job = resuming.load(folder)
        again = replace(self, args=started.args, module=started.module, gpus=started.gpus)
        again = replace(again, engine=started.engine, workers=started.workers)
        places = places_of(started.data or None, started.sites)
        again = replace(again, trackers=make_trackers((*job.track, *self.trackers)))
        if (source := again._source()) and Path(job.app).resolve() != folder / _SCRIPT:
            raise ConfigError(f"this run has begun with {job.app}", where="Simulation(script=)", fix="leave script out")
        if source:
            (folder / _SCRIPT).write_text(source, encoding="utf-8")
        command = [] if started.engine else script_command(job, started.args, module=started.module)
        return again._run(job, started.sites, folder, command, places, began)

    def _run(
        self,
        job: Job,
        sites: tuple[str, ...],
        folder: Path,
        command: list[str],
        places: Mapping[str, str],
        began: float,
    ) -> SimulationResult:
        printers: tuple[Listener, ...] = () if self.quiet else (progress_listener(),)
        tracker = RunTracker()
        params = {**job.model_dump(mode="json", exclude={"track"}), "sites": sites}
        tracking = Tracking.of_folder(self.trackers, job.name, folder, params)
        run = LocalRun(job.settings(sites), folder, tracker, FanOut((tracker, tracking, *self.listeners, *printers)))
        with tracking.until_the_end(folder):
            return self._followed(job, run, command, places, began)

    def _followed(
        self, job: Job, run: LocalRun, command: list[str], places: Mapping[str, str], began: float
    ) -> SimulationResult:
        virtual = self._virtual()
        if virtual:
            virtual.check(job, run.settings)
            return virtual.run(job, run, began, places)
        with (
            _server(run, self.port, self.share) as (server, tokens, address),
            site_processes(server, run, command, gpus=self.gpus) as processes,
        ):
            run.tell(starting_event(run, command))
            self._start_sites(processes, command, run, places, tokens, address)
            exits = follow(server, processes, run)
            return make_result(server, run, exits, began)

    def _source(self) -> str:
        """The script that runs `script` at a site; "" without one. Raises ConfigError if it cannot be written."""
        if self.script is None:
            return ""
        for name, given in (("engine", self.engine), ("module", self.module)):
            if given:
                raise ConfigError(
                    f"script= is run in a process per site, without {name}",
                    where=f"Simulation({name}=)",
                    fix=f"leave {name} out; virtual sites take function=",
                )
        return function_script(self.script)

    def _written(self, job: Job, folder: Path, source: str) -> tuple[Job, list[str]]:
        """Write the script into the run's folder. Returns the job with the script as its app, and the command."""
        path = folder / _SCRIPT
        path.write_text(source, encoding="utf-8")
        job = job.model_copy(update={"app": os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)})
        return job, script_command(job, self.args, module=False)

    def _virtual(self) -> VirtualSimulation | None:
        if self.engine is None:
            for name, given in (("workers", self.workers), ("function", self.function), ("initial", self.initial)):
                if given is not None:
                    raise ConfigError(
                        f"{name} is for virtual sites",
                        where=f"Simulation({name}=)",
                        fix='give engine="processes" too, or leave it out',
                    )
            return None
        from fl_adapters.environments.virtual.simulation import VirtualSimulation

        return VirtualSimulation(self.engine, self.workers, self.function, self.initial, self.gpus, self.args)

    def _start_sites(
        self,
        processes: SiteProcesses,
        command: list[str],
        run: LocalRun,
        places: Mapping[str, str],
        tokens: dict[str, str],
        address: str,
    ) -> None:
        sites = run.settings.sites
        ports, gpus = free_ports(len(sites)), visible_devices(self.gpus)
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
                data=places.get(site, ""),
            )
            kit_folder = kit.save(run.folder / "sites" / site / "kit")
            gpu = gpus[index % len(gpus)] if gpus else None
            environment = site_environment(kit_folder, len(sites), ports[index], gpu)
            processes.start(site, command, environment, run.log(site))


@contextmanager
def _server(run: LocalRun, port: int, share: bool) -> Iterator[tuple[Server, dict[str, str], str]]:
    if not share:
        use_one_arena()  # as `fl-adapters server` does, since share=False shows its exchange
    tokens = {site: secrets.token_urlsafe(24) for site in run.settings.sites}
    fresh, address = not (run.folder / "server").exists(), ""
    try:
        server = Server(run.settings, run.folder, tokens, port=port, listeners=[run.tell], share=share, record=True)
        try:
            if server.finished:
                raise ConfigError("this run has finished", where=str(run.folder), fix="see its model and history there")
            remove_models(server, run)
            address = server.start()
            yield server, tokens, address
        finally:
            server.close()  # delivers the last events
    finally:
        if fresh and not address:  # nothing ran, so leave the name free
            shutil.rmtree(run.folder, ignore_errors=True)
