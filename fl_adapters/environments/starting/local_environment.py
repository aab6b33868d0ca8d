"""What the environments on this machine have in common: a script, its sites and their data, and who listens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path

from fl_adapters.environments.starting.site_data import DataOfSites
from fl_adapters.environments.tracking import Tracker
from fl_runtime.types import Listener


@dataclass(frozen=True)
class LocalEnvironment:
    """Arguments of every environment that runs a script once per site on this machine.

    Attributes:
        sites: Number of sites, or their names.
        args: Arguments of the script.
        module: Whether the job's app is a module.
        gpus: CUDA devices that the sites get in turn.
        folder: Folder that the run's own folder is made in.
        port: TCP port of the server; 0 takes a free one.
        listeners: Functions that are called with each `Event`.
        quiet: Print nothing.
        data: Where the data of each site lie.
        trackers: Where the run is tracked, beside the job's `track`.
    """

    sites: int | Sequence[str] | None = None
    args: Sequence[str] = ()
    module: bool = False
    gpus: Sequence[str | int] = ()
    folder: str | Path = "runs"
    port: int = 0
    listeners: Sequence[Listener] = ()
    quiet: bool = False
    _: KW_ONLY
    data: DataOfSites | None = None
    trackers: Sequence[str | Tracker] = ()
