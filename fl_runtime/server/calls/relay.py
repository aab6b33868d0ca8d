"""The relay of streams between two sites. The server passes their parts on and does not look inside.

The two ends grant each other credit (fl_runtime/transport/tunnel.py). The relay counts it too: a site that sends more
than its peer has granted, or grants more than has arrived, loses its call and is named. So what waits here for one site
from another is bounded. If many small parts wait, the server stops reading from their sender.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator

from google.protobuf.message import DecodeError

from fl_runtime.errors import ProtocolError
from fl_runtime.transport.tunnel import PEER_BYTES, WINDOW_BYTES
from fl_runtime.wire.fl.v1 import federation_pb2 as pb

_MAX_STREAMS, _MAX_NAME_CHARS = 1_024, 200
_MAX_WAITING_BYTES = 2 * WINDOW_BYTES
_PART_BYTES = 128  # memory of a waiting part beside its own bytes
_BEAT_S, _LOOK_S = 10.0, 1.0


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
            ProtocolError: A part cannot be read, asks for more than one site may have, or exceeds its credit.
        """
        line = _Line(site)
        if not when_gone(line.close):
            return
        with self._lock:
            old, self._lines[site] = self._lines.get(site), line
        if old is not None:
            old.close()
        reader = threading.Thread(target=self._read, args=(line, parts), name=f"fl-relay-{site}", daemon=True)
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
                self._close(line, peer, stream, patient=False)

    def _read(self, line: _Line, parts: Iterable[bytes]) -> None:
        try:
            for message in parts:
                part = _parsed(message)
                if part.peer not in self._sites or max(len(part.stream), len(part.opened)) > _MAX_NAME_CHARS:
                    raise ProtocolError(
                        f"the stream {part.stream[:100]!r} leads to {part.peer[:100]!r}, which is not a site of this "
                        f"run, or the stream's name is longer than {_MAX_NAME_CHARS} characters"
                    )
                self._pass_on(line, part)
        except ProtocolError as error:
            line.error = error
        except Exception:  # the call has ended; there is nobody to tell
            pass
        finally:
            line.close()

    def _pass_on(self, line: _Line, part: pb.TunnelPart) -> None:
        """Pass on a part of a stream that is open. Parts that crossed with the end of their stream are dropped."""
        peer, stream = part.peer, part.stream
        with self._lock:
            target = self._lines.get(peer)
        if part.opened and line.begin(peer, stream, own=True) and target is not None:
            target.begin(line.site, stream, own=False)
        if part.closed:
            self._close(line, peer, stream, patient=True)
        elif line.send(peer, stream, len(part.data)):
            if part.credit and target is not None:
                target.credit(line.site, stream, part.credit)
            part.peer = line.site
            if target is None or not target.put(part, line):
                line.end(peer, stream)
                line.put(pb.TunnelPart(peer=peer, stream=stream, closed=True), line)

    def _close(self, line: _Line, peer: str, stream: str, *, patient: bool) -> None:
        with self._lock:
            target = self._lines.get(peer)
        line.end(peer, stream)
        if target is not None and target.end(line.site, stream):
            target.put(pb.TunnelPart(peer=line.site, stream=stream, closed=True), line if patient else None)


class _Line:
    """One site's call: the parts that wait for the site, and what the site has sent in its open streams.

    Attributes:
        site: Name of the site.
        error: Why the relay has ended the call, or None.
    """

    def __init__(self, site: str) -> None:
        self.site = site
        self.error: ProtocolError | None = None
        self._changed = threading.Condition()
        self._waiting: deque[tuple[str, bytes]] = deque()
        self._bytes: dict[str, int] = {}
        self._unread: dict[tuple[str, str], int] = {}  # open streams: bytes that the peer has not granted again
        self._own: set[tuple[str, str]] = set()  # those that this site has opened
        self._closed = False

    # -- what this site sends ----------------------------------------------------------------------------------

    def begin(self, peer: str, stream: str, *, own: bool) -> bool:
        """Note that a stream is open; False if it was already. ProtocolError if the site has opened too many."""
        key = peer, stream
        with self._changed:
            if key in self._unread:
                return False
            if own and len(self._own) >= _MAX_STREAMS:
                raise ProtocolError(f"{self.site} has more than {_MAX_STREAMS} streams open at a time")
            self._unread[key] = 0
            if own:
                self._own.add(key)
            return True

    def send(self, peer: str, stream: str, count: int) -> bool:
        """Count bytes that the site sends; False if the stream is not open. ProtocolError over its credit."""
        key = peer, stream
        with self._changed:
            if key not in self._unread:
                return False
            self._unread[key] += count
            everywhere = sum(unread for (name, _), unread in self._unread.items() if name == peer) if count else 0
            if self._unread[key] > WINDOW_BYTES or everywhere > PEER_BYTES:
                raise ProtocolError(
                    f"{self.site} has sent more to {peer} than its credit: at most {WINDOW_BYTES} bytes in one stream, "
                    f"and {PEER_BYTES} in all, may be unread",
                    where=f"the stream {stream[:100]!r}",
                    fix="send on when the other site has granted new credit, as fl_runtime.transport.tunnel does",
                )
            return True

    def credit(self, peer: str, stream: str, count: int) -> None:
        """Count credit that a peer grants to this site. ProtocolError if that is more than it has been sent."""
        key = peer, stream
        with self._changed:
            unread = self._unread.get(key, count)
            if count > unread:
                raise ProtocolError(
                    f"{peer} grants {self.site} a credit of {count} bytes, and has {unread} unread bytes of it",
                    where=f"the stream {stream[:100]!r}",
                    fix="grant as many bytes as have been read, as fl_runtime.transport.tunnel does",
                )
            if key in self._unread:
                self._unread[key] -= count

    def end(self, peer: str, stream: str) -> bool:
        """Note that a stream is closed; False if it was not open."""
        with self._changed:
            self._own.discard((peer, stream))
            return self._unread.pop((peer, stream), None) is not None

    def open_streams(self) -> list[tuple[str, str]]:
        with self._changed:
            return list(self._unread)

    # -- what waits for this site ------------------------------------------------------------------------------

    @property
    def closed(self) -> bool:
        return self._closed

    def put(self, part: pb.TunnelPart, source: _Line | None) -> bool:
        """Queue a part; False if the site has hung up. Waits while too much of its source waits, if one is given."""
        message, name = part.SerializeToString(), source.site if source else part.peer
        with self._changed:
            while source and self._bytes.get(name, 0) > _MAX_WAITING_BYTES and not (self._closed or source.closed):
                self._changed.wait(_LOOK_S)
            if self._closed:
                return False
            self._waiting.append((name, message))
            self._bytes[name] = self._bytes.get(name, 0) + len(message) + _PART_BYTES
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
                    self._bytes[source] -= len(message) + _PART_BYTES
                    self._changed.notify_all()
            yield message  # an empty message is a sign of life

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._waiting.clear()
            self._changed.notify_all()


def _parsed(message: bytes) -> pb.TunnelPart:
    try:
        return pb.TunnelPart.FromString(message)
    except DecodeError:
        raise ProtocolError("a message of a stream is not a TunnelPart message") from None
