"""Carries XGBoost's collective through the federation: loopback ports for this site's worker, streams to other sites.

Member k has the address 127.0.1.(k+1) for every worker and for the tracker, which runs beside member 0's worker. A
worker that connects to 127.0.1.(k+1) reaches a port of its own machine. Its bytes travel, encrypted, through the
server to member k, which connects to its own worker's port. The workers choose their ports: each names them to the
tracker in its START message, which is held back until all other members listen on the same ports.
"""

from __future__ import annotations

import json
import logging
import re
import socket
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import TypeVar

from fl_runtime.errors import ConnectionLostError, FederationError, ProtocolError
from fl_runtime.text import parse_json
from fl_runtime.transport.tunnel import Stream
from fl_runtime.trust.streams.secure_stream import SecureStream

log = logging.getLogger(__name__)

_PORTS = re.compile(rb'\{[^{}]*"error_port"[^{}]*\}')
_START_BYTES = 65_536
_READ_BYTES = 2**18
_PORTS_CHARS = 4_096
_PORT_NAMES = ("port", "error_port")

T = TypeVar("T", socket.socket, SecureStream)


class Sockets:
    """Sockets within the worker's network, made by a helper thread of the worker."""

    def __init__(self, helper: socket.socket) -> None:
        self._helper, self._lock = helper, threading.Lock()

    def listening(self, host: str, port: int = 0) -> tuple[socket.socket, int]:
        """Return (a listening socket, its port). Raises ConnectionLostError if there is none."""
        return self._request({"listen": [host, port]})

    def connected(self, source: str, port: int) -> socket.socket:
        """Return a connection from the loopback address `source` to a port of the worker."""
        connection, _ = self._request({"from": source})
        connection.connect(("127.0.0.1", port))
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection

    def _request(self, request: dict[str, object]) -> tuple[socket.socket, int]:
        with self._lock:
            try:
                self._helper.sendall(json.dumps(request).encode())
                answer, descriptors, _, _ = socket.recv_fds(self._helper, 4096, 1)
                reply = json.loads(answer or b'{"error": "the worker has ended"}')
            except OSError as error:
                reply, descriptors = {"error": str(error)}, []
        if not descriptors:
            raise ConnectionLostError(f"no socket for {request}: {reply.get('error')}")
        return socket.socket(fileno=descriptors[0]), int(reply["port"])


class Ring:
    """This site's connections in one generation of the collective. `close` ends all of them.

    Streams are named "<generation>|<purpose>", the purpose being "tracker", "ports", "worker" or "error".
    """

    def __init__(
        self,
        me: str,
        members: Sequence[str],
        generation: str,
        sockets: Sockets,
        open_stream: Callable[[str, str], Stream],
        seal: Callable[[Stream], SecureStream],
        network: str,
        tracker_port: int | None,
    ) -> None:
        """Connect nothing as yet.

        Args:
            me: Name of this site.
            members: Names of all members, in the same order everywhere.
            generation: Name of the generation.
            sockets: Makes sockets within the worker's network.
            open_stream: open_stream(site, name) opens a stream to another site through the server.
            seal: Encrypts a stream between two sites.
            network: Name of the network that the worker is in.
            tracker_port: Port of the tracker, at member 0; None at the others.
        """
        self._me, self._members, self._generation = me, list(members), generation
        self._sockets, self._open_stream, self._seal = sockets, open_stream, seal
        self._network, self._tracker_port = network, tracker_port
        self._lock = threading.Lock()
        self._connections: list[socket.socket | SecureStream] = []
        self._closed = False
        self._ports: dict[str, int] = {}

    @property
    def index(self) -> int:
        """This site's number among the members."""
        return self._members.index(self._me)

    def begin(self) -> tuple[str, int]:
        """Start to listen, and return the (host, port) at which this site's worker finds the tracker."""
        host = self._address(self._me)
        listener, port = self._sockets.listening(host)
        self._serve(listener, self._to_tracker)
        return host, port

    def incoming(self, stream: Stream) -> None:
        """Serve a stream that another member opened in this generation. Returns at once."""
        if stream.peer not in self._members:
            stream.close()
            return
        self._in_thread(lambda: self._answer(stream))

    def close(self) -> None:
        """Close all connections of the generation."""
        with self._lock:
            self._closed, connections, self._connections = True, self._connections, []
        for connection in connections:
            _shut(connection)

    # Outgoing: this site's worker connects.

    def _to_tracker(self, connection: socket.socket) -> None:
        first = self._members[0]
        if self._me == first:
            assert self._tracker_port is not None
            tracker = self._keep(self._sockets.connected(self._address(first), self._tracker_port))
            self._in_thread(lambda: _pipe(tracker, connection))
            _pipe(connection, tracker, self._announce())
        else:
            self._join(connection, self._sealed(first, "tracker"), self._announce())

    def _announce(self) -> Callable[[bytes], None]:
        """A function that watches the worker's bytes to the tracker. At START it waits until all members listen."""
        seen = bytearray()
        done = False

        def watch(data: bytes) -> None:
            nonlocal done
            if done or len(seen) > _START_BYTES:
                return
            seen.extend(data)
            match = _PORTS.search(seen)
            if match is None:
                return
            done = True
            self._ports = {name: int(json.loads(match.group())[name]) for name in _PORT_NAMES}
            streams = [self._sealed(peer, "ports") for peer in self._members if peer != self._me]
            for stream in streams:
                stream.send(json.dumps({**self._ports, "network": self._network}).encode())
            for stream in streams:
                if stream.receive() != b"listening":
                    raise ConnectionLostError(f"{stream.peer} does not listen for {self._me}")
                stream.close()

        return watch

    def _listen_for(self, peer: str, ports: dict[str, int]) -> None:
        listeners = {"worker": ports["port"]}
        if self._me == self._members[0]:
            listeners["error"] = ports["error_port"]
        for kind, port in listeners.items():
            listener, _ = self._sockets.listening(self._address(peer), port)
            self._serve(listener, self._calls(peer, kind))

    def _calls(self, peer: str, kind: str) -> Callable[[socket.socket], None]:
        return lambda connection: self._join(connection, self._sealed(peer, kind))

    # Incoming: another member's worker connects.

    def _answer(self, inner: Stream) -> None:
        kind = inner.name.partition("|")[2]
        stream = self._keep(self._seal(inner))
        stream.meet()
        if kind == "ports":
            ports, network = read_ports(stream.receive(), inner.peer)
            if network != self._network:  # else the worker itself listens there
                self._listen_for(inner.peer, ports)
            stream.send(b"listening")
            return
        port = self._tracker_port if kind == "tracker" else self._ports["port" if kind == "worker" else "error_port"]
        if port is None:
            raise ConnectionLostError(f"{inner.peer} expects a tracker here")
        self._join(self._keep(self._sockets.connected(self._address(inner.peer), port)), stream)

    # Both ways.

    def _sealed(self, peer: str, kind: str) -> SecureStream:
        stream = self._keep(self._seal(self._open_stream(peer, f"{self._generation}|{kind}")))
        stream.meet()
        return stream

    def _join(
        self, connection: socket.socket, stream: SecureStream, watch: Callable[[bytes], None] | None = None
    ) -> None:
        """Carry bytes both ways until both ends have finished or one breaks."""
        down = threading.Thread(target=lambda: self._guarded(lambda: _from_stream(stream, connection)), daemon=True)
        down.start()
        try:
            _to_stream(connection, stream, watch)
        except BaseException:
            _shut(stream)
            raise
        down.join()
        for end in (connection, stream):
            _shut(end)

    def _serve(self, listener: socket.socket, handle: Callable[[socket.socket], None]) -> None:
        self._keep(listener)

        def accept() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._keep(connection)
                self._in_thread(partial(self._or_shut, handle, connection))

        threading.Thread(target=accept, name="fl-ring-accept", daemon=True).start()

    def _or_shut(self, handle: Callable[[socket.socket], None], connection: socket.socket) -> None:
        try:
            handle(connection)
        except BaseException:
            _shut(connection)
            raise

    def _in_thread(self, work: Callable[[], None]) -> None:
        threading.Thread(target=lambda: self._guarded(work), name="fl-ring", daemon=True).start()

    def _guarded(self, work: Callable[[], None]) -> None:
        """Run `work`; if a connection breaks, end the generation, since XGBoost's workers need each other."""
        try:
            work()
        except (FederationError, OSError, ValueError, KeyError) as error:
            if not self._closed:
                log.info("%s, generation %s: %s", self._me, self._generation, error)
                self.close()

    def _keep(self, connection: T) -> T:
        """Remember a connection that is to be closed with the generation."""
        with self._lock:
            if not self._closed:
                self._connections.append(connection)
                return connection
        _shut(connection)
        raise ConnectionLostError(f"generation {self._generation} is over")

    def _address(self, member: str) -> str:
        number = self._members.index(member)
        return f"127.0.{1 + number // 250}.{1 + number % 250}"


def read_ports(message: bytes, peer: str) -> tuple[dict[str, int], str]:
    """Read which ports a member's worker has chosen.

    Args:
        message: What the member sent.
        peer: Name of the member.

    Returns:
        The ports "port" and "error_port", and the name of the network that the worker is in.

    Raises:
        ProtocolError: The message names no two ports and a network.
    """
    try:
        fields = parse_json(message, limit_chars=_PORTS_CHARS, depth=2)
        ports, network = {name: fields[name] for name in _PORT_NAMES}, fields["network"]
    except (ValueError, LookupError, TypeError):
        ports, network = {}, None
    if not isinstance(network, str) or not all(type(port) is int and 0 < port < 2**16 for port in ports.values()):
        raise ProtocolError(
            f"{peer} names the ports of its XGBoost worker in a way that this site cannot read",
            fix="run the same version of fl-adapters at every site, or ask who runs that site",
        )
    return ports, network


def _to_stream(connection: socket.socket, stream: SecureStream, watch: Callable[[bytes], None] | None) -> None:
    while data := connection.recv(_READ_BYTES):
        if watch is not None:
            watch(data)
        stream.send(data)
    stream.send(b"")  # the end of this direction


def _from_stream(stream: SecureStream, connection: socket.socket) -> None:
    while data := stream.receive():
        connection.sendall(data)
    with suppress(OSError):
        connection.shutdown(socket.SHUT_WR)


def _pipe(source: socket.socket, target: socket.socket, watch: Callable[[bytes], None] | None = None) -> None:
    while data := source.recv(_READ_BYTES):
        if watch is not None:
            watch(data)
        target.sendall(data)
    with suppress(OSError):
        target.shutdown(socket.SHUT_WR)


def _shut(connection: socket.socket | SecureStream) -> None:
    if isinstance(connection, socket.socket):
        with suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)  # wakes a thread that waits for it
    connection.close()
