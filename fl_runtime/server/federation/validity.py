"""Which certificates count at the server: issued by a trusted root, in time, not revoked, and not replaced."""

from __future__ import annotations

import logging
from datetime import UTC, datetime

from fl_runtime.errors import PermissionDeniedError
from fl_runtime.server.federation.audit_summary import AuditSummary
from fl_runtime.server.federation.renewals import Renewals
from fl_runtime.server.federation.roots import RootsAtServer
from fl_runtime.transport.base import BEGINNINGS
from fl_runtime.trust.certificates import Certificate
from fl_runtime.trust.project import Members
from fl_runtime.trust.revocation import RevocationList
from fl_runtime.trust.roots.outside_lists import OUTSIDE_LISTS, OutsideLists

log = logging.getLogger(__name__)

_ALWAYS = ("Roots", "Revocations")  # calls by which a participant gets a newer certificate or list
_SIGN_LIST = "where the authority is, run `fl-adapters cert crl --authority FOLDER --kit KIT` with an admin's kit"


class Validity:
    """Tells which certificates count.

    Args:
        federation: Name of the federation whose certificates count.
        roots: The trusted roots.
        revoked: The list of revoked certificates.
        outside_lists: The revocation lists of outside authorities.
        renewals: The certificates that were replaced by renewed ones.
        members: The members of the federation.
        audit: Takes notes about the revocation list to the audit log.

    Attributes:
        revoked: The list of revoked certificates.
        members: The members of the federation.
    """

    def __init__(
        self,
        federation: str,
        roots: RootsAtServer,
        revoked: RevocationList,
        outside_lists: OutsideLists,
        renewals: Renewals,
        members: Members,
        audit: AuditSummary,
    ) -> None:
        self.members = members
        self._federation, self._roots, self.revoked, self._renewals = federation, roots, revoked, renewals
        self._outside_lists, self._audit = outside_lists, audit
        self._list_state = ""

    def read(self, pem: bytes) -> Certificate:
        """Read a certificate, with who holds it; see `Holders.read`."""
        return self._roots.holders.read(pem)

    def fault(self, certificate: Certificate) -> str:
        """Return why a certificate does not count, also for calls that are open; "" if it does."""
        if self.revokes(certificate):
            return "its certificate was revoked"
        if not self._roots.holders.trusts(certificate):
            if certificate.issuer:
                return "its certificate is of an outside authority, or for a name, that does not count any more"
            return "its certificate is of a root that was retired"
        now = datetime.now(UTC)
        if now > certificate.not_after:
            return f"its certificate expired on {certificate.not_after:%Y-%m-%d %H:%M} UTC"
        if now < certificate.not_before:
            return "its certificate is not valid yet"
        return self.members.fault(certificate.identity)

    def revokes(self, certificate: Certificate) -> bool:
        """Whether a certificate is on the federation's revocation list, or on that of an outside authority."""
        return certificate in self.revoked or self._outside_lists.revokes(certificate)

    def check(self, certificate: Certificate) -> None:
        """Check that a certificate counts. Raises PermissionDeniedError if it does not."""
        reason, absent = self.fault(certificate), self.members.fault(certificate.identity)
        if reason and reason == absent and certificate.identity.federation == self._federation:
            raise PermissionDeniedError(
                f"{certificate.identity} may not call: {reason}",
                where="rule members: the newest members.json of the server",
                fix="have the authority run `fl-adapters provision` with this name in the project file, and send the "
                "list to the server with --kit",
            )
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

    def check_call(self, certificate: Certificate, method: str) -> None:
        """Check what a new call needs besides, and note that the certificate is in use.

        Args:
            certificate: The caller's certificate, which counts.
            method: Name of the call.

        Raises:
            PermissionDeniedError: If a renewed certificate is in use, or something would begin on the word of a
                revocation list that has ended, also of an outside authority's. Calls that are open go on.
        """
        since = self._renewals.replaced_since(certificate)
        if since is not None and method not in _ALWAYS:
            raise PermissionDeniedError(
                f"{certificate.identity} may not call: its certificate was replaced by a renewed one, in use since "
                f"{since:%Y-%m-%d %H:%M} UTC",
                where="rule certificate: the newest of its key",
                fix="install the renewed certificate with `fl-adapters cert install` wherever this kit is used",
            )
        current = self.revoked.current
        if method in BEGINNINGS and current is not None and current.has_ended:
            raise PermissionDeniedError(
                f"{certificate.identity} can begin nothing: the federation's revocation list ended on "
                f"{current.ends:%Y-%m-%d %H:%M} UTC",
                where="rule certificate: a revocation list that counts",
                fix=_SIGN_LIST,
            )

        ended = self._outside_lists.end_for(certificate)
        if method in BEGINNINGS and ended is not None:
            raise PermissionDeniedError(
                f"{certificate.identity} can begin nothing: the revocation list of its authority, "
                f"{certificate.issuer}, ended on {ended:%Y-%m-%d %H:%M} UTC",
                where="rule certificate: a revocation list that counts",
                fix=f"copy the newest list of that authority into {OUTSIDE_LISTS} of the server's kit",
            )

    def refresh(self) -> None:
        """Read changed lists again, and say once that our revocation list ends soon or has ended.

        Raises:
            ConfigError: If the file is not valid; once for each change. The list in force stays in force.
        """
        self._warn_of_end()
        if self.members.refresh():
            self._audit.write("list of members read", sites=list(self.members.sites))
        if self.revoked.refresh():
            self._audit.write("revocation list read", serials=[f"{item:x}" for item in self.revoked.serials])
        if self._outside_lists.refresh():
            self._audit.write("revocation lists of outside authorities read")

    def _warn_of_end(self) -> None:
        current = self.revoked.current
        state = "" if current is None else "ended" if current.has_ended else "ends soon" if current.ends_soon else ""
        if state and state != self._list_state and current is not None:
            when = f"{current.ends:%Y-%m-%d %H:%M} UTC"
            self._audit.write(f"revocation list {state}", number=str(current.number), ends=when)
            verb = "ended" if state == "ended" else "ends"
            log.warning(
                "the revocation list %s on %s; without a newer one nothing can begin: %s", verb, when, _SIGN_LIST
            )
        self._list_state = state
