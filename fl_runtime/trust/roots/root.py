"""A root: the self-signed certificate of an authority, and its key."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization

from fl_runtime.trust.certificates import PrivateKey, PublicKey, load, new_key, subject
from fl_runtime.trust.project import Project

CLOCK_SKEW = timedelta(minutes=5)
"""How long before now certificates begin, since the participants' clocks differ."""


@dataclass(frozen=True)
class Root:
    """A root: a certificate that is signed with its own key, and the key.

    Attributes:
        pem: The certificate.
        key: The private key.
    """

    pem: bytes
    key: PrivateKey = field(repr=False)

    @classmethod
    def make(cls, project: Project, number: str) -> Root:
        """Make a new key and its certificate.

        Args:
            project: The federation's project, which has its name and the lifetime.
            number: Distinguishes the certificate's name from those of earlier roots; "" for the first one.

        Returns:
            The root.
        """
        key = new_key()
        name = subject(f"{project.federation[:50]} authority {number}".rstrip())
        return cls(certificate_of_root(key.public_key(), name, Root(b"", key), name, project.authority_days), key)

    def cross_sign(self, other: Root) -> bytes:
        """Certify the key of another root, until the earlier of both ends.

        Args:
            other: The other root.

        Returns:
            The certificate as PEM.
        """
        mine, theirs = load(self.pem), load(other.pem)
        ends = min(mine.not_valid_after_utc, theirs.not_valid_after_utc)
        days = (ends - datetime.now(UTC)).total_seconds() / 86_400
        return certificate_of_root(other.key.public_key(), theirs.subject, self, mine.subject, days)


def certificate_of_root(key: PublicKey, name: x509.Name, signer: Root, issuer: x509.Name, days: float) -> bytes:
    """Return a certificate as PEM for the key of a root.

    Args:
        key: The root's public key.
        name: The root's name.
        signer: Whose key signs: the root itself, or another one.
        issuer: The signer's name.
        days: Lifetime in days.
    """
    now = datetime.now(UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_SKEW)
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(key_usage(authority=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.key.public_key()), critical=False)
    )
    return builder.sign(signer.key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def key_usage(*, authority: bool) -> x509.KeyUsage:
    """Return the key usage of a root's certificate, or of a participant's."""
    return x509.KeyUsage(
        digital_signature=not authority,
        key_cert_sign=authority,
        crl_sign=authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
