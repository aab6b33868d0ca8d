"""The gRPC transport. Messages pass through as bytes; errors travel as trailing metadata.

No module outside this folder imports gRPC.
"""

from __future__ import annotations

import hmac
import json
import logging
import socket
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
from fl_runtime.transport.routes.addresses import Addresses
from fl_runtime.transport.routes.route import Route, find_route
from fl_runtime.transport.tls import refuses_old_tls, server_credentials
from fl_runtime.transport.turns import MEMORY_MIB, TransferMemory, Turns

log = logging.getLogger(__name__)

_SERVICE = "fl.v1.Federation"
_ERROR_KEY = "fl-error-bin"
_ERROR_BYTES = {"what": 4_000, "where": 1_000, "fix": 1_000}  # gRPC always accepts up to 8 KiB of metadata
_CHECK_NETWORK = "check the network between this machine and the server"
_MESSAGE_BYTES = 8 * 2**20
_COMMON: list[tuple[str, int]] = [
    ("grpc.max_receive_message_length", _MESSAGE_BYTES),
    ("grpc.max_send_message_length", _MESSAGE_BYTES),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.http2.max_pings_without_data", 0),  # else an open call without traffic is silent after two pings
]
_CLIENT = [
    *_COMMON,
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.enable_retries", 0),  # our retries resume a transfer; gRPC's would start it again
    ("grpc.use_local_subchannel_pool", 1),  # a new channel must not wait for the connection of an old one
]
_SERVER = [
    *_COMMON,
    ("grpc.so_reuseport", 0),  # else a second server could bind the same port and get half of the sites
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.keepalive_time_ms", 20_000),
]
_OPEN_PORT = [  # additional options of a server that strangers can reach
    ("grpc.server_handshake_timeout_ms", 10_000),
    ("grpc.max_connection_idle_ms", 300_000),
    ("grpc.max_concurrent_streams", 64),
]
_ALL_METHODS = (*METHODS, *CONTROL_METHODS)
_TRANSIENT = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED, grpc.StatusCode.DEADLINE_EXCEEDED}
_BROKEN = {grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.DATA_LOSS}
"""Status codes that gRPC reports when the received bytes are not valid HTTP/2."""


class GrpcTransport:
    """A site's connection to the server: one HTTP/2 connection, opened by the first call.

    After a lost connection, the next call opens a new channel. The old channel would wait between its attempts for
    longer than configured (5 to 11 s in grpcio 1.62 to 1.78) and refuse calls meanwhile.

    If certificates are revoked, each channel accepts only the one server certificate that was looked up before: gRPC
    itself has no way to refuse a revoked one.

    Args:
        addresses: Where the server may be, each as "host:port"; one may be given as text. Calls go to one at which
            somebody accepts connections. After a lost connection, the others are tried first.
        token: Secret that authenticates the site in a simulation on the loopback.
        credentials: Returns the credentials for mutual TLS. It is called before every call, so the next call uses a
            renewed certificate. None means a plain connection with `token`.
        revoked: Returns the serial numbers of revoked certificates, with which no server is accepted. It is called
            before every call.

    Raises:
        ConfigError: If the environment does not name an HTTP proxy where it should.
    """

    def __init__(
        self,
        addresses: str | Sequence[str],
        token: str = "",
        credentials: Callable[[], Credentials] | None = None,
        revoked: Callable[[], frozenset[int]] = frozenset,
    ) -> None:
        self._addresses, self._plain = Addresses(addresses), credentials is None
        self._authorization = f"Bearer {token}" if token else ""
        self._credentials: Callable[[], Credentials | None] = credentials or (lambda: None)
        self._revoked = revoked
        self._opening = threading.Lock()
        self._channel: _Channel | None = None
        self._silent = False  # whether the server whose certificate was looked up last did not answer
        self._closed = False

    def call(self, method: str, requests: bytes | Iterable[bytes]) -> Call:
        """Start a call, see `Transport.call`. Raises PermissionDeniedError if the server's certificate was revoked."""
        with self._opening:
            channel = self._usable_channel()
        try:
            if isinstance(requests, bytes):
                message = integrity.with_check(requests) if self._plain else requests
                grpc_call = channel.single[method](message, metadata=self._metadata(method))
            else:
                messages = map(integrity.with_check, requests) if self._plain else iter(requests)
                grpc_call = channel.streamed[method](messages, metadata=self._metadata(method))
        except ValueError as error:  # closed by another thread
            raise ConnectionLostError(f"the connection to {channel.address} has been closed: {error}") from None
        return _GrpcCall(grpc_call, channel.address, channel.lost, self._plain)

    def _usable_channel(self) -> _Channel:
        """Return the channel, or a new one if it is lost or was opened under other circumstances."""
        credentials, revoked = self._credentials(), self._revoked()
        channel = self._channel
        if self._closed:
            raise ConnectionLostError(f"the connection to {self._addresses} has been closed")
        if (
            channel is None
            or channel.lost.is_set()
            or credentials is not channel.credentials
            or (revoked and (channel.server is None or channel.server in revoked))
        ):
            lost = channel is not None and channel.lost.is_set()
            address = self._addresses.look(elsewhere=lost or self._silent)
            channel = _Channel.open(self._way(address, credentials, revoked), credentials, pinned=bool(revoked))
            self._channel = channel  # running calls keep the old one
            if self._closed:
                channel.grpc_channel.close()
        return channel

    def _way(self, address: str, credentials: Credentials | None, revoked: frozenset[int]) -> Route:
        """Return the way to the server. Raises PermissionDeniedError if its certificate was revoked."""
        self._silent = False
        try:
            way = find_route(address, credentials.authority if credentials else b"", look_up=bool(revoked))
        except ConnectionLostError:
            self._silent = True
            raise
        if way.certificate is not None and way.certificate.serial in revoked:
            raise PermissionDeniedError(
                f"the certificate of the server at {address} was revoked (serial number {way.certificate.serial:x})",
                where="rule certificate: the server's is not revoked",
                fix="ask who runs the server: somebody may be posing as it; else it needs a new certificate",
            )
        return way

    def _metadata(self, method: str) -> tuple[tuple[str, str], ...]:
        if not self._plain:
            return ()
        check = integrity.check_of_call(_path(method), self._authorization)
        return (("authorization", self._authorization), (integrity.CHECK_KEY, check))

    def close(self) -> None:
        """Close the connection and end its calls."""
        self._closed = True
        if self._channel is not None:
            self._channel.grpc_channel.close()


@dataclass(frozen=True)
class _Channel:
    """A gRPC channel and its methods. The first call that finds the connection lost or damaged sets `lost`."""

    address: str
    grpc_channel: Any
    single: Mapping[str, Any]
    streamed: Mapping[str, Any]
    lost: threading.Event
    credentials: Credentials | None
    server: int | None = None  # serial number of the only certificate that it accepts; None: any of the authority

    @classmethod
    def open(cls, way: Route, credentials: Credentials | None, *, pinned: bool) -> _Channel:
        options = [*_CLIENT, *way.options()]
        if credentials is None:
            channel = grpc.insecure_channel(way.target, options=options)
        else:
            only = way.certificate if pinned else None
            trusted = only.pem if only else credentials.authority  # BoringSSL takes a leaf as an anchor, too
            tls = grpc.ssl_channel_credentials(trusted, credentials.key, credentials.certificate)
            options.append(("grpc.ssl_target_name_override", way.server_name))
            channel = grpc.secure_channel(way.target, tls, options=options)
        single = {m: channel.unary_stream(_path(m), None, None) for m in _ALL_METHODS}
        streamed = {m: channel.stream_stream(_path(m), None, None) for m in _ALL_METHODS}
        server = way.certificate.serial if pinned and way.certificate else None
        return cls(way.address, channel, single, streamed, threading.Event(), credentials, server)


@dataclass(frozen=True)
class _GrpcCall:
    """The replies of a gRPC call. It maps gRPC's errors to ours."""

    grpc_call: Any
    address: str
    lost: threading.Event
    plain: bool

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        try:
            message: bytes = next(self.grpc_call)
            return integrity.checked(message) if self.plain else message
        except StopIteration:
            raise
        except TransferDamagedError:
            self.cancel(broken=True)
            raise
        except grpc.RpcError as error:
            failure = _federation_error(error, self.address, self.plain)
            if error.code() is grpc.StatusCode.UNAVAILABLE or isinstance(failure, TransferDamagedError):
                self.lost.set()
            raise failure from None

    def cancel(self, *, broken: bool = False) -> None:
        if broken:
            self.lost.set()
        self.grpc_call.cancel()


class GrpcServer:
    """A gRPC server for one service on one port.

    Callers are authenticated in one of two ways, by `authenticate` or by `credentials`; exactly one must be given.

    Args:
        service: Answers the calls.
        authenticate: Returns the caller's name from the metadata of its call, or raises PermissionDeniedError. For
            plain connections on the loopback.
        threads: Number of calls that are answered at the same time; further calls wait.
        sites: Expected number of sites, which share the memory for data in transit.
        credentials: Returns the server's credentials for mutual TLS 1.3. Only callers with a certificate of the same
            authority are accepted, and `Peer.certificate` says who they are.
        memory_mib: The server's own memory, beside mapped files, in MiB. Large transfers take turns to stay below it.
    """

    def __init__(
        self,
        service: Service,
        authenticate: Callable[[Mapping[str, str]], str] | None,
        threads: int,
        sites: int,
        credentials: Callable[[], Credentials] | None = None,
        memory_mib: int = MEMORY_MIB,
    ) -> None:
        assert (authenticate is None) != (credentials is None)
        keep_freed_memory()
        self._credentials = credentials
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="fl-server")
        memory = TransferMemory.of(memory_mib, sites)
        self._server = grpc.server(
            self._pool,
            options=[
                *_SERVER,
                *_flow_control(memory.window_bytes),
                *(_OPEN_PORT if credentials else []),
            ],
        )
        self._handlers = _Handlers(service, authenticate, Turns(memory.turns))
        self._server.add_generic_rpc_handlers((self._handlers,))

    def start(self, host: str, port: int) -> str:
        """Bind the port and start to serve.

        Args:
            host: Address to listen on, such as "127.0.0.1" or "0.0.0.0".
            port: Port number; 0 takes any free port.

        Returns:
            "host:port" with the actual port.

        Raises:
            ConfigError: If the port cannot be used.
        """
        _check_port(host, port)
        shown = f"[{host}]" if ":" in host else host
        if self._credentials is None:
            bound_port = self._server.add_insecure_port(f"{shown}:{port}")
        else:
            bound_port = self._server.add_secure_port(f"{shown}:{port}", server_credentials(self._credentials))
        self._server.start()
        self._handlers.old_tls_refused = self._credentials is not None and refuses_old_tls(host, bound_port)
        return f"{shown}:{bound_port}"

    def stop(self, grace_s: float) -> None:
        """Refuse new calls, let running calls finish for `grace_s` seconds, then end them."""
        self._server.stop(grace_s).wait()
        self._pool.shutdown(wait=False, cancel_futures=True)


def tokens_to_names(tokens: Mapping[str, str]) -> Callable[[Mapping[str, str]], str]:
    """Make the `authenticate` function of a simulation, in which every site has a secret of its own.

    Args:
        tokens: Site name -> its secret, valid for one run.

    Returns:
        A function from a call's metadata to the site's name. It raises PermissionDeniedError for an unknown secret.
    """

    def authenticate(metadata: Mapping[str, str]) -> str:
        secret = metadata.get("authorization", "").removeprefix("Bearer ")
        for name, token in tokens.items():
            if hmac.compare_digest(secret.encode(), token.encode()):
                return name
        raise PermissionDeniedError("this process is not a site of this run", fix="use the startup kit of this run")

    return authenticate


class _Handlers(grpc.GenericRpcHandler):  # type: ignore[type-arg]
    def __init__(self, service: Service, authenticate: Callable[[Mapping[str, str]], str] | None, turns: Turns) -> None:
        self._authenticate, self._service, self._turns = authenticate, service, turns
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
            except grpc.RpcError:  # the caller disconnected while we read from it
                return
            except Exception as error:
                log.exception("call %s failed", method)
                what = f"the server failed in {method}: {error!r}"
                _abort(context, FederationError(what, fix="see the server's log"), plain)

        return answer

    def _peer(self, method: str, context: Any) -> Peer:
        if self._authenticate is not None:
            metadata = dict(context.invocation_metadata())
            name = self._authenticate(_undamaged(method, metadata))
            return Peer(name, context.add_callback, hang_up=context.cancel, turns=self._turns)
        facts = context.auth_context()
        version = facts.get("ssl_tls_version", [b"TLSv1.3" if self.old_tls_refused else b"an unknown TLS"])[0].decode()
        fault = "" if version == "TLSv1.3" else f"its connection uses {version}"
        certificate: bytes = facts["x509_pem_cert"][0]  # present, since the TLS handshake requires one
        return Peer("", context.add_callback, certificate, fault, context.peer(), context.cancel, turns=self._turns)


def _flow_control(window_bytes: int) -> list[tuple[str, int]]:
    """Return the options that limit how much data of a call the server receives ahead of need.

    gRPC's own estimate would allow every connection 10 MB and more, so the server's memory would grow with the sites.
    """
    chunk = min(max(window_bytes // 16, 2**14), 2**20)
    return [
        ("grpc.http2.bdp_probe", 0),
        ("grpc.http2.lookahead_bytes", window_bytes),
        ("grpc.experimental.tcp_read_chunk_size", chunk),
        ("grpc.experimental.tcp_max_read_chunk_size", chunk),
    ]


def _check_port(host: str, port: int) -> None:
    """Bind the port with a plain socket first: gRPC's failure would print to stderr and name no cause."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, proto) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # gRPC can bind a port in TIME_WAIT
            probe.bind(address)
    except OSError as error:
        raise ConfigError(
            f"port {port} on {host} cannot be used: {error.strerror or error}",
            fix="stop the program that uses it, choose another port, or pass 0 to take any free one",
        ) from None


def _path(method: str) -> str:
    return f"/{_SERVICE}/{method}"


def _undamaged(method: str, metadata: Mapping[str, str]) -> Mapping[str, str]:
    """Verify the check sum in the metadata of a call over a plain connection."""
    check = metadata.get(integrity.CHECK_KEY, "")
    if check != integrity.check_of_call(_path(method), metadata.get("authorization", "")):
        raise TransferDamagedError("the metadata of a call was damaged in transfer", fix=_CHECK_NETWORK)
    return metadata


def _abort(context: Any, error: FederationError, plain: bool) -> None:
    fields = {key: _shortened(text, _ERROR_BYTES.get(key, 100)) for key, text in error.to_wire().items()}
    data = json.dumps(fields, ensure_ascii=False).encode(errors="replace")
    context.set_trailing_metadata(((_ERROR_KEY, integrity.error_with_check(data) if plain else data),))
    context.abort(grpc.StatusCode.FAILED_PRECONDITION, fields["code"])


def _shortened(text: str, max_bytes: int) -> str:
    data = text.encode(errors="replace")
    return text if len(data) <= max_bytes else data[:max_bytes].decode(errors="ignore") + " ..."


def _federation_error(error: Any, address: str, plain: bool) -> FederationError:
    for key, value in error.trailing_metadata() or ():
        if key == _ERROR_KEY:
            return integrity.checked_error(value) if plain else integrity.error_of(value)
    if error.code() in _TRANSIENT:
        return ConnectionLostError(
            f"the server at {address} does not answer ({error.details() or error.code().name})",
            fix="check that the server runs and that this machine can reach it",
        )
    if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
        return ProtocolError(
            f"a message is too large for gRPC: {error.details()}",
            where=f"call to {address}; a message may have {_MESSAGE_BYTES} bytes, in which tensors are described "
            "by name, dtype and shape",
            fix="send fewer tensors (exchange=, keep_local=, a strategy or filter that adds none), or run the same "
            "version of fl-adapters at server and sites: newer ones register models of any number of tensors",
        )
    what = f"the server at {address} answered {error.code().name}: {error.details()}"
    if plain or error.code() in _BROKEN:
        return TransferDamagedError(what, fix=f"{_CHECK_NETWORK}, and that an fl-adapters server listens there")
    return ProtocolError(what)
