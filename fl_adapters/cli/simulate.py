"""`fl-adapters simulate`: builds the job, shows the run while it goes on, and sums it up."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn, cast

from rich.console import Console

from fl_adapters.cli.live import live_table, rounds_table
from fl_adapters.cli.output import console_for, report_errors, show_json
from fl_adapters.environments.progress import ProgressLines
from fl_runtime.errors import ConfigError
from fl_runtime.types import Listener

if TYPE_CHECKING:
    from fl_adapters.environments.local import SimulationResult
    from fl_adapters.environments.virtual.simulation import Engine
    from fl_adapters.job import Job


@dataclass(frozen=True)
class SimulateOptions:
    """The command line. settings: fields of the job that were given as options, as they were typed."""

    app: str
    job_file: Path | None
    settings: Mapping[str, Any]
    args: tuple[str, ...]
    module: bool
    gpus: tuple[str, ...]
    folder: Path
    port: int
    engine: str | None = None
    workers: int | None = None


def run(wanted: SimulateOptions, as_json: bool) -> int:
    """Exit status 0: every round finished. Human output goes to stderr where stdout is for JSON."""
    console = console_for(as_json)
    console.print("fl-adapters simulate: starting", style="dim")  # the imports below take a moment
    with report_errors(as_json), _sigterm_as_ctrl_c():
        job = _job(wanted)
        result = _simulated(wanted, job, console)
        if as_json:
            show_json(_json(result))
        else:
            _sum_up(result, console)
    return 0


def resume(folder: Path, as_json: bool) -> int:
    """Exit status 0: every round finished."""
    console = console_for(as_json)
    console.print("fl-adapters job resume: starting", style="dim")
    with report_errors(as_json), _sigterm_as_ctrl_c():
        from fl_adapters.environments.simulation import Simulation

        with _listening(console) as listener:
            result = Simulation(listeners=(listener,), quiet=True).resume(folder)
        if as_json:
            show_json(_json(result))
        else:
            _sum_up(result, console)
    return 0


@contextmanager
def _listening(console: Console) -> Iterator[Listener]:
    """Who shows the run while it goes on: a live table, or lines where there is no terminal."""
    if not console.is_terminal:
        yield ProgressLines(console.file)
        return
    with live_table(console) as view:
        yield view


@contextmanager
def _sigterm_as_ctrl_c() -> Iterator[None]:
    """Job schedulers and CI end a command with SIGTERM: the sites are to end in the same orderly way."""

    def interrupt(number: int, frame: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _job(wanted: SimulateOptions) -> Job:
    from fl_adapters.job import Job

    given = dict(wanted.settings)
    if "sites" in given:
        given["sites"] = _sites(given["sites"])
    if str(given.get("every", "")).isdigit():
        given["every"] = int(given["every"])
    if wanted.app:
        given["app"] = wanted.app
    if wanted.job_file is not None:
        return Job.from_file(wanted.job_file, **given)
    if "app" not in given:
        raise ConfigError("there is nothing to run", where="SCRIPT", fix="name the training script, or give --job FILE")
    return Job(**given)


def _sites(text: str) -> int | tuple[str, ...]:
    """3, or names: north,south."""
    return int(text) if text.lstrip("-").isdigit() else tuple(name.strip() for name in text.split(","))


def _simulated(wanted: SimulateOptions, job: Job, console: Console) -> SimulationResult:
    from fl_adapters.environments.simulation import Simulation

    with _listening(console) as listener:
        simulation = Simulation(
            args=wanted.args,
            module=wanted.module,
            gpus=wanted.gpus,
            folder=wanted.folder,
            port=wanted.port,
            engine=cast("Engine | None", wanted.engine),  # Simulation refuses others
            workers=wanted.workers,
            listeners=(listener,),
            quiet=True,
        )
        return job.run(simulation)


def _sum_up(result: SimulationResult, console: Console) -> None:
    console.print(rounds_table(result))
    shown = {"model": result.model, "best": result.best, "history": result.folder / "history.csv"}
    logs = next((folder for name in ("workers", "sites") if (folder := result.folder / name).exists()), None)
    for name, path in {**shown, "logs": logs}.items():
        if path is not None:
            best = f" (round {result.best_round})" if name == "best" else ""
            console.print(f"{name:8} {_short(path)}{best}", highlight=False, soft_wrap=True)
    console.print(f"{len(result.rounds)} rounds in {result.wall_s:.1f} s", highlight=False)


def _short(path: Path) -> str:
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def _json(result: SimulationResult) -> dict[str, Any]:
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
        "folder": str(result.folder),
    }
