"""Authentication of secure streams: each site signs its key of the stream with its certificate.

Format of a signed key: a JSON object with key (hexadecimal), signature (hexadecimal, ECDSA with SHA-256) and
certificate (PEM, and after it those that lead to the root). The signature covers "fl-adapters stream key 1", sender,
receiver, the stream's name and the public key, separated by zero bytes. It is therefore valid for one stream between
two sites only.

No library replaces this: it is one signed statement over certificates that we have already. JWS (`PyJWT`, `joserfc`)
would bring a format with algorithms to choose from, and the certificate would still have to be verified here.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

from fl_runtime.errors import ConnectionLostError, FederationError
from fl_runtime.text import parse_json
from fl_runtime.trust.certificates import Certificate, read_key, sign, signed_by
from fl_runtime.trust.files import read_file
from fl_runtime.trust.kits import CRL, KEY, known_roots, read_kit
from fl_runtime.trust.revocation import RevocationList
from fl_runtime.trust.roots.outside_lists import OUTSIDE_LISTS, OutsideLists

_PURPOSE = b"fl-adapters stream key 1"


class StreamIdentity:
    """Signs this site's stream keys, and verifies those of other sites of the federation.

    Args:
        folder: Startup kit of this site.

    Raises:
        ConfigError: If the kit is not valid.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._me = read_kit(folder, kind="site").identity

    def signed(self, public: bytes, peer: str, stream: str) -> bytes:
        """Sign a public key.

        Args:
            public: This end's public key.
            peer: Name of the site that it is sent to.
            stream: Name of the stream.

        Returns:
            The message to send.
        """
        certificate = read_kit(self._folder).certificate.pem  # each time, since it may have been renewed
        key = read_key(read_file(self._folder / KEY, "private key"), str(self._folder / KEY))
        signature = sign(key, _statement(public, self._me.name, peer, stream))
        # during a rotation of the authority, the other site may not have heard of the new root
        chain = "".join([certificate.decode(), *known_roots(self._folder).crossed])
        fields = {"key": public.hex(), "signature": signature.hex(), "certificate": chain}
        return json.dumps(fields).encode()

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
            pem = str(fields["certificate"]).encode()
            certificate = known_roots(self._folder).holders.checked(pem)
            holder, now = certificate.identity, datetime.now(UTC)
            valid = (holder.federation, holder.kind, holder.name) == (self._me.federation, "site", peer)
            valid = valid and certificate.not_before <= now <= certificate.not_after
            valid = valid and signed_by(pem, _statement(public, peer, self._me.name, stream), signature)
        except (ValueError, KeyError, TypeError, AssertionError, FederationError):
            valid, public = False, b""
        if valid and self._is_revoked(certificate):
            raise ConnectionLostError(
                f"the key for the stream {stream} is signed with a certificate of the site {peer} that was revoked",
                fix=f"{peer} needs a new certificate; the server should not have let it take part: ask who runs it",
            )
        if not valid:
            raise ConnectionLostError(
                f"the key for the stream {stream} is not signed by the site {peer}",
                fix="the server, or someone on the way to it, may be trying to read the stream: ask who runs it",
            )
        return public

    def _is_revoked(self, certificate: Certificate) -> bool:
        """Whether a list in the kit has a certificate. They are read each time: newer ones may have come."""
        known = known_roots(self._folder)
        if certificate in RevocationList(self._folder / CRL, known.roots):
            return True
        return OutsideLists(self._folder / OUTSIDE_LISTS, lambda: known.outside).revokes(certificate)


def _statement(public: bytes, sender: str, receiver: str, stream: str) -> bytes:
    return b"\0".join([_PURPOSE, sender.encode(), receiver.encode(), stream.encode(), public])
