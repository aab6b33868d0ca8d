"""What tensors there are: names, dtypes, shapes, and where each lies in the payload.

The payload is all tensors back to back, little endian, the largest item size first and otherwise in the given
order: so every tensor is aligned, there are no gaps, and a payload behind a header is a valid safetensors file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
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


@dataclass(frozen=True)
class TensorSpec:
    """One tensor: canonical dtype name, shape, and whether it is an extra (travels beside the weights)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    extra: bool = False

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * dtype_of(self.dtype).itemsize

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class Manifest:
    """An ordered list of tensors. Two manifests with the same `layout` describe the same payload."""

    tensors: tuple[TensorSpec, ...]

    @classmethod
    def of(cls, arrays: Arrays, extras: Arrays | None = None) -> Manifest:
        """The manifest of host arrays; ConfigError for a dtype that cannot travel."""
        return cls((*_specs(arrays, extra=False), *_specs(extras or {}, extra=True)))

    @classmethod
    def from_proto(cls, message: pb.Manifest) -> Manifest:
        """Checks everything a hostile peer could send; ProtocolError names the offending entry."""
        if len(message.tensors) > MAX_TENSORS:
            raise ProtocolError(f"a manifest of {len(message.tensors)} tensors; the limit is {MAX_TENSORS}")
        specs = tuple(_checked(t) for t in message.tensors)
        if len({(s.extra, s.name) for s in specs}) != len(specs):
            raise ProtocolError("a manifest names the same tensor twice")
        return cls(specs)

    def to_proto(self) -> pb.Manifest:
        return pb.Manifest(
            tensors=[pb.Tensor(name=t.name, dtype=t.dtype, shape=t.shape, extra=t.extra) for t in self.tensors]
        )

    @cached_property
    def layout(self) -> bytes:
        """16 bytes that identify names, dtypes, shapes and their order."""
        digest = xxhash.xxh3_128()
        for t in self.tensors:
            digest.update(f"{t.name}\0{t.dtype}\0{t.shape}\0{t.extra}\n".encode())
        return digest.digest()

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Where each tensor begins in the payload, in manifest order."""
        starts, at = [0] * len(self.tensors), 0
        for index in self.payload_order:
            starts[index] = at
            at += self.tensors[index].nbytes
        return tuple(starts)

    @cached_property
    def payload_order(self) -> tuple[int, ...]:
        sizes = [dtype_of(t.dtype).itemsize for t in self.tensors]
        return tuple(sorted(range(len(sizes)), key=lambda i: -sizes[i]))

    @cached_property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors)

    def views(self, buffer: Array) -> tuple[Arrays, Arrays]:
        """(arrays, extras) as views of a uint8 buffer of `nbytes` bytes; they live as long as the buffer."""
        arrays: dict[str, Array] = {}
        extras: dict[str, Array] = {}
        for spec, start in zip(self.tensors, self.offsets, strict=True):
            flat = buffer[start : start + spec.nbytes].view(dtype_of(spec.dtype))
            (extras if spec.extra else arrays)[spec.name] = flat.reshape(spec.shape)
        return arrays, extras

    def pieces(self, arrays: Arrays, extras: Arrays) -> list[memoryview]:
        """The tensors as flat views of bytes, in payload order; copies only what is not contiguous little endian."""
        return [self._bytes_of(self.tensors[i], arrays, extras) for i in self.payload_order]

    def digests(self, arrays: Arrays, extras: Arrays, inspected: Inspected | None = None) -> bytes:
        """xxh3-64 of every tensor's bytes, 8 bytes each, in manifest order. inspected: knows some of them already."""
        found = []
        for t in self.tensors:
            known = inspected and inspected.digest((extras if t.extra else arrays)[t.name], t.name, extra=t.extra)
            found.append(known or xxhash.xxh3_64_digest(self._bytes_of(t, arrays, extras)))
        return b"".join(found)

    def digests_of_payload(self, buffer: Array) -> bytes:
        return b"".join(
            xxhash.xxh3_64_digest(buffer[start : start + spec.nbytes].data)
            for spec, start in zip(self.tensors, self.offsets, strict=True)
        )

    @staticmethod
    def _bytes_of(spec: TensorSpec, arrays: Arrays, extras: Arrays) -> memoryview:
        array = (extras if spec.extra else arrays)[spec.name]
        little = np.ascontiguousarray(array, dtype=dtype_of(spec.dtype))
        return little.reshape(-1).view(np.uint8).data


def differences(ours: Manifest, theirs: Manifest, shape_of: ShapeOf | None = None) -> list[str]:
    """One line per weight tensor that differs; empty when the weights agree. Extras do not count.

    shape_of(name, shape): the part of a shape that counts; None: all of it.
    """
    a = {t.name: t for t in ours.tensors if not t.extra}
    b = {t.name: t for t in theirs.tensors if not t.extra}
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
    shown = name[:60]
    if not 0 < len(name) <= MAX_NAME_CHARS or not name.isprintable():
        raise ProtocolError(f"tensor name {shown!r} is empty, longer than {MAX_NAME_CHARS} or not printable")
    if len(shape) > MAX_DIMENSIONS:
        raise ProtocolError(f"tensor {shown!r} has {len(shape)} dimensions; the limit is {MAX_DIMENSIONS}")
    spec = TensorSpec(name, tensor.dtype, shape, tensor.extra)
    sides = math.prod(max(side, 1) for side in shape)  # NumPy bounds these too, whether or not another side is zero
    if sides * dtype_of(spec.dtype).itemsize > MAX_TENSOR_BYTES:
        raise ProtocolError(f"tensor {shown!r} of shape {list(shape)} is larger than {MAX_TENSOR_BYTES} bytes")
    return spec
