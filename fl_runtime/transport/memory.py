"""In-process transport: calls go directly to a service in the same process. For tests and small tools."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager

from fl_runtime.errors import ConnectionLostError
from fl_runtime.transport.base import Call, Peer, Service

SCHEME = "memory:"
_services: dict[str, Service] = {}
_numbers = itertools.count(1)


@contextmanager
def serving(service: Service) -> Iterator[str]:
    """Make a service reachable within this process.

    Args:
        service: The service that answers the calls.

    Yields:
        Its address, such as "memory:1", valid inside the `with` block.
    """
    address = f"{SCHEME}{next(_numbers)}"
    _services[address] = service
    try:
        yield address
    finally:
        del _services[address]


def connect(address: str, name: str) -> MemoryTransport:
    """Connect to a service in this process.

    Args:
        address: An address that `serving` yielded.
        name: The site's name; there is no authentication.

    Returns:
        The site's transport.

    Raises:
        ConnectionLostError: If no service has this address, or not any more.
    """
    try:
        return MemoryTransport(_services[address], name)
    except KeyError:
        raise ConnectionLostError(f"no service in this process has the address {address} (any more)") from None


class MemoryTransport:
    """A site's transport to a service in the same process. It carries the same messages as gRPC.

    Args:
        service: The service that answers the calls.
        name: The site's name; there is no authentication.
    """

    def __init__(self, service: Service, name: str) -> None:
        self._service, self._name = service, name
        self._open: set[_MemoryCall] = set()

    def call(self, method: str, requests: bytes | Iterable[bytes]) -> Call:
        """Start a call, see `Transport.call`."""
        messages = iter([requests] if isinstance(requests, bytes) else requests)
        call = _MemoryCall(self._open.discard)
        call.replies = self._service.handle(method, Peer(self._name, call.when_gone, hang_up=call.cancel), messages)
        self._open.add(call)
        return call

    def close(self) -> None:
        """Cancel every call, as a broken connection would."""
        for call in list(self._open):
            call.cancel()


class _MemoryCall:
    replies: Iterator[bytes]

    def __init__(self, forget: Callable[[_MemoryCall], None]) -> None:
        self._forget = forget
        self._lock = threading.Lock()
        self._gone: list[Callable[[], None]] = []
        self._ended = False
        self._running = False

    def when_gone(self, callback: Callable[[], None]) -> bool:
        with self._lock:
            if not self._ended:
                self._gone.append(callback)
            return not self._ended

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        with self._lock:
            if self._ended:
                raise ConnectionLostError("the call was cancelled")
            self._running = True
        try:
            reply = next(self.replies)
        except BaseException:
            self._running = False
            self.cancel()
            raise
        with self._lock:
            self._running = False
            ended = self._ended
        if ended:  # cancelled by another thread, which could not close a generator that was running
            _end(self.replies)
        return reply

    def cancel(self, *, broken: bool = False) -> None:
        with self._lock:
            callbacks, self._gone = self._gone, []
            ends, self._ended = not (self._ended or self._running), True
        self._forget(self)
        for callback in callbacks:
            callback()
        if ends:
            _end(self.replies)


def _end(replies: Iterator[bytes]) -> None:
    """Close the service's generator now, so that it releases its resources before garbage collection."""
    if isinstance(replies, Generator):
        replies.close()
