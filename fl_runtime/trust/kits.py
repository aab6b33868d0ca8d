"""Startup kits: one folder per participant, all that it needs to take part.

kit/
    kit.json                who this is, and the server's address
    ca.pem                  the authority's certificate
    manifest.json, .sig     digests of the two files above, signed by the authority
    certificate.pem         this participant's certificate; replaced when it is renewed
    key.pem                 its private key, mode 0600; made here where `cert request` is used
    policy.yml              of a site: what may leave it; to be edited by the site
    crl.pem                 of the server: certificates that no longer count
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fl_runtime.errors import ConfigError
from fl_runtime.trust.authority import Authority
from fl_runtime.trust.certificates import (
    Certificate,
    PrivateKey,
    PublicKey,
    check_issued_by,
    fingerprint,
    key_pem,
    load,
    new_key,
    read_certificate,
    read_key,
    request,
    signed_by,
)
from fl_runtime.trust.files import check_private, read_file, write_file
from fl_runtime.trust.identity import Identity
from fl_runtime.trust.policy import POLICY_FILE, TEMPLATE

KIT_FORMAT = 1
KIT_FILE, CERTIFICATE, KEY, CA, CRL = "kit.json", "certificate.pem", "key.pem", "ca.pem", "crl.pem"
REQUEST, FRESH_KEY = "request.pem", "key.new.pem"
_SIGNED = (KIT_FILE, CA)


@dataclass(frozen=True)
class StartupKit:
    """A kit that has been read and checked. address: the server's, host:port. listen: what the server binds.

    sites: names of the project's sites, in order.
    """

    folder: Path
    identity: Identity
    address: str
    listen: str
    sites: tuple[str, ...]
    certificate: Certificate
    authority: str

    @property
    def policy_file(self) -> Path:
        return self.folder / POLICY_FILE


def write_kit(folder: Path, authority: Authority, identity: Identity, *, with_key: bool = True) -> None:
    """A participant's kit. with_key=False: the participant makes its own with `cert request`, here is none."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    write_file(folder / KIT_FILE, json.dumps(_fields(authority, identity), indent=1).encode())
    write_file(folder / CA, authority.pem)
    digests = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in _SIGNED}
    manifest = json.dumps({"format": KIT_FORMAT, "files": digests}, indent=1, sort_keys=True).encode()
    write_file(folder / "manifest.json", manifest)
    write_file(folder / "manifest.sig", authority.sign(manifest))
    if with_key:
        key = new_key()
        write_file(folder / KEY, key_pem(key), secret=True)
        write_file(folder / CERTIFICATE, authority.issue(identity, key.public_key()))
    if identity.kind == "site" and not (folder / POLICY_FILE).exists():
        write_file(folder / POLICY_FILE, TEMPLATE.encode())
    if identity.kind == "server":
        write_file(folder / CRL, (authority.folder / CRL).read_bytes())


def _fields(authority: Authority, identity: Identity) -> dict[str, Any]:
    """What kit.json says. job, site, index, count, server and token are what a training script looks for."""
    project = authority.project
    sites = [site.name for site in project.sites]
    listen = project.server.listen or f"0.0.0.0:{project.server.address.rpartition(':')[2]}"
    return {
        "format": KIT_FORMAT,
        "kind": identity.kind,
        "identity": identity.uri,
        "job": "",
        "site": identity.name,
        "index": sites.index(identity.name) if identity.kind == "site" else 0,
        "count": len(sites),
        "server": project.server.address,
        "token": "",
        "credentials": ".",
        "sites": sites,
        **({"listen": listen} if identity.kind == "server" else {}),
    }


def read_kit(folder: Path, *, kind: str = "") -> StartupKit:
    """A kit with all that can be checked without a connection checked. Raises ConfigError that names the file.

    kind: what it must be a kit of.
    """
    identity, fields = read_unsigned(folder)
    if kind and identity.kind != kind:
        raise ConfigError(
            f"this is the kit of {identity}, and what is needed is the kit of a {kind}",
            where=str(folder),
            fix=f"use the kit of a {kind}",
        )
    certificate_file, key_file = folder / CERTIFICATE, folder / KEY
    if not certificate_file.exists():
        raise ConfigError(
            f"the kit of {identity.name} has no certificate yet",
            where=str(folder),
            fix="make a request with `fl-adapters cert request`, have it signed, and install it with `cert install`",
        )
    ca = (folder / CA).read_bytes()
    certificate = checked_certificate(certificate_file.read_bytes(), ca, identity, str(certificate_file))
    check_private(key_file)
    if fingerprint(_key(key_file).public_key()) != certificate.fingerprint:
        raise ConfigError(
            "the private key does not belong to the certificate", where=str(key_file), fix="get a fresh startup kit"
        )
    return StartupKit(
        folder=folder.resolve(),
        identity=identity,
        address=str(fields["server"]),
        listen=str(fields.get("listen", "")),
        sites=tuple(map(str, fields.get("sites", ()))),
        certificate=certificate,
        authority=authority_fingerprint(ca),
    )


def read_unsigned(folder: Path) -> tuple[Identity, dict[str, Any]]:
    """Who a kit is for, and its kit.json, of a kit that may still be without a certificate. Checks the manifest."""
    data = read_file(folder / KIT_FILE, "startup kit")
    manifest, signature = folder / "manifest.json", folder / "manifest.sig"
    if not manifest.exists() and b'"simulated"' in data:
        raise ConfigError("this is the kit of a simulation", where=str(folder), fix="use one made by `provision`")
    listed, ca = read_file(manifest, "manifest"), read_file(folder / CA, "authority's certificate")
    if not signed_by(ca, listed, read_file(signature, "manifest's signature")):
        raise ConfigError("the manifest's signature does not hold", where=str(manifest), fix=_FRESH)
    for name, digest in json.loads(listed)["files"].items():
        if hashlib.sha256(read_file(folder / name, "file of the kit")).hexdigest() != digest:
            raise ConfigError(f"{name} was changed after the kit was made", where=str(folder / name), fix=_FRESH)
    fields = json.loads(data)
    if fields.get("format") != KIT_FORMAT:
        raise ConfigError(f"this kit has format {fields.get('format')!r}", where=str(folder), fix="upgrade fl-adapters")
    return Identity.from_uri(fields["identity"]), fields


_FRESH = "get a fresh startup kit; only policy.yml is meant to be edited"


def checked_certificate(pem: bytes, ca: bytes, identity: Identity, where: str) -> Certificate:
    """ConfigError unless the authority has given this certificate to this identity."""
    check_issued_by(pem, ca, where)
    certificate = read_certificate(pem)
    if certificate.identity != identity:
        raise ConfigError(
            f"the certificate is that of {certificate.identity}, the kit that of {identity}",
            where=where,
            fix="install the certificate that was made for this kit",
        )
    return certificate


def make_request(folder: Path) -> Path:
    """A new private key in the kit, which never leaves it, and the request to have it signed; the request's path.

    The key takes effect with `install`: a kit that is in use goes on with the old one until then.
    """
    identity, _ = read_unsigned(folder)
    key = new_key()
    write_file(folder / FRESH_KEY, key_pem(key), secret=True)
    write_file(folder / REQUEST, request(key, identity))
    return folder / REQUEST


def install(folder: Path, pem: bytes, where: str) -> Certificate:
    """Put a signed or renewed certificate into its kit. Processes that use the kit take it up by themselves.

    ConfigError if it is not this kit's, or is for a key that the kit does not have.
    """
    identity, _ = read_unsigned(folder)
    certificate = checked_certificate(pem, (folder / CA).read_bytes(), identity, where)
    for name in (FRESH_KEY, KEY):
        path = folder / name
        if path.exists() and fingerprint(_key(path).public_key()) == certificate.fingerprint:
            if name == FRESH_KEY:
                write_file(folder / KEY, path.read_bytes(), secret=True)
                path.unlink()
                (folder / REQUEST).unlink(missing_ok=True)
            write_file(folder / CERTIFICATE, pem)
            return certificate
    raise ConfigError(
        "the certificate is for a key that this kit does not have",
        where=where,
        fix="install it where `cert request` was run, or request a new one",
    )


def authority_fingerprint(ca_pem: bytes) -> str:
    """SHA-256 of the authority's public key."""
    key = load(ca_pem).public_key()
    assert isinstance(key, PublicKey)
    return fingerprint(key)


def _key(path: Path) -> PrivateKey:
    return read_key(read_file(path, "private key"), str(path))
