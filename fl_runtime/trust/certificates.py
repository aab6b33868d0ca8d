"""Keys, certificates and requests: X.509 with P-256 keys. PEM everywhere.

P-256 rather than Ed25519, because BoringSSL, on which gRPC stands, takes no Ed25519 certificate unless told to,
which gRPC's Python side cannot.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from fl_runtime.errors import ConfigError, PermissionDeniedError
from fl_runtime.trust.identity import Identity

PrivateKey = ec.EllipticCurvePrivateKey
PublicKey = ec.EllipticCurvePublicKey


@dataclass(frozen=True)
class Certificate:
    """A certificate that carries an identity. Times are aware, in UTC. fingerprint: SHA-256 of the public key."""

    identity: Identity
    serial: int
    not_before: datetime
    not_after: datetime
    fingerprint: str
    pem: bytes

    def days_left(self, now: datetime | None = None) -> float:
        """Days until it expires; negative once it has."""
        return (self.not_after - (now or datetime.now(UTC))).total_seconds() / 86_400

    @property
    def expires_soon(self) -> bool:
        """Less than a third of its lifetime is left."""
        return self.days_left() * 86_400 < (self.not_after - self.not_before).total_seconds() / 3


def new_key() -> PrivateKey:
    """A fresh P-256 key."""
    return ec.generate_private_key(ec.SECP256R1())


def key_pem(key: PrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def read_key(pem: bytes, where: str = "") -> PrivateKey:
    """The private key in `pem`. ConfigError where there is none of our kind."""
    try:
        key = serialization.load_pem_private_key(pem, None)
    except (ValueError, TypeError):
        key = None
    if not isinstance(key, PrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        raise ConfigError("this is no P-256 private key in PEM", where=where, fix="get a fresh startup kit")
    return key


@lru_cache(maxsize=4096)
def read_certificate(pem: bytes) -> Certificate:
    """The identity and dates of a certificate. Says nothing about who signed it: see `check_issued_by`.

    Raises PermissionDeniedError for one that does not carry exactly one identity.
    """
    certificate = load(pem)
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        (uri,) = names.get_values_for_type(x509.UniformResourceIdentifier)
    except (x509.ExtensionNotFound, ValueError):
        raise PermissionDeniedError(
            "the certificate does not say who its holder is", fix="use a certificate made by fl-adapters"
        ) from None
    return Certificate(
        identity=Identity.from_uri(uri),
        serial=certificate.serial_number,
        not_before=certificate.not_valid_before_utc,
        not_after=certificate.not_valid_after_utc,
        fingerprint=fingerprint(certificate.public_key()),  # type: ignore[arg-type]
        pem=pem,
    )


def load(pem: bytes, where: str = "") -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(pem)
    except ValueError:
        raise ConfigError("this is no certificate in PEM", where=where, fix="get a fresh startup kit") from None


def ends(pem: bytes) -> datetime:
    """When a certificate of whatever kind expires, in UTC."""
    return load(pem).not_valid_after_utc


def check_issued_by(pem: bytes, authority_pem: bytes, where: str = "") -> None:
    """ConfigError unless the authority has signed this certificate."""
    try:
        load(pem, where).verify_directly_issued_by(load(authority_pem))
    except (ValueError, TypeError, InvalidSignature):
        raise ConfigError(
            "the certificate was not signed by this federation's authority",
            where=where,
            fix="install the certificate that the authority's `cert sign` made for this kit",
        ) from None


def request(key: PrivateKey, identity: Identity) -> bytes:
    """A signing request: the public key and the identity asked for, signed by the key."""
    builder = x509.CertificateSigningRequestBuilder().subject_name(subject(identity.name))
    names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(identity.uri)])
    signed = builder.add_extension(names, critical=False).sign(key, hashes.SHA256())
    return signed.public_bytes(serialization.Encoding.PEM)


def read_request(pem: bytes, where: str = "") -> tuple[Identity, PublicKey]:
    """Who asks, and for which key. ConfigError unless the request is signed by that key."""
    try:
        asked = x509.load_pem_x509_csr(pem)
        names = asked.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        (uri,) = names.get_values_for_type(x509.UniformResourceIdentifier)
        valid, key = asked.is_signature_valid, asked.public_key()
    except (ValueError, x509.ExtensionNotFound):
        valid, key, uri = False, None, ""
    if not valid or not isinstance(key, PublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise ConfigError(
            "this is no signing request of fl-adapters", where=where, fix="make one with `fl-adapters cert request`"
        )
    return Identity.from_uri(uri), key


def subject(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name[:64])])


def fingerprint(key: PublicKey) -> str:
    """SHA-256 of the public key, in hexadecimal."""
    digest = hashes.Hash(hashes.SHA256())
    digest.update(key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo))
    return digest.finalize().hex()


def sign(key: PrivateKey, data: bytes) -> bytes:
    return key.sign(data, ec.ECDSA(hashes.SHA256()))


def signed_by(certificate_pem: bytes, data: bytes, signature: bytes) -> bool:
    """Whether the holder of the certificate's key has signed `data`."""
    key = load(certificate_pem).public_key()
    assert isinstance(key, PublicKey)
    try:
        key.verify(signature, data, ec.ECDSA(hashes.SHA256()))
    except InvalidSignature:
        return False
    return True
