"""Startup kits: a folder for each participant with all that it needs to take part.

kit/
    kit.json                who the participant is, and the server's address
    ca.pem                  the authority's certificate
    manifest.json, .sig     SHA-256 of the two files above, and the authority's signature of that
    certificate.pem         the participant's certificate; replaced when it is renewed
    key.pem                 its private key, mode 0600; `cert request` makes it here
    policy.yml              sites only: what may leave the site; the site edits it
    members.json            server only: the newest list of members, see project.py
    crl.pem                 the newest revocation list; newer ones come with the server's answers
    audit.jsonl, audit.head, log-counter.json   server and sites: the audit log, its signature, and the number of lines
    outside.json            outside authorities, if the project has any, signed by the federation's own
    outside.crl.pem         their revocation lists, which the kit's owner may put there
    origin.pem, roots.json  after a rotation of the authority, see roots/kit_roots.py
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fl_runtime.errors import ConfigError
from fl_runtime.trust.authority import Authority, signed_members
from fl_runtime.trust.certificates import (
    Certificate,
    PrivateKey,
    authority_fingerprint,
    fingerprint,
    key_pem,
    new_key,
    read_key,
    request,
    signed_by,
)
from fl_runtime.trust.files import check_private, check_unwritable, read_file, write_file
from fl_runtime.trust.identity import Identity
from fl_runtime.trust.policy import POLICY_FILE, TEMPLATE
from fl_runtime.trust.project import MEMBERS
from fl_runtime.trust.revocation import RevocationList
from fl_runtime.trust.roots.kit_roots import ORIGIN, KitRoots, checked_outside, read_roots, take_up
from fl_runtime.trust.roots.outside import OUTSIDE, Holders
from fl_runtime.trust.roots.rotation import past_statements
from fl_runtime.trust.roots.staging import read_settled
from fl_runtime.trust.working_kit import working_kit
from fl_runtime.types import PRODUCTION_PATIENCE_S
from fl_runtime.version import check_format, stamp

KIT_FORMAT = 1
KIT_FILE, CERTIFICATE, KEY, CA, CRL = "kit.json", "certificate.pem", "key.pem", "ca.pem", "crl.pem"
REQUEST, FRESH_KEY = "request.pem", "key.new.pem"


@dataclass(frozen=True)
class StartupKit:
    """A kit that has been read and verified.

    Attributes:
        folder: The folder in which it is used: the kit's, or that of its working kit.
        identity: Who its participant is.
        address: The server's address as sites reach it, "host:port"; in other kits that of the first server.
        addresses: Addresses of all servers that stand in for each other.
        listen: "host:port" that the server binds; empty in other kits.
        sites: Names of the federation's sites, in order.
        patience_s: Seconds for which it goes on without others, unless a job or the site says otherwise.
        certificate: The participant's certificate.
        authority: Fingerprint of the authority, see `authority_fingerprint`.
    """

    folder: Path
    identity: Identity
    address: str
    addresses: tuple[str, ...]
    listen: str
    sites: tuple[str, ...]
    patience_s: float
    certificate: Certificate
    authority: str

    @property
    def policy_file(self) -> Path:
        """Path of the site's policy."""
        return self.folder / POLICY_FILE


def write_kit(folder: Path, authority: Authority, identity: Identity, *, with_key: bool = True) -> None:
    """Write the kit of a participant.

    Args:
        folder: The kit's folder; created if missing.
        authority: The authority that signs it.
        identity: The participant.
        with_key: Whether to make its private key and certificate here. Otherwise the participant makes the key with
            `fl-adapters cert request`.

    Raises:
        StoreError: If a file cannot be written.
        ConfigError: If the certificate would outlive the authority.
    """
    outside = authority.signed_outside()
    files = {KIT_FILE: json.dumps(_fields(authority, identity), indent=1).encode(), CA: authority.roots}
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    files["manifest.json"] = json.dumps({**stamp(KIT_FORMAT), "files": digests}, indent=1, sort_keys=True).encode()
    files["manifest.sig"] = authority.sign(files["manifest.json"])  # before anything is written: the key may be locked
    if outside:
        files[OUTSIDE] = outside
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    for name, data in files.items():
        write_file(folder / name, data)
    if with_key:
        key = new_key()
        write_file(folder / KEY, key_pem(key), secret=True)
        write_file(folder / CERTIFICATE, authority.issue(identity, key.public_key()))
    if identity.kind == "site" and not (folder / POLICY_FILE).exists():
        write_file(folder / POLICY_FILE, TEMPLATE.encode())
    if identity.kind == "server":
        write_file(folder / MEMBERS, signed_members(authority))
    RevocationList(folder / CRL, authority.roots).install(authority.crl, str(authority.folder))


def _fields(authority: Authority, identity: Identity) -> dict[str, Any]:
    """Return the fields of kit.json. Training scripts read job, site, index, count, server and token."""
    project, statements = authority.project, past_statements(authority.folder)
    sites = [site.name for site in project.sites]
    addresses = project.server.addresses
    own = project.server.address_of(identity.name) if identity.kind == "server" else addresses[0]
    listen = project.server.listen or f"0.0.0.0:{own.rpartition(':')[2]}"
    return {
        **stamp(KIT_FORMAT),
        "kind": identity.kind,
        "identity": identity.uri,
        "job": "",
        "site": identity.name,
        "index": sites.index(identity.name) if identity.kind == "site" else 0,
        "count": len(sites),
        "server": own,
        **({"servers": addresses} if len(addresses) > 1 else {}),
        "token": "",
        "credentials": ".",
        "sites": sites,
        **({"roots": statements[-1].number} if statements else {}),
        "patience_s": project.patience_s,
        **({"listen": listen} if identity.kind == "server" else {}),
    }


def read_kit(folder: Path, *, kind: str = "") -> StartupKit:
    """Read a kit and verify everything that can be verified without a connection.

    Args:
        folder: The kit's folder. If it cannot be written, its working kit is read in its place.
        kind: "server", "site" or "admin" to accept only such a kit; "" accepts any.

    Returns:
        The kit.

    Raises:
        ConfigError: If it is not a complete and valid kit; the message names the file.
    """
    folder = working_kit(folder)
    return read_settled(folder, lambda: _read_kit(folder, kind))


def _read_kit(folder: Path, kind: str) -> StartupKit:
    identity, fields = read_unsigned(folder)
    check_kind(identity, kind, folder)
    certificate_file, key_file = folder / CERTIFICATE, folder / KEY
    if not certificate_file.exists():
        raise ConfigError(
            f"the kit of {identity.name} has no certificate yet",
            where=str(folder),
            fix="make a request with `fl-adapters cert request`, have it signed, and install it with `cert install`",
        )
    ca, holders = (folder / CA).read_bytes(), read_roots(folder, identity.federation, _first(fields)).holders
    certificate = checked_certificate(certificate_file.read_bytes(), holders, identity, str(certificate_file))
    _finish_install(folder, certificate)
    check_private(key_file)
    if fingerprint(_key(key_file).public_key()) != certificate.fingerprint:
        raise ConfigError(
            "the private key does not belong to the certificate", where=str(key_file), fix="get a new startup kit"
        )
    return StartupKit(
        folder=folder.resolve(),
        identity=identity,
        address=str(fields["server"]),
        addresses=tuple(map(str, fields.get("servers", ()))) or (str(fields["server"]),),
        listen=str(fields.get("listen", "")),
        sites=tuple(map(str, fields.get("sites", ()))),
        patience_s=float(fields.get("patience_s", PRODUCTION_PATIENCE_S)),  # kits of earlier versions have none
        certificate=certificate,
        authority=authority_fingerprint(ca),
    )


def check_kind(identity: Identity, kind: str, folder: Path) -> None:
    """Check that a kit is that of a participant of one kind.

    Args:
        identity: Whose kit it is.
        kind: "server", "site" or "admin"; "" for any.
        folder: The kit's folder, for the error message.

    Raises:
        ConfigError: If it is not.
    """
    if kind and identity.kind != kind:
        raise ConfigError(
            f"this is the kit of {identity}, but the kit of a {kind} is needed",
            where=str(folder),
            fix=f"pass the kit of a {kind}",
        )


def read_unsigned(folder: Path) -> tuple[Identity, dict[str, Any]]:
    """Read a kit that may not have a certificate yet, and verify its manifest.

    Args:
        folder: The kit's folder.

    Returns:
        The participant's identity, and the fields of kit.json.

    Raises:
        ConfigError: If a file is missing or was changed, or the manifest's signature is not valid.
    """
    identity, fields, _ = read_settled(folder, lambda: _read_signed(folder))
    return identity, fields


def take_up_roots(folder: Path, offer: Mapping[str, Any]) -> int | None:
    """Take up the roots that the authority has stated, see `fl_runtime.trust.roots.kit_roots.take_up`.

    Args:
        folder: The kit's folder.
        offer: What the server, or a file of the authority, offers to the kit's participant.

    Returns:
        Number of the newest statement, or None if there was nothing new.

    Raises:
        ConfigError: If the kit is not valid, or a statement is not signed by a root that it trusts.
        StoreError: If the kit cannot be written.
    """
    identity, fields = read_unsigned(folder)
    return take_up(folder, identity, _first(fields), offer)


def known_roots(folder: Path) -> KitRoots:
    """Return the roots that a kit trusts, and the number of the statement that made them so.

    Args:
        folder: The kit's folder.

    Raises:
        ConfigError: If the kit is not valid.
    """
    return read_settled(folder, lambda: _read_signed(folder)[2])


def _first(fields: Mapping[str, Any]) -> int:
    """Return the number of the newest statement about roots when the kit was made."""
    return int(fields.get("roots", 0))


def _read_signed(folder: Path) -> tuple[Identity, dict[str, Any], KitRoots]:
    """Read what the authority has signed: participant, fields of kit.json, and roots."""
    data = read_file(folder / KIT_FILE, "startup kit")
    check_kit_unwritable(folder)
    manifest, signature = folder / "manifest.json", folder / "manifest.sig"
    if not manifest.exists() and b'"simulated"' in data:
        raise ConfigError(
            "this is the kit of a simulation", where=str(folder), fix="pass a kit made by `fl-adapters provision`"
        )
    origin = folder / (ORIGIN if (folder / ORIGIN).exists() else CA)
    signed_list, ca = read_file(manifest, "manifest"), read_file(origin, "authority's certificate")
    if not signed_by(ca, signed_list, read_file(signature, "manifest's signature")):
        raise ConfigError("the manifest's signature is not valid", where=str(manifest), fix=_NEW_KIT)
    contents = json.loads(signed_list)
    check_format(contents.get("format"), KIT_FORMAT, "the kit", where=str(folder), version=contents.get("version"))
    for name, digest in contents["files"].items():
        path = origin if name == CA else folder / name
        if hashlib.sha256(read_file(path, "file of the kit")).hexdigest() != digest:
            raise ConfigError(f"{path.name} was changed after the kit was made", where=str(path), fix=_NEW_KIT)
    fields = json.loads(data)
    check_format(fields.get("format"), KIT_FORMAT, "the kit", where=str(folder), version=fields.get("version"))
    identity = Identity.from_uri(fields["identity"])
    return identity, fields, read_roots(folder, identity.federation, _first(fields))


def check_kit_unwritable(folder: Path) -> None:
    """Check that nobody else can change a kit: the folder, the folders above it, and the files in it.

    Args:
        folder: The kit's folder.

    Raises:
        ConfigError: If somebody can; the message has the command that puts it right.
    """
    check_unwritable(folder)
    for name in (
        KIT_FILE,
        CA,
        "manifest.json",
        "manifest.sig",
        CERTIFICATE,
        KEY,
        POLICY_FILE,
        CRL,
        MEMBERS,
        "ckks.key",
    ):
        check_unwritable(folder / name)


_NEW_KIT = "get a new startup kit; only policy.yml is meant to be edited"


def checked_certificate(pem: bytes, holders: Holders, identity: Identity, where: str) -> Certificate:
    """Check that a trusted authority issued a certificate to an identity.

    Args:
        pem: The certificate.
        holders: Tells who holds a certificate.
        identity: The expected holder.
        where: The certificate's file, for the error message.

    Returns:
        The certificate.

    Raises:
        ConfigError: If no trusted authority signed it, or its holder is another one.
        PermissionDeniedError: If it is nobody's.
    """
    certificate = holders.checked(pem, where)
    if certificate.identity != identity:
        raise ConfigError(
            f"the certificate is for {certificate.identity}, but the kit is for {identity}",
            where=where,
            fix="install the certificate that was made for this kit",
        )
    return certificate


def make_request(folder: Path) -> Path:
    """Make a new private key in a kit, and the request to have it signed.

    The private key never leaves the kit. It takes effect with `install`; a kit in use keeps its old key until then.

    Args:
        folder: The kit's folder.

    Returns:
        Path of the request, to be sent to the authority.

    Raises:
        ConfigError: If the kit is not valid.
    """
    identity, _ = read_unsigned(folder)
    key = new_key()
    write_file(folder / FRESH_KEY, key_pem(key), secret=True)
    write_file(folder / REQUEST, request(key, identity))
    return folder / REQUEST


def install(folder: Path, pem: bytes, where: str, key: PrivateKey | None = None) -> Certificate:
    """Install a new or renewed certificate in its kit. Running processes that use the kit load it by themselves.

    Args:
        folder: The kit's folder.
        pem: The certificate.
        where: The certificate's file, for the error message.
        key: Its private key, if that was not made in the kit.

    Returns:
        The certificate.

    Raises:
        ConfigError: If the certificate is not for this kit, or for a key that the kit does not have.
        PermissionDeniedError: If it is by an outside authority, and its names are nobody's.
    """
    identity, _ = read_unsigned(folder)
    certificate = checked_certificate(pem, known_roots(folder).holders, identity, where)
    if key is not None and fingerprint(key.public_key()) == certificate.fingerprint:
        write_file(folder / FRESH_KEY, key_pem(key), secret=True)
    for name in (FRESH_KEY, KEY):
        path = folder / name
        if path.exists() and fingerprint(_key(path).public_key()) == certificate.fingerprint:
            write_file(folder / CERTIFICATE, pem)  # first: `_finish_install` goes on from here after a crash
            _finish_install(folder, certificate)
            return certificate
    raise ConfigError(
        "the certificate is for a key that this kit does not have",
        where=where,
        fix="install it where `cert request` was run, or request a new one",
    )


def install_outside(folder: Path, data: bytes, where: str) -> int:
    """Put newer outside authorities in force in a kit. Running processes that use the kit load them by themselves.

    Args:
        folder: The kit's folder.
        data: The contents of outside.json.
        where: Its file, for the error message.

    Returns:
        Number of the version.

    Raises:
        ConfigError: If a root of this federation did not sign them, or they are older than those in the kit.
        StoreError: If the kit cannot be written.
    """
    identity, _ = read_unsigned(folder)
    known = known_roots(folder)
    fresh = checked_outside(data, identity.federation, known.origin, known.statements, where)
    if fresh.number < known.outside.number:
        raise ConfigError(
            f"these outside authorities (version {fresh.number}) are older than the kit's ({known.outside.number})",
            where=where,
            fix="use the outside.json in the authority's folder",
        )
    write_file(folder / OUTSIDE, data)
    return fresh.number


def _key(path: Path) -> PrivateKey:
    return read_key(read_file(path, "private key"), str(path))


def _finish_install(folder: Path, certificate: Certificate) -> None:
    """Put the new key in its place, if the certificate is for it. Also after an `install` that was interrupted."""
    fresh = folder / FRESH_KEY
    if fresh.exists() and fingerprint(_key(fresh).public_key()) == certificate.fingerprint:
        write_file(folder / KEY, fresh.read_bytes(), secret=True)
        fresh.unlink()
        (folder / REQUEST).unlink(missing_ok=True)
