"""How a simulation was started, kept in its folder so that it can go on after an error or a kill."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from fl_adapters.job import Job
from fl_runtime.errors import ConfigError

_FILE = "simulation.json"


@dataclass(frozen=True)
class Started:
    """sites, args, module, gpus, engine, workers: see Simulation. directory: where the scripts run; relative paths are
    of it."""

    sites: tuple[str, ...]
    args: tuple[str, ...] = ()
    module: bool = False
    gpus: tuple[str, ...] = ()
    engine: Literal["processes", "ray"] | None = None
    workers: int | None = None
    directory: str = ""


def note(folder: Path, started: Started) -> None:
    fields = {**asdict(started), "directory": os.getcwd()}
    (folder / _FILE).write_text(json.dumps(fields, indent=1), encoding="utf-8")


def read(folder: Path) -> tuple[Started, Job]:
    """How the run in `folder` was started, and its job. ConfigError if there is none, or if it was started in another
    directory than this one."""
    try:
        fields: dict[str, Any] = json.loads((folder / _FILE).read_text(encoding="utf-8"))
        fields = {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}
        started = Started(**fields)
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(
            "there is no simulation here to go on with", where=str(folder), fix="name the folder runs/JOB"
        ) from None
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(
            f"how this simulation was started cannot be read: {error}",
            where=str(folder / _FILE),
            fix="make the file readable, or start the run again under another name",
        ) from None
    if Path(started.directory).resolve() != Path.cwd().resolve():
        raise ConfigError(
            "the run was started in another directory, and its scripts run there",
            where=started.directory,
            fix=f"cd {started.directory}",
        )
    return started, Job.from_file(folder / "job.yml")
