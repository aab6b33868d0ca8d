"""Tracking at the server of a federation: its operator names the trackers, for all jobs."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Protocol

from fl_adapters.environments.tracking.records import EndState
from fl_adapters.environments.tracking.targets import make_trackers
from fl_adapters.environments.tracking.tracking import Tracking
from fl_runtime.errors import ConfigError
from fl_runtime.server.federation.archive import JobRecord
from fl_runtime.types import Event, Listener

_STATES: Mapping[str, EndState] = {"finished": "finished", "failed": "failed", "aborted": "killed"}
_STOP_S = 10.0


class Say(Protocol):
    """Writes a warning about a job for the people who run the server."""

    def __call__(self, text: str, job: str = "", site: str = "", *, warning: bool = False) -> None: ...


class ServerTracking:
    """Tracks the jobs of a server, each with trackers of its own. No job waits for a tracker or fails because of one.

    A job that goes on at another server, or after a restart, continues its tracked run.

    Args:
        targets: The trackers, such as "mlflow:URI".
        say: Writes the lines about trackers that fail.

    Raises:
        ConfigError: A target names no tool, or the tool's package is missing or not set up. A tracking server that is
            away is no error.
    """

    def __init__(self, targets: Sequence[str], say: Say) -> None:
        self._targets, self._say = tuple(targets), say
        self._lock = threading.Lock()
        self._jobs: dict[str, Tracking] = {}
        self._ending: list[threading.Thread] = []
        if targets:
            # this thread tries again itself, and says so: without this MLflow is silent for four minutes
            os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
            make_trackers(targets, must_answer=False)  # imports their packages, and reports those that are missing

    def listener_of(self, record: JobRecord) -> Listener:
        """Begin to track a job.

        Args:
            record: The job, which starts or goes on.

        Returns:
            Listener for the job's events, which never blocks.
        """
        if not self._targets:
            return _ignore
        name, say = record.name, partial(self._say, job=record.name, warning=True)
        facts = f"server {record.federation} {name} {record.submitted_at} {record.submitter.uri}"
        identity = hashlib.sha256(facts.encode()).hexdigest()[:32]
        try:
            trackers = make_trackers(self._targets, must_answer=False)
            tracking = Tracking(trackers, name, identity, asdict(record.settings), say)
        except ConfigError as error:  # such as a key that was taken away since the server was started
            say(f"tracking: the job goes on without it: {error}")
            return _ignore
        with self._lock:
            self._jobs[name] = tracking
        return tracking

    def end(self, record: JobRecord, folder: Path) -> None:
        """Tell the trackers of a job that it has ended, in a thread of its own.

        Args:
            record: The job, which has ended.
            folder: Folder with what it has left.
        """
        with self._lock:
            tracking = self._jobs.pop(record.name, None)
            self._ending = [thread for thread in self._ending if thread.is_alive()]
        if tracking is None:
            return
        close = partial(tracking.close, _STATES[record.state], folder)
        thread = threading.Thread(target=close, name="fl-track-end", daemon=True)
        self._ending.append(thread)
        thread.start()

    def close(self) -> None:
        """Send what is known of jobs that go on later, and wait for those that have ended, for a bounded time."""
        with self._lock:
            going_on, self._jobs = list(self._jobs.values()), {}
        for thread in self._ending:  # each ends by itself within the time that trackers have
            thread.join()
        deadline = time.monotonic() + _STOP_S
        for tracking in going_on:
            tracking.close(None, Path(), max(0.1, deadline - time.monotonic()))


def _ignore(event: Event) -> None:
    """Take an event of a job that is not tracked."""
