"""Hostile variants: certificates, and names that are somebody else's."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import grpc
from attack_client import SERVER_NAME, Attacker
from attack_table import Attack
from study import certificate

from fl_runtime.transport.base import CONTROL_METHODS, METHODS
from fl_runtime.trust.authority import Authority
from fl_runtime.trust.certificates import new_key
from fl_runtime.trust.identity import Identity
from fl_runtime.wire.fl.v1 import federation_pb2 as pb

_NORTH = Identity("study", "site", "north", "north-hospital")
_JOIN = pb.JoinRequest(protocol_min=1, protocol_max=1).SerializeToString()


def joins_with(open_transport: Callable[[Attacker], Any]) -> Callable[[Attacker], object]:
    """Join over a connection of a certificate's holder, or over whatever is opened."""

    def send(attacker: Attacker) -> object:
        reply = pb.JoinReply.FromString(list(open_transport(attacker).call("Join", _JOIN))[-1])
        return f"joined as {reply.site}"

    return send


def of_another_authority(attacker: Attacker) -> Any:
    folder = attacker.federation.folder / "another-authority"
    other = Authority(folder) if folder.exists() else Authority.create(folder, attacker.federation.authority.project)
    return attacker.with_certificate(*certificate(other._key, other.pem, _NORTH))


def self_signed(attacker: Attacker) -> Any:
    """Sign a certificate with a key of one's own, in the name of the authority."""
    return attacker.with_certificate(*certificate(new_key(), attacker.federation.authority.pem, _NORTH))


def with_another_key(attacker: Attacker) -> Any:
    pem = (attacker.federation.folder / "north/certificate.pem").read_bytes()
    return attacker.with_certificate(certificate(new_key(), attacker.federation.authority.pem, _NORTH)[0], pem)


def with_token(attacker: Attacker) -> object:
    """Claim the name and the token of another site in the metadata of a call."""
    folder = attacker.federation.folder
    tls = grpc.ssl_channel_credentials(
        *((folder / "evil" / name).read_bytes() for name in ("ca.pem", "key.pem", "certificate.pem"))
    )
    options = [("grpc.ssl_target_name_override", SERVER_NAME)]
    with grpc.secure_channel(attacker.federation.address, tls, options) as channel:
        metadata = (("authorization", "Bearer secret of north"), ("name", "north"), ("x-forwarded-for", "north"))
        join = channel.unary_stream("/fl.v1.Federation/Join", None, None)
        reply = pb.JoinReply.FromString(list(join(_JOIN, metadata=metadata))[-1])
        attacker.attempt, attacker.job = reply.attempt, "siege"
        return f"joined as {reply.site}"


def in_plaintext(attacker: Attacker) -> object:
    with grpc.insecure_channel(attacker.federation.address) as channel:
        try:
            return list(channel.unary_stream("/fl.v1.Federation/Join", None, None)(_JOIN, timeout=10))
        except grpc.RpcError as error:
            return f"the connection is refused: {error.code().name}"


def every_call(attacker: Attacker) -> object:
    """Make every call there is, with a certificate of the authority for somebody who does not exist."""
    nobody = attacker.certified(Identity("study", "site", "nobody", "nowhere"))
    answers = []
    for method in (*METHODS, *CONTROL_METHODS):
        try:
            answers.append(f"{method}: {len(list(nobody.call(method, _JOIN)))} answers")
        except Exception as error:
            answers.append(type(error).__name__)
    return " ".join(sorted(set(answers)))


def certified(kind: str, name: str, federation: str = "study", role: str = "", **when: float) -> Any:
    identity = Identity(federation, kind, name, "north-hospital", role)  # type: ignore[arg-type]
    return joins_with(lambda attacker: attacker.certified(identity, **when))


_A = partial(Attack, "identity")
_CLOSED = "does not answer"  # the handshake fails: nothing of the call reaches the service

ATTACKS = (
    _A("no certificate", "stranger", joins_with(lambda a: a.with_certificate(None, None)), _CLOSED),
    _A("a certificate of another authority", "stranger", joins_with(of_another_authority), _CLOSED),
    _A("a certificate signed by itself", "stranger", joins_with(self_signed), _CLOSED),
    _A("the certificate of another site", "stranger", joins_with(with_another_key), _CLOSED),
    _A("an expired certificate", "stranger", certified("site", "north", begins_in_s=-7200, ends_in_s=-60), _CLOSED),
    _A("a certificate of tomorrow", "stranger", certified("site", "north", begins_in_s=3600, ends_in_s=7200), _CLOSED),
    _A("a revoked certificate", "stranger", joins_with(lambda a: a.with_kit("gone")), "certificate was revoked"),
    _A("a site of another federation", "stranger", certified("site", "north", "elsewhere"), "belongs to elsewhere"),
    _A("a site that is not of the job", "stranger", certified("site", "east"), "not a site of the job"),
    _A("a site that is no member", "stranger", certified("site", "nowhere"), "not a member of the federation"),
    _A("an admin as a site", "stranger", certified("admin", "ada", role="project-admin"), "may not join a job"),
    _A("the server's own kit as a site", "stranger", joins_with(lambda a: a.with_kit("server")), _CLOSED),
    _A("an observer as a site", "mina", joins_with(lambda a: a.transport), "may not join a job"),
    _A("the token of another site", "evil", with_token, "joined as evil"),
    _A("plaintext", "stranger", in_plaintext, "the connection is refused: UNAVAILABLE"),
    _A("every call of a site that does not exist", "stranger", every_call, "PermissionDeniedError"),
)
