"""Revocation lists of outside authorities, as somebody copies them into a kit, for example once an hour."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509

from fl_runtime.errors import ConfigError
from fl_runtime.trust.certificates import Certificate, load_all
from fl_runtime.trust.files import read_file
from fl_runtime.trust.roots.outside import Outside, OutsideAuthority

OUTSIDE_LISTS = "outside.crl.pem"
"""File in a kit with the lists, one after the other."""

_LIST = re.compile(rb"-----BEGIN X509 CRL-----.+?-----END X509 CRL-----", re.DOTALL)


@dataclass(frozen=True)
class _List:
    """A list whose signature was verified."""

    signed: datetime
    ends: datetime | None
    serials: frozenset[int]


class OutsideLists:
    """The revocation lists of outside authorities in the file of a kit. Threads may share it.

    Each list counts for the certificates of its issuer alone. An issuer without a list has revoked nothing.

    Args:
        path: The file, which may be missing.
        outside: Returns the outside authorities.

    Raises:
        ConfigError: If the file holds what is not a list of one of them.
    """

    def __init__(self, path: Path, outside: Callable[[], Outside]) -> None:
        self._path, self._outside = path, outside
        self._stamp: tuple[int, int, int] | None = None
        self._lists: dict[tuple[bytes, str], _List] = {}  # certificates of the authority, and the issuer's name
        self.refresh()

    def refresh(self) -> bool:
        """Read the file again if it has changed.

        Returns:
            Whether it had.

        Raises:
            ConfigError: If a list is not valid or older than the one in force, or the file is gone; once for each
                change of the file. The lists in force stay in force.
        """
        try:
            status = self._path.stat()
            stamp = status.st_mtime_ns, status.st_size, status.st_ino
        except OSError:
            stamp = None
        if stamp == self._stamp:
            return False
        self._stamp = stamp
        if stamp is None:
            raise ConfigError(
                "the revocation lists of outside authorities are missing",
                where=str(self._path),
                fix="copy them there again",
            )
        found = dict(self._read(pem) for pem in _LIST.findall(read_file(self._path, "revocation lists")))
        for key, each in found.items():
            if key in self._lists and each.signed < self._lists[key].signed:
                raise ConfigError(
                    f"the revocation list of {key[1]} is older than the one in force",
                    where=str(self._path),
                    fix="copy the newest list of that authority there",
                )
        self._lists = self._lists | found
        return True

    def revokes(self, certificate: Certificate) -> bool:
        """Whether the issuer of a certificate has revoked it."""
        each = self._list_for(certificate)
        return each is not None and certificate.serial in each.serials

    def end_for(self, certificate: Certificate) -> datetime | None:
        """Return when the list of a certificate's issuer ended, in UTC; None if it counts, or there is none."""
        each = self._list_for(certificate)
        return each.ends if each is not None and each.ends is not None and each.ends < datetime.now(UTC) else None

    def _list_for(self, certificate: Certificate) -> _List | None:
        authority = self._outside().issuer_of(certificate.pem) if certificate.issuer and self._lists else None
        return None if authority is None else self._lists.get((authority.pem, certificate.issuer))

    def _read(self, pem: bytes) -> tuple[tuple[bytes, str], _List]:
        try:
            crl = x509.load_pem_x509_crl(pem)
            authority = self._signer(crl)
            partial = any(isinstance(item.value, x509.DeltaCRLIndicator) for item in crl.extensions)
        except (ValueError, TypeError):
            authority, partial = None, False
        if authority is None or partial:
            raise ConfigError(
                "this is not a whole revocation list signed by an outside authority of this federation",
                where=str(self._path),
                fix="copy there, as PEM, the lists of the authorities that the project file names",
            )
        serials = frozenset(entry.serial_number for entry in crl)
        return (authority.pem, crl.issuer.rfc4514_string()), _List(crl.last_update_utc, crl.next_update_utc, serials)

    def _signer(self, crl: x509.CertificateRevocationList) -> OutsideAuthority | None:
        """The outside authority that signed a list, with its root or an intermediate authority."""
        for authority in self._outside().authorities:
            for each in load_all(authority.pem):
                if each.subject == crl.issuer and crl.is_signature_valid(each.public_key()):  # type: ignore[arg-type]
                    return authority
        return None
