"""Check sums for connections without TLS, that is, for simulations on the loopback.

TLS detects every changed byte. Without it, 8 bytes of xxh3-64 follow each message. Frames carry none, because the
digests of their tensors travel in the header before them. Both ends always have the same version of fl-adapters.

No library replaces this: gRPC's Python interface offers no check sum of messages, and TLS on the loopback, the usual
answer, would encrypt every tensor of a simulation for nothing. The hash itself is that of `xxhash`.
"""

from __future__ import annotations

import xxhash

from fl_runtime.errors import FederationError, ProtocolError, TransferDamagedError
from fl_runtime.text import parse_json
from fl_runtime.wire import frames

CHECK_BYTES = 8
_MAX_ERROR_CHARS = 2**16
CHECK_KEY = "fl-check"


def with_check(message: bytes) -> bytes:
    """Return a message followed by its check sum; a frame is returned as it is."""
    return message if frames.is_frame(message) else message + xxhash.xxh3_64_digest(message)


def checked(message: bytes) -> bytes:
    """Verify and remove the check sum of a received message.

    Args:
        message: The message as received.

    Returns:
        The message as it was given to `with_check`.

    Raises:
        TransferDamagedError: If the check sum is wrong, or a frame has the wrong length.
    """
    if frames.is_frame(message):
        try:
            frames.frame_data(message)
        except ProtocolError as error:
            raise _damaged(error.what) from None
        return message
    content, digest = message[:-CHECK_BYTES], message[-CHECK_BYTES:]
    if xxhash.xxh3_64_digest(content) != digest:
        raise _damaged("a message has a wrong check sum")
    return content


def check_of_call(path: str, authorization: str) -> str:
    """Return the check sum of a call's path and authorization, as hexadecimal digits.

    It tells a damaged token from the token of a stranger: the first is retried, the second refused.
    """
    return xxhash.xxh3_64_hexdigest(f"{path}\0{authorization}".encode())


def error_with_check(error: bytes) -> bytes:
    """Return a serialized error followed by its check sum."""
    return error + xxhash.xxh3_64_digest(error)


def checked_error(data: bytes) -> FederationError:
    """Return the error that the other end raised, or a TransferDamagedError if its check sum is wrong."""
    content, digest = data[:-CHECK_BYTES], data[-CHECK_BYTES:]
    if xxhash.xxh3_64_digest(content) != digest:
        return _damaged("an error has a wrong check sum")
    return error_of(content)


def error_of(content: bytes) -> FederationError:
    """Return the error that the other end raised, or a ProtocolError if the bytes do not describe one."""
    try:
        fields = parse_json(content, limit_chars=_MAX_ERROR_CHARS)
        if isinstance(fields, dict):
            return FederationError.from_wire(fields)
    except ValueError:
        pass
    return ProtocolError("the server answers with an error that cannot be read", fix="ask the server's operator")


def _damaged(what: str) -> TransferDamagedError:
    return TransferDamagedError(
        f"data was damaged in transfer: {what}", fix="check the network between this machine and the server"
    )
