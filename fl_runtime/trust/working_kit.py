"""Kits that cannot be written, such as a mounted secret: what changes is kept in a folder of the participant's own.

That folder, the working kit, is used in place of the kit. It lies in the server's data folder, in the state folder of
a site daemon, or where `$FL_ADAPTERS_STATE` says. It holds:

    working.json            whose kit it is, and which kit it was made for
    kit.json, manifest.json, manifest.sig    copies
    ca.pem, origin.pem, roots.json           copies, or newer roots that were taken up, see roots/kit_roots.py
    certificate.pem, key.pem, crl.pem, members.json, outside.json   links to those in the kit until newer ones have come
    policy.yml, ckks.key, outside.crl.pem    links to those in the kit
    audit.jsonl, jobs, ...  what the participant writes

What has come counts until the kit has something newer: by the number that the authority has signed, or for certificates
by the begin of their validity. The marks of what was in force (`crl.number` and the like) lie here too, so that a kit
with older lists is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from fl_runtime.errors import ConfigError, FederationError, StoreError
from fl_runtime.trust.certificates import fingerprint, read_certificate, read_key, signed_by
from fl_runtime.trust.files import STATE_VARIABLE, check_unwritable, read_file, write_file
from fl_runtime.trust.identity import Identity
from fl_runtime.trust.project import MEMBERS, read_members
from fl_runtime.trust.revocation import read_list
from fl_runtime.trust.roots.kit_roots import ORIGIN, STATEMENTS, KitRoots, checked_outside, read_roots
from fl_runtime.trust.roots.outside import OUTSIDE
from fl_runtime.trust.roots.staging import locked, replace_together
from fl_runtime.trust.roots.statements import follow, read_statements

WORKING_KIT = ".kit"
"""Name of the working kit in a data or state folder."""

_MARK = "working.json"
_KIT_FILE, _MANIFEST, _CA, _CRL = "kit.json", "manifest.json", "ca.pem", "crl.pem"
_CERTIFICATE, _KEY, _FRESH_KEY = "certificate.pem", "key.pem", "key.new.pem"
_SIGNATURE = "manifest.sig"
_SIGNED = (_KIT_FILE, _MANIFEST, _SIGNATURE)
_ROOTS = (_CA, ORIGIN, STATEMENTS)
_LINKED = ("policy.yml", "ckks.key", "outside.crl.pem")
_NEW_KIT = "get a new startup kit"
_NEWEST_COUNTS = (_CERTIFICATE, _KEY, _CRL, MEMBERS, OUTSIDE)


def working_kit(kit: Path, state: Path | None = None) -> Path:
    """Return the folder in which a kit is used: the kit itself if it can be written, else its working kit.

    The working kit is made if it is missing, and takes up what is newer in the kit. A kit that has one in the named
    folder goes on with it, also if the kit can be written by now: the audit log is there.

    Args:
        kit: The kit's folder.
        state: Data or state folder of the participant. Default: `$FL_ADAPTERS_STATE`; without that, a server's data
            folder beside the kit, and for others a folder of the user's own.

    Returns:
        The folder to be used as the kit from now on.

    Raises:
        ConfigError: The state folder belongs to another participant, or somebody else can write to it.
        StoreError: The kit cannot be written, and the state folder cannot either.
    """
    if not (kit / _MANIFEST).exists() or (kit / _MARK).exists():
        return kit  # a simulation's kit, none at all (its reader reports that), or a working kit
    named = state or (Path(chosen) if (chosen := os.environ.get(STATE_VARIABLE)) else None)
    can_be_written = _can_be_written(kit)
    if can_be_written and named is None:
        return kit
    identity, _ = _read(kit)
    folder = ((named or _default_state(kit, identity)) / WORKING_KIT).absolute()
    if can_be_written and _owner_of(folder) != identity:
        return kit
    _make(folder, kit)
    with locked(folder):
        _check_owner(folder, identity)
        try:
            _WorkingKit(kit.absolute(), folder, identity).renew()
        except OSError as error:
            raise StoreError(
                f"the state of this kit cannot be kept: {error.strerror}", where=str(folder), fix="check the disk"
            ) from None
    return folder


def _can_be_written(kit: Path) -> bool:
    return os.access(kit, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids)


def _read(kit: Path) -> tuple[Identity, int]:
    """Return whose kit it is, and the number of the newest statement about roots when it was made."""
    try:
        fields = json.loads(read_file(kit / _KIT_FILE, "startup kit"))
        return Identity.from_uri(fields["identity"]), int(fields.get("roots", 0))
    except (ValueError, KeyError, TypeError):
        raise ConfigError("the startup kit cannot be read", where=str(kit / _KIT_FILE), fix=_NEW_KIT) from None


def _default_state(kit: Path, identity: Identity) -> Path:
    if identity.kind == "server":
        return kit.resolve().with_name(f"{kit.resolve().name}-data")
    home = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    return home / "fl-adapters" / identity.federation / f"{identity.kind}-{identity.name}"


def _make(folder: Path, kit: Path) -> None:
    try:
        for place in (folder.parent, folder):
            place.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise StoreError(
            f"this kit cannot be written, and its state cannot be kept in {folder.parent}: {error.strerror}",
            where=str(kit),
            fix=f"name a folder for it: --data of a server, --state of a site daemon, or ${STATE_VARIABLE}",
        ) from None
    check_unwritable(folder)


def _mark(folder: Path) -> Mapping[str, Any]:
    """What is noted of a working kit; empty if it was not finished."""
    try:
        fields = json.loads((folder / _MARK).read_bytes())
    except (OSError, ValueError):
        return {}
    return fields if isinstance(fields, dict) else {}


def _owner_of(folder: Path) -> Identity | None:
    with suppress(FederationError):
        return Identity.from_uri(str(_mark(folder).get("identity", "")))
    return None


def _check_owner(folder: Path, identity: Identity) -> None:
    owner = _owner_of(folder)
    if owner is not None and owner != identity:
        raise ConfigError(
            f"this folder keeps the state of {owner} in {owner.federation}; the kit is that of {identity} in "
            f"{identity.federation}",
            where=str(folder.parent),
            fix=f"give each kit a folder of its own with --data, --state or ${STATE_VARIABLE}",
        )


class _WorkingKit:
    """A working kit whose folder is locked."""

    def __init__(self, kit: Path, folder: Path, identity: Identity) -> None:
        self._kit, self._folder, self._identity = kit, folder, identity

    def renew(self) -> None:
        """Take up what is new in the kit."""
        made_for, given = _mark(self._folder).get("kit"), self._digest()
        if made_for is None:
            self._take_along()
        if made_for != given:
            self._take_signed_files()
        roots = self._roots(self._folder)
        for name in _LINKED:
            self._link(name)
        self._choose_certificate()
        self._choose(_CRL, lambda data: read_list(data, roots.roots, "").number)
        self._choose(MEMBERS, lambda data: read_members(data, self._identity.federation, "", roots.roots).number)
        self._choose(OUTSIDE, lambda data: self._outside_number(data, roots))
        if made_for != given:
            mark = {"identity": self._identity.uri, "kit": given}
            write_file(self._folder / _MARK, json.dumps(mark).encode())

    def _digest(self) -> str:
        """Digest of what the authority has signed in the kit."""
        parts = [path.read_bytes() if path.exists() else b"" for path in map(self._kit.joinpath, (*_SIGNED, *_ROOTS))]
        return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()

    def _take_along(self) -> None:
        """Copy what was written into the kit while it could be written: its log, marks and requests."""
        known = {*_SIGNED, *_ROOTS, *_LINKED, *_NEWEST_COUNTS, "lock"}
        for path in sorted(self._kit.iterdir()):
            if path.name not in known and not path.name.startswith(".") and path.is_file():
                write_file(self._folder / path.name, path.read_bytes(), secret=True)

    def _take_signed_files(self) -> None:
        """Copy what the authority has signed. Roots that were taken up here and are newer come after the kit's."""
        given, signature = self._roots(self._kit), read_file(self._kit / _SIGNATURE, "manifest's signature")
        if not signed_by(given.origin, read_file(self._kit / _MANIFEST, "manifest"), signature):
            raise ConfigError("the manifest's signature is not valid", where=str(self._kit / _MANIFEST), fix=_NEW_KIT)
        newer = [each for each in self._taken_up() if each.number > given.number]
        roots, _ = follow(given.roots, given.number, self._identity.federation, newer)
        files: dict[str, bytes | None] = {name: read_file(self._kit / name, "file of the kit") for name in _SIGNED}
        files |= {_CA: roots, ORIGIN: None, STATEMENTS: None}
        if statements := [each.to_json() for each in (*given.statements, *newer)]:
            files |= {ORIGIN: given.origin, STATEMENTS: json.dumps({"statements": statements}, indent=1).encode()}
        replace_together(self._folder, files)

    def _roots(self, folder: Path) -> KitRoots:
        return read_roots(folder, self._identity.federation, _read(folder)[1])

    def _taken_up(self) -> Any:
        path = self._folder / STATEMENTS
        return read_statements(json.loads(path.read_bytes())["statements"]) if path.exists() else ()

    def _outside_number(self, data: bytes, roots: KitRoots) -> int:
        return checked_outside(data, self._identity.federation, roots.origin, roots.statements, "").number

    def _choose_certificate(self) -> None:
        """Use the certificate that was renewed here with its key, unless that of the kit is newer."""
        own, given = self._folder / _CERTIFICATE, self._kit / _CERTIFICATE
        keeps = not own.is_symlink() and own.exists() and self._has_key(own) and not _is_newer(given, own)
        for name in () if keeps else (_CERTIFICATE, _KEY):
            self._link(name, replace=True)
        self._link(_KEY)

    def _has_key(self, certificate: Path) -> bool:
        wanted = read_certificate(certificate.read_bytes()).fingerprint
        keys = [path for path in map(self._folder.joinpath, (_KEY, _FRESH_KEY)) if path.exists()]
        return any(fingerprint(read_key(path.read_bytes(), str(path)).public_key()) == wanted for path in keys)

    def _choose(self, name: str, number_of: Callable[[bytes], int]) -> None:
        """Use the list that has come, unless that of the kit has a higher number."""
        own, given = self._folder / name, self._kit / name
        if own.is_symlink() or not own.exists():
            self._link(name, replace=True)
            return
        with suppress(FederationError, OSError):
            if number_of(given.read_bytes()) > _number(own, number_of):
                self._link(name, replace=True)

    def _link(self, name: str, *, replace: bool = False) -> None:
        """Make a link to a file of the kit, if it has one; in place of a file of one's own only with `replace`."""
        link, file = self._folder / name, self._kit / name
        if link.is_symlink() and not file.exists():
            link.unlink()
        is_there = link.is_symlink() or link.exists()
        if not file.exists() or (is_there and not link.is_symlink() and not replace):
            return
        if link.is_symlink() and os.readlink(link) == str(file):
            return
        fresh = self._folder / f".{name}.link"
        fresh.unlink(missing_ok=True)
        fresh.symlink_to(file)
        os.replace(fresh, link)


def _is_newer(certificate: Path, other: Path) -> bool:
    """Whether a certificate was issued after another one. One that is not there, or cannot be read, was not."""
    try:
        first, second = (read_certificate(path.read_bytes()).not_before for path in (certificate, other))
    except (FederationError, OSError):
        return False
    return first > second


def _number(path: Path, number_of: Callable[[bytes], int]) -> int:
    try:
        return number_of(path.read_bytes())
    except FederationError:
        return -1
