"""Keys, key derivation and encryption of secure sums, by the package `cryptography`.

X25519 (RFC 7748), HKDF with SHA-256 (RFC 5869), ChaCha20-Poly1305 (RFC 8439), Ed25519 (RFC 8032).
"""

from __future__ import annotations

import hmac
import secrets
from importlib.util import find_spec

from fl_runtime.errors import ConfigError

SEED_BYTES = 32
KEY_BYTES = 32
SIGNATURE_BYTES = 64
_NONCE_BYTES = 12
SEAL_BYTES = _NONCE_BYTES + 16
"""By how much encryption makes a text longer: a random nonce before it, the tag after it."""
_SALT = b"fl-adapters secure sum 1"


def check_available(where: str) -> None:
    """Check that secure sums can be computed.

    Args:
        where: Who wants to, for the error message.

    Raises:
        ConfigError: If the package `cryptography` is not installed.
    """
    if find_spec("cryptography") is None:
        raise ConfigError(
            "a secure sum needs the package cryptography, which is not installed",
            where=where,
            fix="pip install cryptography",
        )


class RunKeys:
    """The two key pairs that a site has for one run.

    Attributes:
        exchange: Public X25519 key, 32 bytes.
        signing: Public Ed25519 key, 32 bytes.
    """

    def __init__(self) -> None:
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
        from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

        self._exchange, self._signing = X25519PrivateKey.generate(), Ed25519PrivateKey.generate()
        self.exchange = self._exchange.public_key().public_bytes_raw()
        self.signing = self._signing.public_key().public_bytes_raw()

    def shared(self, public: bytes) -> bytes:
        """Return the secret shared with the holder of an X25519 key. Raises ValueError if the key is a weak one."""
        from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey

        return self._exchange.exchange(X25519PublicKey.from_public_bytes(public))

    def sign(self, statement: bytes) -> bytes:
        """Return the Ed25519 signature of a statement, 64 bytes."""
        return self._signing.sign(statement)


def is_signed(public: bytes, statement: bytes, signature: bytes) -> bool:
    """Whether the holder of an Ed25519 key has signed a statement."""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, statement)
    except (InvalidSignature, ValueError):
        return False
    return True


def new_seed() -> bytes:
    """Return 32 random bytes."""
    return secrets.token_bytes(SEED_BYTES)


def extract(secret: bytes) -> bytes:
    """Return a random key from a secret: HKDF-Extract with SHA-256 and the salt "fl-adapters secure sum 1"."""
    return hmac.digest(_SALT, secret, "sha256")


def expand(key: bytes, purpose: bytes) -> bytes:
    """Return a key of 32 bytes from a random key: the first block of HKDF-Expand (RFC 5869, section 2.3)."""
    return hmac.digest(key, purpose + b"\x01", "sha256")


def seal(key: bytes, data: bytes, purpose: bytes) -> bytes:
    """Encrypt data with ChaCha20-Poly1305; `purpose` is authenticated with it and does not travel."""
    from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

    nonce = secrets.token_bytes(_NONCE_BYTES)
    return nonce + ChaCha20Poly1305(key).encrypt(nonce, data, purpose)


def unseal(key: bytes, sealed: bytes, purpose: bytes) -> bytes:
    """Decrypt what `seal` returned. Raises ValueError if it was changed, or sealed for another purpose."""
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

    try:
        return ChaCha20Poly1305(key).decrypt(sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], purpose)
    except InvalidTag:
        raise ValueError("this was not encrypted with the key, or not for this purpose") from None
