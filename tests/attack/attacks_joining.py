"""Hostile variants: joining a job and registering tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from attack_client import Attacker
from attack_table import Attack

from fl_runtime.wire.fl.v1 import federation_pb2 as pb

ESCAPES = "\x1b[2J\x1b]0;owned\x07\r\n=cmd()|x!A1\u202e"


def joins(**fields: Any) -> Callable[[Attacker], object]:
    def send(attacker: Attacker) -> object:
        request = pb.JoinRequest(**{"protocol_min": 1, "protocol_max": 1, **fields})
        reply = pb.JoinReply.FromString(attacker.call("Join", request.SerializeToString())[-1])
        attacker.attempt, attacker.job = reply.attempt, "siege"
        return f"joined as {reply.site}"

    return send


def registers(**fields: Any) -> Callable[[Attacker], object]:
    def send(attacker: Attacker) -> object:
        attacker.join()
        return attacker.register(**{name: value() if callable(value) else value for name, value in fields.items()})

    return send


def tensors(*given: pb.Tensor) -> Callable[[Attacker], object]:
    return registers(manifest=pb.Manifest(tensors=given))


def tensor(**fields: Any) -> pb.Tensor:
    return pb.Tensor(**{"name": "a", "dtype": "float32", "shape": [1], **fields})


def many(count: int) -> pb.Manifest:
    """A manifest of so many tensors, whose bytes are cheap to make."""
    return pb.Manifest.FromString(pb.Manifest(tensors=[tensor(shape=[])]).SerializeToString() * count)


def raw(method: str, *messages: bytes) -> Callable[[Attacker], object]:
    def send(attacker: Attacker) -> object:
        attacker.join()
        return attacker.call(method, *messages)

    return send


def in_parts(*parts: pb.RegisterRequest) -> Callable[[Attacker], object]:
    def send(attacker: Attacker) -> object:
        attacker.join()
        parts[0].session.CopyFrom(attacker.session)
        return attacker.call("Register", *(part.SerializeToString() for part in parts))

    return send


def names(**fields: Any) -> Callable[[Attacker], object]:
    return registers(names=[pb.NameList(**{"name": "labels", "count": 2, "block": 64, "digest": b"x" * 16, **fields})])


_A = partial(Attack, "joining")
_LONG: Sequence[str] = [f"{n}" for n in range(300)]

ATTACKS = (
    _A("a protocol of the future", "evil", joins(protocol_min=99, protocol_max=2**32 - 1), "protocol"),
    _A("a protocol range upside down", "evil", joins(protocol_min=9, protocol_max=0), "protocol"),
    _A("a version that steers a terminal", "evil", joins(version=ESCAPES * 1000), "joined as evil"),
    _A("a job that does not run", "evil", joins(job="../../etc/passwd"), "not|accept"),
    _A("the training with number 4294967295", "evil", joins(training=2**32 - 1), "training"),
    _A("raw garbage in place of a request", "evil", raw("Join", b"\xff" * 1000), "not a JoinRequest"),
    _A("no message at all", "evil", raw("Register"), "ended before its first message"),
    _A("raw garbage as a registration", "evil", raw("Register", b"\xff" * 1000), "not a RegisterRequest"),
    _A("201,000 tensors", "evil", registers(manifest=lambda: many(201_000)), "describes tensors in"),
    _A("a million tensors", "evil", registers(manifest=lambda: many(1_000_000)), "too large for gRPC"),
    _A("a tensor of 32 TiB", "evil", tensors(tensor(shape=[2**43])), "do not agree"),
    _A("a tensor of 128 TiB", "evil", tensors(tensor(shape=[2**45])), "is larger than"),
    _A("a shape that overflows", "evil", tensors(tensor(shape=[2**32, 2**32])), "is larger than"),
    _A("a negative shape", "evil", tensors(tensor(shape=[2**64 - 1])), "is larger than"),
    _A("a huge length beside zero", "evil", tensors(tensor(shape=[2**63, 0])), "is larger than"),
    _A("33 dimensions", "evil", tensors(tensor(shape=[1] * 33)), "33 dimensions"),
    _A("the same tensor twice", "evil", tensors(tensor(), tensor()), "same tensor twice"),
    _A("objects as a dtype", "evil", tensors(tensor(dtype="object")), "object"),
    _A("pickles as a dtype", "evil", tensors(tensor(dtype="|O")), r"\|O"),
    _A("a structured dtype", "evil", tensors(tensor(dtype="f4,f4")), "f4,f4"),
    _A("a dtype that steers a terminal", "evil", tensors(tensor(dtype=ESCAPES)), r"\\x1b"),
    _A("a name with NUL", "evil", tensors(tensor(name="a\0b")), "not printable"),
    _A("a name of two lines", "evil", tensors(tensor(name="a\nb")), "not printable"),
    _A("a name of 200 kB", "evil", tensors(tensor(name="n" * 200_000)), "longer than"),
    _A("a name of 1 MB", "evil", tensors(tensor(name="n" * 2**20)), "describes tensors in"),
    _A("no name", "evil", tensors(tensor(name="")), "is empty"),
    _A("a path as a name", "evil", tensors(tensor(name="../../etc/passwd")), "do not agree"),
    _A("other tensors", "evil", tensors(tensor(name="a.weight", shape=[5])), "do not agree"),
    _A("no tensors", "evil", tensors(), "do not agree"),
    _A("an info of 1 MB", "evil", registers(info={"x": "y" * 10**6}), "more than 4096 characters"),
    _A("300 infos", "evil", registers(info=dict.fromkeys(_LONG, "")), "more than 256 entries"),
    _A("10,000 capabilities", "evil", registers(capabilities=[str(n) for n in range(10_000)]), "more than 256"),
    _A("labels that steer a terminal", "evil", registers(agreement={"labels": ESCAPES}), r"do not agree(.|\n)*\\x1b"),
    _A("terms nested a million deep", "evil", registers(terms_json="[" * 10**6), "terms .* are not JSON"),
    _A("terms of the wrong type", "evil", registers(terms_json='{"strategy": ["fedavg"]}'), "terms .* cannot be read"),
    _A("an infinite patience", "evil", registers(terms_json='{"patience": 1e400}'), "terms .* cannot be read"),
    _A("a list of names that lies", "evil", names(count=2**32 - 1), "list"),
    _A("a list of names without digests", "evil", names(digest=b"", block=0), "list"),
    _A("entries of 1 MB", "evil", names(entries=["x" * 10**6, "y"]), "list|entr"),
    _A("an answer to no question", "evil", in_parts(pb.RegisterRequest(excerpt=pb.NameExcerpt(name="x"))), "not agree"),
    _A(
        "parts without tensors",
        "evil",
        in_parts(pb.RegisterRequest(manifest=many(1), more=True), pb.RegisterRequest(more=True)),
        "brings no tensors",
    ),
    _A(
        "parts that never end",
        "evil",
        in_parts(pb.RegisterRequest(manifest=many(100_000), more=True), pb.RegisterRequest(manifest=many(150_000))),
        "describes tensors in",
        quick=False,
    ),
    _A(
        "a last part that never comes",
        "evil",
        in_parts(pb.RegisterRequest(manifest=many(1), more=True)),
        "ended before its last message",
    ),
)
