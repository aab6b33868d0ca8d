"""HTTP proxies between a site and the server: the same ones that gRPC uses, for connections that we open ourselves."""

from __future__ import annotations

import base64
import ipaddress
import os
import socket
from urllib.parse import unquote, urlsplit

_PROXIES = ("grpc_proxy", "https_proxy", "http_proxy")  # variables that gRPC reads, in its order
_HEAD_BYTES = 2**16


def proxy_variable(address: str) -> str | None:
    """Return the environment variable whose proxy gRPC uses for connections to an address.

    Args:
        address: The server's "host:port".

    Returns:
        Name of the variable, or None if connections are direct.
    """
    host = host_of(address)
    given = {name: os.environ.get(name, "") for name in ("no_grpc_proxy", "no_proxy", *_PROXIES)}
    exempt = (given["no_grpc_proxy"] or given["no_proxy"]).split(",")
    if is_loopback(address) or any(host.endswith(name.strip()) for name in exempt if name.strip()):
        return None
    return next((name for name in _PROXIES if given[name]), None)


def host_of(address: str) -> str:
    """Return the host of "host:port", without the brackets of an IPv6 address."""
    return address.rpartition(":")[0].strip("[]")


def is_loopback(address: str) -> bool:
    """Whether an address is this machine's own. No proxy can reach it."""
    host = host_of(address)
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def open_connection(address: str, timeout_s: float) -> socket.socket:
    """Open a TCP connection as gRPC would, through the proxy that the environment names, if any.

    Args:
        address: The server's "host:port".
        timeout_s: How long each step may take, in seconds.

    Returns:
        The connection.

    Raises:
        OSError: If there is no way to the server.
    """
    variable = proxy_variable(address)
    if variable is None:
        return socket.create_connection((host_of(address), int(address.rpartition(":")[2])), timeout_s)
    proxy = urlsplit(os.environ[variable])
    connection = socket.create_connection((proxy.hostname or "", proxy.port or 80), timeout_s)
    try:
        lines = [f"CONNECT {address} HTTP/1.1", f"Host: {address}"]
        if proxy.username is not None:
            secret = f"{unquote(proxy.username)}:{unquote(proxy.password or '')}"
            lines.append(f"Proxy-Authorization: Basic {base64.b64encode(secret.encode()).decode()}")
        connection.sendall("\r\n".join([*lines, "", ""]).encode())
        head = b""
        while not head.endswith(b"\r\n\r\n") and len(head) < _HEAD_BYTES:
            part = connection.recv(1)  # byte by byte: what follows the head belongs to the server
            if not part:
                break
            head += part
        status = head.split(b" ", 2)[1:2]
        if status != [b"200"]:
            raise OSError(f"the proxy in ${variable} refuses the connection")
    except BaseException:
        connection.close()
        raise
    return connection
