"""Signatures of a site with the certificate of its kit, and the check of those of other sites of the federation.

Two things are signed: keys of secure streams (identity.py beside it) and keys of secure sums (fl_runtime/secure_sum).
Each statement names its purpose, so that a signature of one is none of the other.

No library replaces this: it is one signed statement over certificates that we have already. JWS (`PyJWT`, `joserfc`)
would bring a format with algorithms to choose from, and the certificate would still have to be verified here.
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from fl_runtime.errors import FederationError, PermissionDeniedError
from fl_runtime.trust.certificates import Certificate, read_key, sign, signed_by
from fl_runtime.trust.files import read_file
from fl_runtime.trust.kits import CRL, KEY, known_roots, read_kit
from fl_runtime.trust.revocation import RevocationList
from fl_runtime.trust.roots.outside_lists import OUTSIDE_LISTS, OutsideLists


class KitSignatures:
    """Signs statements as this site, and verifies those of other sites of the federation.

    It is both a `Signer` and a `Verifier` of fl_runtime/secure_sum. Files of the kit are read each time: the
    certificate may have been renewed, and newer roots and revocation lists may have come.

    Args:
        folder: Startup kit of this site.

    Attributes:
        site: Name of this site.

    Raises:
        ConfigError: If the kit is not valid.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._me = read_kit(folder, kind="site").identity
        self.site = self._me.name

    @property
    def certificate(self) -> bytes:
        """The site's certificate as PEM, and after it those that lead to the root.

        During a rotation of the authority, other sites may not have heard of the new root.
        """
        pem = read_kit(self._folder).certificate.pem
        return "".join([pem.decode(), *known_roots(self._folder).crossed]).encode()

    def sign(self, statement: bytes) -> bytes:
        """Sign a statement.

        Args:
            statement: What to sign. It begins with its purpose.

        Returns:
            The signature (ECDSA with SHA-256).
        """
        return sign(read_key(read_file(self._folder / KEY, "private key"), str(self._folder / KEY)), statement)

    def fault(
        self, site: str, statement: bytes, signature: bytes, certificate: bytes
    ) -> Literal["", "other", "revoked"]:
        """Return why a signature does not count.

        Args:
            site: Name of the site that should have signed.
            statement: What should have been signed.
            signature: The signature.
            certificate: The signer's `certificate`.

        Returns:
            "" if that site of this federation has signed it, "revoked" if its certificate was revoked, else "other".
        """
        try:
            holder = known_roots(self._folder).holders.checked(certificate)
            identity, now = holder.identity, datetime.now(UTC)
            valid = (identity.federation, identity.kind, identity.name) == (self._me.federation, "site", site)
            valid = valid and holder.not_before <= now <= holder.not_after
            valid = valid and signed_by(certificate, statement, signature)
        except (ValueError, TypeError, AssertionError, FederationError):
            return "other"
        if not valid:
            return "other"
        return "revoked" if self._is_revoked(holder) else ""

    def verify(self, site: str, statement: bytes, signature: bytes, certificate: bytes) -> None:
        """Check that a site of this federation has signed a statement.

        Args:
            site: Name of the site.
            statement: What should have been signed.
            signature: The signature.
            certificate: The signer's `certificate`.

        Raises:
            PermissionDeniedError: If it has not, or its certificate was revoked.
        """
        match self.fault(site, statement, signature, certificate):
            case "revoked":
                raise PermissionDeniedError(
                    f"the keys of {site} are signed with a certificate that was revoked",
                    where=self.site,
                    fix=f"{site} needs a new certificate; the server should not have let it take part: ask who runs it",
                )
            case "other":
                raise PermissionDeniedError(
                    f"the keys of {site} are not signed by that site",
                    where=self.site,
                    fix="the server, or someone on the way to it, may be trying to read what is sent: ask who runs it",
                )

    def _is_revoked(self, certificate: Certificate) -> bool:
        known = known_roots(self._folder)
        if certificate in RevocationList(self._folder / CRL, known.roots):
            return True
        return OutsideLists(self._folder / OUTSIDE_LISTS, lambda: known.outside).revokes(certificate)
