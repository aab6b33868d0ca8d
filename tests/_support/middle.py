"""What stands between sites and a server: an HTTP proxy that answers CONNECT, and a TCP balancer that reads SNI."""

from __future__ import annotations

import asyncio
import base64
import ssl
import threading
from collections.abc import Coroutine, Mapping
from typing import Any, Self

LIMIT_S = 30.0


class _Middle:
    """Forwards each connection to the address that `_choose` finds in its first bytes. It runs in a thread of its own.

    Attributes:
        address: Its own "host:port", on the loopback.
        names: What each connection has asked for, in order.
        idle_s: After so many seconds without a byte in one direction a connection is cut, as balancers do.
        idle_cuts: How many were.
        passed: Bytes forwarded so far, in both directions.
        cut_at: Once so many bytes have passed, all connections are broken; 0 for never.
        refuses: Whether new connections are closed at once.
        refused: How many were.
    """

    def __init__(
        self, routes: Mapping[str, str], idle_s: float = 3600.0, context: ssl.SSLContext | None = None
    ) -> None:
        self.routes, self.idle_s = dict(routes), idle_s
        self.names: list[str] = []
        self.refuses, self.refused, self.idle_cuts = False, 0, 0
        self.passed = self.cut_at = 0
        self._open: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._server = self._do(asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=context))
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._server.close)
        self.cut()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(LIMIT_S)

    def cut(self) -> None:
        """Break all connections now, without a goodbye."""

        async def abort() -> None:
            self._abort_all()

        self._do(abort())

    def _abort_all(self) -> None:
        for writer in list(self._open):
            writer.transport.abort()

    def _do(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(LIMIT_S)

    async def _choose(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> tuple[str, bytes]:
        """Return whom a connection asks for, and the bytes that were read and belong to them."""
        raise NotImplementedError

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open.add(writer)
        try:
            if self.refuses:
                self.refused += 1
                return
            name, greeting = await self._choose(reader, writer)
            self.names.append(name)
            if name in self.routes:
                host, _, port = self.routes[name].rpartition(":")
                far_reader, far_writer = await asyncio.open_connection(host, int(port))
                self._open.add(far_writer)
                await self._accepted(writer)
                far_writer.write(greeting)
                ways = [self._pump(reader, far_writer), self._pump(far_reader, writer)]
                await asyncio.wait([asyncio.ensure_future(way) for way in ways], return_when=asyncio.FIRST_COMPLETED)
                far_writer.transport.abort()
        except (OSError, EOFError, asyncio.IncompleteReadError):
            pass
        finally:
            self._open.discard(writer)
            writer.close()

    async def _accepted(self, writer: asyncio.StreamWriter) -> None:
        """Say that the connection stands, where the protocol has words for it."""

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await asyncio.wait_for(reader.read(2**16), self.idle_s):
                self.passed += len(data)
                if self.cut_at and self.passed >= self.cut_at:
                    self.cut_at = 0
                    self._abort_all()
                writer.write(data)
                await writer.drain()
        except TimeoutError:
            self.idle_cuts += 1
        except OSError:
            pass


class ConnectProxy(_Middle):
    """An HTTP proxy for CONNECT. Its `routes` stand for DNS: the "host:port" asked for -> where that is.

    Attributes:
        user: "name:password" that it wants (Basic), or "" for everybody.
        status: What it answers everybody, such as 403, or 0 to connect.
        url: Its URL for $https_proxy, without a user.
        agents: The header `User-Agent` of each request; gRPC sends one, our own connections do not.
    """

    def __init__(self, routes: Mapping[str, str], user: str = "", status: int = 0, idle_s: float = 3600.0) -> None:
        super().__init__(routes, idle_s)
        self.user, self.status, self.url = user, status, f"http://{self.address}"
        self.agents: list[str] = []

    async def _choose(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> tuple[str, bytes]:
        first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = {key.lower(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
        method, name, _ = first.split(" ")
        self.agents.append(headers.get("user-agent", ""))
        wanted = "Basic " + base64.b64encode(self.user.encode()).decode()
        status = self.status or (407 if self.user and headers.get("proxy-authorization") != wanted else 0)
        if method != "CONNECT" or status or name not in self.routes:
            writer.write(f"HTTP/1.1 {status or 502} No\r\nContent-Length: 0\r\n\r\n".encode())
            await writer.drain()
            raise EOFError
        return name, b""

    async def _accepted(self, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 Connection established\r\nVia: 1.1 here\r\n\r\n")


class SniBalancer(_Middle):
    """A TCP balancer that passes TLS on unopened, to where `routes` sends the name in its greeting (SNI)."""

    async def _choose(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> tuple[str, bytes]:
        head = await reader.readexactly(5)
        body = await reader.readexactly(int.from_bytes(head[3:5], "big"))
        return server_name(body), head + body


def server_name(hello: bytes) -> str:
    """The name in a ClientHello (RFC 8446, 4.1.2; RFC 6066, 3), or ""."""
    at = 4 + 2 + 32  # header of the message, version, random
    at += 1 + hello[at]  # session
    at += 2 + int.from_bytes(hello[at : at + 2], "big")  # ciphers
    at += 1 + hello[at]  # compression
    at += 2  # length of all extensions
    while at < len(hello):
        kind, size = int.from_bytes(hello[at : at + 2], "big"), int.from_bytes(hello[at + 2 : at + 4], "big")
        if kind == 0:
            return hello[at + 9 : at + 4 + size].decode()
        at += 4 + size
    return ""


class TlsServer(_Middle):
    """A TLS server that makes handshakes with a certificate of its own, as a firewall that inspects TLS does."""

    def __init__(self, context: ssl.SSLContext) -> None:
        super().__init__({}, context=context)

    async def _choose(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> tuple[str, bytes]:
        await reader.read(1)
        raise EOFError
