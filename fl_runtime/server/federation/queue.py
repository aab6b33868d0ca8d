"""The queue of a federation's server: jobs wait until their sites are there and have room; several run at a time."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fl_runtime.errors import AbortedError, ConfigError, FederationError, NewerFormatError, StoreError
from fl_runtime.filters import place_filter
from fl_runtime.server.courses.initial import digest_of
from fl_runtime.server.federation.archive import JobArchive, JobRecord
from fl_runtime.server.federation.audit_summary import AuditSummary
from fl_runtime.server.federation.jobs import RunningJob
from fl_runtime.server.federation.schedule import Attendance, Room, Work, next_to_start, shortage
from fl_runtime.server.server import check_settings
from fl_runtime.store.stores import Storage
from fl_runtime.trust import permissions
from fl_runtime.trust.identity import Identity
from fl_runtime.trust.kits import StartupKit
from fl_runtime.trust.project import Members
from fl_runtime.types import Listener, RunSettings

log = logging.getLogger(__name__)

ReadJob = Callable[[Mapping[str, Any], Sequence[str]], RunSettings]
"""read(fields, sites) -> the settings of a submitted job. It checks everything and raises ConfigError."""

_PRIORITIES = range(-100, 101)
_DAEMONS = "daemons.json"
_KEPT_AFTER_END = 4
_MOST_QUEUED = 1000


class JobQueue:
    """The jobs of a federation: those that wait, run, and have ended. Its methods may be called from any thread.

    Jobs that waited or ran when the server was killed go on.

    Attributes:
        attendance: Which sites wait for a job, what room they have, and which are away.
        changed: Is notified when a job is submitted, starts or ends. Its lock guards the queue's state.
        closed: Whether the queue starts no more jobs, because the server is being stopped.
        halted: Why nothing runs any more, if the store failed, for example because the disk is full. Jobs go on when
            the server is started again.
    """

    def __init__(
        self,
        kit: StartupKit,
        folder: Path,
        read_job: ReadJob,
        audit: AuditSummary,
        listener_of: Callable[[str], Listener] | None,
        who: Callable[[str], Identity | None],
        members: Members,
        storage: Storage,
    ) -> None:
        """Read the jobs of a folder. None of them runs before `begin`.

        Args:
            kit: The server's startup kit.
            folder: Folder for the runs.
            read_job: Reads and checks the settings of a submitted job.
            audit: The log that all jobs are put on.
            listener_of: Makes a listener for a job's events from the job's name.
            who: Returns the identity of a site that has called, by its name.
            members: The members of the federation.
            storage: Keeps everything.

        Raises:
            ConfigError: The folder holds jobs of another federation.
            StoreError: The disk fails.
        """
        self._members, self._identity, self._patience_s = members, kit.identity, kit.patience_s
        self._read_job, self._audit, self._listener_of, self._who = read_job, audit, listener_of, who
        self._archive = JobArchive(folder, kit.identity.federation, storage.files)
        self._storage = storage
        self._running: dict[str, RunningJob] = {}
        self._lately: deque[RunningJob] = deque(maxlen=_KEPT_AFTER_END)
        self.attendance = Attendance(folder / _DAEMONS)
        self.changed = threading.Condition(threading.RLock())
        self.closed = False
        self.halted: StoreError | None = None

    def begin(self) -> None:
        """Continue the jobs that have not ended. One that cannot go on is recorded as failed.

        Raises:
            NewerFormatError: A later version wrote the journal of one.
            StoreError: The disk fails.
        """
        with self.changed:
            for name, error in list(self._archive.unreadable.items()):
                self._give_up(name, "", error)
            for record in self._archive.in_state("running"):
                self._begin(record)
            self.schedule()

    def submit(self, fields: Mapping[str, Any], submitter: Identity, priority: int = 0) -> str:
        """Put a job into the queue. It starts at once if its sites have room.

        Args:
            fields: The job's settings as they were submitted.
            submitter: Who submits it.
            priority: From -100 to 100; jobs with a higher one start first.

        Returns:
            Name of the job. It survives a kill of the server from now on.

        Raises:
            ConfigError: The settings cannot work, or there is a job of this name.
        """
        if priority not in _PRIORITIES:
            raise ConfigError(f"a priority of {priority} is not possible", where="priority", fix="use -100 to 100")
        settings = self._read_job(fields, self.sites)
        if settings.initial:
            raise ConfigError(
                "a submitted job cannot name a file with initial weights",
                where="initial",
                fix="leave it out, or begin from an earlier job: initial: {job: NAME}",
            )
        settings = self._with_digest(settings, submitter)
        with self.changed:
            settings = replace(settings.for_production(self._patience_s), submitted_by=submitter.uri)
            check_settings(settings)
            if self._storage.shared:
                _check_kept(settings)
            waiting = len(self._archive.in_state("queued"))
            if waiting >= _MOST_QUEUED:
                raise ConfigError(f"{waiting} jobs are waiting already", fix="wait, or abort some of them")
            record = self._archive.add(settings, submitter, priority)
            self._archive.take_initial(record)
            self._audit.write("job queued", submitter, job=settings.name, sites=settings.sites, priority=priority)
            self.schedule()
            return settings.name

    def _with_digest(self, settings: RunSettings, submitter: Identity) -> RunSettings:
        """Note what the earlier result is that a job begins with, and whose. Its submitter must be allowed to download
        it, and a single site whose model it is must take part, since the policy of that site decides."""
        origin = settings.initial_job
        if origin is None:
            return settings
        permissions.check(submitter, "Download")
        with self.changed:
            file = self._archive.result(origin["job"], origin["model"])
            sites = self._archive.made_by(origin["job"], origin["model"])
        if len(sites) == 1 and sites[0] not in settings.sites:
            raise ConfigError(
                f"the {origin['model']} model of the job {origin['job']} is made of the updates of {sites[0]} alone, "
                "which is no site of this job",
                where="initial",
                fix=f"let {sites[0]} take part, so that its policy decides, or begin with the result of more sites",
            )
        return replace(settings, initial_job={**origin, "sha256": digest_of(file), "sites": " ".join(sites)})

    def resume(self, name: str, admin: Identity) -> None:
        """Put a job that failed or was aborted back into the queue. It goes on where its journal stands.

        Args:
            name: Name of the job.
            admin: Who resumes it.

        Raises:
            ConfigError: There is no such job, or it has not ended, or it has finished.
        """
        with self.changed:
            record = self.record(name)
            if record.state not in ("failed", "aborted"):
                state = "has finished" if record.state == "finished" else f"is {record.state}"
                raise ConfigError(f"the job {name} {state}", fix="only a job that failed or was aborted can be resumed")
            self._archive.reopened(name)
            self._audit.write("job resumed", admin, job=name)
            self.schedule()

    def abort(self, name: str, reason: str) -> None:
        """End a job that waits or runs. Its sites get an AbortedError.

        Args:
            name: Name of the job.
            reason: The message of that error.

        Raises:
            ConfigError: There is no such job, or it has ended.
        """
        with self.changed:
            record, job = self.record(name), self._running.get(name)
            if record.ended:
                raise ConfigError(f"the job {name} has ended already", fix="see `fl-adapters job show`")
            if job is None:
                error = AbortedError(reason)
                self._archive.ended_without_a_round(name, record.submitter, error)
                self._audit.write("job ended", record.submitter, job=name, result=error.to_wire())
                self.changed.notify_all()
        if job is not None:
            job.server.abort(reason)

    def delete(self, name: str, admin: Identity) -> None:
        """Delete a job that has ended, with its results.

        Args:
            name: Name of the job.
            admin: Who deletes it.

        Raises:
            ConfigError: There is no such job, or it has not ended.
            StoreError: The disk fails.
        """
        with self.changed:
            if not self.record(name).ended:
                raise ConfigError(f"the job {name} has not ended", fix="abort it first")
            self._archive.delete(name)
            self._audit.write("job deleted", admin, job=name)

    # -- what there is -----------------------------------------------------------------------------------------

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the federation's sites."""
        return self._members.sites

    def folder(self, name: str) -> Path:
        """Return the folder of a job, with its results. Raises ConfigError if there is none of this name."""
        folder = self._archive.folder / self.record(name).name
        self._storage.files.restore_results(folder)
        return folder

    def records(self) -> tuple[JobRecord, ...]:
        """Return the records of all jobs, in the order of their submission."""
        with self.changed:
            return self._archive.all()

    def record(self, name: str) -> JobRecord:
        """Return the record of a job. Raises ConfigError if there is none of this name."""
        with self.changed:
            record = self._archive.get(name)
        if record is None:
            raise ConfigError(f"there is no job {name[:100]!r}", fix="see `fl-adapters job list`")
        return record

    def job(self, name: str) -> RunningJob | None:
        """Return the job of this name if it runs, else None."""
        with self.changed:
            return self._running.get(name)

    def running(self) -> tuple[RunningJob, ...]:
        """Return the jobs that run, in the order in which they started."""
        with self.changed:
            return tuple(self._running.values())

    def stands_still(self, name: str) -> bool:
        """Return whether a job is to run by its record, but does not here: a server will go on with it.

        Args:
            name: Name of the job, which need not exist.
        """
        with self.changed:
            record = self._archive.get(name)
            return record is not None and record.state == "running" and name not in self._running

    def lately_ended(self) -> tuple[RunningJob, ...]:
        """Return the jobs that ended last, whose sites may still have to hear of it. The newest comes first."""
        with self.changed:
            return tuple(job for job in reversed(self._lately) if job.name not in self._running)

    # -- starting and ending -----------------------------------------------------------------------------------

    def site_asks(self, site: str, left: threading.Event, room: Room | None) -> None:
        """Note that a site asks for a job, and what room it has. This may let a job start.

        Args:
            site: Name of the site.
            left: Is set when it has ended its call.
            room: The room that its daemon tells; None if no daemon asks.
        """
        with self.changed:
            news = site in self._away() or room not in (None, self.attendance.rooms.get(site))
            self.attendance.waits(site, left, room)
            if news:
                self.schedule()

    def waits_for(self, record: JobRecord) -> str:
        """Return what a job waits for: room at a site, or sites that are away; "" for jobs that do not wait."""
        with self.changed:
            if record.state != "queued":
                return ""
            return shortage(record.settings, self._work(), self.attendance.rooms, self._away())

    def _work(self) -> list[Work]:
        return [(job.record.settings, job.busy()) for job in self._running.values()]

    def _away(self) -> frozenset[str]:
        jobs = self._running.values()
        return self.attendance.away({site for job in jobs for site in job.sites if job.server.is_present(site)})

    def schedule(self) -> None:
        """Start the jobs whose sites are there and have room. A job that cannot start is recorded as failed."""
        with self.changed:
            while not self.closed and not self.halted:
                record = next_to_start(
                    self._archive.in_state("queued"), self._work(), self.attendance.rooms, self._away()
                )
                if record is None:
                    break
                try:
                    self._begin(self._archive.started(record.name))
                except StoreError as error:
                    self.halted = error
            self.changed.notify_all()

    def _begin(self, record: JobRecord) -> None:
        """Start or continue a job. One that cannot go on is recorded as failed, unless the disk is the reason."""
        folder = self._archive.folder / record.name
        listeners = [self._listener_of(record.name)] if self._listener_of else []
        try:
            self._take_initial(record)
            job = RunningJob(record, folder, self._audit, listeners, self._who, self._on_job_end, self._storage)
            self._running[record.name] = job
            for site in record.settings.sites:
                if site not in self.sites:  # removed while the job waited
                    job.server.expel(site, "it is not a member of the federation")
        except NewerFormatError:  # it goes on once that version is back
            raise
        except FederationError as error:
            away = isinstance(error, StoreError) and error.away
            if away or isinstance(error.__cause__, OSError):  # which may be well again later
                raise
            self._give_up(record.name, record.submitter, error)

    def _take_initial(self, record: JobRecord) -> None:
        """Take the earlier result that a job begins with. A run that another server has begun may not need it."""
        try:
            self._archive.take_initial(record)
        except ConfigError:
            if not self._storage.runs.holds(self._archive.folder / record.name / "server"):
                raise

    def _give_up(self, name: str, submitter: object, error: FederationError) -> None:
        """Record a job that cannot go on as failed, so that it is in nobody's way."""
        log.error("the job %s cannot be continued: %s", name, error)
        self._audit.write("job not continued", self._identity, job=name, reason=error.what)
        self._archive.ended_without_a_round(name, submitter, error)

    def _on_job_end(self, job: RunningJob) -> None:
        with self.changed:
            self.halted = self.halted or job.halted
            if job.halted is None:
                outcome = job.outcome()
                try:
                    self._archive.ended(job.name, outcome)
                except StoreError as error:
                    self.halted = job.halted = error
                else:
                    del self._running[job.name]
                    self._retire(job)
                    job.audit.record_end(outcome["error"])
                    self.schedule()
            self.changed.notify_all()

    def _retire(self, job: RunningJob) -> None:
        """Keep a job that has ended for sites that still ask for its end, in place of the oldest such job."""
        if len(self._lately) == _KEPT_AFTER_END:
            self._tidy(self._lately[0])
        self._lately.append(job)
        if job.server.training_count == 1:  # it goes on serving what it has mapped; others open files again
            self._tidy(job)

    def _tidy(self, job: RunningJob) -> None:
        record = self._archive.get(job.name)
        if record is not None and record.state == "finished":
            self._archive.forget_tensors(job.name)
            self._storage.files.forget_tensors(job.folder)

    # -- waiting for jobs ---------------------------------------------------------------------------------------

    def wait_for_job(self, name: str, timeout_s: float | None = None) -> bool:
        """Wait until a job has ended and its results are written.

        Args:
            name: Name of the job.
            timeout_s: How long to wait, in seconds; None for as long as it takes.

        Returns:
            True once it has; False after the timeout, or when the server is closed or halted.
        """

        def has_ended() -> bool:
            record = self._archive.get(name)
            return record.ended if record is not None else self._archive.outcome(name) is not None

        with self.changed:
            self.changed.wait_for(lambda: has_ended() or self.closed or self.halted, timeout_s)
            return has_ended()

    def outcome(self, name: str) -> Mapping[str, Any]:
        """The outcome of a job that has ended.

        Args:
            name: Name of the job.

        Returns:
            JSON values: `job`, `submitted_by`, `trainings`, `error`, and those of the first training: `rounds`,
            `best_round`, `no_best`, `bytes_up`, `bytes_down`, `folder`. `trainings` has these of every training.

        Raises:
            ConfigError: There is no such job, or it has not ended.
        """
        with self.changed:
            outcome = self._archive.outcome(name)
        if outcome is None:
            raise ConfigError(f"the job {name[:100]!r} has no outcome", fix="see `fl-adapters job list`")
        return outcome

    def stop_scheduling(self) -> None:
        """Start no more jobs, and let everybody go who waits for one."""
        with self.changed:
            self.closed = True
            self.changed.notify_all()

    def close(self) -> None:
        """Stop all jobs. Those that have not ended continue in another queue for the same folder."""
        self.stop_scheduling()
        for job in self.running():
            job.close()
        for job in self.lately_ended():
            self._tidy(job)


def _check_kept(settings: RunSettings) -> None:
    """Refuse a job whose server would keep in its folder what another server needs: the ledger of a privacy budget."""
    for item in map(place_filter, settings.filters):
        if item.at == "server_in" and type(item.filter).__name__ == "GaussianDP":
            raise ConfigError(
                "GaussianDP at server_in keeps its privacy ledger in the server's folder, where another server would "
                "not find it",
                where="filters",
                fix="use GaussianDP at site_out, or a server without --store",
            )
