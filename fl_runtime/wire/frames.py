"""Payload frames: cutting a payload into messages, and assembling it at the receiver.

Frame format, the protobuf encoding of a message whose only field is `bytes data = 15`:

    0x7a      tag: field 15, length-delimited
    varint    number of data bytes
    bytes     the data: a slice of the payload (see wire/manifest.py)

Frames are written and parsed by hand. That costs one copy, which gRPC forces because it accepts neither memoryview nor
bytearray. A protobuf object would cost three.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import xxhash

from fl_runtime.errors import ProtocolError, TransferDamagedError
from fl_runtime.types import Array, Arrays
from fl_runtime.wire.dtypes import dtype_of
from fl_runtime.wire.finite import is_finite
from fl_runtime.wire.fl.v1 import federation_pb2 as pb
from fl_runtime.wire.manifest import Manifest, TensorSpec

FRAME_BYTES = 2 * 2**20
SHORTEST_FRAME_BYTES = 2**16
_FRAMES_BYTES = 2 * FRAME_BYTES
_CHECKED_BYTES = 2**19  # with its copy, half of the cache of a typical core
INLINE_BYTES = 2**20
"""Largest payload that travels inside its header: small rounds then need one message each way."""
_TAG = 0x7A


def frame_bytes(sites: int) -> int:
    """Return the frame size in bytes for a number of sites.

    For servers without turns, which hold one frame of every site. Below 64 KiB the cost of the calls would exceed that
    of the copies.

    Args:
        sites: Number of sites that exchange with one server.

    Returns:
        Data bytes per frame, between 64 KiB and 2 MiB.
    """
    return min(max(_FRAMES_BYTES // max(sites, 1), SHORTEST_FRAME_BYTES), FRAME_BYTES)


def frame(pieces: Sequence[memoryview]) -> bytes:
    """Make one frame of pieces of bytes, back to back."""
    return b"".join((bytes([_TAG]), _varint(sum(len(p) for p in pieces)), *pieces))


def is_frame(message: bytes) -> bool:
    """Whether a message is a frame, judged by its first byte."""
    return bool(message) and message[0] == _TAG


def frame_data(message: bytes) -> memoryview:
    """Return the data of a frame without copying it.

    Args:
        message: A frame, see `is_frame`.

    Returns:
        A view of `message`.

    Raises:
        ProtocolError: If the length does not match the message.
    """
    length, shift, at = 0, 0, 1
    while True:
        if at >= len(message) or shift > 35:
            raise ProtocolError("a frame ends before its length field does")
        byte = message[at]
        at += 1
        length |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            break
    if length != len(message) - at:
        raise ProtocolError(f"a frame says it holds {length} bytes but holds {len(message) - at}")
    return memoryview(message)[at:]


def frames(
    pieces: Sequence[memoryview], start: int = 0, most: Callable[[], int] = lambda: FRAME_BYTES
) -> Iterator[bytes]:
    """Cut a payload into frames; small tensors share a frame.

    Args:
        pieces: Flat views of bytes (format "B") that make up the payload, see `Manifest.pieces`.
        start: Offset of the first byte to send, when a transfer resumes.
        most: Returns the largest number of data bytes in the next frame.

    Yields:
        Frames in payload order.
    """
    batch: list[memoryview] = []
    room = most()
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
                batch, room = [], most()
    if batch:
        yield frame(batch)


def describe(manifest: Manifest, digests: bytes, *, known: bool) -> pb.Payload:
    """Make the header of a payload.

    Args:
        manifest: The tensors of the payload.
        digests: xxh3-64 of every tensor, see `Manifest.digests`.
        known: Whether the receiver has this layout already. The manifest is then left out.

    Returns:
        The protobuf message, without the payload itself.
    """
    return pb.Payload(
        layout=manifest.layout,
        manifest=None if known else manifest.to_proto(),
        total_bytes=manifest.nbytes,
        digests=digests,
    )


def inlined(part: pb.UpdatePart | pb.TaskPart, pieces: Sequence[memoryview]) -> bytes:
    """Serialize a header together with its payload.

    The payload is appended by writing the same fields a second time, which a protobuf parser merges (protobuf's
    encoding guide, "Last One Wins"). That costs one copy. Setting the field and serializing the object copies 1 MiB
    several times into fresh memory, which takes 3 ms.

    Args:
        part: Header of a task or an update whose payload has no `inline` bytes yet.
        pieces: The payload, of at most `INLINE_BYTES` bytes in total.

    Returns:
        The serialized message.
    """
    header = pb.UpdateHeader if isinstance(part, pb.UpdatePart) else pb.TaskHeader
    prefix, length = b"", sum(len(piece) for piece in pieces)
    for kind, field in ((pb.Payload, "inline"), (header, "payload"), (type(part), part.WhichOneof("kind"))):
        number = kind.DESCRIPTOR.fields_by_name[field].number
        prefix = bytes([number << 3 | 2]) + _varint(length + len(prefix)) + prefix
    return b"".join((part.SerializeToString(), prefix, *pieces))


class Receiver:
    """Fills a buffer from the data of frames and verifies each tensor's digest as soon as it is complete.

    Digests and finite values are checked piece by piece, while the bytes are in the processor's cache.

    Args:
        manifest: The tensors that the payload holds.
        digests: xxh3-64 of every tensor, in manifest order.
        buffer: uint8, `manifest.nbytes` long. It belongs to the caller, who must keep it until `finish` has returned.
        finite: Whether to look for NaN and infinite values as well.

    Attributes:
        manifest: The tensors that the payload holds.
        arrived: Offset at which an interrupted transfer continues. After a damaged tensor, the start of that tensor.
        not_finite: Names of the tensors with NaN or infinite values; complete when `finish` has returned.

    Raises:
        ProtocolError: If the digests do not match the number of tensors.
    """

    def __init__(self, manifest: Manifest, digests: bytes, buffer: Array, *, finite: bool = False) -> None:
        if len(digests) != 8 * len(manifest.tensors):
            raise ProtocolError(f"a payload has {len(digests)} bytes of digests for {len(manifest.tensors)} tensors")
        self.manifest, self._digests, self._buffer, self.arrived = manifest, digests, buffer, 0
        self._finite = finite
        self._at, self._seen = 0, 0  # number of tensors (in payload order) and of bytes checked so far
        self._digest, self._compares = xxhash.xxh3_64(), True
        self.not_finite: list[str] = []

    def take(self, data: bytes | memoryview) -> None:
        """Copy the next bytes of the payload into the buffer and check them.

        Args:
            data: The data of a frame; not used after the call.

        Raises:
            ProtocolError: If there are more bytes than the manifest announces.
            TransferDamagedError: If a tensor completed by these bytes has a wrong digest. `arrived` then points to
                its start.
        """
        end = self.arrived + len(data)
        if end > self.manifest.nbytes:
            raise ProtocolError(
                f"a payload has more bytes than its manifest announces ({end} > {self.manifest.nbytes})"
            )
        incoming = np.frombuffer(data, np.uint8)
        for start in range(0, len(incoming), _CHECKED_BYTES):
            part = incoming[start : start + _CHECKED_BYTES]
            self._buffer[self.arrived : self.arrived + len(part)] = part
            self.arrived += len(part)
            self._check()

    def filled(self, *, finite: bool = False) -> None:
        """Mark the buffer as complete after the sender wrote the rest into it through a shared file.

        Digests are not compared, because no network lies between the two processes.

        Args:
            finite: Whether the sender has checked for NaN and infinite values itself.
        """
        self._compares, self._finite = False, self._finite and not finite
        self.arrived = self.manifest.nbytes
        self._check()

    def finish(self) -> tuple[Arrays, Arrays]:
        """Complete the transfer.

        Returns:
            (arrays, extras): views of the buffer.

        Raises:
            ProtocolError: If bytes are missing.
            TransferDamagedError: If a digest is wrong.
        """
        if self.arrived != self.manifest.nbytes:
            raise ProtocolError(f"a transfer ended after {self.arrived} of {self.manifest.nbytes} bytes")
        self._check()
        return self.manifest.views(self._buffer)

    def _check(self) -> None:
        """Check the bytes that arrived since the last check."""
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
            intact = not self._compares or self._digest.digest() == self._digests[8 * index : 8 * index + 8]
            self._digest.reset()
            if not intact:
                self.arrived = self._seen = start
                self.not_finite = [name for name in self.not_finite if name != spec.name]
                raise TransferDamagedError(f"a tensor was damaged in transfer: {spec.name}")
            self._at += 1

    def _check_finite(self, spec: TensorSpec, seen: int, data: Array) -> None:
        """Check the complete elements in a tensor's first bytes; those within the first `seen` bytes are skipped."""
        dtype = dtype_of(spec.dtype)
        elements = data[: len(data) - len(data) % dtype.itemsize].view(dtype)
        if not is_finite(elements[seen // dtype.itemsize :]) and spec.name not in self.not_finite[-1:]:
            self.not_finite.append(spec.name)


def payload_digest(payload: pb.Payload) -> bytes:
    """Return the identifier of a payload's layout and contents, so that resending is idempotent.

    Args:
        payload: Header of the payload.

    Returns:
        xxh3-128 of the layout and the tensor digests, 16 bytes.
    """
    return _identity(payload.layout, payload.digests)


def digest_of(manifest: Manifest, digests: bytes) -> bytes:
    """Return the identifier that `payload_digest` gives, for tensors in memory.

    Args:
        manifest: The tensors of the payload.
        digests: xxh3-64 of every tensor, in manifest order.

    Returns:
        xxh3-128 of the layout and the tensor digests, 16 bytes.
    """
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
