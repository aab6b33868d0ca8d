"""Lists of revoked certificates: X.509 CRLs that the authority signs, as the server, sites and admins keep them."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509

from fl_runtime.errors import ConfigError
from fl_runtime.trust.certificates import Certificate, load_all
from fl_runtime.trust.files import read_file, write_file

_NEWEST = "crl.number"  # beside the list: number of the newest list that was ever in force


@dataclass(frozen=True)
class SignedList:
    """A revocation list whose signature was verified.

    Attributes:
        number: Its number; newer lists have higher ones.
        serials: Serial numbers of the revoked certificates of the federation's own authority.
        outside: Issuer's name and serial number of each revoked certificate of an outside authority.
        signed: When it was signed, in UTC.
        ends: Until when it counts (`nextUpdate`), in UTC.
        pem: The list itself.
    """

    number: int
    serials: frozenset[int]
    outside: frozenset[tuple[str, int]]
    signed: datetime
    ends: datetime
    pem: bytes

    @property
    def has_ended(self) -> bool:
        """Whether it does not count any more."""
        return datetime.now(UTC) > self.ends

    @property
    def ends_soon(self) -> bool:
        """Whether less than a quarter of its lifetime is left."""
        return self.ends - datetime.now(UTC) < (self.ends - self.signed) / 4


def read_list(pem: bytes, roots: bytes, where: str) -> SignedList:
    """Read a revocation list and verify its signature.

    Args:
        pem: The list.
        roots: The roots as PEM, one of which should have signed it.
        where: Its file or sender, for the error message.

    Returns:
        The list.

    Raises:
        ConfigError: If it is not a list signed by one of them, or has no number or no end.
    """
    try:
        crl = x509.load_pem_x509_crl(pem)
        valid = any(crl.is_signature_valid(root.public_key()) for root in load_all(roots))  # type: ignore[arg-type]
        number = crl.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number
        ends = crl.next_update_utc
    except (ValueError, TypeError, x509.ExtensionNotFound):
        valid, ends = False, None
    if not valid or ends is None:
        raise ConfigError(
            "this is not a revocation list signed by this federation's authority",
            where=where,
            fix="use the crl.pem in the authority's folder",
        )
    entries = [(_issuer_in(entry), entry.serial_number) for entry in crl]
    serials = frozenset(serial for issuer, serial in entries if not issuer)
    outside = frozenset(entry for entry in entries if entry[0])
    return SignedList(number, serials, outside, crl.last_update_utc, ends, pem)


def _issuer_in(entry: x509.RevokedCertificate) -> str:
    """The outside authority whose certificate an entry revokes; "" if it is one of the federation's own."""
    try:
        names = entry.extensions.get_extension_for_class(x509.CertificateIssuer).value
    except x509.ExtensionNotFound:
        return ""
    return next(iter(names.get_values_for_type(x509.DirectoryName))).rfc4514_string()


class RevocationList:
    """The revocation list in the file of a kit. Threads may share it.

    `certificate in revocation_list` tells whether it is revoked. A file that is replaced while a process runs takes
    effect with the next `refresh`. Older lists are refused: the highest number so far is kept in a file beside it.

    Args:
        path: The list as PEM.
        roots: The roots as PEM, one of which signs the list; or a function that returns them.
        required: Whether a missing list is an error. If not, and there never was one, nothing is revoked.

    Raises:
        ConfigError: If the file is not a list signed by the authority, is older than one before, or is missing although
            it is required or was there before.
    """

    def __init__(self, path: Path, roots: bytes | Callable[[], bytes], *, required: bool = False) -> None:
        self._path, self._roots = path, roots
        self._lock = threading.Lock()
        self._stamp: tuple[int, int, int] | None = None
        self._current: SignedList | None = None
        self._newest = self._read_newest()
        self.refresh()
        if self._current is None and (required or self._newest >= 0):
            raise ConfigError("the revocation list is missing", where=str(path), fix=_NEWEST_LIST)

    def __contains__(self, certificate: Certificate) -> bool:
        if self._current is None:
            return False
        if certificate.issuer:
            return (certificate.issuer, certificate.serial) in self._current.outside
        return certificate.serial in self._current.serials

    @property
    def current(self) -> SignedList | None:
        """The list in force; None if there never was one."""
        return self._current

    @property
    def serials(self) -> frozenset[int]:
        """Serial numbers of the revoked certificates of the federation's own authority."""
        return frozenset() if self._current is None else self._current.serials

    def install(self, pem: bytes, where: str = "the list that was sent") -> frozenset[int]:
        """Put a newer list in force and write it to the file. The one in force may be installed again.

        Args:
            pem: The list.
            where: Who sent it, for the error message.

        Returns:
            Serial numbers that the list adds.

        Raises:
            ConfigError: If the authority did not sign it, or it is older than the one in force.
            StoreError: If the file cannot be written.
        """
        with self._lock:
            signed = self._checked(pem, where)
            added = signed.serials - self.serials
            write_file(self._path, pem)
            self._take(signed)
            self._stamp = self._stat()
            return added

    def refresh(self) -> frozenset[int]:
        """Read the file again if it has changed.

        Returns:
            Serial numbers that the list adds.

        Raises:
            ConfigError: If the authority did not sign it, or it is older than the one in force. It is raised once for
                each change of the file; the list in force stays in force.
        """
        with self._lock:
            stamp, before = self._stat(), self._stamp
            if stamp == before:
                return frozenset()
            self._stamp = stamp
            if stamp is None:
                raise ConfigError("the revocation list is missing", where=str(self._path), fix=_NEWEST_LIST)
            signed = self._checked(read_file(self._path, "revocation list"), str(self._path))
            added = signed.serials - self.serials
            self._take(signed)
            return added

    def _checked(self, pem: bytes, where: str) -> SignedList:
        signed = read_list(pem, self._roots if isinstance(self._roots, bytes) else self._roots(), where)
        self._newest = max(self._newest, self._read_newest())  # another process may have installed one
        missing = self._current and not (signed.serials >= self.serials and signed.outside >= self._current.outside)
        if signed.number < self._newest or missing:
            raise ConfigError(
                f"this revocation list (number {signed.number}) is older than the one in force (number {self._newest})",
                where=where,
                fix=_NEWEST_LIST,
            )
        return signed

    def _take(self, signed: SignedList) -> None:
        self._current = signed
        if signed.number > self._newest:
            self._newest = signed.number
            write_file(self._newest_file, json.dumps({"number": str(signed.number)}).encode())

    @property
    def _newest_file(self) -> Path:
        return self._path.with_name(_NEWEST)

    def _read_newest(self) -> int:
        try:
            return int(json.loads(self._newest_file.read_bytes())["number"])
        except FileNotFoundError:
            return -1
        except (OSError, ValueError, KeyError, TypeError):
            raise ConfigError(
                "the number of the newest revocation list cannot be read",
                where=str(self._newest_file),
                fix="copy the newest crl.pem from the authority's folder here, and delete this file",
            ) from None

    def _stat(self) -> tuple[int, int, int] | None:
        try:
            status = self._path.stat()
        except OSError:
            return None
        return status.st_mtime_ns, status.st_size, status.st_ino


_NEWEST_LIST = "copy the newest crl.pem from the authority's folder to that place"
