"""Clients without a certificate of this federation for this purpose cannot make any call, over real sockets."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
from federation_bench import Site
from study import Study, certificate

from fl_runtime.errors import (
    ConnectionLostError,
    FederationError,
    PermissionDeniedError,
)
from fl_runtime.transport.base import Peer
from fl_runtime.transport.grpc import GrpcServer, GrpcTransport
from fl_runtime.trust.authority import Authority
from fl_runtime.trust.certificates import new_key
from fl_runtime.trust.identity import Identity
from fl_runtime.wire.fl.v1 import federation_pb2 as pb

NORTH = Identity("study", "site", "north", "north-hospital")
JOIN = pb.JoinRequest(protocol_min=1, protocol_max=1).SerializeToString()


def refused(call: Callable[[], Any]) -> FederationError:
    """Make a call that must not succeed, and return its error."""
    with pytest.raises(FederationError) as caught:
        call()
    return caught.value


def strangers(study: Study) -> dict[str, Callable[[], GrpcTransport]]:
    other = Authority.create(study.folder / "other", study.authority.project)

    def north(**when: float) -> Callable[[], GrpcTransport]:
        return lambda: study.stranger(*study.certificate(NORTH, **when))

    return {
        "no certificate": lambda: study.stranger(None, None),  # type: ignore[arg-type]
        "another authority": lambda: study.stranger(*certificate(other._key, other.pem, NORTH)),
        "another authority of the same name": lambda: study.stranger(
            *certificate(new_key(), study.authority.pem, NORTH)
        ),
        "expired": north(begins_in_s=-7200, ends_in_s=-3600),
        "not valid yet": north(begins_in_s=3600, ends_in_s=7200),
        "somebody else's certificate": lambda: study.stranger(
            study.certificate(NORTH)[0], (study.kits / "south/certificate.pem").read_bytes()
        ),
    }


def test_without_a_good_certificate_nobody_gets_to_call(study: Study) -> None:
    study.job()
    lines = len(study.log())
    for who, transport in strangers(study).items():
        error = refused(lambda transport=transport: list(transport().call("Join", JOIN)))
        assert isinstance(error, ConnectionLostError), who
    with grpc.insecure_channel(study.address) as plain, pytest.raises(grpc.RpcError):
        list(plain.unary_stream("/fl.v1.Federation/Join", None, None)(JOIN, timeout=5))
    assert len(study.log()) == lines, "nothing of it has reached the server"
    assert study.admin().ask("Status")["running"]["sites"]["north"] == "awaited"
    assert study.site("north").join().site == "north"


@pytest.mark.parametrize(
    ("identity", "says"),
    [
        (Identity("elsewhere", "site", "north", "north-hospital"), "belongs to elsewhere"),
        (Identity("study", "site", "west", "west-hospital"), "it is not a member of the federation"),
        (Identity("study", "admin", "north", "x", "project-admin"), "it is not a member of the federation"),
        (Identity("study", "server", "server", "study"), "may not join a job"),
    ],
)
def test_a_certificate_for_somebody_else_is_refused_by_name(study: Study, identity: Identity, says: str) -> None:
    study.job()
    error = refused(lambda: list(study.stranger(*study.certificate(identity)).call("Join", JOIN)))
    assert isinstance(error, PermissionDeniedError)
    assert says in error.what
    assert error.where.startswith("rule ")
    assert study.refusals()[-1]["who"] == identity.uri
    assert study.refusals()[-1]["rule"] == error.where.removeprefix("rule ")


def test_a_sites_certificate_is_no_admins(study: Study) -> None:
    for call in ("SubmitJob", "AbortJob", "Watch", "Revoke"):
        error = refused(lambda call=call: list(study.transport("north").call(call, b"{}")))
        assert isinstance(error, PermissionDeniedError)
        assert "site north of north-hospital may not" in error.what
    assert [entry["action"] for entry in study.refusals()] == ["SubmitJob", "AbortJob", "Watch", "Revoke"]


def test_a_sites_certificate_is_no_servers(study: Study) -> None:
    """A member that intercepts the connection cannot pretend to be the server."""
    from fl_runtime.transport.tls import FileCredentials

    asked = []

    class Impostor:
        def handle(self, method: str, peer: object, requests: Iterator[bytes]) -> Iterator[bytes]:
            asked.append(method)
            yield b""

    impostor = GrpcServer(Impostor(), None, 2, 2, FileCredentials(study.kits / "south"))
    address = impostor.start("127.0.0.1", 0)
    site = Site("north", GrpcTransport(address, credentials=FileCredentials(study.kits / "north")), 0.2)
    assert isinstance(refused(site.join), ConnectionLostError)
    assert asked == []
    site.vanish()
    impostor.stop(0)


def test_older_tls_gets_no_call_through(study: Study) -> None:
    """If gRPC was used before the server could require TLS 1.3, the handshake succeeds but every call is refused."""
    context = ssl.create_default_context(cafile=str(study.kits / "north/ca.pem"))
    context.load_cert_chain(study.kits / "north/certificate.pem", study.kits / "north/key.pem")
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    port = int(study.address.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), 5) as plain, pytest.raises((ssl.SSLError, ConnectionError)):
        context.wrap_socket(plain, server_hostname="server.fl-adapters.internal")

    study.job()
    pem = (study.kits / "north/certificate.pem").read_bytes()
    caller = Peer("", lambda callback: True, pem, fault="its connection uses TLSv1.2")
    error = refused(lambda: list(study.server._guard.handle("Join", caller, iter([JOIN]))))
    assert "site north of north-hospital may not call: its connection uses TLSv1.2" in error.what
    (refusal,) = study.refusals()
    assert (refusal["who"], refusal["action"], refusal["rule"]) == (NORTH.uri, "Join", "transport: TLS 1.3")
