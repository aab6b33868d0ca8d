"""Virtual sites: a simulation of many sites whose work is a function, carried out by a few workers."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from fl_adapters.environments.local import LocalRun, SimulationResult, result_of, starting
from fl_adapters.environments.processes import available_cores, thread_settings
from fl_adapters.environments.virtual.function import First, Function, Place, described, first_weights, named
from fl_adapters.job import Job
from fl_adapters.participant.exchange import selected
from fl_runtime.aggregation import make_strategy
from fl_runtime.errors import ConfigError
from fl_runtime.server import Server
from fl_runtime.server.courses.virtual import Workers, check_settings, course
from fl_runtime.server.records.history import History
from fl_runtime.store.tensorfile import read_tensors
from fl_runtime.types import Arrays, RunSettings
from fl_runtime.wire.manifest import Manifest

Engine = Literal["processes", "ray"]

_MANY = 256


@dataclass(frozen=True)
class Virtual:
    """What a Simulation says of its workers; see there."""

    engine: Engine
    workers: int | None = None
    function: Function | None = None
    initial: First | None = None
    gpus: Sequence[str | int] = ()
    args: Sequence[str] = ()

    def check(self, job: Job, settings: RunSettings) -> None:
        """ConfigError for what cannot work, before a folder is made."""
        if self.engine not in ("processes", "ray"):
            raise ConfigError(f"there is no engine {self.engine!r}", where="engine", fix='use "processes" or "ray"')
        if self.workers is not None and self.workers < 1:
            raise ConfigError(f"{self.workers} workers cannot work", where="workers", fix="give at least 1")
        if self.function is None and not named(job.app):
            raise ConfigError(
                f"virtual sites share a function, and {job.app} does not name one",
                where="app",
                fix='name it as in Job(app="train.py:train"), or leave engine out to run the script at every site',
            )
        if self.args and (self.engine == "ray" or self.function is not None):
            raise ConfigError(
                "arguments are for a module that workers import from a command line, and these do not",
                where="args",
                fix="leave args out, and use environment variables or a closure",
            )
        check_settings(settings, make_strategy(str(job.strategy)))

    def run(self, job: Job, run: LocalRun, began: float) -> SimulationResult:
        """A run in its folder, from the beginning or from where its journal stands, to its end."""
        journal = run.folder / "server" / "journal.sqlite"
        run.tell(starting(run, [sys.executable, job.app]))
        try:
            with _workers(self, job, run) as team:
                return _simulated(self, job, run, team, began)
        except BaseException:
            if not journal.exists():  # nothing has run: the name stays free
                shutil.rmtree(run.folder, ignore_errors=True)
            raise


class _Team(Workers, Protocol):
    def initial(self) -> Arrays: ...
    def begin(self, place: Place, manifest: Manifest) -> None: ...
    def close(self) -> None: ...


def _simulated(virtual: Virtual, job: Job, run: LocalRun, team: _Team, began: float) -> SimulationResult:
    initial = _initial(virtual, job, team)
    manifest, settings = Manifest.of(initial), run.settings
    place = Place(
        job=settings.name,
        count=len(settings.sites),
        rounds=settings.rounds or 0,
        seed=settings.seed,
        layout=described(manifest),
        exchanges_all=settings.exchange is None or isinstance(settings.exchange, str),
    )
    team.begin(place, manifest)
    history = History(run.folder)
    try:
        server = Server(settings, run.folder, {}, listeners=[history, run.tell], loop=course(initial, team))
        try:
            _follow(server, run.folder)
            return result_of(server, run, None, began)
        finally:
            server.close()
    finally:
        history.close()


def _follow(server: Server, folder: Path) -> None:
    """To the end of the run; Ctrl-C ends it in an orderly way."""
    if server.finished:
        raise ConfigError("this run has finished", where=str(folder), fix="look at its model and history")
    for name in ("model", "best"):  # of a run that goes on: how far it had come
        shutil.rmtree(folder / name, ignore_errors=True)
    server.begin()
    try:
        while not server.wait(3600.0):
            pass
    except KeyboardInterrupt:
        server.abort("stopped by Ctrl-C")
        server.wait()
        server.export(folder / "model")
        raise


def _initial(virtual: Virtual, job: Job, team: _Team) -> Arrays:
    if job.initial is not None:
        arrays = read_tensors(Path(job.initial))
    elif virtual.function is not None or virtual.initial is not None:
        arrays = first_weights(virtual.initial)
    else:
        arrays = team.initial()
    return {name: arrays[name] for name in selected(arrays, job.exchange or "auto", ())}


@contextmanager
def _workers(virtual: Virtual, job: Job, run: LocalRun) -> Iterator[_Team]:
    team = _ray(virtual, job) if virtual.engine == "ray" else _processes(virtual, job, run)
    try:
        yield team
    finally:
        team.close()


def _ray(virtual: Virtual, job: Job) -> _Team:
    from fl_adapters.environments.virtual.ray_workers import RayWorkers

    return RayWorkers(job.app, virtual.function, virtual.workers)


def _processes(virtual: Virtual, job: Job, run: LocalRun) -> _Team:
    from fl_adapters.environments.virtual.launch import Forking, Importing, Launcher
    from fl_adapters.environments.virtual.process_workers import WorkerProcesses

    count = min(virtual.workers or available_cores(), run.settings.sites_per_round)
    names = [f"worker-{number}" for number in range(1, count + 1)]
    logs = run.folder / "workers"
    _more_open_files(run.settings)
    launcher: Launcher
    if virtual.function is not None:
        launcher = Forking(virtual.function, logs)
    else:
        environments = {name: thread_settings(count) | dict(os.environ) for name in names}
        for index, name in enumerate(names):
            if virtual.gpus:
                environments[name]["CUDA_VISIBLE_DEVICES"] = str(virtual.gpus[index % len(virtual.gpus)])
        launcher = Importing(job.app, virtual.args, logs, environments)
    return WorkerProcesses(launcher, names, run.folder / "server" / "updates", logs)


def _more_open_files(settings: RunSettings) -> None:
    """A strategy that needs all updates at once maps a file for each; shells often allow 1024."""
    if settings.sites_per_round < _MANY or os.name != "posix":
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY or hard > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
