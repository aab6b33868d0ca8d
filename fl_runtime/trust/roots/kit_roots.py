"""The roots that a kit trusts, and how it takes up new ones.

A kit that has taken up statements holds two more files: origin.pem, the roots under which the kit's manifest was
signed, and roots.json, the statements since then. They lead from origin.pem to the roots in ca.pem.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fl_runtime.errors import ConfigError, FederationError
from fl_runtime.trust.certificates import (
    Certificate,
    authority_fingerprint,
    fingerprint,
    is_issued_by,
    pem_list,
    read_certificate,
    read_key,
)
from fl_runtime.trust.files import read_file
from fl_runtime.trust.identity import Identity
from fl_runtime.trust.revocation import read_list
from fl_runtime.trust.roots.outside import NO_OUTSIDE, OUTSIDE, Holders, Outside, read_outside
from fl_runtime.trust.roots.staging import locked, replace_together
from fl_runtime.trust.roots.statements import Statement, follow, read_statements

ORIGIN, STATEMENTS = "origin.pem", "roots.json"
_CA, _CERTIFICATE, _KEY, _CRL = "ca.pem", "certificate.pem", "key.pem", "crl.pem"


@dataclass(frozen=True)
class KitRoots:
    """The roots that a kit trusts now, and how they came about.

    Attributes:
        origin: The roots under which the kit's manifest was signed, as PEM.
        first: Number of the newest statement when the kit was made.
        statements: The statements that it has taken up since.
        roots: The roots that it trusts now, as PEM, the newest first.
        number: Number of the newest statement that it knows.
        outside: The outside authorities, which count beside the roots.
    """

    origin: bytes
    first: int
    statements: tuple[Statement, ...]
    roots: bytes
    number: int
    outside: Outside = NO_OUTSIDE

    @property
    def holders(self) -> Holders:
        """Tells who holds a certificate."""
        return Holders(self.roots, self.outside)

    @property
    def crossed(self) -> tuple[str, ...]:
        """Certificates of the newest root's key by the one before, as PEM; empty if the kit has taken up none."""
        return tuple(pem for statement in self.statements for pem in statement.crossed)


def read_roots(folder: Path, federation: str, first: int) -> KitRoots:
    """Read the roots of a kit, and check that signed statements lead to them.

    Args:
        folder: The kit's folder.
        federation: Name of the federation.
        first: Number of the newest statement when the kit was made, as the signed kit.json says.

    Returns:
        The roots.

    Raises:
        ConfigError: If they do not.
    """
    roots = read_file(folder / _CA, "authority's certificate")
    if not (folder / ORIGIN).exists():
        return KitRoots(roots, first, (), roots, first, _read_outside(folder, federation, roots, ()))
    origin = read_file(folder / ORIGIN, "authority's first certificate")
    path = folder / STATEMENTS
    try:
        statements = read_statements(json.loads(read_file(path, "statements about roots"))["statements"])
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ConfigError("the statements about roots cannot be read", where=str(path), fix=_NEW_KIT) from None
    found, number = follow(origin, first, federation, statements)
    if found != roots:
        raise ConfigError(f"{_CA} is not what the authority has stated", where=str(folder / _CA), fix=_NEW_KIT)
    return KitRoots(origin, first, statements, roots, number, _read_outside(folder, federation, origin, statements))


def _read_outside(folder: Path, federation: str, origin: bytes, statements: tuple[Statement, ...]) -> Outside:
    path = folder / OUTSIDE
    if not path.exists():
        return NO_OUTSIDE
    return checked_outside(path.read_bytes(), federation, origin, statements, str(path))


def checked_outside(
    data: bytes, federation: str, origin: bytes, statements: tuple[Statement, ...], where: str
) -> Outside:
    """Read outside authorities that a root of the federation must have signed, the present one or an earlier one.

    Nobody can send them to a kit: they come with it, or its owner installs them.

    Args:
        data: The contents of outside.json.
        federation: Name of the federation.
        origin: The roots under which the kit's manifest was signed, as PEM.
        statements: The statements about roots that the kit has taken up since.
        where: The file, for the error message.

    Returns:
        The outside authorities.

    Raises:
        ConfigError: If none of the roots signed them.
    """
    roots = [*pem_list(origin), *(root.encode() for statement in statements for root in statement.roots)]
    return read_outside(data, federation, roots, where)


_NEW_KIT = "get a new startup kit; only policy.yml is meant to be edited"


def take_up(folder: Path, identity: Identity, first: int, offer: Mapping[str, Any]) -> int | None:
    """Take up the roots that an authority has stated, and the certificate that it has issued under them.

    Everything is verified from the roots that the kit trusts, so it does not matter who passes it on. The kit's files
    change together. Running processes that use the kit load them by themselves.

    Args:
        folder: The kit's folder.
        identity: Who its participant is, as the signed kit.json says.
        first: Number of the newest statement when the kit was made, as the signed kit.json says.
        offer: `statements` and `certificates`, as `offered` returns them.

    Returns:
        Number of the newest statement, or None if there was nothing new.

    Raises:
        ConfigError: If a statement is not signed by a root that the kit trusts.
        StoreError: If the kit cannot be written.
    """
    with locked(folder):
        known = read_roots(folder, identity.federation, first)
        newer = [each for each in read_statements(offer.get("statements")) if each.number > known.number]
        roots, number = follow(known.roots, known.number, identity.federation, newer)
        files: dict[str, bytes | None] = {}
        if newer:
            stated = {"statements": [each.to_json() for each in (*known.statements, *newer)]}
            files |= {ORIGIN: known.origin, STATEMENTS: json.dumps(stated, indent=1).encode(), _CA: roots}
            crl = folder / _CRL
            if crl.exists() and not _is_list_of(crl.read_bytes(), roots):
                files[_CRL] = newer[-1].crl.encode()
        chosen = _choose(folder, identity, roots, offer.get("certificates") or ())
        if chosen is not None and chosen != (folder / _CERTIFICATE).read_bytes():
            files[_CERTIFICATE] = chosen
        if not files:
            return None
        replace_together(folder, files)
        return number


def _choose(folder: Path, identity: Identity, roots: bytes, offered: Any) -> bytes | None:
    """Return the certificate that the kit should have, or None if it has none that counts.

    It is one of the newest root. A server keeps that of the oldest one, for sites that know no other.
    """
    if not (folder / _KEY).exists() or not (folder / _CERTIFICATE).exists():
        return None
    own = fingerprint(read_key(read_file(folder / _KEY, "private key"), str(folder / _KEY)).public_key())
    present = (folder / _CERTIFICATE).read_bytes()
    texts = [each.encode() for each in offered if isinstance(each, str)]
    candidates = [item for pem in (present, *texts) if (item := _usable(pem, identity, own)) is not None]
    order = pem_list(roots)
    for root in reversed(order) if identity.kind == "server" else order:
        under = [item for item in candidates if is_issued_by(item.pem, root)]
        if under:
            return present if any(item.pem == present for item in under) else max(under, key=_end).pem
    return None


def _end(item: Certificate) -> datetime:
    return item.not_after


def _usable(pem: bytes, identity: Identity, own: str) -> Certificate | None:
    """Read a certificate. None if it has expired, or is not for this participant and key."""
    try:
        item = read_certificate(pem)
    except FederationError:
        return None
    fits = item.identity == identity and item.fingerprint == own and item.not_after > datetime.now(UTC)
    return item if fits else None


def _is_list_of(crl: bytes, roots: bytes) -> bool:
    try:
        read_list(crl, roots, "")
    except ConfigError:
        return False
    return True


def root_fingerprints(roots: bytes) -> list[str]:
    """Return the fingerprints of roots, in order."""
    return [authority_fingerprint(pem) for pem in pem_list(roots)]
