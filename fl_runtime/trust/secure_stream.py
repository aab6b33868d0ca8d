"""Streams between two sites that the server in the middle cannot read.

X25519 keys made for each stream, HKDF-SHA256, ChaCha20-Poly1305 with a key and a counter per direction: what is
changed, left out, repeated or put in another order is noticed and ends the stream. The keys come through the server.
In a federation of startup kits they are signed with the sites' certificates, so the server cannot put its own in
between; in a simulation, where there are none, it is only kept from listening.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Protocol

from fl_runtime.errors import ConfigError, ConnectionLostError

if TYPE_CHECKING:
    from fl_runtime.trust.stream_identity import StreamIdentity

_SALT = b"fl-adapters stream 1"
_KEY_BYTES = 32


class Messages(Protocol):
    """What is sealed: whole messages, in order (fl_runtime.transport.tunnel.Stream)."""

    peer: str
    name: str

    def send(self, data: bytes) -> None: ...
    def receive(self) -> bytes: ...
    def close(self) -> None: ...


def check_available(me: str) -> None:
    """ConfigError where streams cannot be sealed, for want of a package. me: the site."""
    if find_spec("cryptography") is None:
        raise ConfigError(
            "streams between sites are encrypted, and the package cryptography is not installed",
            where=me,
            fix="pip install cryptography",
        )


class SecureStream:
    """The same verbs. The first `send` or `receive` waits for the other end's key."""

    def __init__(self, inner: Messages, me: str, identity: StreamIdentity | None = None) -> None:
        """Sends this end's key, signed by `identity`. ConfigError where `cryptography` is not installed."""
        check_available(me)
        from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

        self.peer, self.name = inner.peer, inner.name
        self._inner, self._me, self._identity = inner, me, identity
        self._private = X25519PrivateKey.generate()
        self._public = self._private.public_key().public_bytes_raw()
        self._sending, self._receiving = _Counter(), _Counter()
        inner.send(identity.signed(self._public, inner.peer, inner.name) if identity else self._public)

    def meet(self) -> None:
        """Wait for the other end's key. ConnectionLostError if it hangs up before, or if the key is not the other
        site's. Call it once, before the rest."""
        from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey

        theirs = self._inner.receive()
        if theirs and self._identity:
            theirs = self._identity.checked(theirs, self.peer, self.name)
        if len(theirs) != _KEY_BYTES:
            raise ConnectionLostError(f"{self.peer} has hung up before the stream {self.name} began")
        shared = self._private.exchange(X25519PublicKey.from_public_bytes(theirs))
        first, second = sorted([(self._me.encode(), self._public), (self.peer.encode(), theirs)])
        context = b"\0".join([first[0], second[0], self.name.encode()]) + first[1] + second[1]
        keys = _derived(shared, context)
        mine, other = keys if first[0] == self._me.encode() else keys[::-1]
        self._sending.begin(mine)
        self._receiving.begin(other)

    def send(self, data: bytes) -> None:
        self._inner.send(self._sending.encrypt(data))

    def receive(self) -> bytes:
        """The next message; b"" at the end. ConnectionLostError for one that is not the other end's."""
        sealed = self._inner.receive()
        return self._receiving.decrypt(sealed, self.name) if sealed else b""

    def close(self) -> None:
        self._inner.close()


class _Counter:
    """One direction: a key, and a number for each message."""

    def begin(self, key: bytes) -> None:
        from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

        self._cipher, self._count = ChaCha20Poly1305(key), 0

    def encrypt(self, data: bytes) -> bytes:
        return self._cipher.encrypt(self._nonce(), data, None)

    def decrypt(self, sealed: bytes, name: str) -> bytes:
        from cryptography.exceptions import InvalidTag

        try:
            return self._cipher.decrypt(self._nonce(), sealed, None)
        except InvalidTag:
            raise ConnectionLostError(f"the stream {name} was changed on its way") from None

    def _nonce(self) -> bytes:
        self._count += 1
        return self._count.to_bytes(12, "big")


def _derived(shared: bytes, context: bytes) -> tuple[bytes, bytes]:
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    both = HKDF(SHA256(), 2 * _KEY_BYTES, _SALT, context).derive(shared)
    return both[:_KEY_BYTES], both[_KEY_BYTES:]
