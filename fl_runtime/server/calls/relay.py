"""The relay of streams between two sites. The server passes their parts on and does not look inside.

A part waits in the queue of its receiver. What may wait there from one sender is limited. The two ends grant each other
credit (fl_runtime/transport/tunnel.py); if a sender exceeds it, the server stops reading from that sender.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator

from google.protobuf.message import DecodeError

from fl_runtime.errors import ProtocolError
from fl_runtime.wire.fl.v1 import federation_pb2 as pb

_MAX_WAITING_BYTES = 64 * 2**20
_MAX_STREAMS, _MAX_NAME_CHARS = 1_024, 200
_BEAT_S = 10.0


class Relay:
    """Relays the streams of one run's sites. May be used by any thread."""

    def __init__(self, sites: Collection[str]) -> None:
        """Make a relay for these sites; it refuses streams to any other name."""
        self._sites = frozenset(sites)
        self._lock = threading.Lock()
        self._lines: dict[str, _Line] = {}

    def serve(
        self, site: str, parts: Iterable[bytes], when_gone: Callable[[Callable[[], None]], bool]
    ) -> Iterator[bytes]:
        """Serve one site's call until the site hangs up.

        Args:
            site: The site that is calling.
            parts: What it sends; read by a thread of its own.
            when_gone: Registers a function to be called when the caller has hung up; False if it has already.

        Yields:
            The parts that other sites send to it, and an empty message every few seconds without any.

        Raises:
            ProtocolError: A part cannot be read, or asks for more than one site may have.
        """
        line = _Line()
        if not when_gone(line.close):
            return
        with self._lock:
            old, self._lines[site] = self._lines.get(site), line
        if old is not None:
            old.close()
        reader = threading.Thread(target=self._read, args=(site, line, parts), name=f"fl-relay-{site}", daemon=True)
        reader.start()
        try:
            yield from line.outgoing()
            if line.error is not None:
                raise line.error
        finally:
            line.close()
            with self._lock:
                if self._lines.get(site) is line:
                    del self._lines[site]
            for peer, stream in line.open_streams():
                self._pass_on(site, pb.TunnelPart(peer=peer, stream=stream, closed=True), line, patient=False)

    def _read(self, site: str, line: _Line, parts: Iterable[bytes]) -> None:
        try:
            for message in parts:
                part = _parsed(message)
                if part.peer not in self._sites or len(part.stream) > _MAX_NAME_CHARS:
                    raise ProtocolError(
                        f"the stream {part.stream[:100]!r} leads to {part.peer[:100]!r}, which is not a site of this "
                        f"run, or the stream's name is longer than {_MAX_NAME_CHARS} characters"
                    )
                self._pass_on(site, part, line, patient=True)
        except ProtocolError as error:
            line.error = error
        except Exception:  # the call has ended; there is nobody to tell
            pass
        finally:
            line.close()

    def _pass_on(self, site: str, part: pb.TunnelPart, line: _Line, *, patient: bool) -> None:
        peer = part.peer
        line.track(peer, part)
        with self._lock:
            target = self._lines.get(peer)
        part.peer = site
        delivered = target is not None and target.put(site, part.SerializeToString(), patient=patient)
        if target is not None and delivered:
            target.track(site, part)
        elif not part.closed:
            closed = pb.TunnelPart(peer=peer, stream=part.stream, closed=True).SerializeToString()
            line.put(peer, closed, patient=patient)  # a site that sends without reading waits here


class _Line:
    """The queue of parts that wait for one site, and the streams that the site has open."""

    def __init__(self) -> None:
        self.error: ProtocolError | None = None
        self._changed = threading.Condition()
        self._waiting: deque[tuple[str, bytes]] = deque()
        self._bytes: dict[str, int] = {}
        self._open: set[tuple[str, str]] = set()
        self._closed = False

    def track(self, peer: str, part: pb.TunnelPart) -> None:
        """Note that a part opens, continues or closes a stream. ProtocolError for too many open streams."""
        with self._changed:
            if part.closed:
                self._open.discard((peer, part.stream))
            else:
                self._open.add((peer, part.stream))
            if len(self._open) > _MAX_STREAMS:
                raise ProtocolError(f"a site has more than {_MAX_STREAMS} streams open at a time")

    def open_streams(self) -> list[tuple[str, str]]:
        with self._changed:
            return list(self._open)

    def put(self, source: str, message: bytes, *, patient: bool) -> bool:
        """Queue a message; False if the site has hung up. With `patient`, wait while too much of this source waits."""
        with self._changed:
            while patient and not self._closed and self._bytes.get(source, 0) > _MAX_WAITING_BYTES:
                self._changed.wait()
            if self._closed:
                return False
            self._waiting.append((source, message))
            self._bytes[source] = self._bytes.get(source, 0) + len(message)
            self._changed.notify_all()
            return True

    def outgoing(self) -> Iterator[bytes]:
        while True:
            with self._changed:
                while not self._waiting and not self._closed:
                    if not self._changed.wait(_BEAT_S):
                        break
                if self._closed:
                    return
                source, message = self._waiting.popleft() if self._waiting else ("", b"")
                if source:
                    self._bytes[source] -= len(message)
                    self._changed.notify_all()
            yield message  # an empty message is a sign of life

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()


def _parsed(message: bytes) -> pb.TunnelPart:
    try:
        return pb.TunnelPart.FromString(message)
    except DecodeError:
        raise ProtocolError("a message of a stream is not a TunnelPart message") from None
