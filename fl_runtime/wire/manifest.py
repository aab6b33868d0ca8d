"""The manifest: names, dtypes and shapes of the tensors in a payload, and the offset of each.

Payload format: the bytes of all tensors back to back, without gaps.

* Each tensor is C-contiguous and little endian.
* Tensors are ordered by item size, largest first. Tensors of one item size keep the order of the manifest.
  So every tensor begins at a multiple of its item size.
* A safetensors header followed by a payload is a valid safetensors file (see store/tensorfile.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import numpy as np
import xxhash

from fl_runtime.errors import ProtocolError
from fl_runtime.types import Array, Arrays
from fl_runtime.wire.dtypes import dtype_name, dtype_of
from fl_runtime.wire.finite import Inspected
from fl_runtime.wire.fl.v1 import federation_pb2 as pb

ShapeOf: TypeAlias = Callable[[str, tuple[int, ...]], tuple[int, ...]]

MAX_TENSORS = 200_000
MAX_NAME_CHARS = 1_024
MAX_DIMENSIONS = 32
MAX_TENSOR_BYTES = 2**46

_MAX_FIELDS = 4_096
_FIXED_BYTES = {1: 8, 5: 4}  # wire types of protobuf


@dataclass(frozen=True)
class TensorSpec:
    """Name, dtype and shape of one tensor.

    Attributes:
        name: Tensor name, unique among the weights and among the extras.
        dtype: Canonical dtype name, a key of `fl_runtime.wire.dtypes.DTYPES`.
        shape: Length of each dimension.
        extra: Whether it travels beside the weights (optimizer moments, control variates).
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    extra: bool = False

    @property
    def nbytes(self) -> int:
        """Size of the tensor in bytes."""
        return math.prod(self.shape) * dtype_of(self.dtype).itemsize

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class Manifest:
    """An ordered list of tensor specifications; manifests with equal `layout` describe the same payload format.

    Attributes:
        tensors: The specifications, weights first.
    """

    tensors: tuple[TensorSpec, ...]

    @classmethod
    def of(cls, arrays: Arrays, extras: Arrays | None = None) -> Manifest:
        """Make the manifest of host arrays.

        Args:
            arrays: The weights, in the order in which they shall travel.
            extras: The arrays that travel beside them.

        Returns:
            A manifest in the same order, weights first.

        Raises:
            ConfigError: If a dtype cannot be sent.
        """
        return cls((*_specs(arrays, extra=False), *_specs(extras or {}, extra=True)))

    @classmethod
    def from_proto(cls, message: pb.Manifest) -> Manifest:
        """Read a manifest from its protobuf message, which may come from a hostile peer.

        Args:
            message: The message as received.

        Returns:
            The manifest.

        Raises:
            ProtocolError: If a limit is exceeded, a name is unusable or given twice, or a dtype is unknown. The
                message names the tensor.
        """
        check_count(message)
        specs = tuple(_checked(t) for t in message.tensors)
        if len({(s.extra, s.name) for s in specs}) != len(specs):
            raise ProtocolError("a manifest names the same tensor twice")
        return cls(specs)

    def to_proto(self) -> pb.Manifest:
        """Return the protobuf message of this manifest."""
        return pb.Manifest(
            tensors=[pb.Tensor(name=t.name, dtype=t.dtype, shape=t.shape, extra=t.extra) for t in self.tensors]
        )

    @cached_property
    def layout(self) -> bytes:
        """Identifier of the names, dtypes, shapes and their order: xxh3-128, 16 bytes."""
        digest = xxhash.xxh3_128()
        for t in self.tensors:
            digest.update(f"{t.name}\0{t.dtype}\0{t.shape}\0{t.extra}\n".encode())
        return digest.digest()

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Byte offset of each tensor in the payload, in manifest order."""
        starts, at = [0] * len(self.tensors), 0
        for index in self.payload_order:
            starts[index] = at
            at += self.tensors[index].nbytes
        return tuple(starts)

    @cached_property
    def payload_order(self) -> tuple[int, ...]:
        """Indices of `tensors` in the order in which their bytes stand in the payload."""
        sizes = [dtype_of(t.dtype).itemsize for t in self.tensors]
        return tuple(sorted(range(len(sizes)), key=lambda i: -sizes[i]))

    @cached_property
    def nbytes(self) -> int:
        """Size of the whole payload in bytes."""
        return sum(t.nbytes for t in self.tensors)

    def views(self, buffer: Array) -> tuple[Arrays, Arrays]:
        """Return the tensors of a payload without copying them.

        Args:
            buffer: The payload, uint8, `nbytes` long.

        Returns:
            (arrays, extras): views of the buffer, writable if it is.
        """
        arrays: dict[str, Array] = {}
        extras: dict[str, Array] = {}
        for spec, start in zip(self.tensors, self.offsets, strict=True):
            flat = buffer[start : start + spec.nbytes].view(dtype_of(spec.dtype))
            (extras if spec.extra else arrays)[spec.name] = flat.reshape(spec.shape)
        return arrays, extras

    def pieces(self, arrays: Arrays, extras: Arrays) -> list[memoryview]:
        """Return the bytes of the tensors in payload order.

        Args:
            arrays: The weights named in this manifest.
            extras: The extras named in this manifest.

        Returns:
            One flat view (format "B") per tensor. Only arrays that are not contiguous or not little endian are copied.
        """
        return [self._bytes_of(self.tensors[i], arrays, extras) for i in self.payload_order]

    def digests(self, arrays: Arrays, extras: Arrays, inspected: Inspected | None = None) -> bytes:
        """Compute the digest of every tensor.

        Args:
            arrays: The weights named in this manifest.
            extras: The extras named in this manifest.
            inspected: Digests that are known already; they are not computed again.

        Returns:
            xxh3-64 of each tensor's bytes, 8 bytes each, in manifest order.
        """
        digests = []
        for t in self.tensors:
            digest = inspected and inspected.digest((extras if t.extra else arrays)[t.name], t.name, extra=t.extra)
            digests.append(digest or xxhash.xxh3_64_digest(self._bytes_of(t, arrays, extras)))
        return b"".join(digests)

    def digests_of_payload(self, buffer: Array) -> bytes:
        """Compute the same digests from a payload: a uint8 buffer of `nbytes` bytes."""
        return b"".join(
            xxhash.xxh3_64_digest(buffer[start : start + spec.nbytes].data)
            for spec, start in zip(self.tensors, self.offsets, strict=True)
        )

    @staticmethod
    def _bytes_of(spec: TensorSpec, arrays: Arrays, extras: Arrays) -> memoryview:
        array = (extras if spec.extra else arrays)[spec.name]
        little = np.ascontiguousarray(array, dtype=dtype_of(spec.dtype))
        return little.reshape(-1).view(np.uint8).data


def check_count(message: pb.Manifest) -> None:
    """Raise ProtocolError if a manifest has more than `MAX_TENSORS` tensors."""
    if len(message.tensors) > MAX_TENSORS:
        raise ProtocolError(f"a manifest has {len(message.tensors)} tensors; the limit is {MAX_TENSORS}")


def described_bytes(message: bytes, path: Sequence[int]) -> int:
    """Return the length of the manifest in an encoded message, without decoding the manifest.

    A decoded manifest takes ten times the memory of its message.

    Args:
        message: The encoded message, which may be malformed.
        path: Numbers of the fields that lead to the manifest, outermost first.

    Returns:
        Number of bytes; if the field is there several times, of all together. What follows a fault is not counted.
        What follows thousands of fields counts as if it were the manifest.
    """
    found = [memoryview(message)]
    for number in path:
        found = [field for part in found for field in _fields(part, number)]
    return sum(map(len, found))


def _fields(message: memoryview, number: int) -> Iterator[memoryview]:
    """Yield the contents of the fields with this number that have a length, up to the first fault."""
    at = 0
    for _ in range(_MAX_FIELDS):
        if at >= len(message):
            return
        tag, at = _read_varint(message, at)
        kind = tag & 7
        length = 0
        if kind == 0:
            _, at = _read_varint(message, at)
        elif kind == 2:
            length, at = _read_varint(message, at)
            if tag >> 3 == number:
                yield message[at : at + length]
        elif kind in _FIXED_BYTES:
            length = _FIXED_BYTES[kind]
        else:
            return
        at += length
    yield message[at:]


def _read_varint(message: memoryview, at: int) -> tuple[int, int]:
    """Return a number and the offset after it; past the end if there is none."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(message):
            break
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    return 0, len(message)


def differences(left: Manifest, right: Manifest, shape_of: ShapeOf | None = None) -> list[str]:
    """Compare the weights of two manifests; extras are ignored.

    Args:
        left: The manifest on the left of each line.
        right: The manifest on the right of each line.
        shape_of: Maps (name, shape) to the part of the shape that must agree. None compares whole shapes.

    Returns:
        One line per tensor that differs or is missing on one side; empty if the weights agree.
    """
    a = {t.name: t for t in left.tensors if not t.extra}
    b = {t.name: t for t in right.tensors if not t.extra}
    both = [name for name in a if name in b and a[name] != b[name]]
    if shape_of is not None:
        both = [
            name
            for name in both
            if a[name].dtype != b[name].dtype or shape_of(name, a[name].shape) != shape_of(name, b[name].shape)
        ]
    lines = [f"{name}: {a[name]} != {b[name]}" for name in both]
    lines += [f"{name}: {a[name]} != missing" for name in a if name not in b]
    lines += [f"{name}: missing != {b[name]}" for name in b if name not in a]
    return lines


def _specs(arrays: Mapping[str, Array], *, extra: bool) -> Iterable[TensorSpec]:
    for name, array in arrays.items():
        yield TensorSpec(name, dtype_name(array.dtype, tensor=name), tuple(array.shape), extra)


def _checked(tensor: pb.Tensor) -> TensorSpec:
    name, shape = tensor.name, tuple(tensor.shape)
    label = name[:60]
    if not 0 < len(name) <= MAX_NAME_CHARS or not name.isprintable():
        raise ProtocolError(
            f"tensor name {label!r} is empty, longer than {MAX_NAME_CHARS} characters, or not printable"
        )
    if len(shape) > MAX_DIMENSIONS:
        raise ProtocolError(f"tensor {label!r} has {len(shape)} dimensions; the limit is {MAX_DIMENSIONS}")
    spec = TensorSpec(name, tensor.dtype, shape, tensor.extra)
    sides = math.prod(max(side, 1) for side in shape)  # NumPy limits the other sides even if one of them is zero
    if sides * dtype_of(spec.dtype).itemsize > MAX_TENSOR_BYTES:
        raise ProtocolError(f"tensor {label!r} of shape {list(shape)} is larger than {MAX_TENSOR_BYTES} bytes")
    return spec
