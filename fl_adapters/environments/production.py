"""Runs a job on a real federation with an admin's startup kit. Sites run `fl-adapters run` under their policies."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fl_adapters.environments.listeners import FanOut
from fl_adapters.environments.progress import ProgressLines
from fl_adapters.environments.remote import RemoteJob
from fl_adapters.extras import needs_trust_extra
from fl_adapters.job import Job
from fl_runtime.client.control import ControlClient
from fl_runtime.server import RoundResult
from fl_runtime.types import Event, Listener


@dataclass(frozen=True)
class ProductionResult:
    """Result of a finished job on a real federation.

    Attributes:
        job: Name of the job.
        folder: The run's folder, `runs/<job>`, on the server's machine. The models are there.
        rounds: One `RoundResult` per round, in order: metrics, sites, bytes and seconds.
        best_round: Number of the round with the best score, or None if no round has one.
        wall_s: Seconds from the call of `run` to the end of the job.
        bytes_up: Bytes from sites to the server over all rounds.
        bytes_down: Bytes from the server to sites over all rounds.
        no_best: Why there is no best round, as a human-readable message; "" if there is one.
        trainings: Rounds of each training, in order, for scripts that train more than once. The fields above are those
            of the first one.
    """

    job: str
    folder: str
    rounds: tuple[RoundResult, ...]
    best_round: int | None
    wall_s: float
    bytes_up: int
    bytes_down: int
    no_best: str = ""
    trainings: tuple[tuple[RoundResult, ...], ...] = ()


@dataclass(frozen=True)
class Production:
    """Submits a job to a real federation and follows it to its end.

    The server's permissions (docs/permissions.md) and each site's policy decide whether the admin may submit it.

    Attributes:
        kit: Folder of the admin's startup kit.
        listeners: Functions that are called with each `Event`, one at a time, from a thread of this object.
        quiet: Print nothing. Otherwise one line per round goes to stderr.
        patience_s: Seconds to wait for a server that does not answer. The server continues the job when it is back.
            None takes those of the kit, a day unless the project file says otherwise.

    Example:
        >>> job = Job(app="spleen", rounds=20)
        >>> result = job.run(Production(kit="kits/ada"))
    """

    kit: str | Path
    listeners: Sequence[Listener] = ()
    quiet: bool = False
    patience_s: float | None = None

    def run(self, job: Job) -> ProductionResult:
        """Run a job to its end. Ctrl-C aborts it at the server.

        Args:
            job: The job. Its `app` is a name that the sites' policies map to a command.

        Returns:
            The result of the finished job.

        Raises:
            FederationError: The job was refused, or failed.
        """
        began = time.monotonic()
        with needs_trust_extra():
            from fl_runtime.client.roots import RenewingTransport
            from fl_runtime.trust.kits import read_kit

            kit = read_kit(Path(self.kit), kind="admin")
        printers: tuple[Listener, ...] = () if self.quiet else (ProgressLines(sys.stderr),)
        tell = FanOut((*self.listeners, *printers))
        control = ControlClient(RenewingTransport.of_kit(kit.folder, kit.address))
        try:
            remote = RemoteJob(control, job, tell, kit.patience_s if self.patience_s is None else self.patience_s)
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
            no_best=result.no_best,
            trainings=tuple(remote.result(number).rounds for number in range(1, remote.training_count + 1)),
        )
