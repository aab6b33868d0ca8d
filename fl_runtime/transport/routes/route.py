"""The way to a server: its proxy, and the name that its certificate must have."""

from __future__ import annotations

import ipaddress
import ssl
from dataclasses import dataclass

from fl_runtime.errors import ConnectionLostError
from fl_runtime.transport.routes.proxies import Proxy, ProxyError, host_of, is_loopback, open_connection, proxy_of
from fl_runtime.transport.tls import ServerCertificate, server_certificate
from fl_runtime.version import SERVER_NAME

_LOOK_UP_S = 10.0
_DATES = (9, 10)  # OpenSSL's codes for a certificate that is not valid yet, or has expired


@dataclass(frozen=True)
class Route:
    """The way to a server.

    Attributes:
        address: The server's "host:port".
        proxy: The proxy on the way, or None.
        certificate: The certificate that the server has shown, or None if it was not looked up.
    """

    address: str
    proxy: Proxy | None = None
    certificate: ServerCertificate | None = None

    @property
    def server_name(self) -> str:
        """Name to greet the server with (SNI), which its certificate must have.

        It is the host of the address, by which a balancer tells servers apart. A certificate that was issued for
        another address has only the name that all servers share.
        """
        host = host_of(self.address)
        return host if self.certificate is not None and self.certificate.has_name(host) else SERVER_NAME

    @property
    def target(self) -> str:
        """The "host:port" that gRPC connects to."""
        return self.address if self.proxy is None else self.proxy.address

    def options(self) -> list[tuple[str, int | str]]:
        """Return the channel options that have gRPC take this way, whatever it reads in the environment."""
        options: list[tuple[str, int | str]] = [("grpc.enable_http_proxy", 0)]
        if self.proxy is not None:
            # what gRPC's own reading of the environment would set
            options.append(("grpc.http_connect_server", self.address))
            if self.proxy.authorization:
                options.append(("grpc.http_connect_headers", f"Proxy-Authorization:{self.proxy.authorization}"))
        return options


def find_route(address: str, authority: bytes = b"", *, look_up: bool = False) -> Route:
    """Find the way to a server.

    Behind a proxy, and where the address is a name, a connection is made first, to say what is wrong with the way and
    to see the names in the server's certificate.

    Args:
        address: The server's "host:port".
        authority: Certificates of the roots that may have signed the server's, as PEM; empty without TLS.
        look_up: Whether the server's certificate is wanted in any case.

    Returns:
        The way.

    Raises:
        ConnectionLostError: If there is none at present.
        ConfigError: If the environment does not name an HTTP proxy where it should.
    """
    proxy = proxy_of(address)
    if not authority or not (look_up or proxy is not None or is_name(address)):
        return Route(address, proxy)
    try:
        certificate = server_certificate(
            authority, lambda: open_connection(address, _LOOK_UP_S), greeting_name(address)
        )
    except OSError as error:
        what, fix = fault_of(error)
        raise ConnectionLostError(f"the server at {address} does not answer: {what}", fix=fix) from None
    return Route(address, proxy, certificate)


def greeting_name(address: str) -> str:
    """Return the name to greet a server with (SNI) whose certificate was not seen yet: its host, if that is a name."""
    return host_of(address) if is_name(address) else SERVER_NAME


def is_name(address: str) -> bool:
    """Whether the host of "host:port" is a name other than this machine's own, and so may be sent as SNI."""
    try:
        ipaddress.ip_address(host_of(address))
    except ValueError:
        return not is_loopback(address)
    return False


def fault_of(error: OSError) -> tuple[str, str]:
    """Say what is wrong with the way to a server.

    Args:
        error: The error of `open_connection` or `server_certificate`.

    Returns:
        What is wrong, and what to do.
    """
    if isinstance(error, ProxyError):
        return str(error), error.fix
    if isinstance(error, ssl.SSLCertVerificationError) and error.verify_code in _DATES:
        return (
            f"the server's certificate: {error.verify_message}",
            "check this machine's clock; if it is right, the server needs a new certificate",
        )
    if isinstance(error, ssl.SSLCertVerificationError):
        return (
            f"the certificate shown there is not by this federation's authority: {error.verify_message}",
            "another server listens there, or a proxy or firewall opens TLS on the way and signs with its own "
            "certificate: have the server's host exempted from that inspection",
        )
    if isinstance(error, ssl.SSLError):
        return (
            f"TLS fails: {error.reason or error}",
            "check that the federation's server listens there, and that nothing on the way opens TLS or ends it",
        )
    return error.strerror or str(error), "check that the server runs and that this machine can reach it"
