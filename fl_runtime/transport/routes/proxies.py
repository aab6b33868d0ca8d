"""HTTP proxies between a site and the server. Which one counts is decided here, by gRPC's rules.

gRPC reads the same variables, but its versions differ in passwords with special characters and in exemptions, and one
that cannot use a proxy connects directly. So gRPC is told what was decided here; see `route.py`.
"""

from __future__ import annotations

import base64
import ipaddress
import os
import socket
import time
from dataclasses import dataclass, field
from urllib.parse import unquote, urlsplit

from fl_runtime.errors import ConfigError

VARIABLES = ("grpc_proxy", "https_proxy", "http_proxy")
"""Environment variables that may name a proxy. The first that is set counts; an empty one means no proxy."""

_EXEMPTIONS = ("no_grpc_proxy", "no_proxy")
_DEFAULT_PORT = 80
_HEAD_BYTES = 2**16


@dataclass(frozen=True)
class Proxy:
    """An HTTP proxy that the environment names.

    Attributes:
        variable: The environment variable that names it.
        host: Its host, without the brackets of an IPv6 address.
        port: Its port.
        authorization: Value of the header `Proxy-Authorization`, a secret; "" if no user is given.
    """

    variable: str
    host: str
    port: int
    authorization: str = field(default="", repr=False)

    def __str__(self) -> str:
        """The proxy in a message. It shows neither user nor password."""
        return f"the proxy in ${self.variable} ({self.address})"

    @property
    def address(self) -> str:
        """Host and port of the proxy, as "host:port"."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class ProxyError(OSError):
    """A proxy that cannot be reached, or does not connect to the server.

    Attributes:
        fix: What to do.
    """

    def __init__(self, what: str, fix: str) -> None:
        super().__init__(what)
        self.fix = fix


def proxy_of(address: str) -> Proxy | None:
    """Return the proxy for connections to a server.

    Args:
        address: The server's "host:port".

    Returns:
        The proxy, or None if connections are direct, as they always are to this machine itself.

    Raises:
        ConfigError: If the variable that counts does not name an HTTP proxy.
    """
    if is_loopback(address) or _is_exempt(host_of(address)):
        return None
    variable = _first_set(VARIABLES)
    value = os.environ[variable].strip() if variable else ""
    return _read(variable, value, host_of(address)) if value else None


def _read(variable: str, value: str, server: str) -> Proxy:
    """Read a proxy's URL. The error does not quote it, since it may hold a password."""
    url = urlsplit(value if "://" in value else f"http://{value}")
    fault = ""
    try:
        port = url.port or _DEFAULT_PORT
    except ValueError:
        fault = "its port is not a number, or a special character of the password is not encoded"
    if url.scheme != "http":
        fault = f"it begins with {url.scheme}://, and only HTTP proxies can be used"
    elif not url.hostname:
        fault = "it names no host"
    if fault:
        raise ConfigError(
            f"the proxy in ${variable} cannot be used: {fault}",
            where=f"environment variable {variable}",
            fix="write it as http://HOST:PORT or http://USER:PASSWORD@HOST:PORT, with @ : / # ? % of a password as %40 "
            f"%3A %2F %23 %3F %25; or reach the server without a proxy: add {server} to $no_proxy",
        )
    secret = ""
    if url.username is not None:
        given = f"{unquote(url.username)}:{unquote(url.password or '')}"
        secret = f"Basic {base64.b64encode(given.encode()).decode()}"
    return Proxy(variable, str(url.hostname), port, secret)


def _first_set(names: tuple[str, ...]) -> str:
    return next((name for name in names if name in os.environ), "")


def _is_exempt(host: str) -> bool:
    """Whether the environment exempts a host: by its name, a domain above it, its IP address, or a range (CIDR)."""
    variable = _first_set(_EXEMPTIONS)
    entries = [entry.strip().lower() for entry in os.environ[variable].split(",")] if variable else []
    return any(_covers(entry, host.lower()) for entry in entries if entry)


def _covers(entry: str, host: str) -> bool:
    if host == entry or host.endswith(f".{entry.removeprefix('.')}"):
        return True
    try:
        return ipaddress.ip_address(host) in ipaddress.ip_network(entry, strict=False)
    except ValueError:
        return False


def host_of(address: str) -> str:
    """Return the host of "host:port", without the brackets of an IPv6 address."""
    return address.rpartition(":")[0].strip("[]")


def is_loopback(address: str) -> bool:
    """Whether an address is this machine's own. No proxy can reach it."""
    host = host_of(address)
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost" or host.lower().endswith(".localhost")


def open_connection(address: str, timeout_s: float) -> socket.socket:
    """Open a TCP connection to a server, through the proxy that counts for it, if any.

    Args:
        address: The server's "host:port".
        timeout_s: How long each step may take, in seconds.

    Returns:
        The connection.

    Raises:
        OSError: If there is no way to the server; a ProxyError if that is due to the proxy.
        ConfigError: If the environment does not name an HTTP proxy where it should.
    """
    proxy = proxy_of(address)
    if proxy is None:
        return socket.create_connection((host_of(address), int(address.rpartition(":")[2])), timeout_s)
    connection = reach(proxy, timeout_s)
    try:
        ask_for(address, proxy, connection)
    except BaseException:
        connection.close()
        raise
    return connection


def reach(proxy: Proxy, timeout_s: float) -> socket.socket:
    """Open a TCP connection to a proxy.

    Args:
        proxy: The proxy.
        timeout_s: How long this and each later step may take, in seconds.

    Returns:
        The connection.

    Raises:
        ProxyError: If nobody answers there.
    """
    try:
        return socket.create_connection((proxy.host, proxy.port), timeout_s)
    except OSError as error:
        raise ProxyError(
            f"{proxy} cannot be reached: {error.strerror or error}",
            fix=f"check ${proxy.variable} and that the proxy runs; or, if this machine needs none, add the server's "
            "host to $no_proxy",
        ) from None


def ask_for(address: str, proxy: Proxy, connection: socket.socket) -> None:
    """Ask a proxy to connect to a server (HTTP method CONNECT). All later bytes of the connection are the server's.

    Args:
        address: The server's "host:port".
        proxy: The proxy.
        connection: The connection to it; its timeout is the limit for the whole answer.

    Raises:
        ProxyError: If it does not do that.
    """
    lines = [f"CONNECT {address} HTTP/1.1", f"Host: {address}"]
    if proxy.authorization:
        lines.append(f"Proxy-Authorization: {proxy.authorization}")
    head, limit_s = b"", connection.gettimeout()
    ends = None if limit_s is None else time.monotonic() + limit_s
    try:
        connection.sendall("\r\n".join([*lines, "", ""]).encode())
        while not head.endswith(b"\r\n\r\n") and len(head) < _HEAD_BYTES:
            if ends is not None and time.monotonic() > ends:
                raise TimeoutError("timed out")
            part = connection.recv(1)  # byte by byte: what follows the head belongs to the server
            if not part:
                break
            head += part
    except OSError as error:
        why = f"{proxy} does not answer the request to connect to {address}: {error.strerror or error}"
        raise ProxyError(why, fix=_ANSWERS.format(proxy=proxy, address=address)) from None
    words = head.split(b" ", 2)
    status = words[1].decode(errors="replace") if words[0].startswith(b"HTTP/") and len(words) > 1 else ""
    if not status.startswith("2"):
        raise _refusal(status, address, proxy)


_ANSWERS = "check that an HTTP proxy listens at {proxy.address}, and that it may connect to {address}"


def _refusal(status: str, address: str, proxy: Proxy) -> ProxyError:
    host, _, port = address.rpartition(":")
    if status == "407":
        if proxy.authorization:
            what, change = "does not accept the user name and password that stand there", "correct them"
        else:
            what, change = "wants a user name and password", "add them"
        return ProxyError(
            f"{proxy} {what} (status 407)",
            fix=f"{change} in ${proxy.variable}: http://USER:PASSWORD@HOST:PORT, with @ : / # ? % of the password as "
            "%40 %3A %2F %23 %3F %25. Only the scheme Basic is supported",
        )
    if status == "403":
        return ProxyError(
            f"{proxy} does not allow connections to {address} (status 403)",
            fix=f"ask whoever runs the proxy to allow CONNECT to {host}, port {port}; or, if this machine reaches the "
            f"server without a proxy, add {host} to $no_proxy",
        )
    if status in ("502", "503", "504"):
        return ProxyError(
            f"{proxy} cannot connect to {address} (status {status})",
            fix="check that the server runs, and that the proxy knows its name and may reach it",
        )
    answer = f"answers with status {status[:3]}" if status.isdigit() else "does not answer as an HTTP proxy does"
    return ProxyError(f"{proxy} {answer} when asked for {address}", fix=_ANSWERS.format(proxy=proxy, address=address))
