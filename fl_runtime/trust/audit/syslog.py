"""Sends lines to a syslog server: RFC 5424 messages over UDP (RFC 5426), TCP (RFC 6587) or TLS (RFC 5425)."""

from __future__ import annotations

import atexit
import os
import queue
import select
import socket
import ssl
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from urllib.parse import parse_qs, urlsplit

from fl_runtime.errors import ConfigError, FederationError

_PORTS = {"udp": 514, "tcp": 601, "tls": 6514}
_QUEUE_LINES = 10_000
_UDP_BYTES = 60_000
_TIMEOUT_S = 5.0
_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 10.0
_LAST_S = 2.0
_FACILITY = 13  # log audit
_WARNING, _NOTICE = 4, 5


@dataclass(frozen=True)
class SyslogAddress:
    """Where a syslog server listens.

    Attributes:
        scheme: "udp", "tcp" or "tls".
        host: Name or address of the host.
        port: Port.
        authority: File of the certificate (PEM) that the server's is checked against; empty for those of the system.
    """

    scheme: str
    host: str
    port: int
    authority: str = ""

    @classmethod
    def parse(cls, url: str) -> SyslogAddress:
        """Read an address.

        Args:
            url: "udp://HOST[:514]", "tcp://HOST[:601]", or "tls://HOST[:6514][?ca=FILE]".

        Returns:
            The address.

        Raises:
            ConfigError: If it is not such an address.
        """
        try:
            parts = urlsplit(url)
            port, options = parts.port, parse_qs(parts.query, strict_parsing=bool(parts.query))
        except ValueError:
            parts, port, options = urlsplit(""), None, {}
        known = {"ca"} if parts.scheme == "tls" else set()
        if parts.scheme not in _PORTS or not parts.hostname or parts.path.strip("/") or not options.keys() <= known:
            raise ConfigError(
                f"{url!r} is not the address of a syslog server",
                where="syslog",
                fix="write udp://HOST:514, tcp://HOST:601, or tls://HOST:6514?ca=FILE",
            )
        return cls(parts.scheme, parts.hostname, port or _PORTS[parts.scheme], *options.get("ca", [])[:1])

    def __str__(self) -> str:
        return f"{self.scheme}://{self.host}:{self.port}"


class SyslogSender:
    """Sends lines from a thread of its own, over a queue of at most 10,000 lines. Sending never waits.

    While the server is out of reach the queue fills up, and further lines are lost to it. The number of lost lines is
    told when it is reached again, and at the end. Over UDP, and in a TCP connection that breaks, lines can be lost that
    nobody counts.
    """

    def __init__(self, url: str, on_lost: Callable[[int, str], None]) -> None:
        """Make a sender. It connects at the first line.

        Args:
            url: Address of the server, see `SyslogAddress.parse`.
            on_lost: Called by the sender's thread with the number of lost lines and the reason.

        Raises:
            ConfigError: If it is not such an address, or the file of its authority cannot be read.
        """
        self._address = SyslogAddress.parse(url)
        self._connection = _Connection(self._address)
        self._on_lost = on_lost
        self._queue: queue.Queue[bytes | None] = queue.Queue(_QUEUE_LINES)
        self._lock = threading.Lock()
        self._lost, self._reason = 0, ""
        self._thread: threading.Thread | None = None
        self._closing = threading.Event()
        self._host = socket.gethostname().encode("ascii", "replace").decode()[:255] or "-"

    def send(self, text: str, *, refused: bool) -> None:
        """Put a line into the queue, or count it as lost if the queue is full.

        Args:
            text: The line, in ASCII.
            refused: Whether it is a refusal, which has the severity "warning" in place of "notice".
        """
        if self._closing.is_set():
            return
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="fl-syslog", daemon=True)
                self._thread.start()
                atexit.register(self.close)
        priority = _FACILITY * 8 + (_WARNING if refused else _NOTICE)
        stamp = datetime.now(UTC).isoformat(timespec="milliseconds")
        head = f"<{priority}>1 {stamp} {self._host} fl-adapters {os.getpid()} audit - "
        try:
            self._queue.put_nowait((head + text).encode())
        except queue.Full:
            self._count_lost("the queue is full")

    def close(self) -> None:
        """Send what is in the queue, for at most two seconds."""
        self._closing.set()
        with suppress(queue.Full):
            self._queue.put_nowait(None)
        if self._thread is None or self._thread is threading.current_thread():
            return
        self._thread.join(_LAST_S)
        atexit.unregister(self.close)
        if self._thread.is_alive():  # it waits for a host that does not answer
            with suppress(queue.Empty):
                while self._queue.get_nowait() is not None:
                    self._count_lost("no answer")
            self._tell_lost()

    def _work(self) -> None:
        while (message := self._next()) is not None:
            if self._delivered(message) and self._lost and self._queue.qsize() < _QUEUE_LINES // 2:
                self._tell_lost()
        self._connection.close()
        self._tell_lost()

    def _next(self) -> bytes | None:
        if self._closing.is_set() and self._queue.empty():
            return None
        return self._queue.get()

    def _delivered(self, message: bytes) -> bool:
        """Send a message, again and again until the server takes it or this sender is closed."""
        pause_s = _PAUSE_S
        while True:
            try:
                self._connection.send(message)
                return True
            except _TooLongError as error:
                self._count_lost(str(error))
                return False
            except (OSError, ValueError) as error:
                self._reason = getattr(error, "strerror", None) or str(error)
            if self._closing.wait(pause_s):
                self._count_lost(self._reason)
                return False
            pause_s = min(pause_s * 2, _LONGEST_PAUSE_S)

    def _count_lost(self, reason: str) -> None:
        with self._lock:
            self._lost += 1
            self._reason = self._reason or reason

    def _tell_lost(self) -> None:
        with self._lock:
            lost, self._lost, reason, self._reason = self._lost, 0, self._reason, ""
        if not lost:
            return
        with suppress(FederationError):
            self._on_lost(lost, f"{self._address}: {reason}")


class _TooLongError(Exception):
    """A message does not fit into a datagram."""


class _Connection:
    """A connection to a syslog server, made again when it broke."""

    def __init__(self, address: SyslogAddress) -> None:
        self._address = address
        self._tls = _tls_context(address) if address.scheme == "tls" else None
        self._socket: socket.socket | None = None

    def send(self, message: bytes) -> None:
        """Send a message. Raises OSError if the server does not take it."""
        if self._address.scheme == "udp":
            if len(message) > _UDP_BYTES:
                raise _TooLongError(f"a line of {len(message)} bytes does not fit into a datagram")
            framed = message
        else:
            framed = b"%d %s" % (len(message), message)  # octet counting
        try:
            self._connected().sendall(framed)
        except OSError:
            self.close()
            raise

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _connected(self) -> socket.socket:
        if self._socket is not None and self._address.scheme == "tcp" and _has_ended(self._socket):
            self.close()
        if self._socket is None:
            self._socket = self._connect()
        return self._socket

    def _connect(self) -> socket.socket:
        host, port = self._address.host, self._address.port
        if self._address.scheme == "udp":
            family, kind, protocol, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
            connection = socket.socket(family, kind, protocol)
            connection.connect(where)
            return connection
        connection = socket.create_connection((host, port), _TIMEOUT_S)
        if self._tls is None:
            return connection
        try:
            return self._tls.wrap_socket(connection, server_hostname=host)
        except OSError:
            connection.close()
            raise


def _has_ended(connection: socket.socket) -> bool:
    """Whether the other side has closed the connection. What is sent after that would be lost without an error."""
    readable, _, _ = select.select([connection], [], [], 0)
    return bool(readable) and not connection.recv(4096)


def _tls_context(address: SyslogAddress) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=address.authority or None)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"the certificate of the syslog server's authority cannot be read: {error}",
            where=address.authority,
            fix="name a file of certificates in PEM after ?ca=",
        ) from None
