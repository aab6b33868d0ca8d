"""The certificate authority of a federation: a folder to keep private, best on a machine without network.

authority/
    ca.pem, ca.key          the authority's certificate and its private key (mode 0600, see passphrase.py)
    project.yml             who may have a certificate, and with which role
    issued/SERIAL.pem       every certificate that was issued
    next/ca.pem, ca.key     during a rotation (see roots/rotation.py): the new root, which signs from then on
    roots.json              after the first rotation: what participants need to trust the newest root
    retired/                certificates of earlier roots
    revoked.json            serial number -> time of revocation
    revoked-outside.json    revoked certificates of outside authorities, with the time
    crl.pem                 the signed revocation list for the server (X.509 CRL)
    outside.json            the project's outside authorities, signed
    members.json            the signed list of members for the server
"""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from functools import cache, cached_property
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.x509.oid import ExtendedKeyUsageOID

from fl_runtime.errors import ConfigError
from fl_runtime.trust.certificates import (
    Certificate,
    PrivateKey,
    PublicKey,
    authority_fingerprint,
    is_encrypted,
    is_issued_by,
    key_pem,
    load,
    pem_list,
    read_certificate,
    sign,
    subject,
)
from fl_runtime.trust.files import check_private, check_unwritable, read_file, write_file
from fl_runtime.trust.identity import Identity
from fl_runtime.trust.passphrase import NEXT, no_passphrase, open_key
from fl_runtime.trust.project import MEMBERS, MemberList, Project, read_members, read_project, split_address
from fl_runtime.trust.revocation import read_list
from fl_runtime.trust.roots.outside import (
    OUTSIDE,
    Holders,
    Outside,
    OutsideAuthority,
    checked_name,
    read_outside,
    signed_outside,
)
from fl_runtime.trust.roots.root import CLOCK_SKEW, Root, key_usage
from fl_runtime.trust.roots.staging import settle
from fl_runtime.version import SERVER_NAME

_REVOKED_OUTSIDE = "revoked-outside.json"
_FILES = ("ca.key", "ca.pem", "project.yml", "revoked.json", _REVOKED_OUTSIDE, "crl.pem", OUTSIDE, MEMBERS)
_INDIRECT = x509.IssuingDistributionPoint(None, None, False, False, None, True, False)  # a list for several issuers


class Authority:
    """An existing certificate authority. Whoever changes it holds the lock of its folder, see provisioning/lock.py.

    Args:
        folder: The authority's folder.
        passphrase: Returns the passphrase of the private key. It is called at the first signature, and only if the key
            is encrypted.

    Attributes:
        folder: The authority's folder.
        pem: Certificate of its root; during a rotation that of the new one.
        roots: The trusted roots as PEM, the newest first; two during a rotation.
        project: Who may have a certificate, and with which role.

    Raises:
        ConfigError: If the folder holds no authority, or others can read its private key.
    """

    def __init__(self, folder: Path, passphrase: Callable[[], bytes] = no_passphrase) -> None:
        self.folder, self._passphrase = folder, cache(passphrase)
        for file in (*_FILES, f"{NEXT}/ca.key", f"{NEXT}/ca.pem"):
            check_unwritable(folder / file)
        settle(folder)
        old = read_file(folder / "ca.pem", "certificate authority")
        new = self._next / "ca.pem"
        self.is_rotating = new.exists()
        if not self.is_rotating and self._next.exists():  # the process that ended a rotation was killed
            self._next.rmdir()
        self.pem = new.read_bytes() if self.is_rotating else old
        self.roots = self.pem + old if self.is_rotating else old
        for key_file in (folder / "ca.key", *([self._next / "ca.key"] if self.is_rotating else [])):
            read_file(key_file, "authority's private key")
            check_private(key_file)
        self.project = read_project(folder / "project.yml")

    def reopened(self) -> Authority:
        """Return the authority as its folder is now."""
        return Authority(self.folder, self._passphrase)

    @property
    def passphrase(self) -> bytes:
        """Passphrase of the root's key; empty if the key is not encrypted."""
        return self._passphrase() if is_encrypted(read_file(self.folder / "ca.key", "authority's private key")) else b""

    @property
    def _next(self) -> Path:
        """Folder of the new root during a rotation."""
        return self.folder / NEXT

    @cached_property
    def _key(self) -> PrivateKey:
        return open_key((self._next if self.is_rotating else self.folder) / "ca.key", self._passphrase)

    @cached_property
    def oldest_root(self) -> Root:
        """The oldest trusted root: until the end of a rotation, everybody trusts it."""
        key = open_key(self.folder / "ca.key", self._passphrase) if self.is_rotating else self._key
        return Root(read_file(self.folder / "ca.pem", "certificate authority"), key)

    @property
    def newest_root(self) -> Root:
        """The newest root, which signs certificates and kits."""
        return Root(self.pem, self._key)

    @classmethod
    def create(cls, folder: Path, project: Project, passphrase: bytes = b"") -> Authority:
        """Create the authority of a new federation.

        Args:
            folder: Folder to create.
            project: The federation's participants.
            passphrase: Encrypts the private key; empty for a key that is not encrypted.

        Returns:
            The authority.

        Raises:
            ConfigError: If the folder holds an authority already.
        """
        if (folder / "ca.key").exists():
            raise ConfigError(f"{folder} has an authority already", fix="choose another folder")
        check_unwritable(folder)
        root = Root.make(project, "")
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_file(folder / "ca.key", key_pem(root.key, passphrase), secret=True)
        write_file(folder / "ca.pem", root.pem)
        save_project(folder, project)
        authority = cls(folder, lambda: passphrase)
        authority.sign_list()
        signed_members(authority)
        return authority

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the authority's public key, hexadecimal, for comparison over another channel."""
        return authority_fingerprint(self.pem)

    def issue(
        self, identity: Identity, key: PublicKey, *, days: float | None = None, root: Root | None = None
    ) -> bytes:
        """Issue a certificate.

        Args:
            identity: Who its holder is.
            key: The holder's public key.
            days: Lifetime in days; None takes the project's.
            root: The root that signs it. None: the newest; for the server the oldest, since during a rotation there may
                be sites that have not heard of the new one.

        Returns:
            The certificate as PEM, which is also recorded in the authority's folder.

        Raises:
            ConfigError: If it would be valid for longer than the authority's own certificate.
        """
        now = datetime.now(UTC)
        lifetime = timedelta(days=self.project.days if days is None else days)
        root = root or (self.oldest_root if identity.kind == "server" else self.newest_root)
        authority = load(root.pem)
        if now + lifetime > authority.not_valid_after_utc:
            raise ConfigError(
                f"the certificate of {identity.name} would outlive the authority, which ends on "
                f"{authority.not_valid_after_utc:%Y-%m-%d}",
                fix="issue it for fewer days, or make a new root with `fl-adapters authority rotate`",
            )
        usage = ExtendedKeyUsageOID.SERVER_AUTH if identity.kind == "server" else ExtendedKeyUsageOID.CLIENT_AUTH
        names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(identity.uri)]
        if identity.kind == "server":
            names += [
                x509.DNSName(SERVER_NAME),
                _host_name(split_address(self.project.server.address_of(identity.name))[0]),
            ]
        serial = x509.random_serial_number()
        begins = [item.not_before for item in self.issued() if item.identity.name == identity.name]
        later = [time + timedelta(seconds=1) for time in begins]  # so that the newest certificate is always known
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject(identity.name))
            .issuer_name(authority.subject)
            .public_key(key)
            .serial_number(serial)
            .not_valid_before(min(now, max(now - CLOCK_SKEW, *later)) if later else now - CLOCK_SKEW)
            .not_valid_after(now + lifetime)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(key_usage(authority=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(root.key.public_key()), critical=False)
        )
        pem = _pem(builder.sign(root.key, hashes.SHA256()))
        write_file(self.folder / "issued" / f"{serial:x}.pem", pem)
        signed_members(self)
        return pem

    def issued(self) -> Iterator[Certificate]:
        """Yield every certificate that was issued, oldest first."""
        certificates = [read_certificate(path.read_bytes()) for path in (self.folder / "issued").glob("*.pem")]
        yield from sorted(certificates, key=lambda item: (item.not_before, item.serial))

    def newest(self, name: str) -> Certificate:
        """Return a participant's newest certificate that was not revoked.

        Args:
            name: Name of the participant.

        Returns:
            The certificate, which may have expired.

        Raises:
            ConfigError: If there is none.
        """
        revoked = self.revoked()
        valid = [item for item in self.issued() if item.identity.name == name and item.serial not in revoked]
        if not valid:
            raise ConfigError(f"no certificate of {name} is valid", fix="see `fl-adapters cert list`")
        return valid[-1]

    def renew(self, name: str, *, days: float | None = None) -> bytes:
        """Issue a new certificate for the key of a participant's newest one, so its private key need not change.

        Args:
            name: Name of the participant.
            days: Lifetime in days; None takes the project's.

        Returns:
            The certificate as PEM.

        Raises:
            ConfigError: If there is no certificate to renew, or the project does not name the participant any more.
        """
        old = self.newest(name)
        key = load(old.pem).public_key()
        assert isinstance(key, PublicKey)
        return self.issue(self.project.participant(name), key, days=days)

    def revoked(self) -> dict[int, str]:
        """Return the revoked certificates: serial number -> time of revocation (ISO 8601)."""
        path = self.folder / "revoked.json"
        entries: dict[str, str] = json.loads(path.read_text("utf-8")) if path.exists() else {}
        return {int(serial, 16): when for serial, when in entries.items()}

    def counting(self, name: str) -> Iterator[Certificate]:
        """Yield the certificates of a participant that count: of a trusted root, not revoked or expired; oldest first.

        Args:
            name: Name of the participant.
        """
        revoked, now = self.revoked(), datetime.now(UTC)
        for item in self.issued():
            valid = item.serial not in revoked and now < item.not_after
            if item.identity.name == name and valid and is_issued_by(item.pem, self.roots):
                yield item

    def revoke(self, name: str) -> tuple[list[Certificate], bytes]:
        """Revoke every certificate of a participant. Doing it again changes nothing but the number of the list.

        Args:
            name: Name of the participant.

        Returns:
            The certificates that were not revoked before, and the newly signed revocation list as PEM.

        Raises:
            ConfigError: If the participant never had a certificate.
        """
        certificates = [item for item in self.issued() if item.identity.name == name]
        if not certificates:
            raise ConfigError(f"{name!r} never had a certificate", fix="see `fl-adapters cert list`")
        return self.revoke_certificates(certificates), self.crl

    def revoke_certificates(self, certificates: Sequence[Certificate]) -> list[Certificate]:
        """Revoke certificates, and sign the list of all revoked ones.

        Args:
            certificates: The certificates; those that were revoked before keep their time of revocation.

        Returns:
            Those that were not revoked before.
        """
        revoked, when = self.revoked(), datetime.now(UTC).isoformat(timespec="seconds")
        new = [item for item in certificates if item.serial not in revoked]
        entries = {f"{serial:x}": time for serial, time in (revoked | {item.serial: when for item in new}).items()}
        _ = self.oldest_root  # asks for the passphrase before anything is written
        # before the list: if this process is killed now, the next list has them too
        write_file(self.folder / "revoked.json", json.dumps(entries, indent=1).encode())
        self.sign_list()
        signed_members(self)
        return new

    def revoke_outside(self, name: str, pem: bytes) -> Certificate:
        """Revoke a certificate of an outside authority, and sign the list of all revoked ones.

        Args:
            name: Its holder.
            pem: The certificate.

        Returns:
            What it says.

        Raises:
            ConfigError: If none of the project's outside authorities issued it, or it is another participant's.
            PermissionDeniedError: If it is nobody's.
        """
        outside = read_outside(self.signed_outside(), self.project.federation, [self.pem], OUTSIDE)
        certificate = Holders(self.roots, outside).checked(pem)
        if not certificate.issuer:
            raise ConfigError(
                "the federation's own authority issued this certificate",
                fix="revoke it without --certificate, by the participant's name",
            )
        if certificate.identity.name != name:
            raise ConfigError(f"this is the certificate of {certificate.identity}, not of {name}", fix="check the file")
        entries, when = self._revoked_outside(), datetime.now(UTC).isoformat(timespec="seconds")
        known = {(load(each).issuer, load(each).serial_number) for each in entries}
        if (load(pem).issuer, certificate.serial) not in known:
            entries[pem_list(pem)[0]] = when
        listed = [{"certificate": each.decode(), "when": time} for each, time in entries.items()]
        write_file(self.folder / _REVOKED_OUTSIDE, json.dumps(listed, indent=1).encode())
        self.sign_list()
        return certificate

    def _revoked_outside(self) -> dict[bytes, str]:
        """The revoked certificates of outside authorities: PEM -> time of revocation (ISO 8601)."""
        path = self.folder / _REVOKED_OUTSIDE
        entries = json.loads(path.read_text("utf-8")) if path.exists() else []
        return {each["certificate"].encode(): each["when"] for each in entries}

    @property
    def crl(self) -> bytes:
        """The signed revocation list as PEM."""
        return read_file(self.folder / "crl.pem", "revocation list")

    def sign_list(self) -> bytes:
        """Sign the revocation list again: with a higher number, and valid for the project's `crl_days` from now.

        Returns:
            The list as PEM, which is also in the authority's folder.
        """
        crl = self.make_list(self.oldest_root)  # everybody trusts that one
        write_file(self.folder / "crl.pem", crl)
        return crl

    def make_list(self, root: Root) -> bytes:
        """Sign a revocation list as `sign_list` does, without putting it into the authority's folder.

        Args:
            root: The root that signs.

        Returns:
            The list as PEM.
        """
        now = datetime.now(UTC)
        ends = min(now + timedelta(days=self.project.crl_days), load(root.pem).not_valid_after_utc)
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(load(root.pem).subject)
            .last_update(now)
            .next_update(ends)
            .add_extension(x509.CRLNumber(self._next_number(now)), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(root.key.public_key()), critical=False)
        )
        for serial, when in self.revoked().items():
            entry = x509.RevokedCertificateBuilder().serial_number(serial)
            builder = builder.add_revoked_certificate(entry.revocation_date(datetime.fromisoformat(when)).build())
        outside = self._revoked_outside()
        for pem, when in outside.items():  # after the others: an entry's issuer is that of the entry before by default
            issuer = x509.CertificateIssuer([x509.DirectoryName(load(pem).issuer)])
            entry = x509.RevokedCertificateBuilder().serial_number(load(pem).serial_number)
            entry = entry.revocation_date(datetime.fromisoformat(when)).add_extension(issuer, critical=True)
            builder = builder.add_revoked_certificate(entry.build())
        if outside:
            builder = builder.add_extension(_INDIRECT, critical=True)
        return builder.sign(root.key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    def _next_number(self, now: datetime) -> int:
        """Return a number above that of every list before: the time, which also grows if the folder is a backup."""
        path = self.folder / "crl.pem"
        before = read_list(path.read_bytes(), self.roots, str(path)).number if path.exists() else 0
        return max(before + 1, int(now.timestamp()))

    def signed_outside(self) -> bytes:
        """Sign which outside authorities the project has.

        Returns:
            The contents of outside.json; empty if the project never had any.
        """
        entries = self.project.outside_authorities
        path = self.folder / OUTSIDE
        if not entries and not path.exists():
            return b""
        listed = [
            (
                entry.certificate.encode(),
                {checked_name(name): self.project.participant(who) for who, name in entry.names.items()},
            )
            for entry in entries
        ]
        federation, before = self.project.federation, Outside()
        if path.exists():
            roots = [*pem_list(self.roots), *(each.read_bytes() for each in (self.folder / "retired").glob("*.pem"))]
            before = read_outside(path.read_bytes(), federation, roots, str(path))
            if before.authorities == tuple(OutsideAuthority(*each) for each in listed) and before.root == self.pem:
                return path.read_bytes()
        number = max(before.number + 1, int(datetime.now(UTC).timestamp()))
        data = signed_outside(self._key, federation, number, listed)
        write_file(path, data)
        return data

    def sign(self, data: bytes) -> bytes:
        """Sign data with the newest root's key; `pem` is enough to verify the signature."""
        return sign(self._key, data)


def signed_members(authority: Authority) -> bytes:
    """Return the signed list of members. It is signed again if it has changed.

    The members are the participants of the project, without those all of whose certificates were revoked.

    Args:
        authority: The authority.

    Returns:
        The contents of members.json.

    Raises:
        ConfigError: If the list in the authority's folder cannot be read, or the key cannot be opened.
        StoreError: If the file cannot be written.
    """
    revoked, issued = authority.revoked(), list(authority.issued())
    had = {item.identity.name for item in issued}
    have = {item.identity.name for item in issued if item.serial not in revoked}
    members = tuple(item for item in authority.project.participants() if item.name in have or item.name not in had)
    path, federation, before = authority.folder / MEMBERS, authority.project.federation, None
    if path.exists():
        before = read_members(path.read_bytes(), federation, str(path), None)
    if before is None or before.participants != members:
        number = max(before.number + 1 if before else 0, int(datetime.now(UTC).timestamp()))
        root = authority.oldest_root  # everybody trusts that one
        write_file(path, MemberList(number, members).signed(root.key, federation))
    return path.read_bytes()


def save_project(folder: Path, project: Project) -> None:
    """Write the project file into the authority's folder.

    Args:
        folder: The authority's folder.
        project: Who may have a certificate.

    Raises:
        StoreError: If the file cannot be written.
    """
    import yaml

    text = yaml.safe_dump(project.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    write_file(folder / "project.yml", text.encode())


def _host_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)
