"""A hostile client: raw messages and bytes over the real socket, without any check of its own."""

from __future__ import annotations

import contextlib
import json
import socket
import ssl
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from study import certificate

from fl_runtime.errors import FederationError
from fl_runtime.transport.base import Call, Credentials
from fl_runtime.transport.grpc import GrpcTransport
from fl_runtime.transport.tls import FileCredentials
from fl_runtime.trust.identity import Identity
from fl_runtime.types import Arrays
from fl_runtime.wire import frames
from fl_runtime.wire.fl.v1 import federation_pb2 as pb
from fl_runtime.wire.manifest import Manifest

if TYPE_CHECKING:
    from attack_federation import Federation

SERVER_NAME = "server.fl-adapters.internal"
MODEL: Arrays = {"a.weight": np.zeros((300, 1000), np.float32), "b.bias": np.zeros(7, np.float32)}


class Attacker:
    """Somebody who attacks the server of a federation.

    Attributes:
        federation: The federation.
        name: Whose kit is held, or "" for none.
        round: Round of the honest sites that is open, if a job is running.
        attempt: Attempt under which this attacker has joined the job, 0 before.
        taken: A whole update, as an honest site has sent it to the server.
    """

    def __init__(self, federation: Federation, name: str) -> None:
        self.federation, self.name = federation, name
        self.round = self.attempt = 0
        self.job = "job"
        self._stop = threading.Event()
        self._transports: list[GrpcTransport] = []
        self.transport = self.with_kit(name) if name else None

    def close(self) -> None:
        self._stop.set()
        for transport in self._transports:
            transport.close()

    # -- calls ------------------------------------------------------------------------------------------------

    def with_kit(self, name: str) -> GrpcTransport:
        """Open another connection with the certificate of a kit."""
        transport = GrpcTransport(self.federation.address, credentials=FileCredentials(self.federation.folder / name))
        self._transports.append(transport)
        return transport

    def with_certificate(self, key: Any, pem: Any) -> GrpcTransport:
        """Open a connection with any key and certificate."""
        found = Credentials(key, pem, self.federation.authority.pem)
        self._transports.append(GrpcTransport(self.federation.address, credentials=lambda: found))
        return self._transports[-1]

    def certified(self, identity: Identity, begins_in_s: float = -60, ends_in_s: float = 3600) -> GrpcTransport:
        """Open a connection with a certificate that the authority has signed for any identity and time."""
        authority = self.federation.authority
        return self.with_certificate(*certificate(authority._key, authority.pem, identity, begins_in_s, ends_in_s))

    def begin(self, method: str, messages: Iterable[bytes]) -> Call:
        assert self.transport is not None
        return self.transport.call(method, iter(messages))

    def call(self, method: str, *messages: bytes) -> list[bytes]:
        """Send messages, and return the answers."""
        return list(self.begin(method, messages))

    def ask(self, method: str, request: object) -> Any:
        """Make a call about jobs with any JSON, and return its last answer."""
        return json.loads(self.call(method, json.dumps(request).encode())[-1])

    def held_open(self, *messages: bytes) -> Iterator[bytes]:
        """Yield messages, and then nothing until the attacker gives up."""
        yield from messages
        self._stop.wait(60)

    # -- as a site of the job ---------------------------------------------------------------------------------

    @property
    def session(self) -> pb.Session:
        return pb.Session(job=self.job, attempt=self.attempt)

    def join(self) -> str:
        request = pb.JoinRequest(protocol_min=1, protocol_max=1)
        reply = pb.JoinReply.FromString(self.call("Join", request.SerializeToString())[-1])
        self.attempt, self.job = reply.attempt, json.loads(reply.settings_json)["name"]
        return f"joined as {reply.site}"

    def register(self, **fields: Any) -> str:
        """Register the honest sites' tensors, or others."""
        given = {"session": self.session, "manifest": Manifest.of(MODEL).to_proto(), **fields}
        replies = self.call("Register", pb.RegisterRequest(**given).SerializeToString())
        return f"registered for {pb.RegisterReply.FromString(replies[-1]).rounds} rounds"

    def leave(self) -> None:
        self.call("Leave", pb.LeaveRequest(session=self.session, early=True).SerializeToString())

    def give_up(self) -> None:
        """Leave the job if the attacker takes part in it, and close all connections."""
        if self.attempt:
            with contextlib.suppress(FederationError):
                self.leave()
        self.close()

    def header(self, arrays: Arrays = MODEL, extras: Arrays | None = None, **fields: Any) -> pb.UpdateHeader:
        """Return a valid header of an update for the open round, with these fields changed."""
        manifest = Manifest.of(arrays, extras)
        payload = frames.describe(manifest, manifest.digests(arrays, extras or {}), known=False)
        given = {"round": self.round, "content": "weights", "num_examples": 1, "payload": payload, **fields}
        return pb.UpdateHeader(**{"session": self.session, **given})

    def submit(self, header: pb.UpdateHeader, *after: bytes) -> str:
        """Send a header and what follows it, and return the last answer."""
        message = pb.UpdatePart(update=header).SerializeToString()
        reply = pb.SubmitReply.FromString(self.call("Submit", message, *after)[-1])
        return f"the update is {reply.accepted.status}" if reply.HasField("accepted") else "the server waits for bytes"

    def update(self, arrays: Arrays = MODEL, **fields: Any) -> str:
        """Send a whole update."""
        return self.submit(self.header(arrays, **fields), *pieces(arrays))

    def score(self, metrics_json: str = "{}", **fields: Any) -> str:
        given = {"session": self.session, "version": max(self.round - 1, 0), "num_examples": 1, **fields}
        self.call("Score", pb.ScoreRequest(metrics_json=metrics_json, **given).SerializeToString())
        return "the score is taken"

    # -- without gRPC -----------------------------------------------------------------------------------------

    def line(self) -> socket.socket:
        """Open a bare connection to the server's port."""
        host, _, port = self.federation.address.rpartition(":")
        return socket.create_connection((host, int(port)), 10)

    def tls(self, kit: str = "", newest: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3) -> ssl.SSLSocket:
        """Open a TLS connection, with the certificate of a kit or without one."""
        context = ssl.create_default_context(cafile=str(self.federation.folder / "evil/ca.pem"))
        if kit:
            folder = self.federation.folder / kit
            context.load_cert_chain(folder / "certificate.pem", folder / "key.pem")
        context.maximum_version = newest
        context.set_alpn_protocols(["h2"])
        return context.wrap_socket(self.line(), server_hostname=SERVER_NAME)


def pieces(arrays: Arrays, extras: Arrays | None = None) -> list[bytes]:
    """Return the frames of tensors."""
    return list(frames.frames(Manifest.of(arrays, extras).pieces(arrays, extras or {})))


def answer_of(line: socket.socket) -> str:
    """Read from a connection until the other end closes it; say what came."""
    line.settimeout(15)
    received = bytearray()
    with contextlib.suppress(ConnectionError, ssl.SSLError):
        while data := line.recv(2**16):
            received += data
            if len(received) > 2**20:
                break
    text = bytes(received).decode("latin-1")
    return f"closed after {len(received)} bytes: {text[:100]!r}"


def member(send: Callable[[Attacker], object]) -> Callable[[Attacker], object]:
    """Let the attacker join the job and register as an honest site does, before it sends something."""

    def joined(attacker: Attacker) -> object:
        attacker.join()
        attacker.register()
        return send(attacker)

    return joined
