"""Authorities outside of the federation, such as a hospital's own PKI, and whose certificates of theirs count.

The project file lists them, and which name in their certificates stands for which participant. The federation's own
authority signs that in outside.json, which each kit has: JSON with the fields text and signature (ECDSA with SHA-256,
hexadecimal, over b"fl-adapters outside authorities 1", a zero byte and the text). The text is JSON with format,
federation, number (newer ones are higher) and authorities: certificate (PEM) and names (name -> URI of the holder).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID

from fl_runtime.errors import ConfigError, FederationError, PermissionDeniedError
from fl_runtime.trust.certificates import (
    Certificate,
    PrivateKey,
    PublicKey,
    fingerprint,
    is_issued_by,
    is_self_signed,
    load,
    load_all,
    read_certificate,
    sign,
    signed_by,
)
from fl_runtime.trust.identity import Identity
from fl_runtime.version import check_format

OUTSIDE = "outside.json"
"""File in kits, and in the authority's folder, with the outside authorities."""

FORMAT = 1
_PURPOSE = b"fl-adapters outside authorities 1\0"
_ANY_PURPOSE = x509.ObjectIdentifier("2.5.29.37.0")
_NEW_FILE = "get a new outside.json from the person who keeps the federation's authority"


@dataclass(frozen=True)
class OutsideAuthority:
    """An authority that is not the federation's own.

    Attributes:
        pem: Its root's certificate, and after it any intermediate ones.
        holders: Name in its certificates, such as "dns:fl.north.example" -> the participant that the name stands for.
    """

    pem: bytes
    holders: Mapping[str, Identity]

    def issued(self, pem: bytes) -> bool:
        """Whether it issued a certificate, see `is_issued_by`."""
        return is_issued_by(pem, self.pem)

    def read(self, pem: bytes) -> Certificate:
        """Read a certificate that this authority issued.

        Args:
            pem: The certificate, and after it any intermediate ones.

        Returns:
            What it says, with the participant that its name stands for.

        Raises:
            PermissionDeniedError: If its names stand for no participant or for several, or it is for another use.
        """
        certificate, names = load(pem), names_in(load(pem))
        found = {self.holders[name] for name in names if name in self.holders}
        if len(found) != 1:
            fault = f"stand for {len(found)} participants" if found else "stand for no participant"
            raise PermissionDeniedError(
                f"the names in this certificate of an outside authority {fault}: {', '.join(sorted(names))[:300]}",
                where="rule certificate: names of outside authorities",
                fix="have its name added to outside_authorities in the project file, once",
            )
        (identity,) = found
        key = certificate.public_key()
        if not isinstance(key, PublicKey) or not isinstance(key.curve, ec.SECP256R1):
            raise PermissionDeniedError(
                f"the certificate of {identity} is not for a P-256 key",
                where="rule certificate: P-256 keys",
                fix="make the key with `fl-adapters cert request`, or `openssl ecparam -name prime256v1 -genkey`",
            )
        if not _may_call(certificate):
            raise PermissionDeniedError(
                f"the certificate of {identity} is not for TLS clients",
                where="rule certificate: its use",
                fix="have one issued with the extended key usage clientAuth",
            )
        return Certificate(
            identity=identity,
            serial=certificate.serial_number,
            not_before=certificate.not_valid_before_utc,
            not_after=certificate.not_valid_after_utc,
            fingerprint=fingerprint(key),
            pem=pem,
            issuer=certificate.issuer.rfc4514_string(),
        )


@dataclass(frozen=True)
class Outside:
    """The outside authorities of a federation, as its own authority has signed them.

    Attributes:
        number: Number of this version; newer ones are higher. 0 if there never was one.
        authorities: The authorities.
        root: The root whose key signed it, as PEM.
    """

    number: int = 0
    authorities: tuple[OutsideAuthority, ...] = ()
    root: bytes = b""

    @property
    def pem(self) -> bytes:
        """The certificates of all of them, as one PEM text."""
        return b"".join(authority.pem for authority in self.authorities)

    def issuer_of(self, pem: bytes) -> OutsideAuthority | None:
        """Return the authority that issued a certificate; None if none of them did."""
        return next((authority for authority in self.authorities if authority.issued(pem)), None)


NO_OUTSIDE = Outside()
"""What a federation without outside authorities has."""


@dataclass(frozen=True)
class Holders:
    """Tells who holds a certificate, of the federation's own authority or of an outside one.

    A URI in a certificate counts only if the federation's own authority has issued it.

    Attributes:
        roots: The roots of the federation's own authority, as PEM.
        outside: The outside authorities.
    """

    roots: bytes
    outside: Outside = NO_OUTSIDE

    def read(self, pem: bytes) -> Certificate:
        """Read a certificate. It does not check dates or revocation, or whether anybody issued it: see `trusts`.

        Args:
            pem: The certificate, and after it any intermediate ones.

        Returns:
            What it says.

        Raises:
            ConfigError: If it is not a certificate.
            PermissionDeniedError: If it is nobody's.
        """
        authority = None if is_issued_by(pem, self.roots) else self.outside.issuer_of(pem)
        return read_certificate(pem) if authority is None else authority.read(pem)

    def trusts(self, certificate: Certificate) -> bool:
        """Whether a trusted authority issued a certificate to the participant that it was read for."""
        if is_issued_by(certificate.pem, self.roots):
            return not certificate.issuer
        authority = self.outside.issuer_of(certificate.pem)
        try:
            return authority is not None and authority.read(certificate.pem).identity == certificate.identity
        except FederationError:
            return False

    def checked(self, pem: bytes, where: str = "") -> Certificate:
        """Read a certificate that a trusted authority must have issued.

        Args:
            pem: The certificate, and after it any intermediate ones.
            where: Its file, for the error message.

        Returns:
            What it says.

        Raises:
            ConfigError: If it is not a certificate, or no trusted authority issued it.
            PermissionDeniedError: If it is nobody's.
        """
        load_all(pem, where)
        if not is_issued_by(pem, self.roots) and self.outside.issuer_of(pem) is None:
            raise ConfigError(
                "the certificate was not signed by this federation's authority"
                + (", or by an outside one that it knows" if self.outside.authorities else ""),
                where=where,
                fix="install the certificate that the authority's `cert sign` made for this kit",
            )
        return self.read(pem)


def names_in(certificate: x509.Certificate) -> frozenset[str]:
    """Return the names in a certificate: "dns:...", "email:...", "uri:..." and "subject:..." (RFC 4514)."""
    names = {f"subject:{certificate.subject.rfc4514_string()}"} if list(certificate.subject) else set()
    try:
        also = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (x509.ExtensionNotFound, ValueError):
        return frozenset(names)
    names |= {f"dns:{name.lower()}" for name in also.get_values_for_type(x509.DNSName)}
    names |= {f"email:{name}" for name in also.get_values_for_type(x509.RFC822Name)}
    names |= {f"uri:{name}" for name in also.get_values_for_type(x509.UniformResourceIdentifier)}
    return frozenset(names)


def checked_name(name: str) -> str:
    """Check a name of a project file, and return it as `names_in` writes it.

    Args:
        name: Such as "dns:fl.north.example", "email:ada@north.example" or "subject:CN=ada,O=North".

    Returns:
        The name.

    Raises:
        ConfigError: If it is not one, or stands for many.
    """
    kind, _, value = name.partition(":")
    if not value or "*" in value or kind not in ("dns", "email", "uri", "subject"):
        raise ConfigError(
            f"{name!r} is not one name in certificates",
            fix="write it as dns:NAME, email:ADDRESS, uri:URI or subject:SUBJECT, without a wildcard",
        )
    if kind == "subject":
        try:
            value = x509.Name.from_rfc4514_string(value).rfc4514_string()
        except ValueError:
            raise ConfigError(
                f"{value!r} is not a subject",
                fix="write it as `openssl x509 -noout -subject -nameopt RFC2253` prints it, such as CN=ada,O=North",
            ) from None
    return f"{kind}:{value.lower() if kind == 'dns' else value}"


def check_bundle(pem: bytes, where: str) -> None:
    """Check the certificates of an outside authority. Raises ConfigError if there is no root, or one may not sign."""
    found = load_all(pem, where)
    for each in found:
        try:
            authority = each.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
        except (x509.ExtensionNotFound, ValueError):
            authority = False
        if not authority:
            raise ConfigError(
                f"{each.subject.rfc4514_string()} is not an authority: its certificate may not sign others",
                where=where,
                fix="pass the authority's root, and after it the intermediate ones",
            )
    if not any(map(is_self_signed, found)):
        raise ConfigError(
            "there is no root among these certificates: none is signed with its own key",
            where=where,
            fix="put the root's certificate into the same file, before the intermediate ones",
        )


def signed_outside(
    key: PrivateKey, federation: str, number: int, authorities: Iterable[tuple[bytes, Mapping[str, Identity]]]
) -> bytes:
    """Sign which outside authorities a federation has.

    Args:
        key: Key of the federation's root.
        federation: Name of the federation.
        number: Number of this version, higher than those before.
        authorities: For each the certificates as PEM, and name -> holder.

    Returns:
        The contents of outside.json.
    """
    listed = [
        {"certificate": pem.decode(), "names": {name: identity.uri for name, identity in holders.items()}}
        for pem, holders in authorities
    ]
    text = json.dumps({"format": FORMAT, "federation": federation, "number": number, "authorities": listed}, indent=1)
    return json.dumps({"text": text, "signature": sign(key, _PURPOSE + text.encode()).hex()}, indent=1).encode()


def read_outside(data: bytes, federation: str, roots: Iterable[bytes], where: str) -> Outside:
    """Read which outside authorities a federation has, and verify the signature.

    Args:
        data: The contents of outside.json.
        federation: Name of the federation.
        roots: The federation's roots, one of which signed it.
        where: The file, for the error message.

    Returns:
        The outside authorities.

    Raises:
        ConfigError: If it is damaged, of another federation, or not signed by one of the roots.
    """
    try:
        fields = json.loads(data)
        text, signature = fields["text"], bytes.fromhex(fields["signature"])
        stated = json.loads(text)
        check_format(stated["format"], FORMAT, "the list of outside authorities", where=where)
        number, of = int(stated["number"]), stated["federation"]
        authorities = tuple(
            OutsideAuthority(
                each["certificate"].encode(), {name: Identity.from_uri(uri) for name, uri in each["names"].items()}
            )
            for each in stated["authorities"]
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, PermissionDeniedError):
        raise ConfigError("this is not a list of outside authorities", where=where, fix=_NEW_FILE) from None
    signer = next((root for root in roots if signed_by(root, _PURPOSE + text.encode(), signature)), None)
    if of != federation or signer is None:
        raise ConfigError(
            "the outside authorities are not signed by this federation's authority", where=where, fix=_NEW_FILE
        )
    return Outside(number, authorities, signer)


def _may_call(certificate: x509.Certificate) -> bool:
    """Whether a certificate may be used by a TLS client: it says so, or does not restrict its use."""
    try:
        usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    except x509.ExtensionNotFound:
        return True
    return ExtendedKeyUsageOID.CLIENT_AUTH in usage or _ANY_PURPOSE in usage
