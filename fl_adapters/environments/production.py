"""Runs a job on a real federation with an admin's startup kit. Sites run `fl-adapters run` under their policies."""

from __future__ import annotations

import hashlib
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fl_adapters.environments.download import download
from fl_adapters.environments.listeners import FanOut
from fl_adapters.environments.models import Which
from fl_adapters.environments.progress.notebook import progress_listener
from fl_adapters.environments.remote import RemoteJob, submit
from fl_adapters.environments.report.saved_run import SavedRun
from fl_adapters.environments.tracking import EndState, Tracker, Tracking
from fl_adapters.environments.tracking.targets import make_trackers
from fl_adapters.extras import needs_trust_extra
from fl_adapters.job import Job
from fl_runtime.client.control import ControlClient
from fl_runtime.errors import AbortedError, FederationError
from fl_runtime.server import RoundResult
from fl_runtime.types import Event, Listener


@dataclass(frozen=True)
class ProductionResult:
    """Result of a finished job on a real federation.

    Attributes:
        job: Name of the job.
        folder: The run's folder, `runs/<job>`, on the server's machine. The models are there.
        kit: Folder of the admin's startup kit, which `download` and `load` use.
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
    kit: Path
    rounds: tuple[RoundResult, ...]
    best_round: int | None
    wall_s: float
    bytes_up: int
    bytes_down: int
    no_best: str = ""
    trainings: tuple[tuple[RoundResult, ...], ...] = ()

    def download(self, folder: str | Path = "") -> SavedRun:
        """Download the job's result files. What is there and whole is not fetched again.

        Args:
            folder: Folder to write to. Default: one that is named as the job, in the current directory.

        Returns:
            The run on this machine, with `history`, `plot()` and `load()`.

        Raises:
            FederationError: A file cannot be fetched.
        """
        chosen = Path(folder or self.job)
        Production(self.kit).download(self.job, chosen)
        return SavedRun(chosen)

    def load(self, into: Any = None, *, which: Which = "final", partial: bool = False, folder: str | Path = "") -> Any:
        """Download the job's result files and open the global model. Nothing is unpickled.

        Args:
            into: See `SavedRun.load`.
            which: "final" for the last global model, "best" for that of the best round.
            partial: See `SavedRun.load`.
            folder: As in `download`.

        Returns:
            The model; see `SavedRun.load`.

        Raises:
            FederationError: A file cannot be fetched, or the model cannot be opened in this way.
            ImportError: The framework is not installed.
        """
        return self.download(folder).load(into, which=which, partial=partial)


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
        trackers: Where jobs that are run or followed are tracked from this machine, beside the job's `track`; see
            `Simulation`. The job's results are then downloaded at its end.

    Example:
        >>> job = Job(app="spleen", rounds=20)
        >>> result = job.run(Production(kit="kits/ada"))
    """

    kit: str | Path
    listeners: Sequence[Listener] = ()
    quiet: bool = False
    patience_s: float | None = None
    trackers: Sequence[str | Tracker] = ()

    def run(self, job: Job) -> ProductionResult:
        """Run a job to its end. Ctrl-C stops following it; the job goes on.

        Args:
            job: The job. Its `app` is a name that the sites' policies map to a command.

        Returns:
            The result of the finished job.

        Raises:
            FederationError: The job was refused, or failed.
        """
        with self._connected() as (control, patience_s):
            return self._followed(control, patience_s, job)

    def submit(self, job: Job, *, priority: int = 0) -> str:
        """Put a job into the federation's queue, and return at once.

        Args:
            job: The job.
            priority: From -100 to 100; jobs with a higher one start first.

        Returns:
            Name of the job, for `attach`.

        Raises:
            FederationError: The job was refused.
        """
        with self._connected() as (control, _):
            return submit(control, job, priority=priority)

    def attach(self, job: str) -> ProductionResult:
        """Follow a job that was submitted before to its end. Ctrl-C stops following it; the job goes on.

        Args:
            job: Name of the job.

        Returns:
            The result of the finished job.

        Raises:
            FederationError: There is no such job, or it failed.
        """
        with self._connected() as (control, patience_s):
            return self._followed(control, patience_s, job)

    def jobs(self) -> list[dict[str, Any]]:
        """Return the jobs that wait or run, and those that ended last.

        Returns:
            For each job a dict with `job`, `state` ("queued", "running", "finished", "failed", "aborted"), `app`,
            `sites`, `submitted_by`, `priority`, and the times `submitted_at`, `started_at` and `ended_at` in seconds
            since the epoch.
        """
        with self._connected() as (control, _):
            return list(control.ask("Status")["jobs"])

    def abort(self, job: str) -> None:
        """End a job that waits or runs.

        Args:
            job: Name of the job.

        Raises:
            FederationError: There is no such job, it cannot be done, or this admin may not do it.
        """
        with self._connected() as (control, _):
            control.ask("AbortJob", job=job)

    def resume(self, job: str) -> None:
        """Put a job that failed or was aborted back into the queue, to go on where its journal stands.

        Args:
            job: Name of the job.

        Raises:
            FederationError: There is no such job, it cannot be done, or this admin may not do it.
        """
        with self._connected() as (control, _):
            control.ask("ResumeJob", job=job)

    def download(self, job: str, folder: str | Path) -> list[Path]:
        """Download the result files of a job that has ended; see `environments.download.download`.

        Args:
            job: Name of the job.
            folder: Folder to write to.

        Returns:
            The files.

        Raises:
            FederationError: There is no such job, it has not ended, or a file cannot be fetched.
        """
        with self._connected() as (control, patience_s):
            return download(control, job, Path(folder), patience_s=patience_s)

    @contextmanager
    def _connected(self) -> Iterator[tuple[ControlClient, float]]:
        """A connection to the server, and how long to wait for it."""
        with connected(Path(self.kit)) as (control, patience_s):
            yield control, patience_s if self.patience_s is None else self.patience_s

    def _followed(self, control: ControlClient, patience_s: float, job: Job | str) -> ProductionResult:
        began = time.monotonic()
        printers: tuple[Listener, ...] = () if self.quiet else (progress_listener(),)
        targets = (*(job.track if isinstance(job, Job) else ()), *self.trackers)
        trackers = make_trackers(targets)  # reports what is missing before the job is submitted
        name = job if isinstance(job, str) else submit(control, job)
        shown = control.ask("ShowJob", job=name, patience_s=patience_s)
        settings = shown["settings"]
        facts_of_job = f"{name} {shown.get('submitted_at')} {shown.get('submitted_by')}"
        identity = hashlib.sha256(facts_of_job.encode()).hexdigest()[:32]
        tracking = Tracking(trackers, name, identity, settings)
        tell = FanOut((tracking, *self.listeners, *printers))
        remote = RemoteJob(control, name, tell, patience_s)
        place = f"{remote.name} of the server's data folder"
        facts = {"job": remote.name, "folder": place, "sites": settings["sites"], "command": settings["app"]}
        tell(Event("starting", time.time(), data=facts))
        try:
            remote.wait()
        except KeyboardInterrupt:
            text = f"no longer following {remote.name}, which goes on; to end it: fl-adapters job abort {remote.name}"
            print(text, file=sys.stderr, flush=True)
            tracking.close(None, Path())
            raise
        result = remote.result()
        if targets:
            self._end(tracking, remote, result.error)
        if result.error is not None:
            raise result.error
        return ProductionResult(
            job=remote.name,
            folder=str(remote.outcome["folder"]),
            kit=Path(self.kit),
            rounds=result.rounds,
            best_round=result.best_round,
            wall_s=time.monotonic() - began,
            bytes_up=result.bytes_up,
            bytes_down=result.bytes_down,
            no_best=result.no_best,
            trainings=tuple(remote.result(number).rounds for number in range(1, remote.training_count + 1)),
        )

    def _end(self, tracking: Tracking, remote: RemoteJob, error: FederationError | None) -> None:
        """Give what the job has left to its trackers. A job that could not be followed to its end has no state."""
        if not remote.outcome:
            tracking.close(None, Path())
            return
        state: EndState = "killed" if isinstance(error, AbortedError) else "failed" if error else "finished"
        with tempfile.TemporaryDirectory(prefix="fl-adapters-tracked-") as temporary:
            folder = Path(temporary)
            try:
                self.download(remote.name, folder)
            except FederationError as missing:
                print(f"fl-adapters: tracking: the results of {remote.name} are not there: {missing}", file=sys.stderr)
            tracking.close(state, folder)


@contextmanager
def connected(kit_folder: Path) -> Iterator[tuple[ControlClient, float]]:
    """Connect to a federation's server as an admin, for the duration of the block.

    Args:
        kit_folder: The admin's startup kit.

    Yields:
        The connection, and the kit's patience: how long the server may be out of reach, in seconds.

    Raises:
        ConfigError: The folder is not the kit of an admin.
    """
    with needs_trust_extra():
        from fl_runtime.client.roots import RenewingTransport
        from fl_runtime.trust.kits import read_kit

        kit = read_kit(kit_folder, kind="admin")
    with closing(ControlClient(RenewingTransport.of_kit(kit.folder, kit.addresses))) as control:
        yield control, kit.patience_s
