"""Saves the arguments of a simulation in its folder, so that the simulation can be resumed after an error or a kill."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from fl_adapters.job import Job
from fl_runtime.errors import ConfigError

_FILE = "simulation.json"


@dataclass(frozen=True)
class StartArguments:
    """Arguments that a simulation was started with. See `Simulation` for all but `directory`.

    Attributes:
        sites: Names of the sites.
        args: Arguments of the script.
        module: Whether the app is a module.
        gpus: CUDA devices of the sites.
        engine: Engine of virtual sites, or None.
        workers: Number of workers of virtual sites, or None.
        data: Site -> path or address of its data.
        directory: Working directory of the scripts, to which relative paths refer.
    """

    sites: tuple[str, ...]
    args: tuple[str, ...] = ()
    module: bool = False
    gpus: tuple[str, ...] = ()
    engine: Literal["processes", "ray"] | None = None
    workers: int | None = None
    data: dict[str, str] = field(default_factory=dict)
    directory: str = ""


def save(folder: Path, started: StartArguments) -> None:
    """Write the arguments into the run's folder, with the current directory."""
    fields = {**asdict(started), "directory": os.getcwd()}
    (folder / _FILE).write_text(json.dumps(fields, indent=1), encoding="utf-8")


def load(folder: Path) -> tuple[StartArguments, Job]:
    """The arguments and the job of the run in `folder`.

    Raises ConfigError if there is no simulation in `folder`, or if it was started in another working directory.
    """
    try:
        fields: dict[str, Any] = json.loads((folder / _FILE).read_text(encoding="utf-8"))
        fields = {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}
        started = StartArguments(**fields)
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(
            "there is no simulation to resume here", where=str(folder), fix="name its folder, runs/JOB"
        ) from None
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(
            f"cannot read the arguments of this simulation: {error}",
            where=str(folder / _FILE),
            fix="make the file readable, or start the run again under another name",
        ) from None
    if Path(started.directory).resolve() != Path.cwd().resolve():
        raise ConfigError(
            "this run was started in another directory, in which its scripts must run",
            where=started.directory,
            fix=f"cd {started.directory}",
        )
    return started, Job.from_file(folder / "job.yml")
