"""State files of a site: nested lists and dicts of plain values and arrays, in one safetensors file.

Arrays are tensors with the names "0", "1" and so on. The structure around them is JSON, in the tensor "json". Nothing
is pickled, and reading a file executes nothing. The JSON of formats after the first is ["format", number, version,
structure].
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from fl_runtime.errors import ConfigError, NewerFormatError
from fl_runtime.store.tensorfile import header_of, read_tensors, replacing, write_pieces
from fl_runtime.types import Array
from fl_runtime.version import check_format
from fl_runtime.wire.dtypes import DTYPES
from fl_runtime.wire.manifest import Manifest

State: TypeAlias = Any
"""None, bool, int, float, str, bytes, a NumPy array or scalar, or a list, tuple or dict of these. Keys of dicts are str
or int."""

_JSON = "json"
_FORMAT = 1
_KNOWN = {dtype.newbyteorder("=") for dtype in DTYPES.values()}


def write_state(path: Path, state: State, *, recycled: Path | None = None) -> int:
    """Write a state to a file, in one atomic step.

    Args:
        path: The file. Its folder is created if it does not exist.
        state: The state. Arrays are borrowed for the call.
        recycled: An old file to overwrite, which is several times faster than making a new one if it is large.

    Returns:
        Size of the file in bytes.

    Raises:
        ConfigError: The state holds a value of another type. The message names its place.
        StoreError: The disk is full or failed.
    """
    arrays: dict[str, Array] = {}
    text = json.dumps(_packed(state, arrays, "state")).encode()
    arrays[_JSON] = np.frombuffer(text, np.uint8)
    manifest = Manifest.of(arrays)
    with replacing(path) as partial:
        if recycled is not None and recycled.exists():
            os.replace(recycled, partial)
        with open(partial, "r+b" if partial.exists() else "wb") as file:
            file.write(header_of(manifest))
            write_pieces(file, manifest.pieces(arrays, {}))
            size = file.tell()
            file.truncate()
    return size


def read_state(path: Path) -> State:
    """Read a state.

    Args:
        path: A file of `write_state`.

    Returns:
        The state. The caller owns its arrays.

    Raises:
        NewerFormatError: A later version wrote the file.
        ConfigError: The file was not written by `write_state`.
    """
    arrays = read_tensors(path)
    try:
        packed = json.loads(arrays[_JSON].tobytes())
        if isinstance(packed, list) and packed[:1] == ["format"]:
            check_format(packed[1], _FORMAT, "the saved state", where=str(path), version=packed[2])
            packed = packed[3]
        return _unpacked(packed, arrays)
    except NewerFormatError:
        raise
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise ConfigError(
            f"this is not a state file of a site: {error!r}",
            where=str(path),
            fix="delete the file: the site begins anew",
        ) from None


def _packed(value: Any, arrays: dict[str, Array], where: str) -> Any:
    """Return `value` as JSON. A list stands for everything but plain values; its first item names the type."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, np.ndarray | np.generic):
        if value.dtype.newbyteorder("=") not in _KNOWN:
            raise _refused(f"an array of dtype {value.dtype}", where)
        name = str(len(arrays))
        arrays[name] = np.asarray(value)
        return ["array" if isinstance(value, np.ndarray) else "number", name]
    if isinstance(value, bytes):
        return ["bytes", value.hex()]
    if isinstance(value, list | tuple):
        kind = "list" if isinstance(value, list) else "tuple"
        return [kind, *(_packed(item, arrays, f"{where}[{index}]") for index, item in enumerate(value))]
    if isinstance(value, Mapping):
        return ["dict", *([_key(k, where), _packed(v, arrays, f"{where}[{k!r}]")] for k, v in value.items())]
    if isinstance(value, str | bool | int | float):  # subclasses of these, such as string enumerations
        plain = next(kind for kind in (str, bool, int, float) if isinstance(value, kind))
        return plain(value)
    raise _refused(f"a {type(value).__name__}", where)


def _key(key: Any, where: str) -> str | int:
    if isinstance(key, str):
        return str(key)
    if isinstance(key, int) and not isinstance(key, bool):
        return int(key)
    raise _refused(f"a dict with the key {key!r}", where)


def _unpacked(value: Any, arrays: Mapping[str, Array]) -> State:
    if not isinstance(value, list):
        return value
    kind, *items = value
    if kind in ("array", "number"):
        array = np.array(arrays[items[0]])
        return array if kind == "array" else array[()]
    if kind == "bytes":
        return bytes.fromhex(items[0])
    if kind == "dict":
        return {key: _unpacked(item, arrays) for key, item in items}
    unpacked = [_unpacked(item, arrays) for item in items]
    if kind == "tuple":
        return tuple(unpacked)
    if kind != "list":
        raise ValueError(f"unknown kind {kind!r}")
    return unpacked


def _refused(what: str, where: str) -> ConfigError:
    return ConfigError(
        f"{what} cannot be saved for a restart",
        where=where,
        fix="save plain values, lists, dicts and NumPy arrays; or leave exact_restart out of the job",
    )
