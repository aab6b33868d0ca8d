"""Hostile variants: bare sockets, TLS and HTTP/2 without gRPC, and streams between sites."""

from __future__ import annotations

import contextlib
import socket
import ssl
import struct
from collections.abc import Callable
from functools import partial

from attack_client import Attacker, answer_of, member
from attack_table import Attack

from fl_runtime.wire.fl.v1 import federation_pb2 as pb

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """Make an HTTP/2 frame (RFC 9113, section 4.1)."""
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


_SETTINGS, _PING, _RESET = frame(4, 0, 0), frame(6, 0, 0, b"12345678"), 3


def bare(sent: bytes, *, shut: bool = False) -> Callable[[Attacker], object]:
    """Send bytes over a bare connection, and read until the server closes it."""

    def send(attacker: Attacker) -> object:
        with attacker.line() as line:
            with contextlib.suppress(ConnectionError):
                line.sendall(sent)
                if shut:
                    line.shutdown(socket.SHUT_WR)
            return answer_of(line)

    return send


def http2(*frames: bytes, count: int = 1) -> Callable[[Attacker], object]:
    """Send HTTP/2 frames over TLS with the kit of a site; say whether the server has ended the connection."""

    def send(attacker: Attacker) -> object:
        with attacker.tls("evil") as line, contextlib.suppress(ConnectionError, ssl.SSLError):
            line.sendall(_PREFACE + _SETTINGS + b"".join(frames) * count)
            line.settimeout(1)
            received = b""
            with contextlib.suppress(TimeoutError):
                while data := line.recv(2**16):
                    received += data
                return f"ended by the server after {len(received)} bytes"
            return f"left open after {len(received)} bytes"
        return "ended by the server"

    return send


def old_tls(attacker: Attacker) -> object:
    with attacker.tls("evil", ssl.TLSVersion.TLSv1_2) as line:
        return f"speaks {line.version()}"


def without_certificate(attacker: Attacker) -> object:
    """Finish a handshake without a certificate, which TLS 1.3 refuses only after it."""
    with attacker.tls() as line:
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            line.sendall(_PREFACE + _SETTINGS)
        return answer_of(line)


def idle(count: int, sent: bytes = b"") -> Callable[[Attacker], object]:
    """Open many connections and hold them open while another participant calls."""

    def send(attacker: Attacker) -> object:
        with contextlib.ExitStack() as lines:
            for _ in range(count):
                line = lines.enter_context(attacker.line())
                line.sendall(sent)
            return f"holds {count} connections, and {attacker.federation.ask('mina', 'Status')['you']} is served"

    return send


def drips(attacker: Attacker) -> object:
    """Begin handshakes with a few bytes each, as a slow client would, and never end them."""
    return idle(40, b"\x16\x03\x01\x02\x00\x01")(attacker)


def tunnel(*parts: pb.TunnelPart, job: str = "") -> Callable[[Attacker], object]:
    """Open a tunnel, and send these parts."""

    def send(attacker: Attacker) -> object:
        session = pb.Session(job=job or attacker.job, attempt=attacker.attempt)
        messages = [pb.TunnelPart(session=session), *parts]
        call = attacker.begin("Tunnel", attacker.held_open(*(part.SerializeToString() for part in messages)))
        for message in call:
            part = pb.TunnelPart.FromString(message)
            if part.closed:
                call.cancel()
                return f"the stream to {part.peer} is closed"
        return "the tunnel has ended"

    return member(send)


def garbage_in_tunnel(attacker: Attacker) -> object:
    first = pb.TunnelPart(session=attacker.session).SerializeToString()
    return list(attacker.begin("Tunnel", attacker.held_open(first, b"\xff" * 1000)))


def not_registered(attacker: Attacker) -> object:
    attacker.join()
    return attacker.call("Tunnel", pb.TunnelPart(session=attacker.session).SerializeToString())


def too_many_calls(attacker: Attacker) -> object:
    """Open one call after the other, and end none."""
    attacker.join()
    attacker.register()
    message = pb.SessionRequest(session=attacker.session).SerializeToString()
    calls = []
    try:
        for _ in range(20):
            calls.append(attacker.begin("Attend", [message]))
            next(calls[-1])
    finally:
        for call in calls:
            call.cancel()
    return f"{len(calls)} calls are open"


_A = partial(Attack, "transport")
_S = partial(Attack, "streams")
_HEADERS = frame(1, 4, 1, b"\x83\x86\x84\x41\x01x" + b"\x00\x01a\x7f\x80\x80\x80\x01" + b"b" * 4000)
_NORTH = pb.TunnelPart(peer="north", stream="s", opened="x")

ATTACKS = (
    _A("raw garbage", "stranger", bare(bytes(range(256)) * 100), "closed after"),
    _A("HTTP/1.1", "stranger", bare(b"GET /../../etc/passwd HTTP/1.1\r\nHost: x\r\n\r\n"), "closed after"),
    _A("HTTP/2 in plaintext", "stranger", bare(_PREFACE + _SETTINGS), "closed after"),
    _A(
        "a handshake that says it is 64 KiB long",
        "stranger",
        bare(b"\x16\x03\x01\xff\xff" + b"a" * 65535),
        "closed after",
    ),
    _A("a connection that is half closed", "stranger", bare(b"\x16\x03\x01", shut=True), "closed after"),
    _A("handshakes byte by byte", "stranger", drips, "is served"),
    _A("40 idle connections", "stranger", idle(40), "is served"),
    _A("800 idle connections", "stranger", idle(800), "is served", quick=False),
    _A("TLS 1.2", "stranger", old_tls, "SSL(EOF)?Error|Connection"),
    _A("TLS without a certificate", "stranger", without_certificate, "closed after"),
    _A("garbage within TLS", "evil", http2(b"\xff" * 5000), "ended by the server"),
    _A("frames of unknown kinds", "evil", http2(frame(0xEE, 0xFF, 77, b"x" * 100), count=500), "left open|ended"),
    _A("a frame of 16 MB", "evil", http2(b"\xff\xff\xff\x00\x00\x00\x00\x00\x01"), "left open|ended"),
    _A("10,000 pings", "evil", http2(_PING, count=10_000), "ended by the server"),
    _A("10,000 settings", "evil", http2(_SETTINGS, count=10_000), "left open|ended"),
    _A("headers that do not decode", "evil", http2(_HEADERS), "ended by the server"),
    _A(
        "streams that are reset at once",
        "evil",
        http2(frame(1, 4, 1, b"\x83\x86\x84"), frame(_RESET, 0, 1, b"\0" * 4), count=2000),
        "left open|ended",
    ),
    _A("more calls than a site may have open", "evil", too_many_calls, "8 calls open already"),
    _S("a stream to nobody", "evil", tunnel(pb.TunnelPart(peer="nobody", stream="s")), "not a site of this"),
    _S("a stream to a site that has no tunnel", "evil", tunnel(_NORTH), "to north is closed"),
    _S("a name of 100,000 characters", "evil", tunnel(pb.TunnelPart(peer="north", stream="s" * 10**5)), "longer than"),
    _S(
        "3,000 streams",
        "evil",
        tunnel(*[pb.TunnelPart(peer="evil", stream=str(n), opened="x") for n in range(3000)]),
        "more than 1024 streams",
    ),
    _S("a tunnel of another job", "evil", tunnel(job="another"), "does not run here any more"),
    _S("a tunnel before registering", "evil", not_registered, "evil has not registered"),
    _S("raw garbage", "evil", member(garbage_in_tunnel), "not a TunnelPart"),
)
