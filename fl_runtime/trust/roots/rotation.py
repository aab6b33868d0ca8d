"""Rotation: the authority changes to a new root without stopping the federation.

1. `begin`: the authority makes a new root and certifies it with the old one. Everybody gets a certificate under the new
   root, for the key that it has. A statement signed by the old root says that both roots are trusted.
2. The participants take that up through the server, each in its kit (`take_up`), and call with their new certificates.
   The server keeps its old certificate, so that those who have not heard of the new root can still reach it.
3. `finish`: a statement signed by the new root says that it alone is trusted. The server gets its new certificate, and
   the old root's key is deleted.

Each step may be killed at any time: doing it again goes on where it stopped.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fl_runtime.errors import ConfigError
from fl_runtime.trust.authority import Authority
from fl_runtime.trust.certificates import (
    Certificate,
    PublicKey,
    authority_fingerprint,
    is_issued_by,
    key_pem,
    load,
    pem_list,
)
from fl_runtime.trust.files import read_file, write_file
from fl_runtime.trust.passphrase import NEXT
from fl_runtime.trust.roots.root import Root
from fl_runtime.trust.roots.staging import locked, replace_together
from fl_runtime.trust.roots.statements import FROM_AUTHORITY, Statement, read_statements

PACKAGE = "roots.json"
"""File in the authority's folder with what participants need: all statements, and their certificates."""

_BUILDING = "next.building"


def begin(authority: Authority) -> Authority:
    """Begin a rotation, or complete the beginning of one.

    Args:
        authority: The authority.

    Returns:
        The authority as it is now, with two trusted roots.

    Raises:
        ConfigError: If a key cannot be opened.
        StoreError: If a file cannot be written.
    """
    folder = authority.folder
    with locked(folder):
        if not authority.is_rotating:
            _make_root(authority)
            authority = authority.reopened()
        _issue_missing(authority)
        statements = past_statements(folder)
        roots = [each.decode() for each in pem_list(authority.roots)]
        if not statements or list(statements[-1].roots) != roots:
            old, new = authority.oldest_root, authority.newest_root
            crossed = [old.cross_sign(new).decode(), new.cross_sign(old).decode()]
            crl = authority.make_list(old).decode()
            number = statements[-1].number + 1 if statements else 1
            statement = Statement.make(old.key, authority.project.federation, number, roots, crossed, crl)
            statements = (*statements, statement)
        _write_package(authority, statements)
    return authority


def finish(authority: Authority) -> Authority:
    """End a rotation: from now on, the new root alone counts, and the old one's key is deleted.

    Args:
        authority: The authority.

    Returns:
        The authority as it is now, with one trusted root.

    Raises:
        ConfigError: If no rotation has begun, or its beginning was not completed.
        StoreError: If a file cannot be written.
    """
    folder = authority.folder
    statements = past_statements(folder)
    if not authority.is_rotating:
        raise ConfigError(
            "no rotation has begun", where=str(folder), fix="begin one with `fl-adapters authority rotate`"
        )
    if not statements or list(statements[-1].roots) != [each.decode() for each in pem_list(authority.roots)]:
        raise ConfigError(
            "the rotation has not been handed out", where=str(folder), fix="run `fl-adapters authority rotate` again"
        )
    with locked(folder):
        _issue_missing(authority)
        new, old = authority.newest_root, authority.oldest_root
        crl = authority.make_list(new)
        statement = Statement.make(
            new.key, authority.project.federation, statements[-1].number + 1, [new.pem.decode()], [], crl.decode()
        )
        files: dict[str, bytes | None] = {
            PACKAGE: _package(authority, (*statements, statement)),
            f"retired/{authority_fingerprint(old.pem)[:16]}.pem": old.pem,
            "crl.pem": crl,
            "ca.key": read_file(folder / NEXT / "ca.key", "new root's private key"),
            "ca.pem": new.pem,
            f"{NEXT}/ca.key": None,
            f"{NEXT}/ca.pem": None,
        }
        replace_together(folder, files, secret={"ca.key"})
        (folder / NEXT).rmdir()
    return authority.reopened()


def not_heard(authority: Authority, taken_up: Mapping[str, int]) -> list[str]:
    """Return who has a certificate that counts and has not taken up the newest statement, without the server.

    Args:
        authority: The authority.
        taken_up: Participant -> number of the newest statement with which it has called.

    Returns:
        Their names, in the order of the project.
    """
    statements = past_statements(authority.folder)
    number = statements[-1].number if statements else 0
    holders = {item.identity.name for root in pem_list(authority.roots) for item in under_root(authority, root)}
    holders |= authority.project.outside_holders()
    names = [identity.name for identity in authority.project.participants() if identity.kind != "server"]
    return [name for name in names if name in holders and taken_up.get(name, 0) < number]


def past_statements(authority_folder: Path) -> tuple[Statement, ...]:
    """Return all statements that an authority has made, oldest first.

    Args:
        authority_folder: The authority's folder.

    Raises:
        ConfigError: If the file with them cannot be read.
    """
    path = authority_folder / PACKAGE
    return read_statements(read_package(path)["statements"]) if path.exists() else ()


def read_package(path: Path) -> dict[str, Any]:
    """Read a package of an authority, without checking signatures.

    Args:
        path: The file, `roots.json`.

    Returns:
        `statements`: their JSON values, and `certificates`: name -> certificates as PEM.

    Raises:
        ConfigError: If it cannot be read or is not a package.
    """
    try:
        return checked_package(json.loads(read_file(path, "statement about roots")))
    except (ValueError, RecursionError):
        raise ConfigError("this is not JSON", where=str(path), fix=FROM_AUTHORITY) from None


def checked_package(fields: Any) -> dict[str, Any]:
    """Return the fields of a package. Raises ConfigError if they do not have the form of one."""
    try:
        statements, certificates = fields["statements"], fields["certificates"]
        texts = [pem for pems in certificates.values() for pem in pems]
        if not all(isinstance(each, str) for each in (*certificates, *texts)):
            raise TypeError
    except (KeyError, TypeError, AttributeError):
        raise ConfigError("this is not what an authority hands out about its roots", fix=FROM_AUTHORITY) from None
    read_statements(statements)
    return {"statements": statements, "certificates": certificates}


def under_root(authority: Authority, root: Root | bytes) -> Iterator[Certificate]:
    """Yield the certificates that count and were issued directly by a root, oldest first.

    Args:
        authority: The authority.
        root: The root, or its certificate as PEM.
    """
    pem = root.pem if isinstance(root, Root) else root
    revoked, now = authority.revoked(), datetime.now(UTC)
    for item in authority.issued():
        if item.serial not in revoked and item.not_after > now and is_issued_by(item.pem, pem):
            yield item


def _make_root(authority: Authority) -> None:
    """Make the new root's folder, in one step."""
    building = authority.folder / _BUILDING
    shutil.rmtree(building, ignore_errors=True)  # of a process that was killed
    number = len(list((authority.folder / "retired").glob("*.pem"))) + 2
    root = Root.make(authority.project, str(number))
    authority.sign(b"")  # asks for the passphrase before anything is written
    write_file(building / "ca.key", key_pem(root.key, authority.passphrase), secret=True)
    write_file(building / "ca.pem", root.pem)
    os.replace(building, authority.folder / NEXT)


def _issue_missing(authority: Authority) -> None:
    """Issue a certificate under the new root for every key whose certificate under the old root counts."""
    names = {identity.name: identity for identity in authority.project.participants()}
    done = {(item.identity, item.fingerprint) for item in under_root(authority, authority.pem)}
    for item in under_root(authority, authority.oldest_root):
        identity = names.get(item.identity.name)
        if identity is None or (identity, item.fingerprint) in done:
            continue
        key = load(item.pem).public_key()
        assert isinstance(key, PublicKey)
        authority.issue(identity, key, root=authority.newest_root)
        done.add((identity, item.fingerprint))


def _package(authority: Authority, statements: tuple[Statement, ...]) -> bytes:
    certificates: dict[str, list[str]] = {}
    for root in pem_list(authority.roots):
        for item in under_root(authority, root):
            certificates.setdefault(item.identity.name, []).append(item.pem.decode())
    fields = {"statements": [each.to_json() for each in statements], "certificates": certificates}
    return json.dumps(fields, indent=1).encode()


def _write_package(authority: Authority, statements: tuple[Statement, ...]) -> None:
    data, path = _package(authority, statements), authority.folder / PACKAGE
    if not path.exists() or path.read_bytes() != data:
        write_file(path, data)
