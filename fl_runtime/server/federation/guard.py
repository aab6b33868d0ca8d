"""The guard of a federation's server: it authenticates, authorises and audits every call before anything reads it."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, Protocol

from fl_runtime.errors import ConnectionLostError, FederationError, PermissionDeniedError
from fl_runtime.server.federation.roots import RootsAtServer
from fl_runtime.transport.base import METHODS, Peer, Service
from fl_runtime.trust import permissions
from fl_runtime.trust.audit import AuditLog
from fl_runtime.trust.certificates import Certificate, is_issued_by, read_certificate
from fl_runtime.trust.identity import Identity
from fl_runtime.trust.revocation import RevocationList

log = logging.getLogger(__name__)

CALLS_EACH = 8
"""Calls that one participant may have open at a time, so that nobody uses up the threads of others. A site needs 3."""

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


class Guard:
    """A service that passes on the calls that the table of permissions allows.

    Every second it ends the calls whose certificate has expired or was revoked, or is of a root that was retired.

    Attributes:
        roots: The trusted roots.
    """

    def __init__(
        self,
        service: Service,
        control: Control,
        federation: str,
        roots: RootsAtServer,
        revoked: RevocationList,
        audit: AuditLog,
        on_expelled: Callable[[str, str], None],
    ) -> None:
        """Make a guard, and start its thread.

        Args:
            service: Answers the calls within a job.
            control: Answers the calls about jobs.
            federation: Name of the federation whose certificates count.
            roots: The trusted roots.
            revoked: The list of revoked certificates.
            audit: The log that every refusal is put on.
            on_expelled: Called with a participant's name and a reason when its certificate was revoked.
        """
        self._service, self._control, self._federation = service, control, federation
        self.roots, self._revoked, self._audit, self._on_expelled = roots, revoked, audit, on_expelled
        self._lock = threading.Lock()
        self._open: dict[int, tuple[Certificate, Peer]] = {}
        self._counts: Counter[str] = Counter()
        self._seen: dict[int, Certificate] = {}  # certificates of earlier callers, without revoked ones
        self._known: dict[str, Identity] = {}
        self._next = 0
        self._closed = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="fl-guard", daemon=True)
        self._watcher.start()

    def handle(self, method: str, peer: Peer, requests: Iterator[bytes]) -> Iterator[bytes]:
        """Pass on a call that its caller is allowed to make. Raises PermissionDeniedError for others."""
        who: Identity | None = None
        try:
            certificate = read_certificate(peer.certificate)
            who = certificate.identity
            self._check(certificate)
            if peer.fault:
                raise PermissionDeniedError(
                    f"{who} may not call: {peer.fault}", where="rule transport: TLS 1.3", fix="use TLS 1.3"
                )
            self._seen[certificate.serial], self._known[who.name] = certificate, who
            permissions.check(who, method)
            with self._counted(certificate, peer):
                named = replace(peer, name=who.name)
                if method in METHODS:
                    yield from self._service.handle(method, named, requests)
                else:
                    yield from self._control.control(method, who, named, next(requests, b""))
        except ConnectionLostError:
            raise
        except FederationError as error:
            self._audit.refused(who, method, error, address=peer.address)
            raise

    def end_invalid_calls(self) -> None:
        """End the open calls of certificates that do not count any more, at once instead of within a second."""
        self._end_invalid_calls()

    def put_in_force(self, crl: bytes) -> list[str]:
        """Install a newer revocation list, which takes effect at once and on open connections.

        Returns:
            Names of the revoked participants that had called before.
        """
        self._revoked.install(crl)
        return self._end_invalid_calls()

    def who(self, name: str) -> Identity | None:
        """The identity of a participant that has called, by name."""
        return self._known.get(name)

    def close(self) -> None:
        self._closed.set()
        self._watcher.join()

    def _check(self, certificate: Certificate) -> None:
        reason = self._why_invalid(certificate)
        if reason:
            raise PermissionDeniedError(
                f"{certificate.identity} may not call: {reason}",
                where=f"rule certificate: {reason}",
                fix="ask for a new certificate and install it with `fl-adapters cert install`",
            )
        if certificate.identity.federation != self._federation:
            raise PermissionDeniedError(
                f"{certificate.identity} belongs to {certificate.identity.federation}, not to {self._federation}",
                where="rule certificate: the federation's own",
                fix="use the kit of this federation",
            )

    def _why_invalid(self, certificate: Certificate) -> str:
        if certificate.serial in self._revoked:
            return "its certificate was revoked"
        if not is_issued_by(certificate.pem, self.roots()):
            return "its certificate is of a root that was retired"
        now = datetime.now(UTC)
        if now > certificate.not_after:
            return f"its certificate expired on {certificate.not_after:%Y-%m-%d %H:%M} UTC"
        return "its certificate is not valid yet" if now < certificate.not_before else ""

    @contextmanager
    def _counted(self, certificate: Certificate, peer: Peer) -> Iterator[None]:
        """Keep the call on the list of open ones. Raises PermissionDeniedError if the participant has too many."""
        name = certificate.identity.name
        with self._lock:
            if self._counts[name] >= CALLS_EACH:
                raise PermissionDeniedError(
                    f"{certificate.identity} has {CALLS_EACH} calls open already",
                    where=f"rule calls: at most {CALLS_EACH} at a time",
                    fix="run one process per site",
                )
            self._counts[name] += 1
            self._next += 1
            number = self._next
            self._open[number] = certificate, peer
        try:
            yield
        finally:
            with self._lock:
                del self._open[number]
                self._counts[name] -= 1
                if not self._counts[name]:
                    del self._counts[name]

    def _watch(self) -> None:
        while not self._closed.wait(_LOOK_S):
            try:
                if self._revoked.refresh():
                    self._audit.write("revocation list read", serials=[f"{item:x}" for item in self._revoked.serials])
                self._end_invalid_calls()
            except FederationError as error:
                log.warning("%s", error)

    def _end_invalid_calls(self) -> list[str]:
        """End the calls whose certificate is not valid any more. A participant with a renewed one just calls again.

        Returns:
            Names of the revoked participants that had called before.
        """
        with self._lock:
            invalid = [(item, peer, why) for item, peer in self._open.values() if (why := self._why_invalid(item))]
            revoked = [self._seen.pop(serial) for serial in self._revoked.serials & self._seen.keys()]
        for item in revoked:
            self._on_expelled(item.identity.name, "its certificate was revoked")
        ended = {item.serial: (item, why) for item, _, why in invalid}
        for item, why in [
            *ended.values(),
            *((item, self._why_invalid(item)) for item in revoked if item.serial not in ended),
        ]:
            self._audit.write("calls ended", item.identity, rule=f"certificate: {why}", error=f"{item.identity}: {why}")
        for _, peer, _ in invalid:
            peer.hang_up()
        return [item.identity.name for item in revoked]


def facts(identity: Identity) -> dict[str, Any]:
    """An identity as JSON values."""
    return {"name": identity.name, "kind": identity.kind, "organisation": identity.organisation, "role": identity.role}
