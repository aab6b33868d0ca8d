"""The server of a provisioned federation: one port, mutual TLS, jobs one after another.

Calls about jobs carry JSON: one object as the request, one or more objects as the answer.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from fl_runtime.errors import (
    ConfigError,
    ConnectionLostError,
    FederationError,
    PermissionDeniedError,
    ProtocolError,
    StoreError,
)
from fl_runtime.server.federation.audit_summary import AuditSummary
from fl_runtime.server.federation.guard import Guard
from fl_runtime.server.federation.jobs import RunningJob, give_up, past_outcome, unfinished
from fl_runtime.server.federation.quota import CALLS_EACH, HELD_EACH
from fl_runtime.server.federation.roots import RootsAtServer
from fl_runtime.text import parse_json
from fl_runtime.transport.base import Peer
from fl_runtime.trust import permissions
from fl_runtime.trust.audit import AuditLog, Witness
from fl_runtime.trust.identity import Identity
from fl_runtime.trust.kits import CRL, StartupKit
from fl_runtime.trust.project import split_address
from fl_runtime.trust.revocation import RevocationList
from fl_runtime.types import Listener, RunSettings
from fl_runtime.version import VERSION

log = logging.getLogger(__name__)

ReadJob = Callable[[Mapping[str, Any], Sequence[str]], RunSettings]
"""read(fields, sites) -> the settings of a submitted job. It checks everything and raises ConfigError."""

BEAT_S = 10.0
ABORT_S = 10.0
_REQUEST_BYTES = 2**18
_PACKAGE_BYTES = 2**22  # with the certificates of all participants
_GRACE_S = 0.5


class FederationServer:
    """Serves the federation of a server's startup kit. Threads of its own do all the work.

    A job that was running when the server was killed goes on.

    Attributes:
        halted: Why nothing runs any more, if the store failed, for example because the disk is full. Jobs go on when
            the server is started again.
    """

    def __init__(
        self,
        kit: StartupKit,
        folder: Path,
        read_job: ReadJob,
        *,
        listen: str = "",
        listeners: Sequence[Listener] = (),
        syslog: str = "",
    ) -> None:
        """Make a server that does not serve yet.

        Args:
            kit: The server's startup kit.
            folder: Folder for the runs.
            read_job: Reads and checks the settings of a submitted job.
            listen: Address to serve on, as "host:port"; "" for that of the kit.
            listeners: Called with each event of every job, one at a time and in order.
            syslog: Address of a syslog server that gets every line of the audit log, too; "" for none.

        Raises:
            ConfigError: A file of the kit cannot be read, or the address of the syslog server is not valid.
        """
        self._kit, self._folder, self._read_job, self._listeners = kit, folder, read_job, tuple(listeners)
        self._listen = split_address(listen or kit.listen)
        self._audit = AuditSummary(AuditLog(kit.folder, kit.folder))
        self._audit.log.ship_to(syslog)
        self._witness = Witness(self._audit.log, kit.folder, kit.identity)
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._job: RunningJob | None = None
        self._past: dict[str, Mapping[str, Any]] = {}
        self._closed = False
        self.halted: StoreError | None = None
        roots = RootsAtServer(kit)
        revoked = RevocationList(kit.folder / CRL, roots)
        federation = kit.identity.federation
        self._guard = Guard(self, self, federation, roots, revoked, self._audit, self._expel, self._go_on_without)
        self._stop_serving: Callable[[float], None] | None = None

    def start(self) -> str:
        """Serve, and continue an unfinished job. One that cannot be continued is recorded as failed.

        Returns:
            The address that it serves on, as "host:port".

        Raises:
            ConfigError: The port is in use.
            StoreError: The disk fails.
        """
        from fl_runtime.transport.grpc import GrpcServer
        from fl_runtime.transport.tls import FileCredentials

        threads = (CALLS_EACH + HELD_EACH) * (len(self._kit.sites) + 8) + 16
        server = GrpcServer(self._guard, None, threads, len(self._kit.sites), FileCredentials(self._kit.folder))
        with self._lock:  # sites that call already wait until their job goes on
            address = server.start(*self._listen)
            self._stop_serving = server.stop
            self._audit.log.write("server started", self._kit.identity, address=address, version=VERSION)
            try:
                job = unfinished(self._folder)
                if job:
                    self._begin(job.settings, job.submitter)
            except FederationError as error:
                if isinstance(error.__cause__, OSError):  # of the disk, which may be well again later
                    raise
                self._give_up(error)
        return address

    def _give_up(self, error: FederationError) -> None:
        """Record a job that cannot be continued as failed, so that the next one can begin."""
        outcome = give_up(self._folder, error)
        name = outcome["job"] if outcome else ""
        log.error("the job %s cannot be continued: %s", name, error)
        self._audit.log.write("job not continued", self._kit.identity, job=name, reason=error.what)
        if outcome:
            self._past[name] = outcome

    def submit(self, fields: Mapping[str, Any], submitter: Identity) -> str:
        """Start a job.

        Args:
            fields: The job's settings as they were submitted.
            submitter: Who submits it.

        Returns:
            Name of the job.

        Raises:
            ConfigError: Another job is running, or the settings cannot work.
        """
        with self._lock:
            if self._job is not None and not self._job.over:
                raise ConfigError(
                    f"the job {self._job.settings.name} is running", fix="wait until it has finished, or abort it"
                )
            settings = self._read_job(fields, self._kit.sites)
            if settings.initial:
                raise ConfigError(
                    "a submitted job cannot name a file with initial weights", where="initial", fix="leave it out"
                )
            if (self._folder / settings.name).exists():
                raise ConfigError(f"a job {settings.name} exists already", where="name", fix="choose another name")
            settings = settings.for_production(self._kit.patience_s)
            self._begin(replace(settings, submitted_by=submitter.uri), submitter)
            return settings.name

    def running(self) -> str | None:
        """Name of the job that is running, or None."""
        with self._lock:
            return self._job.settings.name if self._job is not None and not self._job.over else None

    def close(self) -> None:
        """Stop serving. A job that has not ended continues when the server is started again."""
        with self._lock:
            self._closed = True
            job = self._job
            self._changed.notify_all()
        if self._stop_serving:
            self._stop_serving(_GRACE_S)
        self._guard.close()
        if job is not None:
            job.close()
        self._audit.log.write("server stopped", self._kit.identity)
        self._audit.log.close()

    def wait_for_job(self, name: str, timeout_s: float | None = None) -> bool:
        """Wait until a job has ended and its results are written.

        Args:
            name: Name of the job.
            timeout_s: How long to wait, in seconds; None for as long as it takes.

        Returns:
            True once it has; False after the timeout, or when the server is closed or halted.
        """
        with self._lock:
            ended = self._changed.wait_for(lambda: name in self._past or self._closed or self.halted, timeout_s)
            return bool(ended) and name in self._past

    def outcome(self, name: str) -> Mapping[str, Any]:
        """The outcome of a job that has ended while this server was running.

        Args:
            name: Name of the job.

        Returns:
            JSON values: `job`, `submitted_by`, `trainings`, `error`, and those of the first training: `rounds`,
            `best_round`, `no_best`, `bytes_up`, `bytes_down`, `folder`. `trainings` has these of every training.
        """
        with self._lock:
            return self._past[name]

    def _begin(self, settings: RunSettings, submitter: Identity) -> None:
        with self._lock:
            self._job = RunningJob(
                settings, submitter, self._folder, self._audit, self._listeners, self._guard.who, self._on_job_end
            )
            self._changed.notify_all()

    def _on_job_end(self, job: RunningJob) -> None:
        with self._lock:
            self.halted = job.halted
            if job.halted is None:
                self._past[job.settings.name] = job.outcome()
            self._changed.notify_all()

    def _expel(self, name: str, reason: str) -> None:
        with self._lock:
            if self._job is not None:
                self._job.server.expel(name, reason)

    def _go_on_without(self, name: str, reason: str) -> None:
        """Let the running job go on without one of its sites, which may join again."""
        with self._lock:
            if self._job is not None and name in self._job.settings.sites:
                self._job.server.site_left(name, reason)

    # -- calls of a job's sites --------------------------------------------------------------------------------

    def handle(self, method: str, peer: Peer, requests: Iterator[bytes]) -> Iterator[bytes]:
        """Answer a call within the job that is running. The guard has established who is calling."""
        with self._lock:
            job = self._job
        if job is None:
            raise ConfigError("no job is running", fix="start the script with `fl-adapters run`, which waits for one")
        if peer.name not in job.settings.sites:
            raise PermissionDeniedError(
                f"{peer.name} is not a site of the job {job.settings.name}",
                where=f"rule sites: {', '.join(job.settings.sites)}",
                fix="submit a job with this site",
            )
        return job.server.service.handle(method, peer, requests)

    # -- calls about jobs --------------------------------------------------------------------------------------

    def control(self, method: str, caller: Identity, peer: Peer, request: bytes) -> Iterator[bytes]:
        """Answer a call about jobs. The guard has established who is calling, and that the call is allowed."""
        fields = _object(request, _PACKAGE_BYTES if method == "HandOutRoots" else _REQUEST_BYTES)
        answers: Mapping[str, Callable[[Identity, Mapping[str, Any]], Iterator[Mapping[str, Any]]]] = {
            "Assignment": self._assignment,
            "Status": self._status,
            "SubmitJob": self._submit_job,
            "AbortJob": self._abort_job,
            "Watch": self._watch,
            "Revoke": self._revoke,
            "Roots": partial(self._roots_for, peer),
            "HandOutRoots": self._hand_out_roots,
        }
        if caller.kind == "admin" and method != "Roots":
            self._audit.write(f"called {method}", caller, address=peer.address, request=_loggable(fields))
        elif "log" in fields:
            self._witness.take(fields["log"], "site", caller)
        for answer in answers[method](caller, fields):
            yield json.dumps(answer).encode()

    def _assignment(self, caller: Identity, fields: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
        """Wait until there is a job for this site, with a sign of life now and then."""
        while True:
            with self._lock:
                if not self._waits_for(caller.name):
                    self._changed.wait(BEAT_S)
                if self.halted:
                    raise self.halted
                job = self._job if self._waits_for(caller.name) else None
                if self._closed:
                    raise ConnectionLostError("the server is being stopped", fix="wait until it is back")
            if job is None:
                yield {"waiting": True}
                continue
            settings = job.settings
            yield {
                "job": settings.name,
                "app": settings.app,
                "strategy": settings.strategy,
                "submitted_by": settings.submitted_by,
                "index": settings.sites.index(caller.name),
                "count": len(settings.sites),
                "log": self._witness.statement(caller),
            }
            return

    def _waits_for(self, site: str) -> bool:
        job = self._job
        return job is not None and not job.over and site in job.settings.sites and site not in job.done

    def _status(self, caller: Identity, fields: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
        with self._lock:
            job = self._job
            past = dict(list(self._past.items())[-20:])
        running = None
        if job is not None and not job.over:
            running = {"job": job.settings.name, "submitted_by": str(job.submitter), **job.server.state()}
        yield {
            "federation": self._kit.identity.federation,
            "version": VERSION,
            "time": time.time(),
            "you": caller.uri,
            "sites": list(self._kit.sites),
            "running": running,
            "ended": past,
            "log": self._witness.statement(caller),
        }

    def _submit_job(self, caller: Identity, fields: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
        yield {"job": self.submit(_field(fields, "job", dict), caller)}

    def _abort_job(self, caller: Identity, fields: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
        job = self._named(_field(fields, "job", str))
        permissions.check_job(caller, "AbortJob", job.submitter)
        job.server.abort(f"{caller} has aborted the job")
        name = job.settings.name
        yield {"job": name, "ended": self.wait_for_job(name, ABORT_S)}  # wait, so that the next job can be submitted

    def _watch(self, caller: Identity, fields: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
        name = _field(fields, "job", str)
        with self._lock:
            current = self._job is not None and self._job.settings.name == name
        past = None if current else past_outcome(self._folder, name)
        if past is not None:
            yield {"ended": past}
            return
        job = self._named(name)
        first = fields.get("from", 0)
        for number, event in job.events.follow(first if isinstance(first, int) else 0, BEAT_S):
            yield {"waiting": True} if event is None else {"number": number, "event": event}
        yield {"ended": job.outcome()}

    def _revoke(self, caller: Identity, fields: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
        ended = self._guard.put_in_force(_field(fields, "crl", str).encode())
        yield {"ended": ended}

    def _roots_for(self, peer: Peer, caller: Identity, fields: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
        """Answer what is newer than the caller's statement; wait for it if the caller says so."""
        number = _field(fields, "number", int)
        if self._guard.roots.note(caller.name, number, peer.certificate):
            self._audit.log.write("new root taken up", caller, number=number, address=peer.address)
        while True:
            with self._lock:  # while it is held, nobody is told of new roots
                offer = self._guard.roots.offer(caller.name, number, peer.certificate)
                if offer is None and fields.get("wait") is True:
                    self._changed.wait(BEAT_S)
                    if self._closed:
                        raise ConnectionLostError("the server is being stopped", fix="wait until it is back")
                    offer = self._guard.roots.offer(caller.name, number, peer.certificate)
            if offer is not None or fields.get("wait") is not True:
                yield offer or {}
                return
            yield {"waiting": True}

    def _hand_out_roots(self, caller: Identity, fields: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
        """Take up new roots, and hand them out; without any, only tell who has taken up the newest."""
        if "package" in fields:
            before = self._guard.roots.number
            self._guard.roots.install(_field(fields, "package", dict))
            if self._guard.roots.number != before:
                self._audit.log.write(
                    "new roots", caller, number=self._guard.roots.number, roots=self._guard.roots.fingerprints
                )
                self._guard.end_invalid_calls()
        with self._lock:
            self._changed.notify_all()
        yield self._guard.roots.standing()

    def _named(self, name: str) -> RunningJob:
        with self._lock:
            if self._job is None or self._job.settings.name != name:
                raise ConfigError(f"the job {name[:100]!r} is not running", fix="see `fl-adapters status`")
            return self._job


def _object(request: bytes, limit: int = _REQUEST_BYTES) -> Mapping[str, Any]:
    try:
        if len(request) > limit:
            raise ValueError
        fields = parse_json(request or b"{}")
        if isinstance(fields, dict):
            return fields
    except (ValueError, RecursionError):
        pass
    raise ProtocolError(f"a request is not a JSON object of at most {limit} bytes")


def _field(fields: Mapping[str, Any], name: str, kind: type) -> Any:
    value = fields.get(name)
    if not isinstance(value, kind):
        raise ProtocolError(f"the request has no {name!r} of type {kind.__name__}")
    return value


def _loggable(fields: Mapping[str, Any]) -> Mapping[str, Any]:
    return {name: value for name, value in fields.items() if name not in ("crl", "package")}
