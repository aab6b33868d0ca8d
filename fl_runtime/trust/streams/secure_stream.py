"""Secure streams: encryption between two sites, so that the server that relays a stream cannot read it.

Protocol, over a stream of messages:

1. Each end makes an X25519 key pair for this stream and sends the public key (32 bytes). With startup kits, the key is
   signed with the site's certificate (see identity.py), so the server cannot replace it. In a simulation it is
   not signed: the server cannot listen, but it could impersonate a site.
2. HKDF-SHA256 derives 64 bytes from the shared secret. Salt: "fl-adapters stream 1". Info: the two site names in order,
   separated by a zero byte, a zero byte, the stream's name, and the two public keys in the order of the names. The
   first 32 bytes are the key of the site whose name comes first, the rest that of the other site.
3. Every message is encrypted with ChaCha20-Poly1305 and the sender's key. The nonce is the number of the message in
   this direction, from 1, 12 bytes, big endian. So changed, dropped, repeated and reordered messages are detected.

The primitives are those of `cryptography`. A library for the Noise protocol would replace about 60 lines, but
`noiseprotocol` has had no release since 0.3.1 of 2020. TLS from the standard library (`ssl.MemoryBIO`) needs a
certificate at one end, which simulations do not have.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Protocol

from fl_runtime.errors import ConfigError, ConnectionLostError

if TYPE_CHECKING:
    from fl_runtime.trust.streams.identity import StreamIdentity

_SALT = b"fl-adapters stream 1"
_KEY_BYTES = 32


class Messages(Protocol):
    """An ordered stream of messages to another site, such as `fl_runtime.transport.tunnel.Stream`.

    Attributes:
        peer: Name of the site at the other end.
        name: What the stream is for.
    """

    peer: str
    name: str

    def send(self, data: bytes) -> None:
        """Send one message to the peer."""
        ...

    def receive(self) -> bytes:
        """Return the next message, or b"" at the end of the stream."""
        ...

    def close(self) -> None:
        """Close both directions of the stream."""
        ...


def check_available(me: str) -> None:
    """Check that streams can be encrypted.

    Args:
        me: Name of this site, for the error message.

    Raises:
        ConfigError: If the package `cryptography` is not installed.
    """
    if find_spec("cryptography") is None:
        raise ConfigError(
            "streams between sites are encrypted, which needs the package cryptography; it is not installed",
            where=me,
            fix="pip install cryptography",
        )


class SecureStream:
    """An encrypted stream to another site, over a stream that others can read.

    Making one sends this end's public key. Call `meet` once before `send` and `receive`.

    Args:
        inner: The stream to encrypt.
        me: Name of this site.
        identity: Signs this end's key and verifies the other's; None in a simulation.

    Attributes:
        peer: Name of the site at the other end.
        name: What the stream is for.

    Raises:
        ConfigError: If the package `cryptography` is not installed.
    """

    def __init__(self, inner: Messages, me: str, identity: StreamIdentity | None = None) -> None:
        check_available(me)
        from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

        self.peer, self.name = inner.peer, inner.name
        self._inner, self._me, self._identity = inner, me, identity
        self._private = X25519PrivateKey.generate()
        self._public = self._private.public_key().public_bytes_raw()
        self._sending, self._receiving = _Direction(), _Direction()
        inner.send(identity.signed(self._public, inner.peer, inner.name) if identity else self._public)

    def meet(self) -> None:
        """Wait for the other end's key and derive the keys of the stream.

        Raises:
            ConnectionLostError: If the other end closes the stream before, or the key is not signed by that site.
        """
        from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey

        peer_key = self._inner.receive()
        if peer_key and self._identity:
            peer_key = self._identity.checked(peer_key, self.peer, self.name)
        if len(peer_key) != _KEY_BYTES:
            raise ConnectionLostError(f"{self.peer} closed the stream {self.name} before it began")
        shared = self._private.exchange(X25519PublicKey.from_public_bytes(peer_key))
        first, second = sorted([(self._me.encode(), self._public), (self.peer.encode(), peer_key)])
        context = b"\0".join([first[0], second[0], self.name.encode()]) + first[1] + second[1]
        keys = _derived(shared, context)
        sending_key, receiving_key = keys if first[0] == self._me.encode() else keys[::-1]
        self._sending.begin(sending_key)
        self._receiving.begin(receiving_key)

    def send(self, data: bytes) -> None:
        """Encrypt and send one message."""
        self._inner.send(self._sending.encrypt(data))

    def receive(self) -> bytes:
        """Receive and decrypt the next message.

        Returns:
            The message, or b"" at the end of the stream.

        Raises:
            ConnectionLostError: If the message is not the next one that the other end sent.
        """
        encrypted = self._inner.receive()
        return self._receiving.decrypt(encrypted, self.name) if encrypted else b""

    def close(self) -> None:
        """Close both directions of the stream."""
        self._inner.close()


class _Direction:
    """One direction of a stream: its key, and the number of the last message."""

    def begin(self, key: bytes) -> None:
        from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

        self._cipher, self._count = ChaCha20Poly1305(key), 0

    def encrypt(self, data: bytes) -> bytes:
        return self._cipher.encrypt(self._nonce(), data, None)

    def decrypt(self, encrypted: bytes, name: str) -> bytes:
        from cryptography.exceptions import InvalidTag

        try:
            return self._cipher.decrypt(self._nonce(), encrypted, None)
        except InvalidTag:
            raise ConnectionLostError(f"a message of the stream {name} was changed on its way") from None

    def _nonce(self) -> bytes:
        self._count += 1
        return self._count.to_bytes(12, "big")


def _derived(shared: bytes, context: bytes) -> tuple[bytes, bytes]:
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    both = HKDF(SHA256(), 2 * _KEY_BYTES, _SALT, context).derive(shared)
    return both[:_KEY_BYTES], both[_KEY_BYTES:]
