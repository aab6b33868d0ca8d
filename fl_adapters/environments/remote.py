"""A job that runs on a federation's server, seen from here: submit it, hear its events, get its result."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from fl_adapters.job import Job
from fl_runtime.control import ControlClient
from fl_runtime.errors import FederationError
from fl_runtime.server.records.results import RoundResult, RunResult
from fl_runtime.types import Event, Listener


class RemoteJob:
    """A submitted job. tell(event) is called for each of its events, by a thread of this object.

    patience_s: how long a server that does not answer is waited for.
    """

    def __init__(self, control: ControlClient, job: Job, tell: Listener, patience_s: float) -> None:
        fields = {**job.model_dump(mode="json", exclude_unset=True), "name": job.name}
        self._control, self._tell, self._patience_s = control, tell, patience_s
        self.name: str = control.ask("SubmitJob", job=fields)["job"]
        self.outcome: Mapping[str, Any] = {}
        self._error: FederationError | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="fl-watch", daemon=True)
        self._thread.start()

    def site_left(self, name: str, reason: str) -> None:
        """The server hears it from `fl-adapters run` at the site."""

    def abort(self, reason: str) -> None:
        """Ask the server to end the job; nothing if it has ended."""
        try:
            self._control.ask("AbortJob", job=self.name, reason=reason)
        except FederationError:
            if not self._ended.wait(self._patience_s):
                raise

    def wait(self, timeout_s: float | None = None) -> bool:
        """True once the job has ended and its results are written."""
        return self._ended.wait(timeout_s)

    def result(self) -> RunResult:
        """What there is, once the job has ended; before, nothing."""
        found = self.outcome
        error = FederationError.from_wire(found["error"]) if found.get("error") else self._error
        return RunResult(
            rounds=tuple(RoundResult.from_json(item) for item in found.get("rounds", ())),
            best_round=found.get("best_round"),
            error=error,
            bytes_up=found.get("bytes_up", 0),
            bytes_down=found.get("bytes_down", 0),
        )

    def export(self, folder: Path, which: Literal["final", "best"] = "final") -> Path | None:
        """The server writes the models by itself."""
        return folder if folder.exists() else None

    def _follow(self) -> None:
        try:
            for answer in self._control.follow(self.name, patience_s=self._patience_s):
                if "event" in answer:
                    self._tell(Event(**answer["event"]))
                else:
                    self.outcome = answer["ended"]
        except FederationError as error:
            self._error = error
        finally:
            self._ended.set()
