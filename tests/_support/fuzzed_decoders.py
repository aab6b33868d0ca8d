"""The decoders of bytes from the network, as the fuzzer and the corpus test call them.

Bad bytes may raise our own errors and nothing else. The first byte of an input chooses the decoder, so one corpus
serves all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from google.protobuf.message import DecodeError, Message

from fl_runtime.errors import FederationError, ProtocolError
from fl_runtime.server.calls import service
from fl_runtime.server.calls.service import first_request
from fl_runtime.server.federation.federation import _object
from fl_runtime.trust.identity import Identity
from fl_runtime.wire import frames
from fl_runtime.wire.dtypes import dtype_of
from fl_runtime.wire.fl.v1 import federation_pb2 as pb
from fl_runtime.wire.manifest import Manifest, differences

M = TypeVar("M", bound=Message)
MOST_BYTES = 2**20
_KNOWN = Manifest.of({"a": np.zeros((3, 2), np.float32), "b": np.zeros(5, np.int8)})


def one(data: bytes) -> None:
    """Decode one input. Our own errors are the right answer to bad bytes; any other error is a finding."""
    decode = DECODERS[data[0] % len(DECODERS)] if data else None
    if decode is not None:
        try:
            decode(data[1:])
        except FederationError as error:
            FederationError.from_wire(error.to_wire())


def manifest(data: bytes) -> None:
    """A manifest: if its buffer is small enough to allocate, the tensors cover it without gaps or overlaps."""
    found = Manifest.from_proto(_parsed(pb.Manifest, data))
    assert Manifest.from_proto(found.to_proto()) == found
    differences(_KNOWN, found)
    if found.nbytes <= MOST_BYTES:
        arrays, extras = found.views(np.zeros(found.nbytes, np.uint8))
        assert sum(a.nbytes for a in (*arrays.values(), *extras.values())) == found.nbytes
        for spec in found.tensors:
            assert (extras if spec.extra else arrays)[spec.name].dtype == dtype_of(spec.dtype)


def frame(data: bytes) -> None:
    """A single frame: what our reader accepts, protobuf must accept too."""
    if frames.is_frame(data):
        inside = bytes(frames.frame_data(data))
        assert _parsed(pb.UpdatePart, data).data == inside


def transfer(data: bytes) -> None:
    """A whole upload: a header, then the rest cut into frames of 64 bytes. Nothing is written past the buffer."""
    size = int.from_bytes(data[:2], "big")
    header = _parsed(pb.UpdatePart, data[2 : 2 + size]).update
    service._update_fields(header)
    found = Manifest.from_proto(header.payload.manifest) if header.payload.HasField("manifest") else _KNOWN
    if found.nbytes > MOST_BYTES:
        return
    guarded = np.full(found.nbytes + 64, 0x55, np.uint8)
    receiver = frames.Receiver(found, header.payload.digests, guarded[: found.nbytes])
    rest = data[2 + size :]
    try:
        receiver.take(header.payload.inline)
        for start in range(0, len(rest), 64):
            receiver.take(frames.frame_data(rest[start : start + 64]))
        receiver.finish()
    finally:
        assert (guarded[found.nbytes :] == 0x55).all()
    assert frames.payload_digest(header.payload)


def registration(data: bytes) -> None:
    request = _parsed(pb.RegisterRequest, data)
    Manifest.from_proto(request.manifest)
    service._terms(request.terms_json)


def score(data: bytes) -> None:
    service._metrics(_parsed(pb.ScoreRequest, data).metrics_json)


def tunnel(data: bytes) -> None:
    first_request("Tunnel", iter([data]))


def control(data: bytes) -> None:
    """A control request, such as those about jobs."""
    assert isinstance(_object(data), dict)


def identity(data: bytes) -> None:
    """The identity in a certificate: a valid one survives a round trip."""
    found = Identity.from_uri(data.decode("utf-8", "replace"))
    assert Identity.from_uri(found.uri) == found


DECODERS: tuple[Callable[[bytes], Any], ...] = (
    manifest,
    frame,
    transfer,
    registration,
    score,
    control,
    identity,
    tunnel,
)


def _parsed(kind: type[M], data: bytes) -> M:
    try:
        return kind.FromString(data)
    except DecodeError:
        raise ProtocolError(f"this is no {kind.__name__}") from None
