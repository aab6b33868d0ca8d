"""A small HTTP server for the pages `/healthz` and `/metrics` of a server or a site daemon."""

from __future__ import annotations

import ipaddress
import socket
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from fl_runtime.errors import ConfigError
from fl_runtime.text import printable
from fl_runtime.trust.project import split_address

_LOOPBACK = "127.0.0.1"
_MOST_CONNECTIONS = 16
_TIMEOUT_S = 5.0


class MonitoringPages:
    """Serves the two pages from threads of its own, from construction until `close`.

    Attributes:
        address: Where they are, as "host:port".
    """

    def __init__(
        self,
        address: str,
        metrics: Callable[[], bytes],
        faults: Callable[[], list[str]],
        well: Callable[[], str] = lambda: "ok",
    ) -> None:
        """Serve the pages.

        Args:
            address: "host:port" to listen on; a port alone means that of the loopback, and port 0 any free one.
            metrics: Returns the page `/metrics`.
            faults: Returns what is wrong, for `/healthz`: its status is 503 if there is anything, else 200.
            well: Returns what `/healthz` says if nothing is wrong.

        Raises:
            ConfigError: It is not such an address, or cannot be listened on.
        """
        host, port = split_address(f"{_LOOPBACK}:{address.lstrip(':')}" if ":" not in address.lstrip(":") else address)
        try:
            self._server = _Server((host, port), metrics, faults, well)
        except (OSError, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ConfigError(
                f"cannot listen at {address}: {reason}", where="--metrics", fix="choose another port or address"
            ) from error
        shown = f"[{host}]" if ":" in host else host
        self.address = f"{shown}:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.1,), name="fl-metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop serving the pages, and free their address."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(ThreadingHTTPServer):
    """Answers a bounded number of connections at a time, and drops the others."""

    daemon_threads = True
    block_on_close = False

    def __init__(
        self,
        address: tuple[str, int],
        metrics: Callable[[], bytes],
        faults: Callable[[], list[str]],
        well: Callable[[], str],
    ) -> None:
        self.metrics, self.faults, self.well = metrics, faults, well
        self._free = threading.BoundedSemaphore(_MOST_CONNECTIONS)
        if _is_ipv6(address[0]):
            self.address_family = socket.AF_INET6
        super().__init__(address, _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._free.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore clients that break off."""


class _Handler(BaseHTTPRequestHandler):
    """Answers GET and HEAD for the two pages, one request a connection."""

    server: _Server
    server_version, sys_version = "fl-adapters", ""
    timeout = _TIMEOUT_S

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/metrics":
            self._answer(200, "text/plain; version=0.0.4; charset=utf-8", self.server.metrics())
        elif path == "/healthz":
            faults = self.server.faults()
            text = "\n".join(printable(fault, 1000) for fault in faults) or self.server.well()
            self._answer(503 if faults else 200, "text/plain; charset=utf-8", f"{text}\n".encode())
        else:
            self._answer(404, "text/plain; charset=utf-8", b"there are /healthz and /metrics\n")

    def do_HEAD(self) -> None:
        self.do_GET()

    def _answer(self, status: int, kind: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Write no line per request."""


def _is_ipv6(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).version == 6
    except ValueError:
        return False
