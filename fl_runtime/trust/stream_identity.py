"""Who is at the other end of a stream between two sites: keys of streams, signed with the sites' certificates."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

from fl_runtime.errors import ConnectionLostError, FederationError
from fl_runtime.trust.certificates import check_issued_by, read_certificate, read_key, sign, signed_by
from fl_runtime.trust.kits import CA, KEY, read_kit

_PURPOSE = b"fl-adapters stream key 1"


class StreamIdentity:
    """That of the site whose startup kit is in `folder`. What it signs names both ends and the stream, so that it is
    good for nothing else; the keys are made for one stream, so that saying it again is of no use to anybody."""

    def __init__(self, folder: Path) -> None:
        """Raises ConfigError for a kit that is not in order."""
        kit = read_kit(folder, kind="site")
        self._me, self._certificate = kit.identity, kit.certificate.pem
        self._key, self._authority = (
            read_key((folder / KEY).read_bytes(), str(folder / KEY)),
            (folder / CA).read_bytes(),
        )

    def signed(self, public: bytes, peer: str, stream: str) -> bytes:
        """The public key as it is sent to `peer`."""
        signature = sign(self._key, _statement(public, self._me.name, peer, stream))
        fields = {"key": public.hex(), "signature": signature.hex(), "certificate": self._certificate.decode()}
        return json.dumps(fields).encode()

    def checked(self, message: bytes, peer: str, stream: str) -> bytes:
        """The public key that `peer` has sent. ConnectionLostError unless that site of this federation signed it."""
        try:
            fields = json.loads(message)
            public, signature = bytes.fromhex(fields["key"]), bytes.fromhex(fields["signature"])
            pem = str(fields["certificate"]).encode()
            check_issued_by(pem, self._authority)
            found = read_certificate(pem)
            them, now = found.identity, datetime.now(UTC)
            good = (them.federation, them.kind, them.name) == (self._me.federation, "site", peer)
            good = good and found.not_before <= now <= found.not_after
            good = good and signed_by(pem, _statement(public, peer, self._me.name, stream), signature)
        except (ValueError, KeyError, TypeError, FederationError):
            good, public = False, b""
        if not good:
            raise ConnectionLostError(
                f"the key for the stream {stream} is not signed by the site {peer}",
                fix="the server, or somebody on the way to it, may be reading along: ask who runs it",
            )
        return public


def _statement(public: bytes, sender: str, receiver: str, stream: str) -> bytes:
    return b"\0".join([_PURPOSE, sender.encode(), receiver.encode(), stream.encode(), public])
