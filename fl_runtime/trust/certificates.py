"""Keys, certificates and signing requests: X.509 with P-256 keys, as PEM.

The keys are P-256 rather than Ed25519, because BoringSSL, which gRPC uses, accepts Ed25519 certificates only after a
setting that gRPC's Python interface does not offer.
"""

from __future__ import annotations

import re
import time
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

_LONGEST = 6  # certificates in a chain, with the root
_P256 = "use a P-256 key (`openssl ecparam -name prime256v1 -genkey`); if a kit was damaged, get a new startup kit"
PrivateKey = ec.EllipticCurvePrivateKey
PublicKey = ec.EllipticCurvePublicKey


@dataclass(frozen=True)
class Certificate:
    """A certificate that names one identity.

    Attributes:
        identity: Who its holder is.
        serial: Serial number.
        not_before: Start of its validity, with time zone UTC.
        not_after: End of its validity, with time zone UTC.
        fingerprint: SHA-256 of the public key, hexadecimal.
        pem: The certificate itself.
        issuer: Name of the outside authority that issued it (RFC 4514); "" for the federation's own authority.
    """

    identity: Identity
    serial: int
    not_before: datetime
    not_after: datetime
    fingerprint: str
    pem: bytes
    issuer: str = ""

    def days_left(self, now: datetime | None = None) -> float:
        """Return the number of days until it expires; negative after that.

        Args:
            now: The time to compare with; None for the current time.

        Returns:
            The number of days, with fractions.
        """
        return (self.not_after - (now or datetime.now(UTC))).total_seconds() / 86_400

    @property
    def expires_soon(self) -> bool:
        """Whether less than a third of its lifetime is left."""
        return self.days_left() * 86_400 < (self.not_after - self.not_before).total_seconds() / 3


def new_key() -> PrivateKey:
    """Make a random P-256 private key."""
    return ec.generate_private_key(ec.SECP256R1())


def key_pem(key: PrivateKey, passphrase: bytes = b"") -> bytes:
    """Return a private key as PEM (PKCS 8), encrypted if there is a passphrase."""
    encryption = serialization.BestAvailableEncryption(passphrase) if passphrase else serialization.NoEncryption()
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)


def is_encrypted(key: bytes) -> bool:
    """Whether a private key as PEM can be read with a passphrase only."""
    return b"-----BEGIN ENCRYPTED PRIVATE KEY-----" in key or b"Proc-Type: 4,ENCRYPTED" in key


def read_key(pem: bytes, where: str = "", passphrase: bytes = b"") -> PrivateKey:
    """Read a private key.

    Args:
        pem: The key.
        where: Its file, for the error message.
        passphrase: Its passphrase; empty if it is not encrypted.

    Returns:
        The key.

    Raises:
        ConfigError: If it is not a P-256 key as PEM, or the passphrase is not the key's.
    """
    encrypted = is_encrypted(pem)
    try:
        key = serialization.load_pem_private_key(pem, passphrase if encrypted else None)
    except (ValueError, TypeError):
        key = None
    if encrypted and key is None:
        raise ConfigError("this passphrase does not open the private key", where=where, fix="check the passphrase")
    if not isinstance(key, PrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        raise ConfigError("this is not a P-256 private key in PEM", where=where, fix=_P256)
    return key


@lru_cache(maxsize=4096)
def read_certificate(pem: bytes) -> Certificate:
    """Read the identity and dates of a certificate. It does not check who signed it; see `check_issued_by`.

    Args:
        pem: The certificate.

    Returns:
        What the certificate says.

    Raises:
        ConfigError: If it is not a certificate.
        PermissionDeniedError: If it does not carry exactly one identity.
    """
    certificate = load(pem)
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        (uri,) = names.get_values_for_type(x509.UniformResourceIdentifier)
    except (x509.ExtensionNotFound, ValueError):
        raise PermissionDeniedError(
            "the certificate does not name its holder", fix="use a certificate made by fl-adapters"
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
    """Parse a certificate.

    Args:
        pem: The certificate.
        where: Its file, for the error message.

    Returns:
        The certificate as an object of `cryptography`.

    Raises:
        ConfigError: If it is not a certificate as PEM.
    """
    try:
        return x509.load_pem_x509_certificate(pem)
    except ValueError:
        raise ConfigError("this is not a certificate in PEM", where=where, fix="get a new startup kit") from None


def pem_list(pem: bytes) -> list[bytes]:
    """Split a text with several certificates into one PEM text for each."""
    return [each.public_bytes(serialization.Encoding.PEM) for each in load_all(pem)]


def ends(pem: bytes) -> datetime:
    """Return the time (UTC) at which any certificate expires, also one without an identity."""
    return load(pem).not_valid_after_utc


def issuer_of(pem: bytes) -> str:
    """Return the name of a certificate's issuer (RFC 4514), as the certificate says it. Nothing is verified."""
    return load(pem).issuer.rfc4514_string()


def load_all(pem: bytes, where: str = "") -> list[x509.Certificate]:
    """Parse one certificate or more, in the order of the file. Raises ConfigError if there is none."""
    try:
        return x509.load_pem_x509_certificates(pem)
    except ValueError:
        raise ConfigError("this is not a certificate in PEM", where=where, fix="get a new startup kit") from None


def check_issued_by(pem: bytes, roots: bytes, where: str = "") -> None:
    """Check that a trusted root issued a certificate, directly or through intermediate authorities.

    It does not check the dates of the certificate itself, or revocation.

    Args:
        pem: The certificate, and after it any intermediate ones.
        roots: The trusted roots, and after them any intermediate ones.
        where: The certificate's file, for the error message.

    Raises:
        ConfigError: If none did.
    """
    load_all(pem, where)
    if not is_issued_by(pem, roots):
        raise ConfigError(
            "the certificate was not signed by this federation's authority",
            where=where,
            fix="install the certificate that the authority's `cert sign` made for this kit",
        )


def is_issued_by(pem: bytes, roots: bytes) -> bool:
    """Whether a trusted root issued a certificate, see `check_issued_by`.

    Only signatures, the intermediate certificates' dates and their right to sign are checked. As in RFC 5280, section
    6.1.1, a trusted root is a name and a key: a path length in its own certificate does not count.

    Args:
        pem: The certificate, and after it any intermediate ones.
        roots: The trusted roots, and after them any intermediate ones.

    Returns:
        Whether it did.

    Raises:
        ConfigError: If one of both is not certificates as PEM.
    """
    return _is_issued_by(pem, roots, int(time.time() // 60))


@lru_cache(maxsize=4096)
def _is_issued_by(pem: bytes, roots: bytes, minute: int) -> bool:
    """Whether a root issued a certificate. `minute` is that of the clock, since intermediate certificates expire."""
    leaf, *given = load_all(pem)
    known = load_all(roots)
    trusted = [each for each in known if is_self_signed(each)]
    between = [each for each in (*given, *known) if not is_self_signed(each)]
    return _leads_to(leaf, trusted, between, 0)


def _leads_to(
    certificate: x509.Certificate, trusted: list[x509.Certificate], between: list[x509.Certificate], below: int
) -> bool:
    if any(signed(certificate, root) for root in trusted):
        return True
    if below + 2 >= _LONGEST:
        return False
    issuers = [each for each in between if each != certificate and _may_sign(each, below) and signed(certificate, each)]
    return any(_leads_to(issuer, trusted, between, below + 1) for issuer in issuers)


def is_self_signed(certificate: x509.Certificate) -> bool:
    """Whether a certificate is signed with its own key, as those of roots are."""
    return certificate.subject == certificate.issuer and signed(certificate, certificate)


def signed(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    """Whether one certificate names another as its issuer and was signed with that one's key."""
    try:
        certificate.verify_directly_issued_by(issuer)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def _may_sign(certificate: x509.Certificate, below: int) -> bool:
    """Whether an intermediate certificate may issue others now, with so many intermediate ones below it."""
    if not certificate.not_valid_before_utc <= datetime.now(UTC) <= certificate.not_valid_after_utc:
        return False
    try:
        basic = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
        usage = certificate.extensions.get_extension_for_class(x509.KeyUsage).value
    except x509.ExtensionNotFound:
        return False
    return basic.ca and usage.key_cert_sign and (basic.path_length is None or basic.path_length >= below)


def request(key: PrivateKey, identity: Identity) -> bytes:
    """Make a certificate signing request.

    Args:
        key: The private key, which signs the request.
        identity: The identity that the certificate shall name.

    Returns:
        The request as PEM.
    """
    builder = x509.CertificateSigningRequestBuilder().subject_name(subject(identity.name))
    names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(identity.uri)])
    signed = builder.add_extension(names, critical=False).sign(key, hashes.SHA256())
    return signed.public_bytes(serialization.Encoding.PEM)


def read_request(pem: bytes, where: str = "") -> tuple[Identity, PublicKey]:
    """Read a certificate signing request.

    Args:
        pem: The request.
        where: Its file, for the error message.

    Returns:
        The identity that it asks for, and the public key.

    Raises:
        ConfigError: If it is not a request made by fl-adapters, or not signed by its own key.
        PermissionDeniedError: If the identity is not a valid one.
    """
    try:
        csr = x509.load_pem_x509_csr(pem)
        names = csr.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        (uri,) = names.get_values_for_type(x509.UniformResourceIdentifier)
        valid, key = csr.is_signature_valid, csr.public_key()
    except (ValueError, x509.ExtensionNotFound):
        valid, key, uri = False, None, ""
    if not valid or not isinstance(key, PublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise ConfigError(
            "this is not a signing request made by fl-adapters",
            where=where,
            fix="make one with `fl-adapters cert request`",
        )
    return Identity.from_uri(uri), key


def subject(name: str) -> x509.Name:
    """Return the X.509 subject for a name. It is for human readers; the identity is in the URI name."""
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name[:64])])


def fingerprint(key: PublicKey) -> str:
    """Return the SHA-256 of a public key, hexadecimal."""
    digest = hashes.Hash(hashes.SHA256())
    digest.update(key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo))
    return digest.finalize().hex()


def authority_fingerprint(ca_pem: bytes) -> str:
    """Return the SHA-256 of an authority's public key, hexadecimal."""
    key = load(ca_pem).public_key()
    assert isinstance(key, PublicKey)
    return fingerprint(key)


def same_fingerprint(first: str, second: str) -> bool:
    """Return whether two fingerprints are the same, whatever colons, spaces and capitals people write them with."""
    digits = [re.sub(r"[\s:]", "", text).lower() for text in (first, second)]
    return digits[0] == digits[1]


def sign(key: PrivateKey, data: bytes) -> bytes:
    """Sign data with ECDSA and SHA-256."""
    return key.sign(data, ec.ECDSA(hashes.SHA256()))


def signed_by(certificate_pem: bytes, data: bytes, signature: bytes) -> bool:
    """Verify a signature.

    Args:
        certificate_pem: Certificate of the signer.
        data: The signed data.
        signature: The signature made by `sign`.

    Returns:
        Whether the key of this certificate signed the data.

    Raises:
        ConfigError: If the certificate cannot be parsed.
    """
    key = load(certificate_pem).public_key()
    assert isinstance(key, PublicKey)
    try:
        key.verify(signature, data, ec.ECDSA(hashes.SHA256()))
    except InvalidSignature:
        return False
    return True
