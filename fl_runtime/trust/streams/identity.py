"""Authentication of secure streams: each site signs its key of the stream with its certificate.

Format of a signed key: a JSON object with key (hexadecimal), signature (hexadecimal, ECDSA with SHA-256) and
certificate (PEM, and after it those that lead to the root). The signature covers "fl-adapters stream key 1", sender,
receiver, the stream's name and the public key, separated by zero bytes. It is therefore valid for one stream between
two sites only.
"""

from __future__ import annotations

import json
from pathlib import Path

from fl_runtime.errors import ConnectionLostError
from fl_runtime.text import parse_json
from fl_runtime.trust.streams.kit_signatures import KitSignatures

_PURPOSE = b"fl-adapters stream key 1"


class StreamIdentity:
    """Signs this site's stream keys, and verifies those of other sites of the federation.

    Args:
        folder: Startup kit of this site.

    Raises:
        ConfigError: If the kit is not valid.
    """

    def __init__(self, folder: Path) -> None:
        self._signatures = KitSignatures(folder)

    def signed(self, public: bytes, peer: str, stream: str) -> bytes:
        """Sign a public key.

        Args:
            public: This end's public key.
            peer: Name of the site that it is sent to.
            stream: Name of the stream.

        Returns:
            The message to send.
        """
        chain = self._signatures.certificate
        signature = self._signatures.sign(_statement(public, self._signatures.site, peer, stream))
        return json.dumps({"key": public.hex(), "signature": signature.hex(), "certificate": chain.decode()}).encode()

    def checked(self, message: bytes, peer: str, stream: str) -> bytes:
        """Verify a signed public key.

        Args:
            message: The message as received.
            peer: Name of the site that should have sent it.
            stream: Name of the stream.

        Returns:
            The other end's public key.

        Raises:
            ConnectionLostError: If that site of this federation did not sign it for this stream and this site.
        """
        try:
            fields = parse_json(message, limit_chars=2**16)
            public, signature = bytes.fromhex(fields["key"]), bytes.fromhex(fields["signature"])
            chain = str(fields["certificate"]).encode()
        except (ValueError, KeyError, TypeError):
            public = signature = chain = b""
        statement = _statement(public, peer, self._signatures.site, stream)
        match self._signatures.fault(peer, statement, signature, chain):
            case "revoked":
                raise ConnectionLostError(
                    f"the key for the stream {stream} is signed with a certificate of the site {peer} that was revoked",
                    fix=f"{peer} needs a new certificate; the server should not have let it take part: ask who runs it",
                )
            case "other":
                raise ConnectionLostError(
                    f"the key for the stream {stream} is not signed by the site {peer}",
                    fix="the server, or someone on the way to it, may be trying to read the stream: ask who runs it",
                )
        return public


def _statement(public: bytes, sender: str, receiver: str, stream: str) -> bytes:
    return b"\0".join([_PURPOSE, sender.encode(), receiver.encode(), stream.encode(), public])
