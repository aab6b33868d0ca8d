"""The format of an audit log.

audit.jsonl has one JSON object a line:

    number    number of the line, from 1. It continues behind lines that were lost
    before    digest of the line before; 64 zeros in the first line
    time      ISO 8601, UTC, milliseconds
    who       identity (URI) of the caller; empty for the process itself
    action    what was asked for
    outcome   "done" or "refused"
    rule, error   of a refusal: the rule that applied, and the message
    ...       further facts of the action
    format    number of the format, if it is not 1
    seal      HMAC-SHA256 (hexadecimal) of the fields above, with a key made of the kit's private key. By it the owner
              knows its own line, even if it is not signed yet
    digest    SHA-256 (hexadecimal) of the other fields
    (both of JSON with sorted keys, without blanks, in ASCII)

A line that is edited, removed or moved breaks the chain of digests. Removing lines from the end would not, and anyone
with write access could make a new chain. Therefore audit.head and log-counter.json name the last line, signed with the
kit's private key: each holds a JSON object with number, digest, signature (base64, ECDSA with SHA-256 over
"NUMBER DIGEST") and certificate (PEM), filled up with blanks. They are equal but for a process killed between the two.

Where the log is not what was signed, the next line has the action "audit log damaged": `problem` says what happened,
and its number is the highest that was ever signed plus 1.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fl_runtime.errors import FederationError
from fl_runtime.trust.certificates import signed_by
from fl_runtime.version import check_format

LOG_FILE, HEAD_FILE, COUNTER_FILE = "audit.jsonl", "audit.head", "log-counter.json"
DAMAGED = "audit log damaged"
NOTED = "log noted"
_HEAD_BYTES = 4096
_FORMAT = 1  # of a line without a number


@dataclass(frozen=True)
class LineMark:
    """Number and digest of a line of an audit log, which fix all lines up to it.

    Attributes:
        number: Number of the line; 0 for the beginning of the log.
        digest: Digest of the line, 64 hexadecimal digits.
    """

    number: int
    digest: str

    @classmethod
    def of(cls, fields: object) -> LineMark | None:
        """Read a mark that came from the network or a file.

        Args:
            fields: A JSON object with number and digest.

        Returns:
            The mark, or None if it is none.
        """
        number, digest = (fields.get("number"), fields.get("digest")) if isinstance(fields, dict) else (None, None)
        if type(number) is not int or not 0 <= number < 2**53 or not isinstance(digest, str) or len(digest) != 64:
            return None
        return cls(number, digest) if set(digest) <= set("0123456789abcdef") else None

    def to_json(self) -> dict[str, Any]:
        """Return the mark as JSON values, which `of` reads."""
        return {"number": self.number, "digest": self.digest}


BEGIN = LineMark(0, "0" * 64)


@dataclass(frozen=True)
class Head:
    """The signed name of the last line.

    Attributes:
        mark: The line.
        signature: ECDSA with SHA-256 of the kit's private key.
        certificate: Certificate of the signer, as PEM.
    """

    mark: LineMark
    signature: bytes
    certificate: bytes

    @classmethod
    def read(cls, data: bytes) -> Head | None:
        """Read a head, without checking its signature. Returns None if it is none."""
        try:
            fields = json.loads(data)
            mark = LineMark.of(fields)
            signature, certificate = base64.b64decode(fields["signature"]), str(fields["certificate"]).encode()
        except (ValueError, KeyError, TypeError, RecursionError):
            return None
        return None if mark is None else cls(mark, signature, certificate)

    def to_bytes(self) -> bytes:
        """Return the contents of its file: of constant length, so that a kill leaves the old or the new ones."""
        signature, certificate = base64.b64encode(self.signature).decode(), self.certificate.decode()
        text = json.dumps({**self.mark.to_json(), "signature": signature, "certificate": certificate})
        return text.encode().ljust(-(-len(text) // _HEAD_BYTES) * _HEAD_BYTES)

    @property
    def valid(self) -> bool:
        """Whether the key of its certificate signed it. Says nothing about whose certificate it is."""
        try:
            return signed_by(self.certificate, signed_text(self.mark), self.signature)
        except (FederationError, ValueError, AssertionError):
            return False


def signed_text(mark: LineMark) -> bytes:
    """Return what is signed of a line."""
    return f"{mark.number} {mark.digest}".encode()


def canonical(fields: Mapping[str, Any]) -> bytes:
    """Return the text of which digests and seals are made."""
    return json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()


def digest_of(fields: Mapping[str, Any]) -> str:
    """Return the digest of a line's fields, which are without `digest`."""
    return hashlib.sha256(canonical(fields)).hexdigest()


def seal_of(fields: Mapping[str, Any], key: bytes) -> str:
    """Return the seal of a line's fields, which are without `seal` and `digest`."""
    return hmac.digest(key, canonical(fields), "sha256").hex()


def is_sealed(fields: Mapping[str, Any], key: bytes) -> bool:
    """Whether the owner of a key has sealed a line."""
    covered = {name: value for name, value in fields.items() if name not in ("seal", "digest")}
    return hmac.compare_digest(str(fields.get("seal", "")), seal_of(covered, key))


def parsed(line: bytes) -> Any:
    """Return the fields of a line; anything else if it is no entry.

    Args:
        line: The line.

    Raises:
        ValueError: It is no JSON.
        NewerFormatError: A later version wrote it.
    """
    fields = json.loads(line)
    if isinstance(fields, dict):
        where = f"line {str(fields.get('number'))[:20]}"
        check_format(fields.get("format"), _FORMAT, "the audit log", where=where, version=fields.get("version"))
    return fields


def checked_line(line: bytes, previous: LineMark) -> tuple[str, Mapping[str, Any]]:
    """Check a line.

    Args:
        line: The line.
        previous: The line before it. An empty digest if that one cannot be read.

    Returns:
        The problem, empty if there is none, and the fields of the line, empty if it cannot be read.

    Raises:
        NewerFormatError: A later version wrote the line.
    """
    try:
        fields = parsed(line)
        covered = {name: value for name, value in fields.items() if name != "digest"}
        mark = LineMark.of(fields)
    except (ValueError, AttributeError, RecursionError):
        mark = None
    if mark is None:
        return "is not an entry", {}
    if mark.digest != digest_of(covered):
        return "was edited", fields
    follows = mark.number == previous.number + 1 or (mark.number > previous.number and fields.get("action") == DAMAGED)
    if not follows or fields.get("before") != previous.digest:
        return "does not follow the line before it: one was removed, added or moved", fields
    return "", fields


def next_mark(fields: Mapping[str, Any], previous: LineMark) -> LineMark:
    """Return the mark of a line with these fields, by which the line after it is checked."""
    return LineMark.of(fields) or LineMark(previous.number + 1, "")
