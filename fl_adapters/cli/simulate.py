"""Commands `fl-adapters simulate` and `job resume`: build the job, show the run's progress, and sum it up."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn, cast

from rich.console import Console

from fl_adapters.cli.doctor.script_checks import missing_adapter
from fl_adapters.cli.live import has_screen, print_next, print_path, rounds_table, shown_progress
from fl_adapters.cli.output import console_for, report_errors, show_json
from fl_runtime.errors import ConfigError
from fl_runtime.trainings import HISTORY
from fl_runtime.types import Listener

if TYPE_CHECKING:
    from fl_adapters.environments.local import SimulationResult, TrainingResult
    from fl_adapters.environments.virtual.simulation import Engine
    from fl_adapters.job import Job


@dataclass(frozen=True)
class SimulateOptions:
    """Options of `fl-adapters simulate`.

    Attributes:
        app: The script or module, or "" to use that of the job file.
        job_file: Job file, or None.
        settings: Fields of the job that were given as options, as they were typed.
        args: Arguments of the script.
        module: Whether `app` is a module.
        gpus: CUDA devices of the sites.
        data: Where the data of each site lie, as they were typed.
        folder: Folder for runs.
        port: TCP port of the server, or 0.
        engine: Engine of virtual sites, or None.
        workers: Number of workers of virtual sites, or None.
    """

    app: str
    job_file: Path | None
    settings: Mapping[str, Any]
    args: tuple[str, ...]
    module: bool
    gpus: tuple[str, ...]
    data: tuple[str, ...]
    folder: Path
    port: int
    engine: str | None = None
    workers: int | None = None


def run(options: SimulateOptions, as_json: bool) -> int:
    """Run the simulation. Returns exit status 0 if every round finished."""
    console = console_for(as_json)
    console.print("fl-adapters simulate: starting", style="dim")  # the imports below take a moment
    with report_errors(as_json), _sigterm_as_ctrl_c():
        job = _make_job(options)
        _warn_of_missing_adapter(options, job, console)
        with shown_progress(console) as listener:
            result = _simulate(options, job, listener)
        if as_json:
            show_json(_json_fields(result))
        else:
            sum_up(result, console, listener.view.best_metric)
    return 0


def resume(folder: Path, as_json: bool) -> int:
    """Continue the simulation in a folder. Returns exit status 0 if every round finished."""
    console = console_for(as_json)
    console.print("fl-adapters job resume: starting", style="dim")
    with report_errors(as_json), _sigterm_as_ctrl_c():
        from fl_adapters.environments.simulation import Simulation

        with shown_progress(console) as listener:
            result = Simulation(listeners=(listener,), quiet=True).resume(folder)
        if as_json:
            show_json(_json_fields(result))
        else:
            sum_up(result, console, listener.view.best_metric)
    return 0


@contextmanager
def _sigterm_as_ctrl_c() -> Iterator[None]:
    """Treat SIGTERM, which job schedulers and CI send, as Ctrl-C, so that the sites end in the same orderly way."""

    def interrupt(number: int, frame: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _make_job(options: SimulateOptions) -> Job:
    from fl_adapters.environments.starting.site_data import parse_sites
    from fl_adapters.job import Job

    given = dict(options.settings)
    if "sites" in given:
        given["sites"] = parse_sites(given["sites"])
    if str(given.get("every", "")).isdigit():
        given["every"] = int(given["every"])
    if options.app:
        given["app"] = options.app
    if options.job_file is not None:
        return Job.from_file(options.job_file, **given)
    if "app" not in given:
        raise ConfigError("there is nothing to run", where="SCRIPT", fix="name the training script, or give --job FILE")
    return Job(**given)


def _warn_of_missing_adapter(options: SimulateOptions, job: Job, console: Console) -> None:
    """Say before the sites start that they would train alone. Only some scripts can be told apart without running."""
    check = missing_adapter(Path(job.app)) if job.app and not options.module else None
    if check is not None:
        console.print(f"warning: {job.app} may train alone: it {check.detail}; to do: {check.fix}", style="yellow")


def _simulate(options: SimulateOptions, job: Job, listener: Listener) -> SimulationResult:
    from fl_adapters.environments.simulation import Simulation
    from fl_adapters.environments.starting.site_data import parse_data

    simulation = Simulation(
        args=options.args,
        module=options.module,
        gpus=options.gpus,
        data=parse_data(options.data),
        folder=options.folder,
        port=options.port,
        engine=cast("Engine | None", options.engine),  # Simulation refuses others
        workers=options.workers,
        listeners=(listener,),
        quiet=True,
    )
    return job.run(simulation)


def sum_up(result: SimulationResult, console: Console, best_metric: str) -> None:
    """Print the rounds of a simulation, where its results are, and what to do with them.

    Args:
        result: The result.
        console: Where to print it.
        best_metric: The metric that decides the best round; "" for none.
    """
    several = len(result.trainings) > 1
    for training in result.trainings:
        title = f"{result.job}, training {training.number}" if several else result.job
        console.print(rounds_table(training.rounds, training.best_round, title, best_metric, console.width))
        for name, path in _left_by(training).items():
            best = f" (round {training.best_round})" if name == "best" else ""
            print_path(console, name, path, best)
        if training.no_best and has_screen(console):  # otherwise a line of progress has said it
            console.print(f"best     none: {training.no_best}", highlight=False, soft_wrap=True)
        print_next(console, training.folder, training.best or training.model)
    logs = next((folder for name in ("workers", "sites") if (folder := result.folder / name).exists()), None)
    print_path(console, "logs", logs)
    rounds = sum(len(training.rounds) for training in result.trainings)
    of_trainings = f" of {len(result.trainings)} trainings" if several else ""
    console.print(f"{rounds} rounds{of_trainings} in {result.wall_s:.1f} s", highlight=False)


def _left_by(training: TrainingResult) -> dict[str, Path | None]:
    folder = training.folder
    return {"model": training.model, "best": training.best, "history": folder / HISTORY}


def _json_fields(result: SimulationResult) -> dict[str, Any]:
    return {
        "job": result.job,
        "rounds": len(result.rounds),
        "sites": len(result.sites),
        "wall_s": round(result.wall_s, 4),
        "startup_s": round(result.startup_s, 4),
        "round_s": [round(item.seconds, 5) for item in result.rounds],
        "bytes_up": result.bytes_up,
        "bytes_down": result.bytes_down,
        "metrics": [dict(item.metrics) for item in result.rounds],
        "model": None if result.model is None else str(result.model),
        "best_round": result.best_round,
        "no_best": result.no_best,
        "folder": str(result.folder),
        "trainings": [_training_fields(training) for training in result.trainings],
    }


def _training_fields(training: TrainingResult) -> dict[str, Any]:
    return {
        "number": training.number,
        "folder": str(training.folder),
        "rounds": len(training.rounds),
        "metrics": [dict(item.metrics) for item in training.rounds],
        "model": None if training.model is None else str(training.model),
        "best": None if training.best is None else str(training.best),
        "best_round": training.best_round,
        "no_best": training.no_best,
    }
