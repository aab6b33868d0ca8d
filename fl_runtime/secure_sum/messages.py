"""Messages of secure sums: JSON objects with a version, a kind, and bytes in base64. All is checked when it is read."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from fl_runtime.errors import ProtocolError
from fl_runtime.secure_sum.primitives import KEY_BYTES, SEAL_BYTES, SEED_BYTES, SIGNATURE_BYTES
from fl_runtime.secure_sum.shamir import PRIME, SHARE_BYTES
from fl_runtime.text import parse_json, printable

VERSION = 1
SEALED_BYTES = 2 * SHARE_BYTES + SEAL_BYTES
DIGEST_BYTES = 32
_MAX_KEYS_CHARS = 2**16
_CHARS_A_SITE = 1024  # a name of 200 characters, escaped, and its bytes
_MAX_SIGNATURE_BYTES, _MAX_CERTIFICATE_BYTES = 512, 2**15
_MAX_INTEGER = 2**53


@dataclass(frozen=True)
class KeysMessage:
    """The public keys of a site for one run.

    Attributes:
        site: Name of the site.
        attempt: Number of its process in the run.
        exchange: Public X25519 key.
        signing: Public Ed25519 key.
        signature: Signature of both with the site's certificate; empty in a simulation.
        certificate: The certificate as PEM, and after it those that lead to the root; empty in a simulation.
    """

    site: str
    attempt: int
    exchange: bytes
    signing: bytes
    signature: bytes = b""
    certificate: bytes = b""

    def encode(self) -> bytes:
        """Return the message as bytes."""
        return _encode(
            "keys",
            site=self.site,
            attempt=self.attempt,
            exchange=_text(self.exchange),
            signing=_text(self.signing),
            signature=_text(self.signature),
            certificate=_text(self.certificate),
        )

    @classmethod
    def parse(cls, site: str, data: bytes) -> KeysMessage:
        """Read the message that a site sent. Raises ProtocolError if it is not one of that site."""
        reader = _Reader("keys", site, data, _MAX_KEYS_CHARS)
        reader.equal("site", site)
        return cls(
            site,
            reader.integer("attempt"),
            reader.binary("exchange", KEY_BYTES),
            reader.binary("signing", KEY_BYTES),
            reader.binary("signature", most=_MAX_SIGNATURE_BYTES),
            reader.binary("certificate", most=_MAX_CERTIFICATE_BYTES),
        )


@dataclass(frozen=True)
class SharesMessage:
    """What a site sends at the beginning of a stage.

    Attributes:
        roster: Digest of the participants and their keys, as the site was told.
        threshold: Number of shares that open one of its secrets.
        commitment: SHA-256 that its seed b has.
        pairs: Its pair seeds in order of the neighbours' names, encrypted with K.
        sealed: Holder -> its shares of b and K, encrypted for it.
    """

    roster: bytes
    threshold: int
    commitment: bytes
    pairs: bytes
    sealed: Mapping[str, bytes]

    def encode(self, round: int, stage: str) -> bytes:
        """Return the message as bytes, for one stage of a round."""
        return _encode(
            "shares",
            round=round,
            stage=stage,
            roster=_text(self.roster),
            threshold=self.threshold,
            commitment=_text(self.commitment),
            pairs=_text(self.pairs),
            sealed={name: _text(each) for name, each in self.sealed.items()},
        )

    @classmethod
    def parse(cls, site: str, data: bytes, round: int, stage: str, sites: int) -> SharesMessage:
        """Read the message that a site sent in a stage with so many sites. Raises ProtocolError if it is not one."""
        reader = _Reader("shares", site, data, _limit(sites))
        reader.stage(round, stage)
        return cls(
            reader.binary("roster", DIGEST_BYTES),
            reader.integer("threshold"),
            reader.binary("commitment", DIGEST_BYTES),
            reader.binary("pairs", most=sites * SEED_BYTES + SEAL_BYTES),
            reader.binaries("sealed", SEALED_BYTES),
        )


@dataclass(frozen=True)
class RevealMessage:
    """The shares that a site reveals at the end of a stage.

    Attributes:
        agreement: Digest of the survivors that it has signed.
        own: Survivor -> share of its seed b.
        pairs: Dropped site -> share of its key K.
    """

    agreement: bytes
    own: Mapping[str, int]
    pairs: Mapping[str, int]

    def encode(self, round: int, stage: str) -> bytes:
        """Return the message as bytes, for one stage of a round."""
        kinds = {"own": self.own, "pairs": self.pairs}
        shares = {
            kind: {name: _text(share.to_bytes(SHARE_BYTES, "big")) for name, share in of.items()}
            for kind, of in kinds.items()
        }
        return _encode("reveal", round=round, stage=stage, agreement=_text(self.agreement), **shares)

    @classmethod
    def parse(cls, site: str, data: bytes, round: int, stage: str, sites: int) -> RevealMessage:
        """Read the message that a site sent in a stage with so many sites. Raises ProtocolError if it is not one."""
        reader = _Reader("reveal", site, data, _limit(sites))
        reader.stage(round, stage)
        own, pairs = (
            {name: reader.share(each) for name, each in reader.binaries(kind, SHARE_BYTES).items()}
            for kind in ("own", "pairs")
        )
        return cls(reader.binary("agreement", DIGEST_BYTES), own, pairs)


def checked_signature(site: str, data: bytes) -> bytes:
    """Return the signature of survivors that a site sent. Raises ProtocolError if it has the wrong length."""
    if len(data) != SIGNATURE_BYTES:
        raise ProtocolError(f"the signature of {site} for a secure sum has {len(data)} bytes, not {SIGNATURE_BYTES}")
    return bytes(data)


class _Reader:
    """The fields of one message, checked one by one."""

    def __init__(self, kind: str, site: str, data: bytes, limit: int) -> None:
        self._about = f"the message '{kind}' of {site} for a secure sum"
        try:
            fields = parse_json(bytes(data), limit_chars=limit, depth=3)
        except ValueError as error:
            self.refuse(f"is not readable: {error}")
        if not isinstance(fields, dict):
            self.refuse("is not a JSON object")
        self._fields: dict[str, Any] = fields
        if fields.get("version") != VERSION or fields.get("kind") != kind:
            self.refuse(f"has version {printable(repr(fields.get('version')), 50)} or another kind")

    def refuse(self, what: str) -> NoReturn:
        raise ProtocolError(f"{self._about} {what}", fix="it is left out of this round; look at that site's log")

    def equal(self, name: str, expected: object) -> None:
        found = self._fields.get(name)
        if found != expected or isinstance(found, bool):
            self.refuse(f"says {name} {printable(repr(found), 100)}, not {expected!r}")

    def stage(self, round: int, stage: str) -> None:
        self.equal("round", round)
        self.equal("stage", stage)

    def integer(self, name: str) -> int:
        found = self._fields.get(name)
        if not isinstance(found, int) or isinstance(found, bool) or not 0 <= found <= _MAX_INTEGER:
            self.refuse(f"has no whole number {name}")
        return found

    def binary(self, name: str, size: int | None = None, most: int = 0) -> bytes:
        return self._decoded(name, self._fields.get(name), size, most)

    def binaries(self, name: str, size: int) -> dict[str, bytes]:
        found = self._fields.get(name)
        if not isinstance(found, dict):
            self.refuse(f"has no object {name}")
        return {each: self._decoded(name, text, size, 0) for each, text in found.items()}

    def share(self, data: bytes) -> int:
        value = int.from_bytes(data, "big")
        if value >= PRIME:
            self.refuse("has a share that is out of range")
        return value

    def _decoded(self, name: str, text: object, size: int | None, most: int) -> bytes:
        try:
            data = base64.b64decode(text if isinstance(text, str) else "?", validate=True)
        except ValueError:
            self.refuse(f"has no bytes {name}")
        if len(data) != size if size is not None else len(data) > most:
            self.refuse(f"has {len(data)} bytes in {name}")
        return data


def _limit(sites: int) -> int:
    return 4096 + _CHARS_A_SITE * sites


def _encode(kind: str, **fields: object) -> bytes:
    return json.dumps({"version": VERSION, "kind": kind, **fields}, separators=(",", ":")).encode()


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()
