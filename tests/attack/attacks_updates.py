"""Hostile variants: headers, transfers and values of updates."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from attack_client import MODEL, Attacker, member, pieces
from attack_table import Attack
from attacks_joining import ESCAPES

from fl_runtime.wire import frames
from fl_runtime.wire.fl.v1 import federation_pb2 as pb
from fl_runtime.wire.manifest import Manifest

_OTHER = {name: array + np.float32(1) for name, array in MODEL.items()}


def header(*after: bytes, **fields: Any) -> Callable[[Attacker], object]:
    """Send a header with these fields changed, and these messages after it."""
    return member(lambda attacker: attacker.submit(attacker.header(**fields), *after))


def payload(*after: bytes, **fields: Any) -> Callable[[Attacker], object]:
    """Send a header whose payload has these fields changed, and these messages after it."""

    def send(attacker: Attacker) -> object:
        found = attacker.header()
        for name, value in fields.items():
            setattr(found.payload, name, value)
        return attacker.submit(found, *after)

    return member(send)


def extras(*shapes: list[int]) -> Callable[[Attacker], object]:
    """Announce tensors of these shapes beside the weights, and send none of their bytes."""

    def send(attacker: Attacker) -> object:
        found = attacker.header()
        given = [pb.Tensor(name=f"x{n}", dtype="float32", shape=s, extra=True) for n, s in enumerate(shapes)]
        found.payload.manifest.tensors.extend(given)
        manifest = Manifest.from_proto(found.payload.manifest)
        found.payload.layout, found.payload.total_bytes = manifest.layout, manifest.nbytes
        found.payload.digests = b"d" * 8 * len(manifest.tensors)
        return attacker.submit(found)

    return member(send)


def raw(*messages: bytes) -> Callable[[Attacker], object]:
    return member(lambda attacker: attacker.call("Submit", *messages))


def values(number: float) -> Callable[[Attacker], object]:
    """Send a whole update with one value of this kind in it."""
    arrays = {**MODEL, "b.bias": np.array([0, 0, number, 0, 0, 0, 0], np.float32)}
    return member(lambda attacker: attacker.update(arrays))


def field_of_another_type(attacker: Attacker) -> object:
    """Send num_examples (field 7) as the eight bytes of NaN, where a varint is expected."""
    found = attacker.header(num_examples=0).SerializeToString() + bytes([7 << 3 | 1]) + struct.pack("<d", float("nan"))
    length = len(found)
    message = b"\x0a" + bytes([length & 0x7F | 0x80, length >> 7]) + found
    return attacker.call("Submit", message, *pieces(MODEL))


def announced_and_never_sent(attacker: Attacker) -> object:
    """Announce an update, send one byte of it, and leave while the call is open."""
    message = pb.UpdatePart(update=attacker.header()).SerializeToString()
    call = attacker.begin("Submit", attacker.held_open(message, frames.frame([memoryview(b"x")])))
    waiting = pb.SubmitReply.FromString(next(call)).WhichOneof("kind")
    attacker.leave()
    call.cancel()
    return f"the server answers {waiting}"


def out_of_order(attacker: Attacker) -> object:
    arrays = {**MODEL, "a.weight": np.arange(300_000, dtype=np.float32).reshape(300, 1000)}
    content = arrays["a.weight"].tobytes() + arrays["b.bias"].tobytes()
    cut = [frames.frame([memoryview(content[start : start + 10**5])]) for start in range(0, len(content), 10**5)]
    return attacker.submit(attacker.header(arrays), *reversed(cut))


def many_broken(attacker: Attacker) -> object:
    """Break off a transfer again and again, each of another update."""
    last = ""
    for number in range(20):
        arrays = {**MODEL, "b.bias": np.full(7, number, np.float32)}
        with contextlib.suppress(StopIteration):
            try:
                attacker.submit(attacker.header(arrays), frames.frame([memoryview(b"x" * 1000)]))
            except Exception as error:
                last = str(error)
    return last


_A = partial(Attack, "updates")
_FRAME = frames.frame([memoryview(b"x" * 100)])

ATTACKS = (
    _A("no bytes", "evil", header(), "ended after 0 bytes"),
    _A("too few bytes", "evil", header(_FRAME), "ended after 100 bytes"),
    _A("no frame", "evil", header(b"hello"), "has no frame"),
    _A("an empty message", "evil", header(b""), "has no frame"),
    _A("a frame that lies about its length", "evil", header(b"\x7a\x10abc"), "says it holds 16 bytes"),
    _A("a length that does not end", "evil", header(b"\x7a" + b"\xff" * 9 + b"\x01"), "ends before its length"),
    _A("frames longer than announced", "evil", header(frames.frame([memoryview(b"x" * 2 * 10**6)])), "more|too|long"),
    _A("the bytes of another update", "evil", header(*pieces(_OTHER)), "damaged in transfer"),
    _A("bytes out of order", "evil", member(out_of_order), "damaged in transfer"),
    _A(
        "a header twice",
        "evil",
        raw(*[pb.UpdatePart(update=pb.UpdateHeader(content="weights")).SerializeToString()] * 2),
        "attempt",
    ),
    _A("frames without a header", "evil", raw(*pieces(MODEL)), "content|attempt|header"),
    _A("raw garbage", "evil", raw(b"\xff" * 10**6), "not a UpdatePart|not an? UpdatePart"),
    _A("a header of 9 MB", "evil", header(encoding="e" * 9 * 2**20), "too large for gRPC"),
    _A("announced and never sent", "evil", member(announced_and_never_sent), "send_from"),
    _A("20 transfers that break off", "evil", member(many_broken), "ended after 1000 bytes"),
    _A("a total of 2**63 bytes", "evil", payload(total_bytes=2**63), "announces 9223372036854775808 bytes"),
    _A("a total of no bytes", "evil", payload(total_bytes=0), "announces 0 bytes"),
    _A("digests that are too short", "evil", payload(digests=b"short"), "digest"),
    _A("a layout nobody knows", "evil", payload(layout=b"unknown"), "layout"),
    _A("2 MB inline", "evil", payload(inline=b"x" * 2 * 10**6), "brings 2000000 bytes"),
    _A("a file of the server's machine", "evil", payload(file="/etc/passwd"), "ended after 0 bytes"),
    _A("a file in a folder that is not shared", "evil", header(_FRAME, shared=True, finite=True), "ended after 100"),
    _A("extras of 4 TiB", "evil", extras(*[[2**38]] * 4), "the limit is"),
    _A("extras of a negative size", "evil", extras([2**63]), "is larger than", quick=False),
    _A("a content nobody sums", "evil", header(content="pickle"), "content of an update is 'pickle'"),
    _A("the content of encoded models", "evil", header(content="encoded"), "sums 'weights'"),
    _A("a stage of 1 MB", "evil", header(stage="s" * 10**6), "the stage of an update is"),
    _A("a stage that steers a terminal", "evil", header(stage=ESCAPES), "is not printable"),
    _A("an encoding of 1 MB", "evil", header(encoding="e" * 10**6), "the encoding of an update is"),
    _A("an encoding that is no filter", "evil", header(encoding='[{"name": "__import__"}]'), "an upload ended after"),
    _A("an encoding nested 900 deep", "evil", header(encoding="[" * 900 + "]" * 900), "encoding|filter"),
    _A("NaN", "evil", values(float("nan")), "NaN or infinite|not finite"),
    _A("infinity", "evil", values(float("inf")), "NaN or infinite|not finite"),
    _A("no examples", "evil", header(num_examples=0), "num_examples is 0"),
    _A("a negative number of examples", "evil", header(num_examples=2**64 - 1), "num_examples is 1844"),
    _A("more examples than a double counts", "evil", header(num_examples=2**53 + 1), "the limit is"),
    _A("NaN examples", "evil", member(field_of_another_type), "num_examples is 0"),
    _A("a negative number of steps", "evil", header(local_steps=2**64 - 1), "local_steps is"),
    _A("a metric that is no number", "evil", header(metrics_json='{"loss": "low"}'), "not a JSON object of numbers"),
    _A("metrics nested a million deep", "evil", header(metrics_json="[" * 10**6), "metrics are not JSON"),
    _A("fewer tensors", "evil", member(lambda a: a.update({"b.bias": MODEL["b.bias"]})), "differs from the agreed"),
    _A(
        "tensors of another dtype",
        "evil",
        member(lambda a: a.update({n: x.astype("f8") for n, x in MODEL.items()})),
        "differs from the agreed",
    ),
    _A(
        "a tensor that is not registered",
        "evil",
        member(lambda a: a.update({**MODEL, "c": MODEL["b.bias"]})),
        "differs from the agreed",
    ),
)
