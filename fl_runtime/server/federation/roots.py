"""The roots that the server trusts and hands out, and who has taken them up."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fl_runtime.errors import ConfigError, FederationError
from fl_runtime.trust.certificates import is_issued_by, pem_list
from fl_runtime.trust.files import write_file
from fl_runtime.trust.kits import CA, StartupKit, known_roots, take_up_roots
from fl_runtime.trust.roots.kit_roots import root_fingerprints
from fl_runtime.trust.roots.outside import OUTSIDE, Holders
from fl_runtime.trust.roots.rotation import checked_package, read_package
from fl_runtime.trust.roots.statements import offered

log = logging.getLogger(__name__)

HANDED_OUT = "handed-out.json"
"""File in the server's kit with the authority's newest package, which the server hands out."""
_TAKEN_UP = "taken-up.json"


class RootsAtServer:
    """The roots in the server's kit. Threads may share it.

    Calling it returns the trusted roots as PEM. Files that are replaced while the server runs take effect by
    themselves, if they are valid.

    Args:
        kit: The server's startup kit.

    Raises:
        ConfigError: If a file cannot be read.
    """

    def __init__(self, kit: StartupKit) -> None:
        self._folder = kit.folder
        self._lock = threading.Lock()
        self._ca, self._handed_out = _Stamp(kit.folder / CA), _Stamp(kit.folder / HANDED_OUT)
        self._outside = _Stamp(kit.folder / OUTSIDE)
        self._outside.changed()
        self._known = known_roots(kit.folder)
        self._package: Mapping[str, Any] = {"statements": [], "certificates": {}}
        if self._handed_out.changed():
            self._package = read_package(kit.folder / HANDED_OUT)
        self._taken_up = _read_numbers(kit.folder / _TAKEN_UP)

    def __call__(self) -> bytes:
        return self._refreshed()[0]

    @property
    def number(self) -> int:
        """Number of the newest statement."""
        return self._refreshed()[1]

    @property
    def holders(self) -> Holders:
        """Tells who holds a certificate."""
        self._refreshed()
        return self._known.holders

    @property
    def fingerprints(self) -> list[str]:
        """Fingerprints of the trusted roots, the newest first."""
        return root_fingerprints(self())

    def install(self, fields: Mapping[str, Any]) -> None:
        """Take up what the authority has stated, and hand it out from now on. Doing it again is harmless.

        Args:
            fields: A package of the authority.

        Raises:
            ConfigError: If the statements are not signed by a root that this server trusts, or are old ones.
            StoreError: If the kit cannot be written.
        """
        install_package(self._folder, fields)

    def offer(self, name: str, number: int, certificate: bytes) -> dict[str, Any] | None:
        """Return what a participant should take up, or None if there is nothing.

        Args:
            name: The participant.
            number: Number of the newest statement that it knows.
            certificate: The certificate with which it calls.
        """
        roots, _ = self._refreshed()
        with self._lock:
            found = offered(self._package, name, number)
        newest = pem_list(roots)[0]
        fresh = any(is_issued_by(each.encode(), newest) for each in found["certificates"])
        return found if found["statements"] or (fresh and not is_issued_by(certificate, newest)) else None

    def note(self, name: str, number: int, certificate: bytes) -> bool:
        """Note that a participant has taken up the newest root. Its certificate under that root is the proof.

        With a certificate of an outside authority, its word is enough.

        Args:
            name: The participant.
            number: Number of the newest statement that it knows.
            certificate: The certificate with which it calls.

        Returns:
            Whether that is news.
        """
        roots, newest = self._refreshed()
        if number != newest or not (
            is_issued_by(certificate, pem_list(roots)[0]) or self._known.outside.issuer_of(certificate)
        ):
            return False
        with self._lock:
            if self._taken_up.get(name, 0) >= number:
                return False
            self._taken_up[name] = number
            write_file(self._folder / _TAKEN_UP, json.dumps(self._taken_up).encode())
            return True

    def standing(self) -> dict[str, Any]:
        """Return as JSON values: number of the newest statement, fingerprints, and participant -> number taken up."""
        with self._lock:
            taken_up = dict(self._taken_up)
        return {"number": self.number, "roots": self.fingerprints, "taken_up": taken_up}

    def _refreshed(self) -> tuple[bytes, int]:
        """Return roots and number, after reading files again that have changed. What is not valid changes nothing."""
        with self._lock:
            try:
                changed = [stamp.changed() for stamp in (self._ca, self._outside)]
                if any(changed):
                    self._known = known_roots(self._folder)
                if self._handed_out.changed():
                    self._package = read_package(self._folder / HANDED_OUT)
            except FederationError as error:
                log.warning("%s", error)
            return self._known.roots, self._known.number


def install_package(folder: Path, fields: Any) -> int | None:
    """Take up a package of the authority in the kit of a server, which hands it out from then on.

    Args:
        folder: The kit's folder.
        fields: The package.

    Returns:
        Number of the newest statement, or None if there was nothing new.

    Raises:
        ConfigError: If the statements are not signed by a root that this server trusts, or are old ones.
        StoreError: If the kit cannot be written.
    """
    package, known = checked_package(fields), known_roots(folder).number
    newest = max((json.loads(each["text"])["number"] for each in package["statements"]), default=0)
    if newest < known:
        raise ConfigError(
            f"this is an older statement about roots (number {newest}) than the server's (number {known})",
            fix="use the newest roots.json of the authority; if its folder is a copy, use the original",
        )
    number = take_up_roots(folder, {**package, "certificates": _all(package)})
    write_file(folder / HANDED_OUT, json.dumps(package).encode())
    return number


def _all(package: Mapping[str, Any]) -> list[str]:
    """Return the certificates of all participants; a kit chooses its own among them."""
    return [pem for pems in package["certificates"].values() for pem in pems]


class _Stamp:
    """Tells whether a file has been replaced. One that is missing does not count as replaced."""

    def __init__(self, path: Path) -> None:
        self._path, self._stamp = path, (0, 0)

    def changed(self) -> bool:
        """Whether it was replaced since the last call."""
        try:
            status = self._path.stat()
        except OSError:
            return False
        before, self._stamp = self._stamp, (status.st_mtime_ns, status.st_ino)
        return before != self._stamp


def _read_numbers(path: Path) -> dict[str, int]:
    try:
        found = json.loads(path.read_bytes())
        return {str(name): int(number) for name, number in found.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError, TypeError):
        raise ConfigError(
            "the list of who has taken up the newest root cannot be read",
            where=str(path),
            fix="delete it; those who call again are listed again",
        ) from None
