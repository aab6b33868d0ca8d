"""Byte streams between two sites, relayed by the server: one site's end of them.

All streams of a site share one call. Each end may send up to `WINDOW_BYTES` more than the other has received. So a slow
reader blocks only the writer of its own stream, and the server's memory stays bounded. The receiver counts as well: it
closes the stream of a peer that sends more, whatever server lets it through.
"""

from __future__ import annotations

import itertools
import logging
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator
from weakref import WeakSet

from google.protobuf.message import DecodeError

from fl_runtime.errors import ConnectionLostError, FederationError
from fl_runtime.text import printable
from fl_runtime.transport.base import Call, Transport
from fl_runtime.transport.threads import start_thread
from fl_runtime.wire.fl.v1 import federation_pb2 as pb

log = logging.getLogger(__name__)

WINDOW_BYTES = 4 * 2**20
"""Bytes that a sender may have unread at the other end."""
MESSAGE_BYTES = 2**20
"""Most bytes in one message."""
PEER_BYTES = 8 * WINDOW_BYTES
"""Bytes that one site may have unread at another, in all their streams."""
_PEER_STREAMS = 64
_UNREAD_BYTES = 64  # memory of an unread message beside its own bytes


class Stream:
    """One end of a stream between two sites. One thread may send while another receives.

    Data of up to `MESSAGE_BYTES` arrives as one message, longer data as several, in order.

    Args:
        send: Queues a `TunnelPart` message; must not block.
        peer: Name of the site at the other end.
        name: What the stream is for; both ends know it.
        stream_id: Identifier, unique between the two sites.

    Attributes:
        peer: Name of the site at the other end.
        name: What the stream is for.
        stream_id: Identifier, unique between the two sites.
    """

    def __init__(self, send: Callable[[pb.TunnelPart], None], peer: str, name: str, stream_id: str) -> None:
        self.peer, self.name, self.stream_id = peer, name, stream_id
        self._send = send
        self._changed = threading.Condition()
        self._arrived: deque[bytes] = deque()
        self._arrived_bytes = 0
        self._credit_bytes = WINDOW_BYTES
        self._closed_here = self._closed_there = False

    def send(self, data: bytes) -> None:
        """Send data; blocks while `WINDOW_BYTES` of it are unread at the other end.

        Args:
            data: The bytes; copied, so the caller may reuse a buffer.

        Raises:
            ConnectionLostError: If either end has closed the stream, or the call to the server has ended.
        """
        view = memoryview(data)
        for start in range(0, len(view), MESSAGE_BYTES):
            piece = bytes(view[start : start + MESSAGE_BYTES])
            with self._changed:
                while self._credit_bytes < len(piece) and not (self._closed_there or self._closed_here):
                    self._changed.wait()
                if self._closed_there or self._closed_here:
                    raise ConnectionLostError(
                        f"the stream {self.name} to {self.peer} is closed", fix=f"look at the log of {self.peer}"
                    )
                self._credit_bytes -= len(piece)
            self._send(pb.TunnelPart(peer=self.peer, stream=self.stream_id, data=piece))

    def receive(self) -> bytes:
        """Wait for the next message.

        Returns:
            The message, or b"" if this end has closed the stream. If the other end has closed it or the call to the
            server has ended, messages that had arrived before are returned first, then b"".
        """
        with self._changed:
            while not self._arrived and not self._closed_there and not self._closed_here:
                self._changed.wait()
            if not self._arrived or self._closed_here:
                return b""
            data = self._arrived.popleft()
            self._arrived_bytes -= len(data)
        self._send(pb.TunnelPart(peer=self.peer, stream=self.stream_id, credit=len(data)))
        return data

    def close(self) -> None:
        """Close both directions; may be called repeatedly and from any thread."""
        with self._changed:
            if self._closed_here:
                return
            self._closed_here = True
            self._arrived.clear()
            self._arrived_bytes = 0
            self._changed.notify_all()
        self._send(pb.TunnelPart(peer=self.peer, stream=self.stream_id, closed=True))

    @property
    def unread_bytes(self) -> int:
        """Memory that messages take which have arrived and have not been received."""
        return self._arrived_bytes + _UNREAD_BYTES * len(self._arrived)

    @property
    def is_over(self) -> bool:
        """Whether the stream is closed and nothing is left to receive."""
        return self._closed_here or (self._closed_there and not self._arrived)

    def take(self, part: pb.TunnelPart) -> bool:
        """Take a part that has arrived for this stream; called by the tunnel.

        Returns:
            Whether its data is within the credit of the other end.
        """
        with self._changed:
            if part.data and not self._closed_here:
                self._arrived.append(part.data)
                self._arrived_bytes += len(part.data)
            self._credit_bytes = min(self._credit_bytes + part.credit, WINDOW_BYTES)
            self._closed_there = self._closed_there or part.closed
            self._changed.notify_all()
            return self._arrived_bytes <= WINDOW_BYTES


class Tunnel:
    """All streams of a site, carried by one call to the server.

    Args:
        transport: The connection to the server.
        session: Job and attempt of the site.
        accept: Called with each stream that another site opens, in a thread of the tunnel; must return at once.
        lost: Called once if the call ends other than by `close`.

    Attributes:
        bytes_up: Number of bytes sent so far.
        bytes_down: Number of bytes received so far.
    """

    def __init__(
        self,
        transport: Transport,
        session: pb.Session,
        accept: Callable[[Stream], None],
        lost: Callable[[], None],
    ) -> None:
        self._accept, self._lost = accept, lost
        self._lock = threading.Lock()
        self._streams: dict[tuple[str, str], Stream] = {}
        self._of_peer: dict[str, WeakSet[Stream]] = {}  # also closed ones whose last messages are unread
        self._refused: set[str] = set()
        self._outgoing: queue.SimpleQueue[pb.TunnelPart | None] = queue.SimpleQueue()
        self._numbers = itertools.count()
        self._prefix = f"{session.attempt}:{id(self):x}"
        self._closed = self._ended = False  # closed by this site; the call is over
        self.bytes_up = self.bytes_down = 0
        self._outgoing.put(pb.TunnelPart(session=session))
        self._call: Call = transport.call("Tunnel", self._messages())
        self._thread = start_thread(self._receive, "fl-tunnel")

    def open(self, peer: str, name: str) -> Stream:
        """Open a stream to another site.

        Args:
            peer: Name of the other site.
            name: What the stream is for; the other site's `accept` sees it as `stream.name`.

        Returns:
            This site's end; it can be written to at once.

        Raises:
            ConnectionLostError: If the call to the server has ended.
        """
        stream = Stream(self._outgoing.put, peer, name, f"{self._prefix}:{next(self._numbers)}")
        with self._lock:
            if self._ended:
                raise ConnectionLostError(
                    "other sites cannot be reached: the call to the server has ended",
                    fix="check the connection to the server",
                )
            self._keep(stream)
        self._outgoing.put(pb.TunnelPart(peer=peer, stream=stream.stream_id, opened=name))
        return stream

    def close(self) -> None:
        """Close all streams and end the call."""
        self._closed = True
        self._outgoing.put(None)
        self._call.cancel()
        self._end_streams()

    def _messages(self) -> Iterator[bytes]:
        while (part := self._outgoing.get()) is not None:
            message = part.SerializeToString()
            self.bytes_up += len(message)
            yield message

    def _receive(self) -> None:
        try:
            for message in self._call:
                self.bytes_down += len(message)
                if message:
                    self._take(pb.TunnelPart.FromString(message))
        except FederationError as error:
            log.debug("the tunnel has ended: %s", error)
        except DecodeError:
            log.warning("the tunnel has ended: the server's message is not a TunnelPart message")
        finally:
            self._outgoing.put(None)  # ends _messages
            self._end_streams()
            if not self._closed:
                self._lost()

    def _take(self, part: pb.TunnelPart) -> None:
        key = part.peer, part.stream
        with self._lock:
            stream = self._streams.get(key)
            is_new = stream is None and bool(part.opened)
            if is_new:
                stream = Stream(self._outgoing.put, part.peer, part.opened, part.stream)
                self._keep(stream)
            if part.closed:
                self._streams.pop(key, None)
            peers = list(self._of_peer.get(part.peer, ()))
        if stream is None:
            return
        if not stream.take(part):
            self._refuse(stream, f"at most {WINDOW_BYTES} bytes of a stream may be unread")
        elif part.data and sum(item.unread_bytes for item in peers) > PEER_BYTES:
            self._refuse(stream, f"at most {PEER_BYTES} bytes of one site may be unread")
        elif is_new and sum(not item.is_over for item in peers) > _PEER_STREAMS:
            self._refuse(stream, f"at most {_PEER_STREAMS} streams of one site may be open")
        elif is_new:
            self._accept(stream)

    def _keep(self, stream: Stream) -> None:
        self._streams[stream.peer, stream.stream_id] = stream
        self._of_peer.setdefault(stream.peer, WeakSet()).add(stream)

    def _refuse(self, stream: Stream, rule: str) -> None:
        with self._lock:
            self._streams.pop((stream.peer, stream.stream_id), None)
            level = logging.DEBUG if stream.peer in self._refused else logging.WARNING
            self._refused.add(stream.peer)
        name = printable(stream.name, 100)
        log.log(level, "%s sent more than it may, and its stream %s is closed: %s", stream.peer, name, rule)
        stream.close()

    def _end_streams(self) -> None:
        with self._lock:
            self._ended = True
            streams, self._streams = list(self._streams.values()), {}
        for stream in streams:
            stream.take(pb.TunnelPart(closed=True))
