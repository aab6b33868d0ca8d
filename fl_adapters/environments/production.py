"""A job on a real federation, over an admin's kit. The sites run `fl-adapters run`, under their own policies."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fl_adapters.environments.extras import needs_cryptography
from fl_adapters.environments.progress import ProgressLines
from fl_adapters.environments.remote import RemoteJob
from fl_adapters.environments.watch import FanOut
from fl_adapters.job import Job
from fl_runtime.control import ControlClient
from fl_runtime.server import RoundResult
from fl_runtime.types import Event, Listener


@dataclass(frozen=True)
class ProductionResult:
    """What a finished job gives back. folder: `runs/<job>` on the server's machine, where the models are.

    bytes_up, bytes_down: of all sites and rounds, up is site to server.
    """

    job: str
    folder: str
    rounds: tuple[RoundResult, ...]
    best_round: int | None
    wall_s: float
    bytes_up: int
    bytes_down: int


@dataclass(frozen=True)
class Production:
    """Submits a job to the federation of an admin's kit and follows it to its end.

    kit: the admin's startup kit. Who may submit is for the server's table of permissions and each site's policy to
    say. patience_s: how long a server that does not answer is waited for; it goes on with the job when it is back.
    listeners, quiet: as in Simulation.
    """

    kit: str | Path
    listeners: Sequence[Listener] = ()
    quiet: bool = False
    patience_s: float = 600.0

    def run(self, job: Job) -> ProductionResult:
        """Run `job` to its end. Raises FederationError if it is refused or fails; Ctrl-C aborts it."""
        began = time.monotonic()
        with needs_cryptography():
            from fl_runtime.trust.kits import read_kit

            kit = read_kit(Path(self.kit), kind="admin")
        shown: tuple[Listener, ...] = () if self.quiet else (ProgressLines(sys.stderr),)
        tell = FanOut((*self.listeners, *shown))
        control = ControlClient.of_kit(kit.folder, kit.address)
        try:
            remote = RemoteJob(control, job, tell, self.patience_s)
            data = {
                "job": remote.name,
                "folder": f"the server's runs/{remote.name}",
                "sites": kit.sites,
                "command": job.app,
            }
            tell(Event("starting", time.time(), data=data))
            try:
                remote.wait()
            except KeyboardInterrupt:
                remote.abort("stopped by Ctrl-C")
                raise
        finally:
            control.close()
        result = remote.result()
        if result.error is not None:
            raise result.error
        return ProductionResult(
            job=remote.name,
            folder=str(remote.outcome["folder"]),
            rounds=result.rounds,
            best_round=result.best_round,
            wall_s=time.monotonic() - began,
            bytes_up=result.bytes_up,
            bytes_down=result.bytes_down,
        )
