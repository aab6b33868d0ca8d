"""The server of a provisioned federation: one port and mutual TLS before a queue of jobs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from google.protobuf.message import Message

from fl_runtime.errors import ConfigError, ConnectionLostError, PermissionDeniedError, ProtocolError
from fl_runtime.server.calls.requests import DescribedLimit, first_request, session_job
from fl_runtime.server.federation.audit_summary import AuditSummary
from fl_runtime.server.federation.calls import JobCalls
from fl_runtime.server.federation.guard import Guard
from fl_runtime.server.federation.jobs import RunningJob
from fl_runtime.server.federation.queue import JobQueue, ReadJob
from fl_runtime.server.federation.quota import CALLS_A_JOB, HELD_EACH, MOST_SLOTS
from fl_runtime.server.federation.renewals import RENEWALS, Renewals
from fl_runtime.server.federation.root_calls import RootCalls
from fl_runtime.server.federation.roots import RootsAtServer
from fl_runtime.server.federation.validity import Validity
from fl_runtime.store.data_folder import DataFolder
from fl_runtime.store.stores import Storage
from fl_runtime.trainings import job_of
from fl_runtime.transport.base import Peer
from fl_runtime.transport.turns import MEMORY_MIB
from fl_runtime.trust.audit import AuditLog, Witness
from fl_runtime.trust.identity import Identity
from fl_runtime.trust.kits import CRL, StartupKit
from fl_runtime.trust.project import MEMBERS, Members, split_address
from fl_runtime.trust.revocation import RevocationList
from fl_runtime.trust.roots.outside_lists import OUTSIDE_LISTS, OutsideLists
from fl_runtime.types import Listener
from fl_runtime.version import VERSION
from fl_runtime.wire.fl.v1 import federation_pb2 as pb

log = logging.getLogger(__name__)

_GRACE_S = 0.5
_SITES_TO_COME = 8  # sites that may be added while the server runs, and have room


class FederationServer:
    """Serves the federation of a server's startup kit. Threads of its own do all the work.

    Attributes:
        queue: The federation's jobs.
    """

    def __init__(
        self,
        kit: StartupKit,
        folder: Path,
        read_job: ReadJob,
        *,
        listen: str = "",
        listener_of: Callable[[str], Listener] | None = None,
        syslog: str = "",
        storage: Storage | None = None,
        memory_mib: int = MEMORY_MIB,
    ) -> None:
        """Make a server that does not serve yet.

        Args:
            kit: The server's startup kit.
            folder: The server's data folder, which holds the jobs.
            read_job: Reads and checks the settings of a submitted job.
            listen: Address to serve on, as "host:port"; "" for that of the kit.
            listener_of: Makes the listener for the events of a job from the job's name.
            syslog: Address of a syslog server that gets every line of the audit log, too; "" for none.
            storage: Keeps runs, and copies of this server's files; None to keep all in the folder.
            memory_mib: The server's own memory, beside mapped files, in MiB; at least 128. Large transfers of all jobs
                take turns to stay below it.

        Raises:
            ConfigError: A file of the kit cannot be read, the folder holds jobs of another federation, or the address
                of the syslog server is not valid.
            StoreError: The disk fails, or another server uses the folder.
        """
        self._kit = kit
        self._listen, self._memory_mib = split_address(listen or kit.listen), memory_mib
        self._data = DataFolder(folder, kit.identity.federation)
        try:
            self._open(kit, folder, read_job, listener_of, syslog, storage or Storage())
        except BaseException:
            self._data.close()
            raise

    def _open(
        self,
        kit: StartupKit,
        folder: Path,
        read_job: ReadJob,
        listener_of: Callable[[str], Listener] | None,
        syslog: str,
        storage: Storage,
    ) -> None:
        self._audit = AuditSummary(AuditLog(kit.folder, kit.folder))
        self._audit.log.ship_to(syslog)
        self._storage = storage
        self._roots = roots = RootsAtServer(kit)
        members = Members(kit.folder, kit.identity.federation, roots, kit.sites)
        self.queue = JobQueue(
            kit, folder, read_job, self._audit, listener_of, lambda name: self._guard.who(name), members, storage
        )
        revoked = RevocationList(kit.folder / CRL, roots, required=True)
        self._take_up(CRL, revoked)
        self._take_up(MEMBERS, members)
        renewals = Renewals(kit.folder / RENEWALS)
        lists = OutsideLists(kit.folder / OUTSIDE_LISTS, lambda: roots.holders.outside)
        validity = Validity(kit.identity.federation, roots, revoked, lists, renewals, members, self._audit)
        witness = Witness(self._audit.log, kit.folder, kit.identity)
        root_calls = RootCalls(roots, self.queue, self._audit.log, lambda: self._guard.look_again())
        calls = JobCalls(kit, self.queue, self._audit, witness, root_calls, revoked, self._put_in_force)
        self._guard = Guard(self, calls, validity, self._audit, _JobsOfQueue(self.queue))
        self._stop_serving: Callable[[float], None] | None = None

    def start(self) -> str:
        """Serve, and continue the jobs that have not ended. One that cannot be continued is recorded as failed.

        Returns:
            The address that it serves on, as "host:port".

        Raises:
            ConfigError: The port is in use.
            StoreError: The disk fails.
        """
        from fl_runtime.transport.grpc import GrpcServer
        from fl_runtime.transport.tls import FileCredentials

        a_participant = 2 * CALLS_A_JOB * MOST_SLOTS + HELD_EACH  # a thread exists once it is needed
        sites = len(self.queue.sites) + _SITES_TO_COME
        threads = a_participant * (sites + 8)
        credentials = FileCredentials(self._kit.folder, lambda: self._roots.holders.outside.pem)
        server = GrpcServer(self._guard, None, threads, sites, credentials, self._memory_mib)
        with self.queue.changed:  # sites that call already wait until their jobs go on
            address = server.start(*self._listen)
            self._stop_serving = server.stop
            self._audit.log.write("server started", self._kit.identity, address=address, version=VERSION)
            self.queue.begin()
        return address

    def submit(self, fields: Mapping[str, Any], submitter: Identity) -> str:
        """Put a job into the queue; see `JobQueue.submit`."""
        return self.queue.submit(fields, submitter)

    def wait_for_job(self, name: str, timeout_s: float | None = None) -> bool:
        """Wait until a job has ended; see `JobQueue.wait_for_job`."""
        return self.queue.wait_for_job(name, timeout_s)

    def outcome(self, name: str) -> Mapping[str, Any]:
        """Return the outcome of a job that has ended; see `JobQueue.outcome`."""
        return self.queue.outcome(name)

    def silent_s(self) -> Mapping[str, float]:
        """Return the seconds since the last call of each participant that has called; 0 while a call is open."""
        return self._guard.silent_s()

    def refusals(self) -> Mapping[str, int]:
        """Return the number of calls refused since the start, by the class of the error."""
        return dict(self._audit.refusals)

    def audit_fault(self) -> str:
        """Return what is wrong with the audit log; see `AuditLog.fault`."""
        return self._audit.log.fault()

    def _take_up(self, name: str, newest: RevocationList | Members) -> None:
        """Put the list of the server before in force, unless this kit has a newer one."""
        kept, file = self._storage.files.kept(name), self._kit.folder / name
        if kept is not None:
            try:
                newest.install(kept)
            except ConfigError as error:
                log.warning("the list of the server before was not taken: %s", error)
        if file.exists() and file.read_bytes() != kept:
            self._storage.files.keep(file, file.read_bytes())

    def _put_in_force(self, crl: bytes, members: bytes) -> list[str]:
        ended = self._guard.put_in_force(crl, members)
        for name, data in ((CRL, crl), (MEMBERS, members)):
            if data:
                self._storage.files.keep(self._kit.folder / name, data)
        return ended

    def close(self) -> None:
        """Stop serving. Jobs that have not ended continue when the server is started again."""
        self.queue.stop_scheduling()
        if self._stop_serving:
            self._stop_serving(_GRACE_S)
        self._guard.close()
        self.queue.close()
        self._audit.log.write("server stopped", self._kit.identity)
        self._audit.log.close()
        self._data.close()

    def handle(self, method: str, peer: Peer, requests: Iterator[bytes]) -> Iterator[bytes]:
        """Answer a call within one of the jobs that run. The guard has established who is calling."""
        request = first_request(method, requests, self._described_limit)
        job = self._job_for(peer.name, request)
        if peer.name not in job.sites:
            raise PermissionDeniedError(
                f"{peer.name} is not a site of the job {job.name}",
                where=f"rule sites: {', '.join(job.sites)}",
                fix="submit a job with this site",
            )
        return job.server.trainings.answer(method, peer, request, requests)

    def _described_limit(self) -> DescribedLimit | None:
        """The limit of the run that allows most; None if there is one that has not begun, or none at all."""
        return DescribedLimit.largest(job.server.trainings.described_limit() for job in self.queue.running())

    def _job_for(self, site: str, request: Message) -> RunningJob:
        """Return the job that a call names. A site that joins without naming one gets the first with work for it."""
        jobs, name = self.queue.running(), _job_named_in(request)
        if name:
            for job in (*jobs, *self.queue.lately_ended()):
                if job.name == name:
                    return job
            if self.queue.stands_still(name):
                raise ConnectionLostError(f"the job {name} stands still at this server", fix="wait, and call again")
            raise ProtocolError(f"the job {name[:100]!r} does not run here any more", fix="start the site again")
        before = job_of(request.follows) if isinstance(request, pb.JoinRequest) else ""
        if not any(job.waits_for(site) for job in jobs):
            jobs = self._running_for_script_of(site)
        waiting = sorted((job for job in jobs if job.waits_for(site)), key=lambda job: job.name != before)
        for job in (*waiting, *jobs, *self.queue.lately_ended()):
            return job
        raise ConfigError("no job is running", fix="start the script with `fl-adapters run`, which waits for one")

    def _running_for_script_of(self, site: str) -> tuple[RunningJob, ...]:
        """The jobs that run after those have started that waited for a site, whose script joins without a daemon."""
        with self.queue.changed:
            if self.queue.attendance.joins_by_itself(site):
                self.queue.schedule()
            return self.queue.running()


class _JobsOfQueue:
    """The jobs that run, for the guard; see `Jobs` there."""

    def __init__(self, queue: JobQueue) -> None:
        self._queue = queue

    def count_of(self, name: str) -> int:
        return sum(name in job.sites for job in self._queue.running())

    def expel(self, name: str, reason: str) -> None:
        for job in self._queue.running():
            job.server.expel(name, reason)

    def go_on_without(self, name: str, reason: str) -> None:
        for job in self._queue.running():
            if name in job.sites:
                job.server.site_left(name, reason)


def _job_named_in(request: Message) -> str:
    """The job that the first message of a site's call names, or "" if it names none."""
    return job_of(request.job if isinstance(request, pb.JoinRequest) else session_job(request))
