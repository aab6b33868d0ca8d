"""A TCP proxy between a site and the server that counts bytes, and cuts, delays or damages them on request."""

from __future__ import annotations

import socket
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

Direction = Literal["up", "down"]

_CHUNK_BYTES = 2**16


@dataclass
class _Fault:
    """A planned fault: after `at` bytes of a direction the connection is cut or stopped, or a byte is changed."""

    direction: Direction
    at: int
    kind: Literal["cut", "damage", "stop"]
    flip: int = 0xFF


@dataclass
class _Line:
    """One direction of one connection.

    Attributes:
        passed: Bytes since the connection began, or since damage to each connection was planned.
    """

    direction: Direction
    passed: int = 0


class TcpProxy:
    """A proxy on a free loopback port that forwards to `target` ("host:port") and counts the bytes."""

    def __init__(self, target: str) -> None:
        self.target = target
        self._counts: dict[Direction, int] = {"up": 0, "down": 0}
        self._faults: list[_Fault] = []
        self._lines: list[_Line] = []
        self._each: dict[Direction, tuple[int, int]] = {}  # bytes to let pass, connections still to be damaged
        self._lock = threading.Condition()
        self._open: list[socket.socket] = []
        self.connections = 0
        self.fired = 0  # cuts and damages of those that were planned
        self.refuses = False  # new connections, while it is set
        self.deaf_next = 0  # so many new connections stand and carry nothing
        self._held_until = 0.0
        self._flowing = threading.Event()
        self._flowing.set()
        self._deaf: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> TcpProxy:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()
        self.go_on()
        self.cut()

    def counted(self) -> tuple[int, int]:
        """Return the bytes so far as (up, down); up is from the site to the server."""
        with self._lock:
            return self._counts["up"], self._counts["down"]

    def wait_for(self, direction: Direction, total_bytes: int, timeout_s: float = 30.0) -> None:
        """Wait until this many bytes have passed."""
        with self._lock:
            if not self._lock.wait_for(lambda: self._counts[direction] >= total_bytes, timeout_s):
                raise TimeoutError(f"{self._counts[direction]} of {total_bytes} bytes {direction} in {timeout_s:g} s")

    def cut_after(self, direction: Direction, more_bytes: int) -> None:
        """Break the connection after this many further bytes; later connections work again."""
        self._plan(direction, more_bytes, "cut")

    def damage_after(self, direction: Direction, more_bytes: int, flip: int = 0xFF) -> None:
        """Flip bits of one byte after this many further bytes."""
        self._plan(direction, more_bytes, "damage", flip)

    def damage_each(self, direction: Direction, after_bytes: int, times: int) -> None:
        """Change one byte in this and in each later connection, up to this many times."""
        with self._lock:
            self._each[direction] = (after_bytes, times)
            for line in self._lines:
                line.passed = 0

    def hold(self, seconds: float) -> None:
        """Hold all bytes back for this long, then forward them."""
        with self._lock:
            self._held_until = max(self._held_until, time.monotonic() + seconds)

    def stop_after(self, direction: Direction, more_bytes: int) -> None:
        """Hold all bytes back after this many further bytes, until `go_on`."""
        self._plan(direction, more_bytes, "stop")

    def go_on(self) -> None:
        """Forward again what was held back."""
        self._flowing.set()

    def deafen(self) -> None:
        """Keep the present connections open, but forward nothing on them any more; later ones work."""
        with self._lock:
            self._deaf |= set(self._open)

    def wait_connected(self, count: int, timeout_s: float = 30.0) -> None:
        """Wait until there have been this many connections."""
        with self._lock:
            if not self._lock.wait_for(lambda: self.connections >= count, timeout_s):
                raise TimeoutError(f"{self.connections} of {count} connections in {timeout_s:g} s")

    def wait_fired(self, count: int, timeout_s: float) -> bool:
        """Wait until this many planned faults have happened; return False if they do not happen in time."""
        with self._lock:
            return self._lock.wait_for(lambda: self.fired >= count, timeout_s)

    def cut(self) -> None:
        """Break all connections now."""
        with self._lock:
            sockets, self._open = self._open, []
        for one in sockets:
            _close(one)

    def _plan(
        self, direction: Direction, more_bytes: int, kind: Literal["cut", "damage", "stop"], flip: int = 0xFF
    ) -> None:
        with self._lock:
            self._faults.append(_Fault(direction, self._counts[direction] + more_bytes, kind, flip))

    def _accept(self) -> None:
        while True:
            try:
                site, _ = self._listener.accept()
            except OSError:  # closed
                return
            host, _, port = self.target.rpartition(":")
            try:
                if self.refuses:
                    raise OSError
                server = socket.create_connection((host, int(port)))
            except OSError:
                _close(site)
                continue
            for one in (site, server):
                one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._lock:
                self._open += [site, server]
                self.connections += 1
                self._lock.notify_all()
                if self.deaf_next:
                    self.deaf_next -= 1
                    self._deaf |= {site, server}
            threading.Thread(target=self._pump, args=("up", site, server), daemon=True).start()
            threading.Thread(target=self._pump, args=("down", server, site), daemon=True).start()

    def _pump(self, direction: Direction, source: socket.socket, sink: socket.socket) -> None:
        line = _Line(direction)
        with self._lock:
            self._lines.append(line)
        try:
            while data := source.recv(_CHUNK_BYTES):
                data, cut = self._counted(line, data)
                while (left := self._held_until - time.monotonic()) > 0:
                    time.sleep(left)
                self._flowing.wait()
                if source not in self._deaf:
                    sink.sendall(data)
                if cut:
                    break
        except OSError:
            pass
        _close(source)
        _close(sink)

    def _counted(self, line: _Line, data: bytes) -> tuple[bytes, bool]:
        """Return what to forward of `data`, and whether the connection ends after it."""
        with self._lock:
            direction, before = line.direction, self._counts[line.direction]
            cut = False
            after, left = self._each.get(direction, (0, 0))
            if left and line.passed <= after < line.passed + len(data):
                data = _flipped(data, after - line.passed, 0xFF)
                self._each[direction] = (after, left - 1)
                self.fired += 1
            line.passed += len(data)
            for fault in [f for f in self._faults if f.direction == direction and f.at < before + len(data)]:
                self._faults.remove(fault)
                self.fired += 1
                place = fault.at - before
                if fault.kind == "cut":
                    data, cut = data[:place], True
                    break
                if fault.kind == "stop":
                    self._flowing.clear()
                else:
                    data = _flipped(data, place, fault.flip)
            self._counts[direction] = before + len(data)
            self._lock.notify_all()
            return data, cut


def _flipped(data: bytes, place: int, bits: int) -> bytes:
    return data[:place] + bytes([data[place] ^ bits]) + data[place + 1 :]


def _close(one: socket.socket) -> None:
    with suppress(OSError):
        one.shutdown(socket.SHUT_RDWR)
    one.close()
