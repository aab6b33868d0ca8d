"""A federation on this machine: the server in this process, and a process per site that runs the user's script."""

from __future__ import annotations

import secrets
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from fl_adapters.environments import resuming
from fl_adapters.environments.local import (
    LocalRun,
    SimulationResult,
    follow,
    make_run_folder,
    result_of,
    script_command,
    site_processes,
    sites_of,
    starting,
)
from fl_adapters.environments.processes import SiteProcesses, free_ports, site_environment
from fl_adapters.environments.progress import ProgressLines
from fl_adapters.environments.resuming import Started
from fl_adapters.environments.watch import FanOut, Watch
from fl_adapters.job import Job
from fl_adapters.participant.kit import Kit
from fl_runtime.errors import ConfigError
from fl_runtime.server import Server
from fl_runtime.server.records.history import History
from fl_runtime.transport.malloc import share_one_heap
from fl_runtime.types import Listener

if TYPE_CHECKING:
    from fl_adapters.environments.virtual.function import First, Function
    from fl_adapters.environments.virtual.run import Engine, Virtual


@dataclass(frozen=True)
class Simulation:
    """Runs a job's app once per site on this machine, over real gRPC on the loopback. Models too large for a message
    (1 MiB) lie in files that all processes map into memory.

    sites: how many, or their names; None takes the job's, else 3. args: arguments of the script.
    module: the job's app is a module (`python -m`). gpus: devices to deal out to the sites in turn.
    folder: where `runs/<job>` goes. port: of the server, 0 for a free one.
    listeners: called with each Event, one at a time, from threads of the server.
    quiet: print nothing; else a line per round goes to stderr. share: False sends large models through the sockets
    too, as between machines; the results are the same.

    engine: None runs the script in a process per site. With "processes", or "ray" (a cluster, too), the sites are
    virtual: the job's app names a function, `train.py:train` or `package.module:train`, and a few workers call
    `train(task, site)` for every site and round; see docs/simulation.md. workers: how many; None: one per core.
    function: the function itself, in place of the app's; workers are then copies of this process. initial: with
    `function`, the first weights (name -> array), or a function that gives them.
    """

    sites: int | Sequence[str] | None = None
    args: Sequence[str] = ()
    module: bool = False
    gpus: Sequence[str | int] = ()
    folder: str | Path = "runs"
    port: int = 0
    listeners: Sequence[Listener] = ()
    quiet: bool = False
    share: bool = True
    engine: Engine | None = None
    workers: int | None = None
    function: Function | None = None
    initial: First | None = None

    def run(self, job: Job) -> SimulationResult:
        """Run `job` to its end. Raises FederationError if it fails; Ctrl-C ends all site processes first."""
        began = time.monotonic()
        virtual = self._virtual()
        command = [] if virtual else script_command(job, self.args, module=self.module)
        sites = sites_of(job, self.sites)
        settings = job.settings(sites)  # what is wrong with the job shows before a folder is made
        if virtual:
            virtual.check(job, settings)
        folder = make_run_folder(Path(self.folder).resolve(), job)
        job = job.model_copy(update={"name": folder.name})
        (folder / "job.yml").write_text(job.to_yaml(), encoding="utf-8")
        gpus = tuple(map(str, self.gpus))
        resuming.note(folder, Started(sites, tuple(self.args), self.module, gpus, self.engine, self.workers))
        return self._run(job, sites, folder, command, began)

    def resume(self, folder: str | Path) -> SimulationResult:
        """Go on with the run in `folder` (`runs/<job>`), which ended with an error or was killed, where it stopped. Of
        this object only `port`, `listeners`, `quiet` and `function` (with `initial`) count; job, sites and arguments
        are those that the run began with. What of a site's state comes back is up to its script. ConfigError for a run
        that has finished."""
        began = time.monotonic()
        folder = Path(folder).resolve()
        started, job = resuming.read(folder)
        again = replace(self, args=started.args, module=started.module, gpus=started.gpus)
        again = replace(again, engine=started.engine, workers=started.workers)
        command = [] if started.engine else script_command(job, started.args, module=started.module)
        return again._run(job, started.sites, folder, command, began)

    def _run(
        self, job: Job, sites: tuple[str, ...], folder: Path, command: list[str], began: float
    ) -> SimulationResult:
        shown: tuple[Listener, ...] = () if self.quiet else (ProgressLines(sys.stderr),)
        watch = Watch()
        run = LocalRun(job.settings(sites), folder, watch, FanOut((watch, *self.listeners, *shown)))
        virtual = self._virtual()
        if virtual:
            virtual.check(job, run.settings)
            return virtual.run(job, run, began)
        with _server(run, self.port, self.share) as (server, tokens, address), site_processes(server, run) as processes:
            run.tell(starting(run, command))
            self._start_sites(processes, command, run, tokens, address)
            exits = follow(server, processes, run)
            return result_of(server, run, exits, began)

    def _virtual(self) -> Virtual | None:
        if self.engine is None:
            for name, given in (("workers", self.workers), ("function", self.function), ("initial", self.initial)):
                if given is not None:
                    raise ConfigError(
                        f"{name} is for virtual sites",
                        where=f"Simulation({name}=)",
                        fix='give engine="processes" too, or leave it out',
                    )
            return None
        from fl_adapters.environments.virtual.run import Virtual

        return Virtual(self.engine, self.workers, self.function, self.initial, self.gpus, self.args)

    def _start_sites(
        self, processes: SiteProcesses, command: list[str], run: LocalRun, tokens: dict[str, str], address: str
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


@contextmanager
def _server(run: LocalRun, port: int, share: bool) -> Iterator[tuple[Server, dict[str, str], str]]:
    if not share:
        share_one_heap()  # as the command `server` does, whose exchange this shows on one machine
    tokens = {site: secrets.token_urlsafe(24) for site in run.settings.sites}
    history = History(run.folder)
    fresh, address = not (run.folder / "server").exists(), ""
    try:
        server = Server(run.settings, run.folder, tokens, port=port, listeners=[history, run.tell], share=share)
        try:
            if server.finished:
                raise ConfigError("this run has finished", where=str(run.folder), fix="look at its model and history")
            for name in ("model", "best"):  # of a run that goes on: how far it had come
                shutil.rmtree(run.folder / name, ignore_errors=True)
            address = server.start()
            yield server, tokens, address
        finally:
            server.close()  # delivers the last events
    finally:
        history.close()
        if fresh and not address:  # nothing has run: the name stays free
            shutil.rmtree(run.folder, ignore_errors=True)
