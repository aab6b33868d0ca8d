"""Tensor files in the safetensors format (https://github.com/huggingface/safetensors, "Format").

Eight bytes give the length of a JSON header, then the header, then the payload. Ours is padded with blanks so
that the payload begins at a multiple of 64 bytes. Written and read here, and not with the library, because a
server blob is filled in place through a mapping, with dtypes that torch-free safetensors does not build arrays of.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from fl_runtime.errors import ConfigError, StoreError
from fl_runtime.types import Array, Arrays
from fl_runtime.wire.dtypes import dtype_of, name_from_safetensors, safetensors_code
from fl_runtime.wire.manifest import Manifest, TensorSpec

_ALIGN = 64
_MAX_HEADER_BYTES = 100 * 2**20
_WRITE_BYTES = 2**20
EXTRA_PREFIX = "extra:"


def header_of(manifest: Manifest, metadata: Mapping[str, str] | None = None) -> bytes:
    """The bytes before the payload."""
    fields: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    for spec, start in zip(manifest.tensors, manifest.offsets, strict=True):
        fields[(EXTRA_PREFIX if spec.extra else "") + spec.name] = {
            "dtype": safetensors_code(spec.dtype),
            "shape": list(spec.shape),
            "data_offsets": [start, start + spec.nbytes],
        }
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGN)
    return len(text).to_bytes(8, "little") + text


def write_tensors(
    path: Path, arrays: Arrays, metadata: Mapping[str, str] | None = None, *, durable: bool = False
) -> None:
    """Write a safetensors file; a file that is there is replaced only once the new one is whole. durable: and is on the
    device when this returns."""
    manifest = Manifest.of(arrays)
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            file.write(header_of(manifest, metadata))
            write_pieces(file, manifest.pieces(arrays, {}))
        if durable:
            sync(partial)
        os.replace(partial, path)
        if durable:
            sync(path.parent)
    except OSError as error:
        raise disk_error(error, path) from error


def write_pieces(file: BinaryIO, pieces: Iterable[memoryview]) -> None:
    """Write bytes (memoryviews of format "B") one after the other, a MiB at a time: Linux takes four times as long to
    put a large model into a new file at once (0.09 and 0.4 s for 256 MiB; ext4, 6.18)."""
    for piece in pieces:
        for start in range(0, len(piece), _WRITE_BYTES):
            file.write(piece[start : start + _WRITE_BYTES])


def read_tensors(path: Path) -> Arrays:
    """The tensors of a safetensors file, mapped copy-on-write. ConfigError if it is not one."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or not 0 < length <= min(_MAX_HEADER_BYTES, size - 8):
                raise ValueError("no safetensors header")
            fields = json.loads(file.read(length))
            mapped = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY), np.uint8)[8 + length :]
        fields.pop("__metadata__", None)
        return {name: _tensor(name, entry, mapped) for name, entry in fields.items()}
    except OSError as error:
        raise ConfigError(f"the tensor file cannot be read: {error.strerror}", where=str(path)) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"this is not a usable safetensors file: {error}", where=str(path), fix="give a .safetensors file"
        ) from None


def disk_error(error: OSError, path: Path) -> StoreError:
    """Our error for a failed write, with what to do about the common causes."""
    return StoreError(
        f"cannot write: {error.strerror or error}", where=str(path), fix="free disk space or choose another folder"
    )


def sync(path: Path) -> None:
    """Wait until a file, however it was written (a mapping too), or a folder's names are on the device. StoreError."""
    if path.is_dir() and os.name != "posix":
        return  # where folders cannot be opened, the file system keeps names by itself
    try:
        descriptor = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise disk_error(error, path) from error


def _tensor(name: str, entry: Mapping[str, Any], payload: Array) -> Array:
    dtype = name_from_safetensors(entry["dtype"])
    if dtype is None:
        raise ValueError(f"tensor {name!r} has dtype {entry['dtype']}, which is not supported")
    begin, end = entry["data_offsets"]
    spec = TensorSpec(name, dtype, tuple(entry["shape"]))
    if not 0 <= begin <= end <= len(payload) or end - begin != spec.nbytes:
        raise ValueError(f"tensor {name!r} does not lie within the file")
    if begin % dtype_of(dtype).itemsize:  # other writers may not align
        return payload[begin:end].copy().view(dtype_of(dtype)).reshape(spec.shape)
    return payload[begin:end].view(dtype_of(dtype)).reshape(spec.shape)
