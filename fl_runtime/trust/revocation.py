"""The server's list of revoked certificates: an X.509 CRL, signed by the authority."""

from __future__ import annotations

import threading
from pathlib import Path

from cryptography import x509

from fl_runtime.errors import ConfigError
from fl_runtime.trust.certificates import load
from fl_runtime.trust.files import write_file


class RevocationList:
    """The revocation list in a file. Threads may share it.

    `serial in revocation_list` tells whether a certificate is revoked. A file that is replaced while the server runs
    takes effect with the next `refresh`. A list can only grow: older lists are refused.

    Args:
        path: The list as PEM; a missing file means that nothing is revoked.
        authority_pem: Certificate of the authority that signs the list.

    Raises:
        ConfigError: If the file is not a list signed by the authority.
    """

    def __init__(self, path: Path, authority_pem: bytes) -> None:
        self._path, self._authority = path, authority_pem
        self._lock = threading.Lock()
        self._stamp: tuple[int, int] | None = None
        self._number, self._serials = -1, frozenset[int]()
        self.refresh()

    def __contains__(self, serial: int) -> bool:
        return serial in self._serials

    @property
    def serials(self) -> frozenset[int]:
        """Serial numbers of the revoked certificates."""
        return self._serials

    def install(self, pem: bytes) -> frozenset[int]:
        """Put a newer list in force and write it to the file.

        Args:
            pem: The list.

        Returns:
            Serial numbers that the list adds.

        Raises:
            ConfigError: If the authority did not sign it, or it is older than the one in force.
            StoreError: If the file cannot be written.
        """
        with self._lock:
            added = self._take(pem, "the list that was sent")
            write_file(self._path, pem)
            self._stamp = self._stat()
            return added

    def refresh(self) -> frozenset[int]:
        """Read the file again if it has changed.

        Returns:
            Serial numbers that the list adds.

        Raises:
            ConfigError: If the authority did not sign it, or it is older than the one in force.
        """
        with self._lock:
            stamp = self._stat()
            if stamp is None or stamp == self._stamp:
                return frozenset()
            added = self._take(self._path.read_bytes(), str(self._path))
            self._stamp = stamp
            return added

    def _take(self, pem: bytes, where: str) -> frozenset[int]:
        authority = load(self._authority)
        try:
            crl = x509.load_pem_x509_crl(pem)
            valid = crl.is_signature_valid(authority.public_key())  # type: ignore[arg-type]
            number = crl.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number
        except (ValueError, TypeError, x509.ExtensionNotFound):
            valid, number = False, -1
        if not valid:
            raise ConfigError(
                "this is not a revocation list signed by this federation's authority",
                where=where,
                fix="use the crl.pem in the authority's folder",
            )
        serials = frozenset(entry.serial_number for entry in crl)
        if number < self._number or not serials >= self._serials:
            raise ConfigError(
                "this revocation list is older than the one in force",
                where=where,
                fix="use the newest crl.pem from the authority's folder",
            )
        added = serials - self._serials
        self._number, self._serials = number, serials
        return added

    def _stat(self) -> tuple[int, int] | None:
        try:
            status = self._path.stat()
        except OSError:
            return None
        return status.st_mtime_ns, status.st_size
