"""Mutual TLS 1.3 for gRPC, with certificates that are read again when their files change.

gRPC's Python interface cannot set a minimum TLS version. Older versions are excluded by their ciphers: the only cipher
left for TLS 1.2 needs an RSA key, and our certificates have P-256 keys. The ciphers of TLS 1.3 are not affected. gRPC
reads the cipher setting once, when it starts, so `tls_setting.only_tls_1_3` must be called before.
"""

from __future__ import annotations

import os
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import grpc

from fl_runtime.errors import ConfigError
from fl_runtime.transport.base import Credentials
from fl_runtime.version import SERVER_NAME

_RECORD_ALERT = 0x15
_TIMEOUT_S = 5.0


class FileCredentials:
    """Loads credentials from key.pem, certificate.pem and ca.pem, again whenever one of the files changes.

    Calling it returns the current `Credentials`: the same object until a file changes.

    Args:
        folder: Folder with the three files, usually a startup kit.
        more: Returns further authorities whose certificates are accepted, as PEM. A server needs them for participants
            whose certificates are by an outside authority.

    Raises:
        ConfigError: If a file is missing or cannot be read.
    """

    def __init__(self, folder: Path, more: Callable[[], bytes] = bytes) -> None:
        self._more, self._outside = more, b""
        self._files = [folder / name for name in ("key.pem", "certificate.pem", "ca.pem")]
        self._stamp: tuple[tuple[int, int], ...] = ()
        self._current: Credentials | None = None
        self()

    def __call__(self) -> Credentials:
        try:
            stamp = tuple((status.st_mtime_ns, status.st_ino) for status in map(os.stat, self._files))
            outside = self._more()
            if self._current is None or (stamp, outside) != (self._stamp, self._outside):
                key, certificate, authority = (path.read_bytes() for path in self._files)
                self._current = Credentials(key, certificate, authority + outside)
                self._stamp, self._outside = stamp, outside
        except OSError as error:
            if self._current is None:
                raise ConfigError(
                    f"the startup kit is not complete: {error.strerror}",
                    where=str(error.filename),
                    fix="get a new kit, or install its certificate with `fl-adapters cert install`",
                ) from None
        return self._current  # a file that is missing while it is replaced does not matter


def server_credentials(load: Callable[[], Credentials]) -> Any:
    """Make gRPC server credentials that require a certificate of every caller.

    Args:
        load: Returns the current credentials, and the same object while they are unchanged. Called at each handshake.

    Returns:
        The object for gRPC's `add_secure_port`.
    """
    current = load()

    def configuration(credentials: Credentials) -> Any:
        pair = (credentials.key, credentials.certificate)
        return grpc.ssl_server_certificate_configuration([pair], credentials.authority)

    def fetch() -> Any:
        nonlocal current
        newest = load()
        if newest is current:
            return None
        current = newest
        return configuration(newest)

    return grpc.dynamic_ssl_server_credentials(configuration(current), fetch, require_client_authentication=True)


@dataclass(frozen=True)
class ServerCertificate:
    """A certificate that a server has shown, and that the federation's authority signed.

    Attributes:
        serial: Serial number.
        pem: The certificate.
        names: Host names and IP addresses in it, in lower case.
    """

    serial: int
    pem: bytes
    names: frozenset[str]

    def has_name(self, host: str) -> bool:
        """Whether it was issued for a host name or IP address."""
        return host.lower() in self.names


def server_certificate(
    authority: bytes, connect: Callable[[], socket.socket], greeting: str = SERVER_NAME
) -> ServerCertificate:
    """Fetch the certificate of a server by a TLS handshake, and verify that the authority signed it for a server.

    Args:
        authority: Certificates of the roots that may have signed it, as PEM.
        connect: Opens a connection to the server.
        greeting: Name to ask for (SNI), by which a balancer chooses the server.

    Returns:
        The certificate.

    Raises:
        OSError: If the server cannot be reached, or has no such certificate.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False  # the name that all servers share is compared below, whatever the greeting
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_verify_locations(cadata=authority.decode())
    context.set_alpn_protocols(["h2"])
    # without a certificate of our own: the server refuses that, but has shown its own before
    with connect() as plain, context.wrap_socket(plain, server_hostname=greeting) as secured:
        fields, der = secured.getpeercert(), secured.getpeercert(binary_form=True)
    if not fields or der is None:
        raise ssl.SSLError("the server has shown no certificate")
    names = frozenset(
        str(name).lower() for kind, name in cast(Any, fields.get("subjectAltName", ())) if kind in ("DNS", "IP Address")
    )
    if SERVER_NAME not in names:
        raise ssl.SSLError("the certificate shown there is not a server's")
    return ServerCertificate(int(str(fields["serialNumber"]), 16), ssl.DER_cert_to_PEM_cert(der).encode(), names)


def shown_certificate(connect: Callable[[], socket.socket], greeting: str) -> bytes:
    """Fetch whatever certificate is shown in a TLS handshake, unverified, to say whose it is.

    Args:
        connect: Opens a connection.
        greeting: Name to ask for (SNI).

    Returns:
        The certificate as PEM; only for messages.

    Raises:
        OSError: If there is none.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with connect() as plain, context.wrap_socket(plain, server_hostname=greeting) as secured:
        der = secured.getpeercert(binary_form=True)
    if der is None:
        raise ssl.SSLError("no certificate was shown")
    return ssl.DER_cert_to_PEM_cert(der).encode()


def refuses_old_tls(host: str, port: int) -> bool:
    """Test whether our own server refuses TLS 1.2: it answers the greeting with an alert, or closes the connection."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    greeting = context.wrap_bio(incoming, outgoing)
    try:
        greeting.do_handshake()
    except ssl.SSLWantReadError:
        pass
    except ssl.SSLError:  # this machine's OpenSSL does not offer TLS 1.2 any more
        return False
    try:
        with socket.create_connection((_reachable(host), port), _TIMEOUT_S) as connection:
            connection.sendall(outgoing.read())
            answer = connection.recv(1)
    except OSError:
        return False
    return answer in (b"", bytes([_RECORD_ALERT]))


def _reachable(host: str) -> str:
    return {"0.0.0.0": "127.0.0.1", "::": "::1", "[::]": "::1"}.get(host, host.strip("[]"))
