"""Simulates many virtual sites: a few workers call one function for every site and round."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from fl_adapters.environments.local import LocalRun, SimulationResult, make_result, remove_models, starting_event
from fl_adapters.environments.processes import available_cores, thread_settings
from fl_adapters.environments.processes.gpus import visible_devices
from fl_adapters.environments.virtual.function import (
    InitialWeights,
    RunInfo,
    SiteFunction,
    encode_layout,
    initial_weights,
    names_function,
)
from fl_adapters.job import Job
from fl_adapters.participant.exchange import selected
from fl_runtime.aggregation import make_strategy
from fl_runtime.errors import ConfigError
from fl_runtime.server import Server
from fl_runtime.server.courses.virtual import VirtualSites, check_settings
from fl_runtime.server.courses.workers import Workers
from fl_runtime.store.tensorfile import read_tensors
from fl_runtime.types import Arrays, RunSettings
from fl_runtime.wire.manifest import Manifest

Engine = Literal["processes", "ray"]

_MANY = 256


@dataclass(frozen=True)
class VirtualSimulation:
    """A simulation of virtual sites. `Simulation` documents the fields.

    Attributes:
        engine: "processes" or "ray".
        workers: Number of workers, or None for one per core.
        function: The function itself, or None to import the one that the app names.
        initial: Weights before round 1, for `function`.
        gpus: CUDA devices that the workers get in turn.
        args: Command-line arguments for the function's module.
    """

    engine: Engine
    workers: int | None = None
    function: SiteFunction | None = None
    initial: InitialWeights | None = None
    gpus: Sequence[str | int] = ()
    args: Sequence[str] = ()

    def check(self, job: Job, settings: RunSettings) -> None:
        """Raise ConfigError for settings that cannot work, before a folder is made."""
        if self.engine not in ("processes", "ray"):
            raise ConfigError(f"there is no engine {self.engine!r}", where="engine", fix='use "processes" or "ray"')
        if self.workers is not None and self.workers < 1:
            raise ConfigError(f"{self.workers} workers are too few", where="workers", fix="give at least 1")
        if self.function is None and not names_function(job.app):
            raise ConfigError(
                f"virtual sites need a function, and {job.app} does not name one",
                where="app",
                fix='name it as in Job(app="train.py:train"), or leave engine out to run the script at every site',
            )
        if self.args and (self.engine == "ray" or self.function is not None):
            raise ConfigError(
                "these workers take no command-line arguments",
                where="args",
                fix="leave args out; use environment variables or a closure instead",
            )
        check_settings(settings, make_strategy(str(job.strategy)))

    def run(self, job: Job, run: LocalRun, began: float, data: Mapping[str, str]) -> SimulationResult:
        """Run the job to its end, from round 1 or from where the run's journal ends. `data`: site -> its path."""
        journal = run.folder / "server" / "journal.sqlite"
        run.tell(starting_event(run, [sys.executable, job.app], virtual=True))
        try:
            with _workers(self, job, run) as pool:
                return _simulated(self, job, run, pool, began, data)
        except BaseException:
            if not journal.exists():  # nothing ran, so leave the name free
                shutil.rmtree(run.folder, ignore_errors=True)
            raise


class _WorkerPool(Workers, Protocol):
    """Workers with a life: they give the initial weights, hear of the run, and end."""

    def initial(self) -> Arrays: ...
    def begin(self, info: RunInfo, manifest: Manifest) -> None: ...
    def close(self) -> None: ...


def _simulated(
    virtual: VirtualSimulation, job: Job, run: LocalRun, pool: _WorkerPool, began: float, data: Mapping[str, str]
) -> SimulationResult:
    initial = _initial(virtual, job, pool)
    manifest, settings = Manifest.of(initial), run.settings
    info = RunInfo(
        job=settings.name,
        count=len(settings.sites),
        rounds=settings.rounds or 0,
        seed=settings.seed,
        layout=encode_layout(manifest),
        exchanges_all=settings.exchange is None or isinstance(settings.exchange, str),
        data=dict(data),
    )
    pool.begin(info, manifest)
    sites = VirtualSites(initial, pool)
    server = Server(settings, run.folder, {}, listeners=[run.tell], virtual=sites, record=True)
    try:
        _follow(server, run)
        return make_result(server, run, None, began)
    finally:
        server.close()


def _follow(server: Server, run: LocalRun) -> None:
    """Wait for the end of the run. Ctrl-C aborts it and keeps the model so far."""
    if server.finished:
        raise ConfigError("this run has finished", where=str(run.folder), fix="see its model and history there")
    remove_models(server, run)
    server.begin()
    try:
        while not server.wait(3600.0):
            pass
    except KeyboardInterrupt:
        server.abort("stopped by Ctrl-C")
        server.wait()
        server.export(run.folder / "model")
        raise


def _initial(virtual: VirtualSimulation, job: Job, pool: _WorkerPool) -> Arrays:
    if isinstance(job.initial, str):  # `Simulation` has replaced the name of an earlier job by its file
        arrays = read_tensors(Path(job.initial))
    elif virtual.function is not None or virtual.initial is not None:
        arrays = initial_weights(virtual.initial)
    else:
        arrays = pool.initial()
    return {name: arrays[name] for name in selected(arrays, job.exchange or "auto", ())}


@contextmanager
def _workers(virtual: VirtualSimulation, job: Job, run: LocalRun) -> Iterator[_WorkerPool]:
    pool = _ray(virtual, job) if virtual.engine == "ray" else _processes(virtual, job, run)
    try:
        yield pool
    finally:
        pool.close()


def _ray(virtual: VirtualSimulation, job: Job) -> _WorkerPool:
    from fl_adapters.environments.virtual.ray_workers import RayWorkers

    return RayWorkers(job.app, virtual.function, virtual.workers)


def _processes(virtual: VirtualSimulation, job: Job, run: LocalRun) -> _WorkerPool:
    from fl_adapters.environments.virtual.launch import Forking, Importing, Launcher
    from fl_adapters.environments.virtual.process_workers import ProcessWorkers

    count = min(virtual.workers or available_cores(), run.settings.sites_per_round)
    names = [f"worker-{number}" for number in range(1, count + 1)]
    logs = run.folder / "workers"
    _more_open_files(run.settings)
    launcher: Launcher
    if virtual.function is not None:
        launcher = Forking(virtual.function, logs)
    else:
        gpus = visible_devices(virtual.gpus)
        environments = {name: thread_settings(count) | dict(os.environ) for name in names}
        for index, name in enumerate(names):
            if gpus:
                environments[name]["CUDA_VISIBLE_DEVICES"] = gpus[index % len(gpus)]
        launcher = Importing(job.app, virtual.args, logs, environments)
    return ProcessWorkers(launcher, names, run.folder / "server" / "updates", logs)


def _more_open_files(settings: RunSettings) -> None:
    """Raise the limit of open files: strategies that need all updates at once map one per site; shells allow 1024."""
    if settings.sites_per_round < _MANY or os.name != "posix":
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY or hard > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
