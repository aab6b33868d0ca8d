"""The contract of a transport: named calls that carry byte messages in both directions.

A site makes calls; the server's service answers them. Every call is a sequence of messages up and a sequence of
messages down, so a new kind of call needs no new transport code. A transport does not know the types of messages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal, Protocol, TypeAlias

from fl_runtime.transport.turns import UNLIMITED, Turns

METHODS = ("Join", "Register", "Attend", "Next", "Submit", "Score", "Files", "Leave", "Tunnel")
"""Calls within a job; their messages are protobuf (wire/fl/v1/federation.proto)."""
CONTROL_METHODS = (
    "Assignment",
    "RefuseJob",
    "TellLog",
    "Status",
    "ShowJob",
    "Watch",
    "Download",
    "SubmitJob",
    "AbortJob",
    "ResumeJob",
    "DeleteJob",
    "Revoke",
    "Revocations",
    "Roots",
    "HandOutRoots",
    "ReadAudit",
)
"""Calls about jobs and certificates; their messages are JSON (server/federation)."""
BEGINNINGS = ("Assignment", "Join", "SubmitJob", "ResumeJob")
"""Calls with which something begins. They need a revocation list that has not ended."""


Resource: TypeAlias = Literal["tensors", "registered bytes", "metric bytes"]
"""What calls use besides time: described tensors, texts of registrations, and texts of metrics."""


class Account(Protocol):
    """Counts what one call costs the server against the quota of its caller."""

    def spend(self, resource: Resource, amount: int) -> None:
        """Count something before work is done on it.

        Args:
            resource: What the call uses.
            amount: How much of it.

        Raises:
            PermissionDeniedError: The caller is over its quota.
        """
        ...

    def read(self) -> None:
        """Note that a first message has been dealt with. Large ones of one caller take turns, as they take memory."""
        ...

    def earn(self) -> None:
        """Note that the call has brought the run on, for which the caller may make the calls of another round."""
        ...

    def void(self) -> None:
        """Note that the call brought nothing new: it counts like one that was refused."""
        ...


class Unmetered:
    """The account of a caller without a quota, such as a site of a simulation."""

    def spend(self, resource: Resource, amount: int) -> None:
        """Count nothing; see `Account`."""

    def read(self) -> None:
        """Count nothing; see `Account`."""

    def earn(self) -> None:
        """Count nothing; see `Account`."""

    def void(self) -> None:
        """Count nothing; see `Account`."""


@dataclass(frozen=True)
class Peer:
    """The caller of one call, as authenticated by the transport.

    Attributes:
        name: The caller's name; empty if `certificate` identifies it.
        when_gone: `when_gone(callback)` registers a function that is called once, in a thread of the transport, when
            the call ends or its connection breaks. Returns False if that has happened already.
        certificate: PEM of a certificate that our authority signed and whose key the caller holds. Empty without TLS.
        fault: Why the connection is not secure enough, or empty.
        address: The network address that it calls from, for the log.
        hang_up: Ends the call; may be called from any thread.
        account: Counts what the call costs.
        turns: Who may transfer a large payload at full speed.
    """

    name: str
    when_gone: Callable[[Callable[[], None]], bool]
    certificate: bytes = b""
    fault: str = ""
    address: str = ""
    hang_up: Callable[[], object] = lambda: None
    account: Account = Unmetered()  # noqa: RUF009 (it has no state)
    turns: Turns = UNLIMITED


@dataclass(frozen=True)
class Credentials:
    """Key and certificates for mutual TLS, as PEM.

    Attributes:
        key: This process's private key; left out of the representation.
        certificate: This process's certificate.
        authority: Certificate of the authority whose participants are accepted.
    """

    key: bytes = field(repr=False)
    certificate: bytes
    authority: bytes


class Service(Protocol):
    """The server's side of a transport: it answers calls."""

    def handle(self, method: str, peer: Peer, requests: Iterator[bytes]) -> Iterator[bytes]:
        """Answer one call. It runs in a thread of the transport and may block.

        Args:
            method: One of `METHODS` or `CONTROL_METHODS`.
            peer: The caller.
            requests: The caller's messages; iterating blocks until the next one arrives.

        Yields:
            The replies, each sent as soon as it is yielded.

        Raises:
            FederationError: To refuse the call; the caller gets the same error.
        """
        ...


class Call(Protocol):
    """A call in progress: an iterator over its replies that blocks until the next one arrives."""

    def __iter__(self) -> Iterator[bytes]:
        """Return the call itself."""
        ...

    def __next__(self) -> bytes:
        """Wait for the next reply.

        Raises:
            StopIteration: When the service has sent its last reply.
            FederationError: The error with which the service refused the call.
            ConnectionLostError: If the server cannot be reached or the connection breaks.
            TransferDamagedError: If a message arrived damaged.
        """
        ...

    def cancel(self, *, broken: bool = False) -> None:
        """End the call; may be called from any thread.

        Args:
            broken: Whether the connection is to be given up, so that later calls make a new one.
        """
        ...


class Transport(Protocol):
    """The site's side of a transport. Threads may share one. It connects with the first call."""

    def call(self, method: str, requests: bytes | Iterable[bytes]) -> Call:
        """Start a call.

        Args:
            method: One of `METHODS` or `CONTROL_METHODS`.
            requests: One message, or an iterable of messages that a thread of the transport consumes.

        Returns:
            The call, whose replies the caller iterates over.

        Raises:
            ConnectionLostError: If the transport has been closed.
        """
        ...

    def close(self) -> None:
        """Close the connection; calls that still run end with ConnectionLostError."""
        ...
