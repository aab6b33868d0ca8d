"""The server's list of certificates that no longer count: an X.509 CRL, signed by the authority."""

from __future__ import annotations

import threading
from pathlib import Path

from cryptography import x509

from fl_runtime.errors import ConfigError
from fl_runtime.trust.certificates import load
from fl_runtime.trust.files import write_file


class RevocationList:
    """The list in `path`, kept as `install` and the file say. Threads may share it.

    A file that is replaced while the server runs counts from the next `refresh` on.
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
        return self._serials

    def install(self, pem: bytes) -> frozenset[int]:
        """Take a newer list; the serials that it adds. ConfigError if it is not the authority's, or an older one."""
        with self._lock:
            added = self._take(pem, "the list that was sent")
            write_file(self._path, pem)
            self._stamp = self._stat()
            return added

    def refresh(self) -> frozenset[int]:
        """Read the file if it has changed; the serials that it adds. Raises ConfigError for one that is not good."""
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
            found = x509.load_pem_x509_crl(pem)
            good = found.is_signature_valid(authority.public_key())  # type: ignore[arg-type]
            number = found.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number
        except (ValueError, TypeError, x509.ExtensionNotFound):
            good, number = False, -1
        if not good:
            raise ConfigError(
                "this is no revocation list of this federation's authority",
                where=where,
                fix="use the crl.pem in the authority's folder",
            )
        serials = frozenset(entry.serial_number for entry in found)
        if number < self._number or not serials >= self._serials:
            raise ConfigError(
                "this revocation list is older than the one in force", where=where, fix="use the authority's newest"
            )
        added = serials - self._serials
        self._number, self._serials = number, serials
        return added

    def _stat(self) -> tuple[int, int] | None:
        try:
            found = self._path.stat()
        except OSError:
            return None
        return found.st_mtime_ns, found.st_size
