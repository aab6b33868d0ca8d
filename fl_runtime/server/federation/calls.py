"""The calls about jobs. They carry JSON: one object as the request, one or more objects as the answer."""

from __future__ import annotations

import json
import logging
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from fl_runtime.errors import ConfigError, ConnectionLostError, PermissionDeniedError, ProtocolError
from fl_runtime.server.calls.software import SiteVersions, settings_for
from fl_runtime.server.federation.archive import JobRecord
from fl_runtime.server.federation.audit_summary import AuditSummary
from fl_runtime.server.federation.jobs import RunningJob
from fl_runtime.server.federation.queue import JobQueue
from fl_runtime.server.federation.quota import MOST_SLOTS
from fl_runtime.server.federation.requests import BEAT_S, REQUEST_BYTES, field, names, read_object
from fl_runtime.server.federation.results import chunks, files_of
from fl_runtime.server.federation.root_calls import RootCalls
from fl_runtime.server.federation.schedule import Room
from fl_runtime.text import printable
from fl_runtime.transport.base import Peer
from fl_runtime.trust import permissions
from fl_runtime.trust.audit import AuditLines, Witness, lines_after, lines_before
from fl_runtime.trust.identity import Identity
from fl_runtime.trust.kits import StartupKit
from fl_runtime.trust.revocation import RevocationList
from fl_runtime.wire.software import OWN, Software

log = logging.getLogger(__name__)

ABORT_S = 10.0
_PACKAGE_BYTES = 2**22  # with the certificates of all participants
_REASON_CHARS = 500
_LINE_CHARS = 300
_ENDED_SHOWN = 20
_LOOK_S = 0.3  # how often a call that follows looks for changes, which pages show within a second
_MOST_LINES = 500  # of the audit log in one answer

_Fields = Mapping[str, Any]


class JobCalls:
    """Answers the calls of admins and sites about jobs.

    Args:
        kit: The server's startup kit.
        queue: The jobs.
        audit: The log that calls of admins are put on.
        witness: Takes note of the ends of the sites' audit logs, and tells that of the server's own.
        roots: Answers the calls about roots.
        revoked: The revocation list, for those who ask for it.
        revoke: Puts a revocation list and a list of members in force, and returns the names of participants that are
            out.
    """

    def __init__(
        self,
        kit: StartupKit,
        queue: JobQueue,
        audit: AuditSummary,
        witness: Witness,
        roots: RootCalls,
        revoked: RevocationList,
        revoke: Callable[[bytes, bytes], list[str]],
    ) -> None:
        self._kit, self._queue, self._audit, self._witness = kit, queue, audit, witness
        self._revoked, self._put_in_force = revoked, revoke
        self._versions = SiteVersions()
        self._answers: Mapping[str, Callable[[Identity, Peer, _Fields], Iterator[_Fields | bytes]]] = {
            "Assignment": self._assignment,
            "RefuseJob": self._refuse_job,
            "TellLog": self._tell_log,
            "Status": self._status,
            "ShowJob": self._show_job,
            "SubmitJob": self._submit_job,
            "AbortJob": self._abort_job,
            "ResumeJob": self._resume_job,
            "DeleteJob": self._delete_job,
            "Watch": self._watch,
            "Download": self._download,
            "Revoke": self._revoke,
            "Revocations": self._revocations,
            "Roots": roots.newer,
            "HandOutRoots": roots.hand_out,
            "ReadAudit": self._read_audit,
        }

    def control(self, method: str, caller: Identity, peer: Peer, request: bytes) -> Iterator[bytes]:
        """Answer a call about jobs. The guard has established who is calling, and that the call is allowed."""
        fields = read_object(request, _PACKAGE_BYTES if method == "HandOutRoots" else REQUEST_BYTES)
        if caller.kind == "admin" and method not in ("Roots", "Revocations"):
            self._audit.write(f"called {method}", caller, address=peer.address, request=_loggable(fields))
        elif "log" in fields:
            self._witness.take(fields["log"], "site", caller)
        if caller.kind == "site":
            self._note_software(caller, fields)
        for answer in self._answers[method](caller, peer, fields):
            yield answer if isinstance(answer, bytes) else json.dumps(answer).encode()

    def _note_software(self, caller: Identity, fields: _Fields) -> None:
        """Note the version that a site's daemon tells, with a line in the audit log when it is another one."""
        told = self._versions.note(caller.name, Software.of_json(fields.get("software")))
        if told is not None:
            self._audit.write("site software", caller, version=told.version, protocols=told.protocols)
            if text := self._versions.misfits().get(caller.name):
                log.warning("fl-adapters %s at %s %s", told.version, caller.name, text)

    # -- calls of sites ----------------------------------------------------------------------------------------

    def _assignment(self, caller: Identity, peer: Peer, fields: _Fields) -> Iterator[_Fields]:
        """Wait until there is another job for this site, with a sign of life now and then."""
        queue, at_work = self._queue, names(fields, "running")
        told = self._versions.checked(caller.name)
        room = Room.told(fields.get("resources"), MOST_SLOTS)
        left = self._woken_by(peer)
        queue.site_asks(caller.name, left, room)
        while not left.is_set():
            with queue.changed:
                queue.attendance.waits(caller.name, left)
                job = self._work_for(caller.name, at_work)
                if job is None and not queue.closed:
                    queue.changed.wait(BEAT_S)
                    job = self._work_for(caller.name, at_work)
                if queue.halted:
                    raise queue.halted
                if queue.closed:
                    raise ConnectionLostError("the server is being stopped", fix="wait until it is back")
            if job is None:
                yield {"waiting": True}
                continue
            with queue.changed:
                queue.attendance.answered(caller.name, left)
            settings = job.record.settings
            try:
                shown = settings_for(settings, caller.name, told)
            except ProtocolError as error:
                job.refuse(caller.name, error.what)  # the site's other jobs must not wait for this one
                queue.schedule()
                continue
            yield {
                "job": settings.name,
                "app": settings.app,
                "strategy": settings.strategy,
                "submitted_by": settings.submitted_by,
                "index": settings.sites.index(caller.name),
                "count": len(settings.sites),
                "settings": shown,
                "log": self._witness.statement(caller),
            }
            return

    def _woken_by(self, peer: Peer) -> threading.Event:
        """An event that is set when the caller ends its call. Whoever waits for the queue is woken then."""
        left = threading.Event()

        def leave() -> None:
            left.set()
            with self._queue.changed:
                self._queue.changed.notify_all()

        if not peer.when_gone(leave):
            left.set()
        return left

    def _work_for(self, site: str, at_work: frozenset[str]) -> RunningJob | None:
        """A job that waits for a site and that the site does not run. One in which no process of it is comes first."""
        jobs = [job for job in self._queue.running() if job.waits_for(site) and job.name not in at_work]
        absent = [job for job in jobs if not job.server.is_present(site)]
        return next(iter(absent or jobs), None)

    def _refuse_job(self, caller: Identity, peer: Peer, fields: _Fields) -> Iterator[_Fields]:
        name, reason = field(fields, "job", str), printable(field(fields, "reason", str), _REASON_CHARS)
        job = self._queue.job(name)
        if job is None or caller.name not in job.sites:
            raise ConfigError(f"the job {name[:100]!r} does not run with {caller.name}", fix="see `fl-adapters status`")
        attempt, training = _number(fields, "attempt"), _number(fields, "training") or 1
        whole = reason if attempt is not None else f"it refuses the job: {reason}"
        refused = job.refuse(caller.name, whole, training, attempt)
        if refused:
            self._queue.schedule()  # the site has room for another job
        yield {"job": name, "refused": refused}

    def _tell_log(self, caller: Identity, peer: Peer, fields: _Fields) -> Iterator[_Fields]:
        """Take a line of a site's own log to the job's events. A quota bounds how many there are."""
        name, text = field(fields, "job", str), printable(field(fields, "text", str), _LINE_CHARS)
        job = self._queue.job(name)
        if job is None or caller.name not in job.sites:
            raise ConfigError(f"the job {name[:100]!r} does not run with {caller.name}", fix="see `fl-adapters status`")
        level = "warning" if fields.get("level") == "warning" else "info"
        job.server.trainings.note_line(caller.name, level, text)
        yield {"job": name}

    # -- what there is -----------------------------------------------------------------------------------------

    def _status(self, caller: Identity, peer: Peer, fields: _Fields) -> Iterator[_Fields]:
        """Tell what there is; to a caller that follows, again whenever it has changed.

        With `before`, the jobs are earlier ones that have ended: those of numbers below it.
        """
        before = fields.get("before")
        if not (before is None or type(before) is int):
            raise ProtocolError("earlier jobs are asked for by the number of a job, as `older` of a status tells it")
        outcomes: dict[tuple[str, float | None], _Fields] = {}
        told = {**self._what_there_is(caller, outcomes, before), "log": self._witness.statement(caller)}
        named = {name: outcome for (name, _), outcome in outcomes.items() if "rounds" in outcome}
        follows = fields.get("follow") is True and before is None
        yield {**told, "ended": {} if follows or before is not None else named, "follows": follows, "time": time.time()}
        del told["log"]
        if follows:
            yield from self._changes(peer, told, lambda: self._what_there_is(caller, outcomes))

    def _changes(self, peer: Peer, told: _Fields, look: Callable[[], _Fields]) -> Iterator[_Fields]:
        """Tell what there is whenever it is not what was told."""

        def news() -> _Fields | None:
            nonlocal told
            before, told = told, look()
            return {**told, "ended": {}, "follows": True, "time": time.time()} if told != before else None

        return self._followed(peer, news)

    def _what_there_is(
        self, caller: Identity, outcomes: dict[tuple[str, float | None], _Fields], before: int | None = None
    ) -> dict[str, Any]:
        """Sites and jobs as they are at this moment. `outcomes` keeps those that have been read."""
        records, running = self._queue.records(), self._queue.running()
        past = [record for record in records if record.ended and (before is None or record.number < before)]
        ended = past[-_ENDED_SHOWN:]
        shown = [record for record in records if not record.ended] if before is None else []
        known = {(record.name, record.ended_at): record for record in ended}
        read = {key: outcomes.get(key) or self._outcome(record) for key, record in known.items()}
        outcomes.clear()
        outcomes.update(read)
        own = [job for job in running if caller.kind != "site" or caller.name in job.sites]
        return {
            "federation": self._kit.identity.federation,
            "version": OWN.version,
            "protocols": [OWN.lowest, OWN.highest],
            "you": caller.uri,
            "sites": list(self._queue.sites),
            "site_states": self._site_states(),
            "site_versions": self._site_versions(running),
            **({"site_rooms": self._site_rooms()} if caller.kind == "admin" else {}),
            "misfits": self._versions.misfits(),
            "jobs": [
                _as_seen_by(caller, self._facts(record, read.get((record.name, record.ended_at))))
                for record in (*ended, *shown)
            ],
            "older": ended[0].number if len(past) > len(ended) else None,
            # what versions before the queue, with one job at a time, tell and ask for
            "running": {**own[0].record.facts(), **own[0].server.state()} if own else None,
        }

    def _followed(self, peer: Peer, news: Callable[[], _Fields | None]) -> Iterator[_Fields]:
        """Tell what is new, and give a sign of life now and then, until the caller ends its call.

        Raises ConnectionLostError if the server is stopped.
        """
        left, told_at = self._woken_by(peer), time.monotonic()
        while not left.wait(_LOOK_S):
            if self._queue.closed:
                raise ConnectionLostError("the server is being stopped", fix="wait until it is back")
            answer = news()
            if answer is not None or time.monotonic() >= told_at + BEAT_S:
                yield answer or {"waiting": True}
                told_at = time.monotonic()

    def _site_states(self) -> dict[str, str]:
        """What each site of the federation does at this moment: what jobs it is in, or that it waits or is absent."""
        with self._queue.changed:
            waiting = self._queue.attendance.waiting
        at_work: dict[str, list[str]] = {}
        for job in self._queue.running():
            for name in job.server.state()["connected"]:
                at_work.setdefault(name, []).append(job.name)
        states = {}
        for site in self._queue.sites:
            if site in at_work:
                states[site] = f"connected; in {', '.join(at_work[site])}"
            else:
                states[site] = "connected; waits for a job" if site in waiting else "absent"
        return states

    def _site_versions(self, running: Sequence[RunningJob]) -> dict[str, str]:
        """The versions that sites have told: their daemons, else their scripts that are in a job."""
        told = {site: version for job in running for site, version in job.server.state()["versions"].items()}
        own = {site: self._versions.version_of(site) for site in self._queue.sites}
        known = {site: own[site] or told.get(site, "") for site in self._queue.sites}
        return {site: version for site, version in known.items() if version}

    def _site_rooms(self) -> dict[str, _Fields]:
        """What room for jobs each site's daemon has told; nothing of sites that have told none."""
        with self._queue.changed:
            rooms = dict(self._queue.attendance.rooms)
        return {site: asdict(rooms[site]) for site in self._queue.sites if site in rooms}

    def _outcome(self, record: JobRecord) -> _Fields:
        """The outcome of a job that has ended. One that is not on the disk reads as an error."""
        try:
            return self._queue.outcome(record.name)
        except ConfigError as error:
            return {"error": error.to_wire()}

    def _facts(self, record: JobRecord, outcome: _Fields | None) -> dict[str, Any]:
        """A job's record; with where its rounds stand while it runs, and its outcome once it has ended."""
        job = self._queue.job(record.name)
        if job is not None:
            state = job.server.state()
            return {**record.facts(), **state, "sites": list(job.sites), "site_states": state["sites"]}
        known = outcome or {}
        facts = {**record.facts(), "error": known.get("error"), "rounds_done": len(known.get("rounds", ()))}
        facts["versions"] = known.get("versions", {})
        waits_for = self._queue.waits_for(record)
        return {**facts, "waits_for": waits_for} if waits_for else facts

    def _show_job(self, caller: Identity, peer: Peer, fields: _Fields) -> Iterator[_Fields]:
        record = self._visible(caller, fields)
        outcome = self._outcome(record) if record.ended else None
        shown: dict[str, Any] = {**self._facts(record, outcome), "settings": asdict(record.settings)}
        if outcome is not None:
            shown["outcome"] = outcome
            shown["files"] = [item.to_json() for item in files_of(self._queue.folder(record.name))]
        yield shown

    def _watch(self, caller: Identity, peer: Peer, fields: _Fields) -> Iterator[_Fields]:
        record = self._visible(caller, fields)
        first = fields.get("from", 0)
        yield from self._until_it_runs(record.name)
        job = self._queue.job(record.name)
        if job is not None:
            start, steps = first if isinstance(first, int) else 0, fields.get("steps") is True
            for number, event in job.events.follow(start, BEAT_S, steps=steps):
                yield {"waiting": True} if event is None else {"number": number, "event": event}
            if job.halted:
                raise job.halted
        if self._queue.record(record.name).ended:
            yield {"ended": self._queue.outcome(record.name)}
        elif self._queue.closed:
            raise ConnectionLostError("the server is being stopped", fix="wait until it is back")

    def _until_it_runs(self, name: str) -> Iterator[_Fields]:
        queue = self._queue
        while True:
            with queue.changed:
                if queue.record(name).state != "queued" or queue.closed:
                    return
                queue.changed.wait(BEAT_S)
            yield {"waiting": True}

    def _download(self, caller: Identity, peer: Peer, fields: _Fields) -> Iterator[bytes]:
        record = self._visible(caller, fields)
        offset = fields.get("from", 0)
        path = field(fields, "file", str)
        yield from chunks(self._queue.folder(record.name), path, offset if isinstance(offset, int) else 0)

    def _visible(self, caller: Identity, fields: _Fields) -> JobRecord:
        """The job that a call names, if its caller may see it: an admin, or one of its sites."""
        record = self._queue.record(field(fields, "job", str))
        if caller.kind == "site" and caller.name not in record.settings.sites:
            raise PermissionDeniedError(
                f"{caller.name} is not a site of the job {record.name}",
                where=f"rule sites: {', '.join(record.settings.sites)}",
                fix="ask an admin of the project",
            )
        return record

    # -- what admins do ----------------------------------------------------------------------------------------

    def _submit_job(self, caller: Identity, peer: Peer, fields: _Fields) -> Iterator[_Fields]:
        priority = fields.get("priority", 0)
        if not isinstance(priority, int):
            raise ProtocolError("the priority of a job is not a whole number")
        name = self._queue.submit(field(fields, "job", dict), caller, priority)
        yield {"job": name, "state": self._queue.record(name).state}

    def _abort_job(self, caller: Identity, peer: Peer, fields: _Fields) -> Iterator[_Fields]:
        name = self._permitted(caller, "AbortJob", fields)
        self._queue.abort(name, f"{caller} has aborted the job")
        yield {"job": name, "ended": self._queue.wait_for_job(name, ABORT_S)}  # so that its sites have room again

    def _resume_job(self, caller: Identity, peer: Peer, fields: _Fields) -> Iterator[_Fields]:
        name = self._permitted(caller, "ResumeJob", fields)
        self._queue.resume(name, caller)
        yield {"job": name, "state": self._queue.record(name).state}

    def _delete_job(self, caller: Identity, peer: Peer, fields: _Fields) -> Iterator[_Fields]:
        name = self._permitted(caller, "DeleteJob", fields)
        self._queue.delete(name, caller)
        yield {"job": name}

    def _read_audit(self, caller: Identity, peer: Peer, fields: _Fields) -> Iterator[_Fields]:
        """Tell the last lines of the server's audit log, or those before others; then what is added, if asked for."""
        count, end = fields.get("count", _MOST_LINES), fields.get("before")
        if type(count) is not int or not 0 < count <= _MOST_LINES or not (end is None or type(end) is int):
            raise ProtocolError(f"the lines of an audit log are asked for by a count of 1 to {_MOST_LINES}")
        lines = lines_before(self._kit.folder, count, end)
        yield _told_lines(lines)

        def added() -> _Fields | None:
            nonlocal lines
            lines = lines_after(self._kit.folder, lines.end)
            return _told_lines(lines) if lines.entries else None

        if fields.get("follow") is True and end is None:
            yield from self._followed(peer, added)

    def _permitted(self, caller: Identity, call: str, fields: _Fields) -> str:
        """Name of the job that a call is about, if the table of permissions lets its caller do that with it."""
        record = self._queue.record(field(fields, "job", str))
        permissions.check_job(caller, call, record.submitter)
        return record.name

    def _revoke(self, caller: Identity, peer: Peer, fields: _Fields) -> Iterator[_Fields]:
        members = field(fields, "members", str).encode() if "members" in fields else b""
        yield {"ended": self._put_in_force(field(fields, "crl", str).encode(), members)}

    def _revocations(self, caller: Identity, peer: Peer, fields: _Fields) -> Iterator[_Fields]:
        """Answer with the revocation list, if the caller's is older. Numbers are texts, since they may be long."""
        current = self._revoked.current
        if current is None:
            raise ConfigError("there is no revocation list", fix="copy crl.pem from the authority's folder")
        known = str(fields.get("number", ""))[:50]
        older = not re.fullmatch(r"[0-9]+", known) or int(known) < current.number
        yield {"number": str(current.number), **({"crl": current.pem.decode()} if older else {})}


def _told_lines(lines: AuditLines) -> _Fields:
    return {"lines": list(lines.entries), "begin": lines.begin, "end": lines.end}


def _as_seen_by(caller: Identity, job: dict[str, Any]) -> dict[str, Any]:
    """A job's facts, without its metrics for sites that take no part in it."""
    hidden = caller.kind == "site" and caller.name not in job.get("sites", ())
    return {name: value for name, value in job.items() if name != "newest"} if hidden else job


def _number(fields: _Fields, name: str) -> int | None:
    value = fields.get(name)
    return value if isinstance(value, int) and value > 0 else None


def _loggable(fields: _Fields) -> _Fields:
    return {name: value for name, value in fields.items() if name not in ("crl", "members", "package")}
