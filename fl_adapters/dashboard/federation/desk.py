"""What the pages about a federation share: the connection, the jobs that are looked at, and the audit log's end."""

from __future__ import annotations

import re
import shutil
import tempfile
import threading
from collections import OrderedDict
from pathlib import Path

from fl_adapters.dashboard.federation.audit import AuditTail
from fl_adapters.dashboard.federation.connection import FederationConnection
from fl_adapters.dashboard.federation.events import JobEvents
from fl_adapters.dashboard.federation.view import Federation, Job, JobDetails, read_details, read_status
from fl_adapters.dashboard.runs.folder import RunsFolder
from fl_adapters.environments.remote import earlier_jobs, job_fields
from fl_adapters.job import Job as JobSettings
from fl_runtime.errors import ConfigError
from fl_runtime.text import printable

_MOST_FOLLOWED = 3  # each is an open call, of which the server allows 8 to an admin
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_JOB_FILE = "job.yml"


class Desk:
    """What the pages about a federation share. May be used by any thread.

    Attributes:
        connection: The connection to the server.
        audit: The end of the server's audit log.
        runs: The events of jobs that were looked at, as runs in a folder.
    """

    def __init__(self, connection: FederationConnection) -> None:
        """Make it.

        Args:
            connection: The connection, which `close` closes.
        """
        self.connection = connection
        self.audit = AuditTail(connection.transport)
        self._folder = Path(tempfile.mkdtemp(prefix="fl-dashboard-"))
        self.runs = RunsFolder(self._folder)
        self._lock = threading.Lock()
        self._events: OrderedDict[str, JobEvents] = OrderedDict()
        self._closed = False

    def details(self, name: str) -> JobDetails:
        """Ask for a job's state, settings and result files.

        Args:
            name: Name of the job.

        Raises:
            FederationError: There is no such job, or the server is out of reach.
        """
        return read_details(self.connection.ask("ShowJob", job=name))

    def earlier(self, before: int) -> Federation:
        """Ask for jobs that ended before those that the server lists by itself.

        Args:
            before: Number of a job, as `Federation.older` tells it.

        Raises:
            ConfigError: The server is of a version that does not tell of them.
            FederationError: The server is out of reach.
        """
        return read_status(earlier_jobs(self.connection.ask, before))

    def job(self, name: str) -> Job:
        """Return a job as the server has told last; of one that it does not list, it is asked.

        Args:
            name: Name of the job.

        Raises:
            FederationError: There is no such job, or the server is out of reach.
        """
        federation = self.connection.seen.federation
        return (federation.job(name) if federation else None) or self.details(name).job

    def follow(self, job: Job) -> JobEvents | None:
        """Follow the events of a job that somebody looks at, in place of the one looked at longest ago.

        Args:
            job: The job.

        Returns:
            Its events; None if its name cannot name a folder, or the dashboard is being closed.
        """
        if not _NAME.fullmatch(job.name):
            return None
        with self._lock:
            if self._closed:
                return None
            events = self._events.pop(job.name, None)
            if events is None:
                events = JobEvents(self.connection.transport, job.name, self._folder / job.name)
            self._events[job.name] = events
            oldest = self._events.popitem(last=False)[1] if len(self._events) > _MOST_FOLLOWED else None
        if oldest is not None:
            self._forget(oldest)
        events.touch(ended=job.ended)
        return events

    def submit(self, text: str, priority: int) -> str:
        """Put the job of a job file into the federation's queue.

        Args:
            text: Contents of the job file.
            priority: From -100 to 100; jobs with a higher one start first.

        Returns:
            Name of the job.

        Raises:
            ConfigError: A field cannot work.
            FederationError: The server refused the job, or is out of reach.
        """
        with tempfile.TemporaryDirectory(prefix=".submitted-", dir=self._folder) as folder:
            path = Path(folder) / _JOB_FILE
            path.write_text(text, encoding="utf-8")
            try:
                fields = job_fields(JobSettings.from_file(path))
            except ConfigError as error:
                raise ConfigError(
                    error.what, where=error.where.replace(str(path), "the job file"), fix=error.fix
                ) from None
        return printable(str(self.connection.ask("SubmitJob", job=fields, priority=priority)["job"]), 100)

    def close(self) -> None:
        """End all calls, and remove what was copied."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            events = list(self._events.values())
        for item in events:
            item.close()
        self.audit.close()
        self.connection.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _forget(self, events: JobEvents) -> None:
        events.close()
        shutil.rmtree(events.folder, ignore_errors=True)
