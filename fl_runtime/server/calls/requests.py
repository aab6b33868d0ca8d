"""The messages of the calls of sites: which one each call begins with, and how it is read.

Runs in threads of the transport.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from google.protobuf.message import DecodeError, Message

from fl_runtime.errors import ProtocolError, TransferDamagedError
from fl_runtime.wire.fl.v1 import federation_pb2 as pb
from fl_runtime.wire.manifest import Manifest, described_bytes

M = TypeVar("M", bound=Message)

_REQUESTS: Mapping[str, type[Message]] = {
    "Join": pb.JoinRequest,
    "Register": pb.RegisterRequest,
    "Attend": pb.SessionRequest,
    "Next": pb.NextRequest,
    "Submit": pb.UpdatePart,
    "Score": pb.ScoreRequest,
    "Files": pb.FilesPart,
    "Leave": pb.LeaveRequest,
    "Tunnel": pb.TunnelPart,
}

_LARGE_BYTES = 2**18
_DESCRIBED_AT: Mapping[str, Sequence[int]] = {  # fields that lead to the manifest
    "Register": (2,),
    "Submit": (1, 10, 2),
    "Files": (1, 2, 2),
}
_EXTRA_TIMES, _EXTRA_BYTES = 8, 2**18


@dataclass(frozen=True)
class DescribedLimit:
    """How long the description of tensors in a message may be, before it is decoded.

    Attributes:
        tensors: Number of tensors of the model that the sites agreed on.
        most_bytes: Most bytes of the description.
    """

    tensors: int
    most_bytes: int

    @classmethod
    def of(cls, agreed: Manifest) -> DescribedLimit:
        """Return the limit for sites that agreed on a model. Updates may bring moments and the like beside it."""
        return cls(len(agreed.tensors), _EXTRA_TIMES * agreed.to_proto().ByteSize() + _EXTRA_BYTES)

    @staticmethod
    def largest(limits: Iterable[DescribedLimit | None]) -> DescribedLimit | None:
        """Return the limit that allows most; None, which is no limit, if there is a None or nothing at all."""
        largest: DescribedLimit | None = None
        for limit in limits:
            if limit is None:
                return None
            if largest is None or limit.most_bytes > largest.most_bytes:
                largest = limit
        return largest

    def check(self, message: bytes, path: Sequence[int]) -> None:
        """Raise ProtocolError if a message describes more; see `described_bytes` for the arguments."""
        count = described_bytes(message, path)
        if count > self.most_bytes:
            raise ProtocolError(
                f"a message describes tensors in {count} bytes; the model that the sites agreed on has {self.tensors} "
                f"tensors, and the limit is {self.most_bytes} bytes",
                fix="build the same model at every site",
            )


def first_request(
    method: str, requests: Iterator[bytes], described_limit: Callable[[], DescribedLimit | None] | None = None
) -> Message:
    """Read the first message of a call.

    Args:
        method: Name of the call.
        requests: The call's messages.
        described_limit: Returns how long the description of tensors may be, or None for any length. Called for large
            messages only.

    Returns:
        The message, decoded as the request of this method.

    Raises:
        ProtocolError: There is no such method, the message is not one of its requests, or it describes too many
            tensors.
        TransferDamagedError: The call ended before its first message.
    """
    if method not in _REQUESTS:
        raise ProtocolError(f"this server does not answer {method}", fix="call a server that `fl-adapters server` runs")
    message = expected(requests, "a call ended before its first message")
    _check_described(method, message, described_limit)
    return _parse(_REQUESTS[method], message)


def session_job(request: Message) -> str:
    """Return the job or training that the first message of a call names, which is not a Join; "" if it names none."""
    if isinstance(request, pb.FilesPart):
        return str(request.files.session.job)
    session = request.update.session if isinstance(request, pb.UpdatePart) else request.session  # type: ignore[attr-defined]
    return str(session.job)


def next_part(
    requests: Iterator[bytes], described_limit: Callable[[], DescribedLimit | None] | None = None
) -> pb.RegisterRequest:
    """Read a further message of a registration; see `first_request`."""
    message = expected(requests, "a registration ended before its last message")
    _check_described("Register", message, described_limit)
    return _parse(pb.RegisterRequest, message)


def _check_described(method: str, message: bytes, described_limit: Callable[[], DescribedLimit | None] | None) -> None:
    path = _DESCRIBED_AT.get(method)
    if path and described_limit and len(message) > _LARGE_BYTES and (limit := described_limit()) is not None:
        limit.check(message, path)


def _parse(kind: type[M], message: bytes) -> M:
    try:
        return kind.FromString(message)
    except DecodeError:
        raise ProtocolError(f"a request is not a {kind.__name__} message") from None


def expected(requests: Iterator[bytes], if_ended: str) -> bytes:
    """Return the next message. Raises TransferDamagedError if the call has ended, so that the site sends it again.

    A damaged connection can end a call silently: an HTTP/2 frame whose type is damaged is dropped.
    """
    message = next(requests, None)
    if message is None:
        raise TransferDamagedError(if_ended, fix="look at the network")
    return message
