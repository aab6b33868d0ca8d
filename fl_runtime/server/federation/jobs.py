"""One job of a federation's server: its run, its history, its events for those who watch, and its end."""

from __future__ import annotations

import json
import logging
import shutil
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from fl_runtime.errors import ConfigError, FederationError, StoreError
from fl_runtime.server.records.history import History
from fl_runtime.server.server import Server
from fl_runtime.store.tensorfile import disk_error
from fl_runtime.trust.audit import AuditLog
from fl_runtime.trust.files import write_file
from fl_runtime.trust.identity import Identity, check_name
from fl_runtime.types import Event, Listener, RunSettings

log = logging.getLogger(__name__)

_CURRENT, _JOB, _OUTCOME = "current.json", "job.json", "outcome.json"
_EVENTS_KEPT = 20_000
_AUDITED = ("joined", "registered", "left", "started", "task_sent", "update", "round_finished", "failed", "finished")


@dataclass(frozen=True)
class Unfinished:
    settings: RunSettings
    submitter: Identity


class RunningJob:
    """Runs from the moment it is made. over: its results are written, or it has failed. done: sites that have
    taken part to the end. halted: why it cannot go on here: it is over, and goes on when the server is started again.
    who: a site's identity, by name. on_end(self) is called once, by a thread of its own."""

    def __init__(
        self,
        settings: RunSettings,
        submitter: Identity,
        folder: Path,
        audit: AuditLog,
        listeners: Sequence[Listener],
        who: Callable[[str], Identity | None],
        on_end: Callable[[RunningJob], None],
    ) -> None:
        self.settings, self.submitter, self._audit = settings, submitter, audit
        self._who, self._on_end = who, on_end
        self.folder, self._current = folder / settings.name, folder / _CURRENT
        self.done: set[str] = set()
        self.over = False
        self.halted: StoreError | None = None
        self._error: FederationError | None = None
        self._lock = threading.Condition()
        self._events: deque[Mapping[str, Any]] = deque(maxlen=_EVENTS_KEPT)
        self._count = 0
        fresh = not self.folder.exists()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._history = History(self.folder)
        try:
            self.server = Server(settings, self.folder, {}, listeners=[self._history, self._record, *listeners])
        except FederationError:
            self._history.close()
            if fresh:
                shutil.rmtree(self.folder, ignore_errors=True)
            raise
        _save(self.folder, self._current, settings, submitter)
        audit.write("job started" if fresh else "job continued", submitter, job=settings.name, sites=settings.sites)
        self._closing = self._ending = False
        self._thread = threading.Thread(target=self._follow, name="fl-job", daemon=True)
        self.server.begin()
        self._thread.start()

    def events_from(self, number: int, beat_s: float) -> Iterator[tuple[int, Mapping[str, Any] | None]]:
        """(number, event) from `number` on until the job is over; an event of None every `beat_s` seconds without."""
        while True:
            with self._lock:
                if number >= self._count and not self.over:
                    self._lock.wait(beat_s)
                first = self._count - len(self._events)
                number = max(number if number <= self._count else 0, first)  # more: it watched before a restart
                found = list(self._events)[number - first :]
                over = self.over
            for event in found:
                yield number, event
                number += 1
            if not found:
                if over:
                    return
                yield number, None

    def outcome(self) -> dict[str, Any]:
        """What the job came to."""
        result = self.server.result()
        error = self._error or result.error
        return {
            "job": self.settings.name,
            "submitted_by": str(self.submitter),
            "rounds": [item.to_json() for item in result.rounds],
            "best_round": result.best_round,
            "bytes_up": result.bytes_up,
            "bytes_down": result.bytes_down,
            "folder": str(self.folder),
            "error": error.to_wire() if error else None,
        }

    def close(self) -> None:
        """Leave a job that has not ended as it is: it can be continued. One that is just ending is waited for."""
        with self._lock:
            self._closing = True
            ending = self._ending
        if ending:
            self._thread.join()
        else:
            self.server.close()
            self._history.close()

    def _record(self, event: Event) -> None:
        with self._lock:
            self._events.append({**asdict(event), "data": json.loads(json.dumps(dict(event.data), default=str))})
            self._count += 1
            if event.kind == "left" and not event.data["early"]:
                self.done.add(event.site)
            self._lock.notify_all()
        if event.kind in _AUDITED:
            facts = {name: value for name, value in event.data.items() if name not in ("info", "error")}
            if event.kind == "failed":
                facts["reason"] = event.data["error"]["what"]
            who = self._who(event.site) if event.site else None
            self._audit.write(event.kind, who, job=self.settings.name, site=event.site, round=event.round, facts=facts)

    def _follow(self) -> None:
        self.server.wait()
        with self._lock:
            if self._closing:
                return
            self._ending = True
        try:
            self._finish()
        except (StoreError, OSError) as error:  # its job.json stays the current one
            self.halted = error if isinstance(error, StoreError) else disk_error(error, self.folder)
            self._history.close()
        with self._lock:
            self.over = True
            self._lock.notify_all()
        self._on_end(self)

    def _finish(self) -> None:
        """Write what the job came to. StoreError for one that its store has halted."""
        error = self.server.result().error
        if isinstance(error, StoreError):
            self.server.close()
            raise error
        try:
            kinds: tuple[Literal["final", "best"], ...] = ("final", "best") if self.server.result().rounds else ()
            for which, name in zip(kinds, ("model", "best"), strict=False):
                if not (self.folder / name).exists():  # a site on this machine may have written its framework's format
                    self.server.export(self.folder / name, which)
        except StoreError:
            self.server.close()
            raise
        except FederationError as failed:
            log.error("%s", failed)
            self._error = failed
        self.server.close()
        self._history.close()
        outcome = self.outcome()
        write_file(self.folder / _OUTCOME, json.dumps(outcome).encode())
        self._current.unlink(missing_ok=True)
        self._audit.write("job ended", self.submitter, job=self.settings.name, result=outcome["error"] or "finished")


def unfinished(folder: Path) -> Unfinished | None:
    """The job that ran when the server was stopped or killed."""
    try:
        name = json.loads((folder / _CURRENT).read_text("utf-8"))["job"]
        fields = json.loads((folder / name / _JOB).read_text("utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"the job that was running cannot be read: {error}",
            where=str(folder),
            fix=f"delete {_CURRENT} to give it up",
        ) from None
    settings: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in fields["settings"].items()
    }
    return Unfinished(RunSettings(**settings), Identity.from_uri(fields["submitter"]))


def past_outcome(folder: Path, name: str) -> Mapping[str, Any] | None:
    """How a job that ended did, of this server or of one before; None if there was no such job."""
    try:
        check_name(name, "job")
        found: Mapping[str, Any] = json.loads((folder / name / _OUTCOME).read_text("utf-8"))
        return found
    except (OSError, ValueError, ConfigError):
        return None


def _save(folder: Path, current: Path, settings: RunSettings, submitter: Identity) -> None:
    text = json.dumps({"settings": asdict(settings), "submitter": submitter.uri}, indent=1)
    write_file(folder / _JOB, text.encode())
    write_file(current, json.dumps({"job": settings.name}).encode())
