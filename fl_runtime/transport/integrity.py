"""Check sums for connections that have none of their own.

TLS notices every changed byte. A simulation on the loopback has no TLS, so every message but frames of tensors, whose
digests travel in the header before them, gets 8 bytes of xxh3 behind it. Both ends are always of the same version.
"""

from __future__ import annotations

import json

import xxhash

from fl_runtime.errors import FederationError, ProtocolError, TransferDamagedError
from fl_runtime.wire import frames

CHECK_BYTES = 8
CHECK_KEY = "fl-check"


def with_check(message: bytes) -> bytes:
    """The message as it travels."""
    return message if frames.is_frame(message) else message + xxhash.xxh3_64_digest(message)


def checked(message: bytes) -> bytes:
    """The message as it was before it travelled. TransferDamagedError if it is not that any more."""
    if frames.is_frame(message):
        try:
            frames.frame_data(message)
        except ProtocolError as error:
            raise _damaged(error.what) from None
        return message
    content, digest = message[:-CHECK_BYTES], message[-CHECK_BYTES:]
    if xxhash.xxh3_64_digest(content) != digest:
        raise _damaged("a message does not have the digest that it came with")
    return content


def check_of_call(path: str, authorization: str) -> str:
    """What a call's metadata says of the rest of it, so that a damaged name is not taken for a stranger's."""
    return xxhash.xxh3_64_hexdigest(f"{path}\0{authorization}".encode())


def error_with_check(error: bytes) -> bytes:
    return error + xxhash.xxh3_64_digest(error)


def checked_error(data: bytes) -> FederationError:
    """The error that the other end has raised; TransferDamagedError for one that has been damaged on the way."""
    content, digest = data[:-CHECK_BYTES], data[-CHECK_BYTES:]
    if xxhash.xxh3_64_digest(content) != digest:
        return _damaged("an error does not have the digest that it came with")
    return FederationError.from_wire(json.loads(content))


def _damaged(what: str) -> TransferDamagedError:
    return TransferDamagedError(f"a connection has damaged what it carries: {what}", fix="look at the network")
