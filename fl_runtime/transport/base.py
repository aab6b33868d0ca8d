"""The contract of a transport: named calls that carry byte messages both ways. It knows no message types.

A site makes calls; the server's service answers them. Every call has the same shape, a sequence of messages up
and a sequence down, so a further one (a byte stream between two sites, say) needs no new transport code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

METHODS = ("Join", "Register", "Attend", "Next", "Submit", "Score", "Leave", "Tunnel")
CONTROL_METHODS = ("Assignment", "Status", "SubmitJob", "AbortJob", "Watch", "Revoke")
"""Calls about jobs rather than within one: their messages are JSON. See server/federation.py."""


@dataclass(frozen=True)
class Peer:
    """Who is calling, as the transport has established it: by name, or by a certificate whose key it has proved to
    hold and whose authority is ours.

    certificate: PEM, empty without TLS. fault: why such a connection is not good enough, empty if it is. address: where
    it calls from, for the log. hang_up() ends the call, from any thread. when_gone(callback) calls back once, from a
    thread of the transport, when this call ends or its connection breaks; False: it is gone already.
    """

    name: str
    when_gone: Callable[[Callable[[], None]], bool]
    certificate: bytes = b""
    fault: str = ""
    address: str = ""
    hang_up: Callable[[], object] = lambda: None


@dataclass(frozen=True)
class Credentials:
    """What proves who we are, and whom we believe: PEM. key: private, never shown."""

    key: bytes = field(repr=False)
    certificate: bytes
    authority: bytes


class Service(Protocol):
    """The server's side: answers calls. `handle` runs in a thread of the transport and may block."""

    def handle(self, method: str, peer: Peer, requests: Iterator[bytes]) -> Iterator[bytes]:
        """The replies to a call, as they become ready. Raises FederationError; the caller gets the same error."""
        ...


class Call(Protocol):
    """A call under way: its replies, once each. Iterating blocks; `cancel` ends it from any thread.

    broken: its connection is not to be trusted any more, so later calls make a new one.
    """

    def __iter__(self) -> Iterator[bytes]: ...
    def __next__(self) -> bytes: ...
    def cancel(self, *, broken: bool = False) -> None: ...


class Transport(Protocol):
    """The site's side. Threads may share it. Nothing connects before the first call."""

    def call(self, method: str, requests: bytes | Iterable[bytes]) -> Call:
        """Start a call with one message, or with a stream of them.

        Iterating raises the service's FederationError, or ConnectionLostError if the server cannot be reached.
        """
        ...

    def close(self) -> None: ...
