"""One job of a federation's server: its run, its history, its events for those who watch it, and its end."""

from __future__ import annotations

import json
import logging
import math
import shutil
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from fl_runtime.errors import ConfigError, FederationError, StoreError
from fl_runtime.server.federation.audit_summary import AuditSummary
from fl_runtime.server.records.results import RunResult
from fl_runtime.server.server import Server
from fl_runtime.store.tensorfile import disk_error
from fl_runtime.trainings import training_folder
from fl_runtime.trust.files import write_file
from fl_runtime.trust.identity import Identity, check_name
from fl_runtime.types import Event, Listener, RunSettings

log = logging.getLogger(__name__)

_CURRENT = ".current.json"  # no name of a job begins with a dot
_JOB, _OUTCOME = "job.json", "outcome.json"
_EVENTS_KEPT = 20_000
_AUDITED = ("joined", "registered", "left", "started", "task_sent", "update", "round_finished", "failed", "finished")


@dataclass(frozen=True)
class Unfinished:
    """A job that was running when the server was stopped or killed.

    Attributes:
        settings: The job's settings.
        submitter: Who submitted it.
    """

    settings: RunSettings
    submitter: Identity


class EventBuffer:
    """The last events of a job, numbered from 0, for callers that watch it. May be used by any thread."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._events: deque[Mapping[str, Any]] = deque(maxlen=_EVENTS_KEPT)
        self._count = 0
        self._closed = False

    @property
    def closed(self) -> bool:
        """Whether no further event will come."""
        return self._closed

    def append(self, event: Event) -> None:
        """Add an event, as JSON values."""
        values = {**asdict(event), "data": _json_values(dict(event.data))}
        with self._changed:
            self._events.append(values)
            self._count += 1
            self._changed.notify_all()

    def close(self) -> None:
        """Let the watchers end: no further event will come."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def follow(self, number: int, beat_s: float) -> Iterator[tuple[int, Mapping[str, Any] | None]]:
        """The events from a number on, until the buffer is closed.

        Args:
            number: Number of the first event. Older ones may have been dropped.
            beat_s: How long to wait for an event, in seconds, before None is yielded in its place.

        Yields:
            Number and event, or number and None.
        """
        while True:
            with self._changed:
                if number >= self._count and not self._closed:
                    self._changed.wait(beat_s)
                first = self._count - len(self._events)
                # a higher number than there are events was given by a server that has been restarted since
                number = max(number if number <= self._count else 0, first)
                events = list(self._events)[number - first :]
                closed = self._closed
            for event in events:
                yield number, event
                number += 1
            if not events:
                if closed:
                    return
                yield number, None


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
        settings: The job's settings.
        submitter: Who submitted it.
        folder: Folder of its run.
        events: Its events, for those who watch it.
        done: Names of the sites that have taken part to the end.
        halted: Why the job cannot go on, if its store failed. It continues when the server is started again.
        server: The server of its run.
    """

    def __init__(
        self,
        settings: RunSettings,
        submitter: Identity,
        folder: Path,
        audit: AuditSummary,
        listeners: Sequence[Listener],
        who: Callable[[str], Identity | None],
        on_end: Callable[[RunningJob], None],
    ) -> None:
        """Start a job, or continue it if its folder exists.

        Args:
            settings: The job's settings.
            submitter: Who submitted it.
            folder: Folder of all jobs.
            audit: The log that its events are put on.
            listeners: Called with each event of the run.
            who: Returns the identity of a site that has called, by its name.
            on_end: Called with this object once the job is over, by a thread of its own.
        """
        self.settings, self.submitter, self._on_end = settings, submitter, on_end
        self.folder = folder / settings.name
        self.events = EventBuffer()
        self.done: set[str] = set()
        self.halted: StoreError | None = None
        self._error: FederationError | None = None
        self._lock = threading.Lock()
        self._audit = JobAudit(audit, settings, submitter, who)
        fresh = not self.folder.exists()
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)  # it holds what sites have sent
        try:
            listeners = [self._record, self._audit, *listeners]
            self.server = Server(settings, self.folder, {}, listeners=listeners, record=True)
        except FederationError:
            if fresh:
                shutil.rmtree(self.folder, ignore_errors=True)
            raise
        _save(self.folder, settings, submitter)
        self._audit.record_begin(fresh=fresh)
        self._closing = self._ending = False
        self._thread = threading.Thread(target=self._follow, name="fl-job", daemon=True)
        self.server.begin()
        self._thread.start()

    @property
    def over(self) -> bool:
        """Whether the job's results are written, or it has failed or was halted."""
        return self.events.closed

    def outcome(self) -> dict[str, Any]:
        """The outcome of the job as JSON values; "error" is None if it did not fail."""
        count = self.server.training_count
        results = [self.server.result(number) for number in range(1, count + 1)]
        error = self._error or results[-1].error
        trainings = [
            {"folder": str(training_folder(self.folder, number)), **_values(result)}
            for number, result in enumerate(results, 1)
        ]
        return {
            "job": self.settings.name,
            "submitted_by": str(self.submitter),
            **trainings[0],
            "trainings": trainings,
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
        except (StoreError, OSError) as error:  # it remains the current job, to be continued
            self.halted = error if isinstance(error, StoreError) else disk_error(error, self.folder)
        self.events.close()
        self._on_end(self)

    def _finish(self) -> None:
        """Write the job's results and outcome. Raises StoreError if its store failed."""
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
        except Exception as failure:  # whatever it is, the job must end, so that the next one can begin
            log.exception("the results of the job %s could not be written", self.settings.name)
            self._error = FederationError(
                f"the results could not be written: {failure!r}",
                fix="see the server's log; the journal holds the model",
            )
        self.server.close()
        outcome = self.outcome()
        write_file(self.folder / _OUTCOME, json.dumps(outcome).encode())
        (self.folder.parent / _CURRENT).unlink(missing_ok=True)
        self._audit.record_end(outcome["error"])

    def _export(self, number: int) -> None:
        """Write the models of a training, unless a site on this machine has written them in its framework's format."""
        kinds: tuple[Literal["final", "best"], ...] = ("final", "best") if self.server.result(number).rounds else ()
        for which, name in zip(kinds, ("model", "best"), strict=False):
            folder = training_folder(self.folder, number) / name
            if not folder.exists():
                self.server.export(folder, which, training=number)


def _values(result: RunResult) -> dict[str, Any]:
    """The result of a training as JSON values."""
    return {
        "rounds": [item.to_json() for item in result.rounds],
        "best_round": result.best_round,
        "no_best": result.no_best,
        "bytes_up": result.bytes_up,
        "bytes_down": result.bytes_down,
    }


def unfinished(folder: Path) -> Unfinished | None:
    """The job that was running when the server was stopped or killed, or None if there was none.

    Raises:
        ConfigError: Its files cannot be read.
    """
    try:
        name = _current(folder)
        if name is None:
            return None
        fields = json.loads((folder / name / _JOB).read_text("utf-8"))
        settings: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in fields["settings"].items()
        }
        return Unfinished(RunSettings(**settings), Identity.from_uri(fields["submitter"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"the job that was running cannot be read: {error!r}",
            where=str(folder),
            fix="submit it again under another name",
        ) from None


def _current(folder: Path) -> str | None:
    """Name of the job that was running, or None."""
    try:
        name = json.loads((folder / _CURRENT).read_text("utf-8"))["job"]
    except FileNotFoundError:
        return None
    check_name(name, "job")
    return str(name)


def give_up(folder: Path, error: FederationError) -> Mapping[str, Any] | None:
    """Record that the job that was running cannot be continued, so that other jobs can run.

    Args:
        folder: Folder of all jobs.
        error: Why not.

    Returns:
        The job's outcome, or None if not even its name can be read.
    """
    try:
        name = _current(folder)
    except (OSError, ValueError, KeyError, TypeError, ConfigError):
        name = None
    (folder / _CURRENT).unlink(missing_ok=True)
    if name is None:
        return None
    nothing: dict[str, Any] = {"rounds": [], "best_round": None, "no_best": "", "bytes_up": 0, "bytes_down": 0}
    outcome = {"job": name, "submitted_by": "", "folder": str(folder / name), **nothing, "error": error.to_wire()}
    if (folder / name).is_dir():
        write_file(folder / name / _OUTCOME, json.dumps(outcome).encode())
    return outcome


def past_outcome(folder: Path, name: str) -> Mapping[str, Any] | None:
    """The outcome of a job that has ended, also of an earlier server in this folder; None if there was no such job."""
    try:
        check_name(name, "job")
        outcome: Mapping[str, Any] = json.loads((folder / name / _OUTCOME).read_text("utf-8"))
        return outcome
    except (OSError, ValueError, ConfigError):
        return None


def _save(folder: Path, settings: RunSettings, submitter: Identity) -> None:
    """Note that this is the job that runs, so that it is continued after a stop of the server."""
    text = json.dumps({"settings": asdict(settings), "submitter": submitter.uri}, indent=1)
    write_file(folder / _JOB, text.encode())
    write_file(folder.parent / _CURRENT, json.dumps({"job": settings.name}).encode())


def _json_values(value: Any) -> Any:
    """Return JSON values; "nan", "inf" and "-inf" stand for what JSON has no number for."""
    if isinstance(value, Mapping):
        return {str(name): _json_values(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_values(item) for item in value]
    if isinstance(value, (str, int, type(None))) or (isinstance(value, float) and math.isfinite(value)):
        return value
    return str(value)
