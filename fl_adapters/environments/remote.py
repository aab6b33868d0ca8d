"""Submits a job to a federation's server, follows its events and fetches its result; asks for earlier jobs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from fl_adapters.job import Job
from fl_runtime.aggregation.metrics.pooling import from_json, plain
from fl_runtime.client.control import ControlClient
from fl_runtime.errors import ConfigError, FederationError, ProtocolError
from fl_runtime.server.records.results import RoundResult, RunResult
from fl_runtime.text import printable
from fl_runtime.types import Event, Listener

_FIX = "run the same version of fl-adapters here and at the server, or ask who runs the server"


class RemoteJob:
    """A job on a federation's server. Creating this object submits it, unless only its name is given.

    Args:
        control: Connection to the server as an admin. The caller closes it.
        job: The job; or the name of one that was submitted before.
        tell: Listener that a thread of this object calls with each event of the job.
        patience_s: Seconds to wait for a server that does not answer.
    """

    def __init__(self, control: ControlClient, job: Job | str, tell: Listener, patience_s: float) -> None:
        self._control, self._tell, self._patience_s = control, tell, patience_s
        self.name = job if isinstance(job, str) else submit(control, job)
        self.outcome: Mapping[str, Any] = {}
        self._error: FederationError | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="fl-watch", daemon=True)
        self._thread.start()

    def site_left(self, name: str, reason: str) -> None:
        """Do nothing: `fl-adapters run` at the site tells the server."""

    def abort(self, reason: str) -> None:
        """Ask the server to end the job. Does nothing if the job has ended."""
        try:
            self._control.ask("AbortJob", job=self.name, reason=reason)
        except FederationError:
            if not self._ended.wait(self._patience_s):
                raise

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait for the job to end and its results to be written; False after `timeout_s` seconds without that."""
        return self._ended.wait(timeout_s)

    @property
    def training_count(self) -> int:
        """Number of trainings of the job; 1 before it has ended."""
        return max(1, len(self.outcome.get("trainings", ())))

    def result(self, training: int = 1) -> RunResult:
        """Result of a training of the job. Empty before the job has ended."""
        outcome = self.outcome
        error = FederationError.from_wire(outcome["error"]) if outcome.get("error") else self._error
        values = outcome["trainings"][training - 1] if outcome.get("trainings") else outcome
        try:
            return RunResult(
                rounds=tuple(RoundResult.from_json(item) for item in values.get("rounds", ())),
                best_round=values.get("best_round"),
                no_best=values.get("no_best", ""),
                error=error,
                bytes_up=values.get("bytes_up", 0),
                bytes_down=values.get("bytes_down", 0),
                files=values.get("files"),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as wrong:
            what = f"the server's result of the job cannot be read: {wrong!r}"[:300]
            raise ProtocolError(what, fix=_FIX) from None

    def export(self, folder: Path, which: Literal["final", "best"] = "final", *, training: int = 1) -> Path | None:
        """Folder with a model that the server wrote by itself; None if it is not there."""
        return folder if folder.exists() else None

    def _follow(self) -> None:
        try:
            for answer in self._control.follow(self.name, patience_s=self._patience_s, steps=True):
                if "event" in answer:
                    self._tell(_event(answer["event"]))
                else:
                    self.outcome = answer["ended"]
        except FederationError as error:
            self._error = error
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            self._error = ProtocolError(f"the server's events of the job cannot be read: {error!r}"[:300], fix=_FIX)
        finally:
            self._ended.set()


def submit(control: ControlClient, job: Job, *, priority: int = 0) -> str:
    """Put a job into the queue of a federation.

    Args:
        control: Connection to the server as an admin.
        job: The job.
        priority: From -100 to 100; jobs with a higher one start first.

    Returns:
        Name of the job.

    Raises:
        FederationError: The server refused it.
    """
    return str(control.ask("SubmitJob", job=job_fields(job), priority=priority)["job"])


def earlier_jobs(ask: Callable[..., dict[str, Any]], before: int) -> dict[str, Any]:
    """Ask the server of a federation for jobs that ended before those that it lists by itself.

    Args:
        ask: Makes a call as an admin, such as `ControlClient.ask`.
        before: Number of a job, as `older` of an earlier answer tells it: the jobs are older than that one.

    Returns:
        The server's answer to `Status`: `jobs` as they were submitted, and in `older` the number to ask for those
        before them, None if there are none.

    Raises:
        ConfigError: The server is of a version that does not tell of them.
        FederationError: The server is out of reach, or refused the call.
    """
    answer = ask("Status", before=before)
    if "older" not in answer:
        raise ConfigError(
            f"the server, with fl-adapters {printable(answer['version'], 50)}, tells only of the jobs that ended last",
            fix="ask who runs the server to upgrade it; `fl-adapters job show` finds older jobs by their names",
        )
    return answer


def job_fields(job: Job) -> dict[str, Any]:
    """Return a job as JSON values for its server. A job without a name has the one that was made for it.

    `track` stays here: who runs the server decides where the server tracks.
    """
    return {**job.model_dump(mode="json", exclude_unset=True, exclude={"track"}), "name": job.name}


def _event(fields: Mapping[str, Any]) -> Event:
    """Read an event; a metric may be the text "nan", which JSON has no number for."""
    data = dict(fields["data"])
    if isinstance(data.get("metrics"), dict):
        data["metrics"] = plain(from_json(data["metrics"]))
    return Event(**{**fields, "data": data})
