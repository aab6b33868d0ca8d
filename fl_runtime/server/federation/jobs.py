"""One job of a federation's server that runs: its run, its history, its events for those who watch it, and its end."""

from __future__ import annotations

import logging
import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from fl_runtime.errors import FederationError, StoreError
from fl_runtime.server.federation.archive import JobRecord
from fl_runtime.server.federation.audit_summary import AuditSummary
from fl_runtime.server.federation.event_buffer import EventBuffer
from fl_runtime.server.federation.results import files_of
from fl_runtime.server.server import Server
from fl_runtime.store.stores import Storage
from fl_runtime.store.tensorfile import disk_error
from fl_runtime.trainings import training_folder
from fl_runtime.trust.identity import Identity
from fl_runtime.types import Event, Listener, RunSettings

log = logging.getLogger(__name__)

_AUDITED = (
    "joined",
    "registered",
    "left",
    "started",
    "task_sent",
    "update",
    "round_finished",
    "files",
    "failed",
    "finished",
)


class JobAudit:
    """A listener that puts a job's events on the audit log, with the identity of the site that each is about.

    Events by which the run proceeds are written in full. Those that a site can repeat at will are summed up.
    """

    def __init__(
        self, audit: AuditSummary, settings: RunSettings, submitter: Identity, who: Callable[[str], Identity | None]
    ) -> None:
        """Make the listener.

        Args:
            audit: The log.
            settings: The job's settings.
            submitter: Who submitted the job.
            who: Returns the identity of a site that has called, by its name.
        """
        self._audit, self._settings, self._submitter, self._who = audit, settings, submitter, who
        self._last_task: dict[str, tuple[int, str]] = {}  # round and kind, by site

    def __call__(self, event: Event) -> None:
        if event.kind not in _AUDITED:
            return
        facts = {name: value for name, value in event.data.items() if name not in ("info", "error")}
        if event.kind == "failed":
            facts["reason"] = event.data["error"]["what"]
        who = self._who(event.site) if event.site else None
        write = self._audit.log.write if self._brings_on(event) else self._audit.write
        write(event.kind, who, job=self._settings.name, site=event.site, round=event.round, facts=facts)

    def _brings_on(self, event: Event) -> bool:
        if event.kind == "task_sent":
            task = event.round, str(event.data["task"])
            before, self._last_task[event.site] = self._last_task.get(event.site), task
            return task != before
        if event.kind == "update":
            return event.data["status"] in ("used", "carried")
        return not event.site

    def record_begin(self, *, fresh: bool) -> None:
        """Record that the job was started, or continued after a stop of the server."""
        entry = "job started" if fresh else "job continued"
        self._audit.log.write(entry, self._submitter, job=self._settings.name, sites=self._settings.sites)

    def record_end(self, error: object) -> None:
        """Record the end of the job. `error` is None if it finished."""
        self._audit.log.write("job ended", self._submitter, job=self._settings.name, result=error or "finished")


class RunningJob:
    """A job that runs from the moment this object is made.

    Attributes:
        record: The job's record when it was started.
        folder: Folder of its run.
        events: Its events, for those who watch it.
        done: Names of the sites that have taken part to the end, or have refused to take part.
        halted: Why the job cannot go on, if its store failed. It continues when the server is started again.
        server: The server of its run.
        audit: Puts its events on the audit log.
    """

    def __init__(
        self,
        record: JobRecord,
        folder: Path,
        audit: AuditSummary,
        listeners: Sequence[Listener],
        who: Callable[[str], Identity | None],
        on_end: Callable[[RunningJob], None],
        storage: Storage,
    ) -> None:
        """Start a job, or continue it if its run has begun.

        Args:
            record: The job's record.
            folder: Folder of the job.
            audit: The log that its events are put on.
            listeners: Called with each event of the run.
            who: Returns the identity of a site that has called, by its name.
            on_end: Called with this object once the job's results are written or it was halted, by a thread of its
                own.
            storage: Keeps its run and its results.
        """
        self.record, self.folder, self._on_end = record, folder, on_end
        self.events = EventBuffer()
        self.done: set[str] = set()
        self.halted: StoreError | None = None
        self._error: FederationError | None = None
        self._lock = threading.Lock()
        self.audit = JobAudit(audit, record.settings, record.submitter, who)
        fresh = not storage.runs.holds(folder / "server")
        self._storage = storage
        listeners = [self._record, self.audit, *listeners]
        self.server = Server(record.settings, folder, {}, listeners=listeners, record=True, store=storage.runs)
        self.audit.record_begin(fresh=fresh)
        self._closing = self._ending = False
        self._thread = threading.Thread(target=self._follow, name="fl-job", daemon=True)
        self.server.begin()
        self._thread.start()

    @property
    def name(self) -> str:
        """Name of the job, which is that of its folder."""
        return self.record.name

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the job's sites, in its order."""
        return self.record.settings.sites

    @property
    def over(self) -> bool:
        """Whether the job's results are written, or it has failed or was halted."""
        return self.events.closed

    def waits_for(self, site: str) -> bool:
        """Return whether the job has work for a site."""
        return not self.over and site in self.sites and site not in self.done

    def busy(self) -> tuple[str, ...]:
        """Return the sites that the job has work for."""
        return tuple(site for site in self.sites if self.waits_for(site))

    def refuse(self, site: str, reason: str, training: int = 1, attempt: int | None = None) -> bool:
        """Note that a site does not take part, so that nobody waits for it.

        Args:
            site: Name of the site.
            reason: Why not, for the events and error messages.
            training: Training that the process for which the site speaks has joined last, from 1.
            attempt: Number of that process there; None if the site has started none.

        Returns:
            False if another process of the site takes part, which goes on.
        """
        refused = self.server.refuse(site, reason, training, attempt)
        if refused:
            self.done.add(site)
        return refused

    def outcome(self) -> dict[str, Any]:
        """The outcome of the job as JSON values; "error" is None if it did not fail."""
        count = self.server.training_count
        results = [self.server.result(number) for number in range(1, count + 1)]
        error = self._error or results[-1].error
        trainings = [
            {"folder": str(training_folder(self.folder, number)), **result.to_json()}
            for number, result in enumerate(results, 1)
        ]
        return {
            "job": self.name,
            "submitted_by": str(self.record.submitter),
            **trainings[0],
            "trainings": trainings,
            "versions": self.server.state()["versions"],
            "error": error.to_wire() if error else None,
        }

    def close(self) -> None:
        """Stop a job that has not ended, so that it can be continued later. A job that is just ending is waited for."""
        with self._lock:
            self._closing = True
            ending = self._ending
        if ending:
            self._thread.join()
        else:
            self.server.close()

    def _record(self, event: Event) -> None:
        if event.kind in ("left", "script_ended") and not event.data["early"] and not event.data.get("stays"):
            self.done.add(event.site)
        self.events.append(event)

    def _follow(self) -> None:
        self.server.wait()
        with self._lock:
            if self._closing:
                return
            self._ending = True
        try:
            self._finish()
            if self._storage.shared:
                self._storage.files.keep_results(self.folder, [file.path for file in files_of(self.folder)])
        except (StoreError, OSError) as error:  # it remains a job that runs, to be continued
            self.halted = error if isinstance(error, StoreError) else disk_error(error, self.folder)
        self._on_end(self)
        self.events.close()

    def _finish(self) -> None:
        """Write the job's results. Raises StoreError if its store failed."""
        error = self.server.result(self.server.training_count).error
        if isinstance(error, StoreError):
            self.server.close()
            raise error
        try:
            for number in range(1, self.server.training_count + 1):
                self._export(number)
        except StoreError:
            self.server.close()
            raise
        except FederationError as failure:
            log.error("%s", failure)
            self._error = failure
        except Exception as failure:  # whatever it is, the job must end, so that others can begin
            log.exception("the results of the job %s could not be written", self.name)
            self._error = FederationError(
                f"the results could not be written: {failure!r}",
                fix="see the server's log; the journal holds the model",
            )
        self.server.close()

    def _export(self, number: int) -> None:
        """Write the models of a training, unless a site on this machine has written them in its framework's format."""
        kinds: tuple[Literal["final", "best"], ...] = ("final", "best") if self.server.result(number).rounds else ()
        for which, name in zip(kinds, ("model", "best"), strict=False):
            folder = training_folder(self.folder, number) / name
            if folder.exists():
                continue
            partial = folder.with_name(f".{name}")  # of a server that was killed, perhaps
            shutil.rmtree(partial, ignore_errors=True)
            if self.server.export(partial, which, training=number) is not None:
                partial.replace(folder)
