"""gRPC: the only place that imports it. Messages pass through as bytes; errors travel as trailing metadata."""

from __future__ import annotations

import hmac
import json
import logging
import socket
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import grpc

from fl_runtime.errors import (
    ConfigError,
    ConnectionLostError,
    FederationError,
    PermissionDeniedError,
    ProtocolError,
    TransferDamagedError,
)
from fl_runtime.transport import integrity
from fl_runtime.transport.base import CONTROL_METHODS, METHODS, Call, Credentials, Peer, Service
from fl_runtime.transport.malloc import keep_freed_memory
from fl_runtime.transport.tls import refuses_old_tls, server_credentials
from fl_runtime.version import SERVER_NAME

log = logging.getLogger(__name__)

_SERVICE = "fl.v1.Federation"
_ERROR_KEY = "fl-error-bin"
_ERROR_BYTES = {"what": 4_000, "where": 1_000, "fix": 1_000}  # metadata of 8 KiB is what gRPC always lets through
_MESSAGE_BYTES = 8 * 2**20
_COMMON: list[tuple[str, int]] = [
    ("grpc.max_receive_message_length", _MESSAGE_BYTES),
    ("grpc.max_send_message_length", _MESSAGE_BYTES),
    ("grpc.keepalive_timeout_ms", 20_000),
]
_CLIENT = [
    *_COMMON,
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.enable_retries", 0),  # ours resume a transfer where it stopped; gRPC's would begin again
    ("grpc.use_local_subchannel_pool", 1),  # a new channel must not share what an old one waits for
]
_SERVER = [
    *_COMMON,
    ("grpc.so_reuseport", 0),  # else a second server takes half of the first one's sites
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
    ("grpc.keepalive_time_ms", 20_000),
]
_OPEN_PORT = [  # what a server adds that strangers can reach
    ("grpc.server_handshake_timeout_ms", 10_000),
    ("grpc.max_connection_idle_ms", 300_000),
    ("grpc.max_concurrent_streams", 64),
]
_NARROWEST_BYTES, _WIDEST_BYTES = 5 * 2**14, 7 * 2**20


@dataclass(frozen=True)
class _Room:
    """The server's memory for what is on its way from all sites, and what a site takes of it anyway: connection,
    threads, and with TLS what is being decrypted. 7 MiB under way fill a line of 1 Gbit/s whose answers take 58 ms."""

    total_bytes: int
    site_bytes: int


_PLAIN, _ENCRYPTED = _Room(11 * 2**20, 2**17), _Room(15 * 2**20, 7 * 2**15)
_ALL_METHODS = (*METHODS, *CONTROL_METHODS)
_TRANSIENT = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED, grpc.StatusCode.DEADLINE_EXCEEDED}
_BROKEN = {grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.DATA_LOSS}
"""What gRPC makes of bytes that are no HTTP/2."""


class GrpcTransport:
    """A site's channel to the server. One HTTP/2 connection, opened by the first call.

    A lost connection is made anew by the next call, on a channel of its own: an old one waits between its attempts
    for longer than it is told to (5 to 11 s in grpcio 1.62 to 1.78), and refuses calls meanwhile.

    address: host:port. token: proves who we are in a simulation on the loopback. credentials: do so everywhere else,
    with mutual TLS; called before every call, so that a renewed certificate is taken up by the next one.
    """

    def __init__(self, address: str, token: str = "", credentials: Callable[[], Credentials] | None = None) -> None:
        self._address, self._plain = address, credentials is None
        self._authorization = f"Bearer {token}" if token else ""
        self._credentials: Callable[[], Credentials | None] = credentials or (lambda: None)
        self._lock = threading.Lock()
        self._line = _Line.open(address, self._credentials())
        self._closed = False

    def call(self, method: str, requests: bytes | Iterable[bytes]) -> Call:
        with self._lock:
            if self._closed:
                raise ConnectionLostError(f"the connection to {self._address} has been closed")
            credentials = self._credentials()
            if self._line.lost.is_set() or credentials is not self._line.credentials:
                self._line = _Line.open(self._address, credentials)  # calls that still run keep the old one
            line = self._line
        try:
            if isinstance(requests, bytes):
                message = integrity.with_check(requests) if self._plain else requests
                started = line.single[method](message, metadata=self._metadata(method))
            else:
                messages = map(integrity.with_check, requests) if self._plain else iter(requests)
                started = line.streamed[method](messages, metadata=self._metadata(method))
        except ValueError as error:  # closed by another thread
            raise ConnectionLostError(f"the connection to {self._address} has been closed: {error}") from None
        return _GrpcCall(started, self._address, line.lost, self._plain)

    def _metadata(self, method: str) -> tuple[tuple[str, str], ...]:
        if not self._plain:
            return ()
        check = integrity.check_of_call(_path(method), self._authorization)
        return (("authorization", self._authorization), (integrity.CHECK_KEY, check))

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._line.channel.close()


@dataclass(frozen=True)
class _Line:
    """A gRPC channel and its calls. lost: set by the first of them that finds no connection, or a damaged one."""

    channel: Any
    single: Mapping[str, Any]
    streamed: Mapping[str, Any]
    lost: threading.Event
    credentials: Credentials | None

    @classmethod
    def open(cls, address: str, credentials: Credentials | None) -> _Line:
        if credentials is None:
            channel = grpc.insecure_channel(address, options=_CLIENT)
        else:
            ours = grpc.ssl_channel_credentials(credentials.authority, credentials.key, credentials.certificate)
            options = [*_CLIENT, ("grpc.ssl_target_name_override", SERVER_NAME)]
            channel = grpc.secure_channel(address, ours, options=options)
        single = {m: channel.unary_stream(_path(m), None, None) for m in _ALL_METHODS}
        streamed = {m: channel.stream_stream(_path(m), None, None) for m in _ALL_METHODS}
        return cls(channel, single, streamed, threading.Event(), credentials)


@dataclass(frozen=True)
class _GrpcCall:
    """Replies of a gRPC call, with gRPC's errors mapped to ours in this one place."""

    started: Any
    address: str
    lost: threading.Event
    plain: bool

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        try:
            message: bytes = next(self.started)
            return integrity.checked(message) if self.plain else message
        except StopIteration:
            raise
        except TransferDamagedError:
            self.cancel(broken=True)
            raise
        except grpc.RpcError as error:
            found = _our_error(error, self.address, self.plain)
            if error.code() is grpc.StatusCode.UNAVAILABLE or isinstance(found, TransferDamagedError):
                self.lost.set()
            raise found from None

    def cancel(self, *, broken: bool = False) -> None:
        if broken:
            self.lost.set()
        self.started.cancel()


class GrpcServer:
    """Serves one service on one port.

    sites: how many are expected, which share the memory for what is on its way.
    authenticate: the caller's name from the metadata of its call. With credentials instead, nobody gets to call
    without a certificate of their authority, over TLS 1.3; `Peer.certificate` is then who it is.
    """

    def __init__(
        self,
        service: Service,
        authenticate: Callable[[Mapping[str, str]], str] | None,
        threads: int,
        sites: int,
        credentials: Callable[[], Credentials] | None = None,
    ) -> None:
        assert (authenticate is None) != (credentials is None)
        keep_freed_memory()
        self._credentials = credentials
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="fl-server")
        self._server = grpc.server(
            self._pool,
            options=[
                *_SERVER,
                *_arriving(sites, _ENCRYPTED if credentials else _PLAIN),
                *(_OPEN_PORT if credentials else []),
            ],
        )
        self._handlers = _Handlers(service, authenticate)
        self._server.add_generic_rpc_handlers((self._handlers,))

    def start(self, host: str, port: int) -> str:
        """Bind and serve; returns "host:port". ConfigError when the port cannot be had."""
        _check_port(host, port)
        if self._credentials is None:
            bound = self._server.add_insecure_port(f"{host}:{port}")
        else:
            bound = self._server.add_secure_port(f"{host}:{port}", server_credentials(self._credentials))
        self._server.start()
        self._handlers.old_tls_refused = self._credentials is not None and refuses_old_tls(host, bound)
        return f"{host}:{bound}"

    def stop(self, grace_s: float) -> None:
        """Refuse new calls, give running ones `grace_s` seconds, then end them."""
        self._server.stop(grace_s).wait()
        self._pool.shutdown(wait=False, cancel_futures=True)


def tokens_to_names(tokens: Mapping[str, str]) -> Callable[[Mapping[str, str]], str]:
    """Authentication for simulations: a secret per site (name -> token), valid for one run."""

    def authenticate(metadata: Mapping[str, str]) -> str:
        offered = metadata.get("authorization", "").removeprefix("Bearer ")
        for name, token in tokens.items():
            if hmac.compare_digest(offered.encode(), token.encode()):
                return name
        raise PermissionDeniedError("the caller is not a site of this run", fix="use the startup kit of this run")

    return authenticate


class _Handlers(grpc.GenericRpcHandler):  # type: ignore[type-arg]
    def __init__(self, service: Service, authenticate: Callable[[Mapping[str, str]], str] | None) -> None:
        self._authenticate = authenticate
        self._service = service
        self.old_tls_refused = False
        self._methods = {_path(m): grpc.stream_stream_rpc_method_handler(self._answer(m)) for m in _ALL_METHODS}

    def service(self, handler_call_details: Any) -> Any:
        return self._methods.get(handler_call_details.method)

    def _answer(self, method: str) -> Callable[[Iterator[bytes], Any], Iterator[bytes]]:
        def answer(requests: Iterator[bytes], context: Any) -> Iterator[bytes]:
            plain = self._authenticate is not None
            try:
                if plain:
                    replies = self._service.handle(
                        method, self._peer(method, context), map(integrity.checked, requests)
                    )
                    yield from map(integrity.with_check, replies)
                else:
                    yield from self._service.handle(method, self._peer(method, context), requests)
            except FederationError as error:
                _abort(context, error, plain)
            except grpc.RpcError:  # the caller went away while we read from it
                return
            except Exception as error:
                log.exception("call %s failed", method)
                _abort(context, FederationError(f"the server failed in {method}: {error!r}", fix="see its log"), plain)

        return answer

    def _peer(self, method: str, context: Any) -> Peer:
        if self._authenticate is not None:
            metadata = dict(context.invocation_metadata())
            name = self._authenticate(_undamaged(method, metadata))
            return Peer(name, context.add_callback, hang_up=context.cancel)
        facts = context.auth_context()
        version = facts.get("ssl_tls_version", [b"TLSv1.3" if self.old_tls_refused else b"an unknown TLS"])[0].decode()
        fault = "" if version == "TLSv1.3" else f"its connection uses {version}"
        certificate: bytes = facts["x509_pem_cert"][0]  # the handshake has asked for one
        return Peer("", context.add_callback, certificate, fault, context.peer(), context.cancel)


def _arriving(sites: int, room: _Room) -> list[tuple[str, int]]:
    """How much a server takes in before it is asked for. gRPC's own estimate of what a connection can carry would give
    each site as much as if it were alone, 10 MB and more, and the server's memory would grow with the sites."""
    share = room.total_bytes // max(sites, 1) - room.site_bytes
    window = min(max(share, _NARROWEST_BYTES), _WIDEST_BYTES)
    chunk = min(max(window // 16, 2**14), 2**20)
    return [
        ("grpc.http2.bdp_probe", 0),
        ("grpc.http2.lookahead_bytes", window),
        ("grpc.experimental.tcp_read_chunk_size", chunk),
        ("grpc.experimental.tcp_max_read_chunk_size", chunk),
    ]


def _check_port(host: str, port: int) -> None:
    """Try the port with a plain socket first: gRPC would write its own lines to stderr and name no cause."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, proto) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port in TIME_WAIT is free for us
            probe.bind(address)
    except OSError as error:
        raise ConfigError(
            f"port {port} on {host} cannot be used: {error.strerror or error}",
            fix="stop the program that has it, choose another port, or port 0 for any free one",
        ) from None


def _path(method: str) -> str:
    return f"/{_SERVICE}/{method}"


def _undamaged(method: str, metadata: Mapping[str, str]) -> Mapping[str, str]:
    """The metadata of a call over a plain connection. TransferDamagedError if they are not as they were sent."""
    check = metadata.get(integrity.CHECK_KEY, "")
    if check != integrity.check_of_call(_path(method), metadata.get("authorization", "")):
        raise TransferDamagedError("a call's metadata were damaged on the way", fix="look at the network")
    return metadata


def _abort(context: Any, error: FederationError, plain: bool) -> None:
    fields = {key: _shortened(text, _ERROR_BYTES.get(key, 100)) for key, text in error.to_wire().items()}
    data = json.dumps(fields, ensure_ascii=False).encode(errors="replace")
    context.set_trailing_metadata(((_ERROR_KEY, integrity.error_with_check(data) if plain else data),))
    context.abort(grpc.StatusCode.FAILED_PRECONDITION, fields["code"])


def _shortened(text: str, max_bytes: int) -> str:
    data = text.encode(errors="replace")
    return text if len(data) <= max_bytes else data[:max_bytes].decode(errors="ignore") + " ..."


def _our_error(error: Any, address: str, plain: bool) -> FederationError:
    for key, value in error.trailing_metadata() or ():
        if key == _ERROR_KEY:
            return integrity.checked_error(value) if plain else FederationError.from_wire(json.loads(value))
    if error.code() in _TRANSIENT:
        return ConnectionLostError(
            f"the server at {address} does not answer ({error.details() or error.code().name})",
            fix="check that the server runs and that this machine can reach it",
        )
    what = f"the server at {address} answered {error.code().name}: {error.details()}"
    if plain or error.code() in _BROKEN:
        return TransferDamagedError(what, fix="look at the network, and check that it is our server that answers there")
    return ProtocolError(what)
