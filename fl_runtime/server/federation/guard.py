"""The guard of a federation's server: it authenticates, authorises and audits every call before anything reads it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Protocol

from fl_runtime.errors import ConnectionLostError, FederationError, PermissionDeniedError
from fl_runtime.server.federation.audit_summary import AuditSummary
from fl_runtime.server.federation.quota import CALLS_A_JOB, CallAccount, Quotas
from fl_runtime.server.federation.validity import Validity
from fl_runtime.transport.base import METHODS, Peer, Service
from fl_runtime.trust import permissions
from fl_runtime.trust.certificates import Certificate
from fl_runtime.trust.identity import Identity

log = logging.getLogger(__name__)

_LOOK_S = 1.0


class Control(Protocol):
    """Answers the calls about jobs."""

    def control(self, method: str, caller: Identity, peer: Peer, request: bytes) -> Iterator[bytes]:
        """Answer one call.

        Args:
            method: Name of the call.
            caller: Who is calling, and may call this.
            peer: The caller's connection.
            request: The call's only message.

        Yields:
            The messages of the answer.
        """
        ...


class Jobs(Protocol):
    """The jobs that run, as the guard sees them. A participant in none of them is passed over."""

    def count_of(self, name: str) -> int:
        """Return the number of jobs that a participant takes part in."""
        ...

    def expel(self, name: str, reason: str) -> None:
        """Take a participant out of its jobs for good, because its certificate was revoked."""
        ...

    def go_on_without(self, name: str, reason: str) -> None:
        """Let its jobs go on without a participant that is over its quota. It may join again."""
        ...


@dataclass(eq=False)
class _OpenCall:
    """A call that is being answered.

    Attributes:
        certificate: Its caller's.
        peer: Its connection.
        left: Whether the caller has ended it, which the thread that answers it may not have noticed yet.
    """

    certificate: Certificate
    peer: Peer
    left: bool = False

    def leave(self) -> None:
        self.left = True


class Guard:
    """A service that passes on the calls that the table of permissions and the caller's quota allow.

    Every second it ends the calls whose certificate has expired or was revoked, or is of a root that was retired.
    """

    def __init__(
        self,
        service: Service,
        control: Control,
        validity: Validity,
        audit: AuditSummary,
        jobs: Jobs,
    ) -> None:
        """Make a guard, and start its thread.

        Args:
            service: Answers the calls within a job.
            control: Answers the calls about jobs.
            validity: Tells which certificates count.
            audit: Takes every refusal to the audit log.
            jobs: The jobs that run.
        """
        self._service, self._control, self._validity = service, control, validity
        self._audit, self._jobs = audit, jobs
        self._lock = threading.Lock()
        self._open: set[_OpenCall] = set()
        self._quotas = Quotas()
        self._seen: dict[tuple[str, int], Certificate] = {}  # certificates of earlier callers, without revoked ones
        self._known: dict[str, Identity] = {}
        self._last_call: dict[str, float] = {}  # when the last call of a participant ended
        self._closed = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="fl-guard", daemon=True)
        self._watcher.start()

    def handle(self, method: str, peer: Peer, requests: Iterator[bytes]) -> Iterator[bytes]:
        """Pass on a call that its caller is allowed to make. Raises PermissionDeniedError for others."""
        who: Identity | None = None
        account: CallAccount | None = None
        try:
            certificate = self._validity.read(peer.certificate)
            who = certificate.identity
            void = f"{certificate.serial:x}" if self._validity.fault(certificate) else ""
            account = self._quotas.account(who, method, void=void)
            account.begin()
            self._validity.check(certificate)
            if peer.fault:
                raise PermissionDeniedError(
                    f"{who} may not call: {peer.fault}", where="rule transport: TLS 1.3", fix="use TLS 1.3"
                )
            self._seen[certificate.issuer, certificate.serial], self._known[who.name] = certificate, who
            permissions.check(who, method)
            self._validity.check_call(certificate, method)
            with self._counted(certificate, peer, account):
                named = replace(peer, name=who.name, account=account)
                messages = account.counted(requests)
                if method in METHODS:
                    yield from self._service.handle(method, named, messages)
                else:
                    yield from self._control.control(method, who, named, next(messages, b""))
        except FederationError as error:
            error.__traceback__ = error.__context__ = None  # they hold the messages of the call, which may be large
            if account is not None:
                account.refuse(error)
            over = account is not None and account.over
            if over or not isinstance(error, ConnectionLostError):
                self._audit.refused(who, method, error, once=over, address=peer.address)
            if who is not None and account is not None:
                if over and method in METHODS and not account.crowded:
                    self._jobs.go_on_without(who.name, error.what)  # the job's other sites do not wait for it
                self._hold_back(who, account, requests, peer)
            raise
        finally:
            if account is not None:
                account.read()

    def _hold_back(self, who: Identity, account: CallAccount, requests: Iterator[bytes], peer: Peer) -> None:
        """Hold back a refusal, so that a client that calls in a loop slows down. Its message takes no memory then."""
        account.read()
        with self._quotas.held(who) as may:
            if may and account.hold_s:
                account.discard(requests, peer.hang_up)
                self._closed.wait(account.hold_s)

    def put_in_force(self, crl: bytes, members: bytes = b"") -> list[str]:
        """Install newer lists, which take effect at once and on open connections.

        Args:
            crl: The revocation list; empty to keep the one in force.
            members: The list of members; empty to keep the one in force.

        Returns:
            Names of the revoked and removed participants that had called before.
        """
        if crl:
            self._validity.revoked.install(crl)
        if members:
            self._validity.members.install(members)
        return self.end_invalid_calls()

    def who(self, name: str) -> Identity | None:
        """The identity of a participant that has called, by name."""
        return self._known.get(name)

    def silent_s(self) -> dict[str, float]:
        """Seconds since the last call of each participant that has called, by name; 0 while a call is open."""
        now = time.monotonic()
        with self._lock:
            silent = {name: now - at for name, at in self._last_call.items()}
            return silent | {call.certificate.identity.name: 0.0 for call in self._open if not call.left}

    def close(self) -> None:
        self._closed.set()
        self._watcher.join()
        self._audit.sum_up(everything=True)

    @contextmanager
    def _counted(self, certificate: Certificate, peer: Peer, account: CallAccount) -> Iterator[None]:
        """Keep the call on the list of open ones. Raises ConnectionLostError if the participant has too many.

        That error lets an honest participant call again: its earlier connection may have broken without a sign, or its
        earlier calls may end in a moment.
        """
        call = _OpenCall(certificate, peer)
        most = CALLS_A_JOB * max(self._jobs.count_of(certificate.identity.name), 1)
        with self._lock:
            own = [item for item in self._open if item.certificate.identity.name == certificate.identity.name]
            if sum(not item.left for item in own) >= most or len(own) >= 2 * most:
                account.over = account.crowded = True
                raise ConnectionLostError(
                    f"{certificate.identity} has {most} calls open already",
                    where=f"rule calls: at most {CALLS_A_JOB} at a time for each job",
                    fix="run one process per site and job",
                )
            self._open.add(call)
        try:
            if not peer.when_gone(call.leave):
                call.leave()
            yield
        finally:
            with self._lock:
                self._open.remove(call)
                self._last_call[certificate.identity.name] = time.monotonic()

    def _watch(self) -> None:
        while not self._closed.wait(_LOOK_S):
            try:
                self.look_again()
                self._audit.sum_up()
            except FederationError as error:
                log.warning("%s", error)

    def look_again(self) -> None:
        """Read roots and revocation list again if their files have changed, and end the calls that are invalid now.

        Raises:
            ConfigError: If the list is not valid; once for each change. The list in force stays in force.
        """
        self._validity.refresh()
        self.end_invalid_calls()

    def end_invalid_calls(self) -> list[str]:
        """End the calls whose certificate is not valid any more. A participant with a renewed one just calls again.

        Returns:
            Names of the revoked and removed participants that had called before.
        """
        with self._lock:
            open_calls = [(call.certificate, call.peer) for call in self._open]
            invalid = [(item, peer, why) for item, peer in open_calls if (why := self._validity.fault(item))]
            removed = self._validity.members.fault
            out = [key for key, item in self._seen.items() if self._validity.revokes(item) or removed(item.identity)]
            revoked = [self._seen.pop(key) for key in out]
        for item in revoked:
            self._jobs.expel(item.identity.name, self._validity.fault(item))
        ended = {item.pem: (item, why) for item, _, why in invalid}
        for item, why in [
            *ended.values(),
            *((item, self._validity.fault(item)) for item in revoked if item.pem not in ended),
        ]:
            self._audit.write("calls ended", item.identity, rule=f"certificate: {why}", error=f"{item.identity}: {why}")
        for _, peer, _ in invalid:
            peer.hang_up()
        return [item.identity.name for item in revoked]
