"""Mutual TLS for gRPC: TLS 1.3 alone, certificates that are taken up from their files when they change.

gRPC's Python side has no setting for the lowest TLS version, so it is made impossible to agree on an older one: our
certificates have P-256 keys, and the ciphers that are left for TLS 1.2 need an RSA key. BoringSSL's ciphers of TLS 1.3
are not affected. gRPC reads that setting once, when it starts: `tls_setting.only_tls_1_3` must have been called before.
"""

from __future__ import annotations

import os
import socket
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc

from fl_runtime.errors import ConfigError
from fl_runtime.transport.base import Credentials

_RECORD_ALERT = 0x15
_TIMEOUT_S = 5.0


class FileCredentials:
    """The credentials in a folder's key.pem, certificate.pem and ca.pem; the same object until a file changes."""

    def __init__(self, folder: Path) -> None:
        self._files = [folder / name for name in ("key.pem", "certificate.pem", "ca.pem")]
        self._stamp: tuple[tuple[int, int], ...] = ()
        self._current: Credentials | None = None
        self()

    def __call__(self) -> Credentials:
        try:
            stamp = tuple((found.st_mtime_ns, found.st_ino) for found in map(os.stat, self._files))
            if self._current is None or stamp != self._stamp:
                self._current = Credentials(*(path.read_bytes() for path in self._files))
                self._stamp = stamp
        except OSError as error:
            if self._current is None:
                raise ConfigError(
                    f"the startup kit is not complete: {error.strerror}",
                    where=str(error.filename),
                    fix="get a fresh kit, or install its certificate with `fl-adapters cert install`",
                ) from None
        return self._current  # a file that is gone for a moment changes nothing


def server_credentials(load: Callable[[], Credentials]) -> Any:
    """gRPC's server credentials: every handshake takes the newest certificate; callers must have one too."""
    current = load()

    def configuration(found: Credentials) -> Any:
        return grpc.ssl_server_certificate_configuration([(found.key, found.certificate)], found.authority)

    def fetch() -> Any:
        nonlocal current
        found = load()
        if found is current:
            return None
        current = found
        return configuration(found)

    return grpc.dynamic_ssl_server_credentials(configuration(current), fetch, require_client_authentication=True)


def refuses_old_tls(host: str, port: int) -> bool:
    """Whether our own server answers a TLS 1.2 greeting with an alert, or not at all."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    greeting = context.wrap_bio(incoming, outgoing)
    try:
        greeting.do_handshake()
    except ssl.SSLWantReadError:
        pass
    except ssl.SSLError:  # this machine's own OpenSSL does not speak it any more
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
