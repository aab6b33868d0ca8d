"""Raw frames: cutting a payload into messages, and putting it together again.

A frame on the wire is the protobuf encoding of a message whose single field is `bytes data = 15`: the tag byte
0x7a, the length as a varint, the bytes. Writing that by hand costs one copy (the one that gRPC forces, since it
takes neither memoryview nor bytearray) where a protobuf object would cost three.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import xxhash

from fl_runtime.errors import ProtocolError, TransferDamagedError
from fl_runtime.types import Array, Arrays
from fl_runtime.wire.dtypes import dtype_of
from fl_runtime.wire.finite import is_finite
from fl_runtime.wire.fl.v1 import federation_pb2 as pb
from fl_runtime.wire.manifest import Manifest, TensorSpec

FRAME_BYTES = 2 * 2**20
_SHORTEST_FRAME_BYTES = 2**16
_FRAMES_BYTES = 2 * FRAME_BYTES
_CHECKED_BYTES = 2**19  # of what arrives: with the copy of it, half of a core's cache
INLINE_BYTES = 2**20
"""Payloads up to this size travel inside their header: one message each way is what makes small rounds quick."""
_TAG = 0x7A


def frame_bytes(sites: int) -> int:
    """How long frames are where so many sites exchange with one server: it holds one of each, so the more there are,
    the shorter they get, down to where calls would cost more than copies."""
    return min(max(_FRAMES_BYTES // max(sites, 1), _SHORTEST_FRAME_BYTES), FRAME_BYTES)


def frame(pieces: Sequence[memoryview]) -> bytes:
    """One frame holding the pieces back to back."""
    return b"".join((bytes([_TAG]), _varint(sum(len(p) for p in pieces)), *pieces))


def is_frame(message: bytes) -> bool:
    return bool(message) and message[0] == _TAG


def frame_data(message: bytes) -> memoryview:
    """The bytes of a frame, without a copy; valid as long as `message`."""
    length, shift, at = 0, 0, 1
    while True:
        if at >= len(message) or shift > 35:
            raise ProtocolError("a frame ends within its length")
        byte = message[at]
        at += 1
        length |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            break
    if length != len(message) - at:
        raise ProtocolError(f"a frame says it holds {length} bytes but holds {len(message) - at}")
    return memoryview(message)[at:]


def frames(pieces: Sequence[memoryview], start: int = 0, most: int = FRAME_BYTES) -> Iterator[bytes]:
    """Cut flat pieces of bytes, taken back to back, into frames of at most `most` bytes, from byte `start` on. Small
    tensors share a frame."""
    batch: list[memoryview] = []
    room = most
    for piece in pieces:
        if start >= len(piece):
            start -= len(piece)
            continue
        rest, start = piece[start:], 0
        while len(rest):
            batch.append(rest[:room])
            room -= len(batch[-1])
            rest = rest[len(batch[-1]) :]
            if room == 0:
                yield frame(batch)
                batch, room = [], most
    if batch:
        yield frame(batch)


def describe(manifest: Manifest, digests: bytes, *, known: bool) -> pb.Payload:
    """The header of a payload; `known`: the receiver has seen this layout, so names need not travel again."""
    return pb.Payload(
        layout=manifest.layout,
        manifest=None if known else manifest.to_proto(),
        total_bytes=manifest.nbytes,
        digests=digests,
    )


def inlined(part: pb.UpdatePart | pb.TaskPart, pieces: Sequence[memoryview]) -> bytes:
    """The message of a header that brings its payload, of at most INLINE_BYTES, along.

    The bytes are written behind the rest, as the same fields once more, which a parser joins (protobuf's encoding,
    "Last One Wins"). That costs one copy; set in an object and serialized, 1 MiB takes several, into memory that is
    fresh each time: 3 ms.
    """
    header = pb.UpdateHeader if isinstance(part, pb.UpdatePart) else pb.TaskHeader
    prefix, length = b"", sum(len(piece) for piece in pieces)
    for kind, field in ((pb.Payload, "inline"), (header, "payload"), (type(part), part.WhichOneof("kind"))):
        number = kind.DESCRIPTOR.fields_by_name[field].number
        prefix = bytes([number << 3 | 2]) + _varint(length + len(prefix)) + prefix
    return b"".join((part.SerializeToString(), prefix, *pieces))


class Receiver:
    """Fills a uint8 buffer of `manifest.nbytes` bytes from frames, and checks every tensor as soon as it is whole.

    The buffer belongs to the caller. `arrived`: where a transfer that broke off goes on; behind the last tensor that
    was whole and right where one was damaged. finite: whether to look for NaN and infinite values too. Both happen
    piece by piece, while the bytes are in the processor's cache and more of them are on their way.
    """

    def __init__(self, manifest: Manifest, digests: bytes, buffer: Array, *, finite: bool = False) -> None:
        if len(digests) != 8 * len(manifest.tensors):
            raise ProtocolError(f"{len(digests)} bytes of digests for {len(manifest.tensors)} tensors")
        self.manifest, self._digests, self._buffer, self.arrived = manifest, digests, buffer, 0
        self._finite = finite
        self._at, self._seen = 0, 0  # tensors in payload order, and bytes, that have been checked
        self._digest, self._compares = xxhash.xxh3_64(), True
        self.not_finite: list[str] = []
        """Names of tensors with a NaN or infinite value; complete when finish() has returned."""

    def take(self, data: bytes | memoryview) -> None:
        """The next bytes. TransferDamagedError if a tensor that they complete is not what was sent."""
        end = self.arrived + len(data)
        if end > self.manifest.nbytes:
            raise ProtocolError(f"more bytes than the manifest announces ({end} > {self.manifest.nbytes})")
        taken = np.frombuffer(data, np.uint8)
        for start in range(0, len(taken), _CHECKED_BYTES):
            part = taken[start : start + _CHECKED_BYTES]
            self._buffer[self.arrived : self.arrived + len(part)] = part
            self.arrived += len(part)
            self._check()

    def filled(self, *, finite: bool = False) -> None:
        """What was missing has been put into the buffer within this machine, where nothing damages it on the way.
        finite: by a site that has looked for NaN and infinite values itself."""
        self._compares, self._finite = False, self._finite and not finite
        self.arrived = self.manifest.nbytes
        self._check()

    def finish(self) -> tuple[Arrays, Arrays]:
        """(arrays, extras), views of the buffer; ProtocolError if bytes are missing, TransferDamagedError if a
        digest is wrong."""
        if self.arrived != self.manifest.nbytes:
            raise ProtocolError(f"a transfer ended after {self.arrived} of {self.manifest.nbytes} bytes")
        self._check()
        return self.manifest.views(self._buffer)

    def _check(self) -> None:
        """Everything between what has been checked and what has arrived."""
        order = self.manifest.payload_order
        while self._at < len(order):
            index = order[self._at]
            spec, start = self.manifest.tensors[index], self.manifest.offsets[index]
            stop = min(start + spec.nbytes, self.arrived)
            if self._compares:
                self._digest.update(self._buffer[self._seen : stop].data)
            if self._finite:
                self._check_finite(spec, self._seen - start, self._buffer[start:stop])
            self._seen = stop
            if stop < start + spec.nbytes:
                return
            right = not self._compares or self._digest.digest() == self._digests[8 * index : 8 * index + 8]
            self._digest.reset()
            if not right:
                self.arrived = self._seen = start
                self.not_finite = [name for name in self.not_finite if name != spec.name]
                raise TransferDamagedError(f"a tensor was damaged on the way: {spec.name}")
            self._at += 1

    def _check_finite(self, spec: TensorSpec, seen: int, data: Array) -> None:
        """The whole elements of a tensor's first bytes, but for those that its first `seen` bytes held."""
        dtype = dtype_of(spec.dtype)
        whole = data[: len(data) - len(data) % dtype.itemsize].view(dtype)
        if not is_finite(whole[seen // dtype.itemsize :]) and spec.name not in self.not_finite[-1:]:
            self.not_finite.append(spec.name)


def payload_digest(payload: pb.Payload) -> bytes:
    """16 bytes that identify layout and contents: what makes resending idempotent."""
    return _identity(payload.layout, payload.digests)


def digest_of(manifest: Manifest, digests: bytes) -> bytes:
    """The same, of tensors that lie here."""
    return _identity(manifest.layout, digests)


def _identity(layout: bytes, digests: bytes) -> bytes:
    return xxhash.xxh3_128_digest(layout + digests)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
