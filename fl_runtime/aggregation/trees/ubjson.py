"""Universal Binary JSON as XGBoost writes it, read and written without XGBoost.

It is a subset of https://ubjson.org (Draft 12): objects without counts, arrays with counts, some of them typed. Typed
arrays become NumPy arrays, everything else plain Python values, so that `dumps(loads(data)) == data`.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from fl_runtime.errors import ProtocolError

Value: TypeAlias = Any
"""None, bool, int, float, str, list, dict with str keys, Raw, or a NumPy array of one dimension."""


@dataclass(frozen=True)
class Raw:
    """A value that is encoded already; `dumps` writes it unchanged.

    Attributes:
        data: The encoded value.
    """

    data: bytes | memoryview


_DTYPES: dict[str, np.dtype[Any]] = {
    "i": np.dtype(">i1"),
    "U": np.dtype(">u1"),
    "I": np.dtype(">i2"),
    "l": np.dtype(">i4"),
    "L": np.dtype(">i8"),
    "d": np.dtype(">f4"),
    "D": np.dtype(">f8"),
}
_CODES = {dtype.newbyteorder("="): code for code, dtype in _DTYPES.items()}
_NUMBERS = {code: struct.Struct(">" + c) for code, c in zip("iUIlLdD", "bBhiqfd", strict=True)}
_LITERALS = {"Z": None, "T": True, "F": False}
_MAX_DEPTH = 64


def loads(data: bytes | bytearray | memoryview) -> Value:
    """Read a document; bytes that follow it are ignored.

    Args:
        data: The encoded document, which may come from a hostile peer.

    Returns:
        Its value.

    Raises:
        ProtocolError: If it is not a document of this format, or nested more than 64 levels deep.
    """
    reader = _Reader(memoryview(data))
    try:
        return reader.value(reader.marker(), 0)
    except (struct.error, IndexError, UnicodeDecodeError, ValueError, KeyError) as error:
        raise ProtocolError(f"not a UBJSON document, at byte {reader.at}: {error}") from None


def dumps(value: Value) -> bytes:
    """Encode a value with the choices that XGBoost makes."""
    out: list[bytes] = []
    _write(value, out)
    return b"".join(out)


class _Reader:
    def __init__(self, data: memoryview) -> None:
        self._data, self.at = data, 0

    def marker(self) -> str:
        self.at += 1
        return chr(self._data[self.at - 1])

    def value(self, marker: str, depth: int) -> Value:
        if depth > _MAX_DEPTH:
            raise ValueError("nested too deeply")
        if marker == "{":
            return self._object(depth)
        if marker == "[":
            return self._array(depth)
        if marker == "S":
            return self._string(self.marker())
        if marker in _LITERALS:
            return _LITERALS[marker]
        number = self._number(marker)
        return np.float32(number) if marker == "d" else number

    def _number(self, marker: str) -> Any:
        kind = _NUMBERS[marker]
        (value,) = kind.unpack_from(self._data, self.at)
        self.at += kind.size
        return value

    def _take(self, count: int) -> memoryview:
        if not 0 <= count <= len(self._data) - self.at:
            raise ValueError("the data ends within a value")
        self.at += count
        return self._data[self.at - count : self.at]

    def _string(self, marker: str) -> str:
        return str(self._take(self._number(marker)), "utf-8")

    def _object(self, depth: int) -> dict[str, Value]:
        fields: dict[str, Value] = {}
        while (marker := self.marker()) != "}":
            name = self._string(marker)
            fields[name] = self.value(self.marker(), depth + 1)
        return fields

    def _array(self, depth: int) -> Value:
        marker = self.marker()
        kind = ""
        if marker == "$":
            kind, marker = self.marker(), self.marker()
        if marker == "#":
            count = self._number(self.marker())
            if kind:
                dtype: np.dtype[Any] = _DTYPES[kind]
                return np.frombuffer(self._take(count * dtype.itemsize), dtype).astype(dtype.newbyteorder("="))
            if not 0 <= count <= len(self._data) - self.at:
                raise ValueError("the data ends within an array")
            return [self.value(self.marker(), depth + 1) for _ in range(count)]
        items = []
        while marker != "]":
            items.append(self.value(marker, depth + 1))
            marker = self.marker()
        return items


def _write(value: Value, out: list[bytes]) -> None:
    if isinstance(value, dict):
        out.append(b"{")
        for name, item in value.items():
            _write_text(name, out)
            _write(item, out)
        out.append(b"}")
    elif isinstance(value, Raw):
        out.append(bytes(value.data))
    elif isinstance(value, np.ndarray):
        code = _CODES[value.dtype]
        out.append(b"[$" + code.encode() + b"#" + _long(value.size))
        out.append(value.astype(_DTYPES[code]).tobytes())
    elif isinstance(value, list):
        out.append(b"[#" + _long(len(value)))
        for item in value:
            _write(item, out)
    elif isinstance(value, str):
        out.append(b"S")
        _write_text(value, out)
    elif value is None or isinstance(value, bool):
        out.append({None: b"Z", True: b"T", False: b"F"}[value])
    elif isinstance(value, (np.floating, float)):
        code = "d" if isinstance(value, np.float32) else "D"
        out.append(code.encode() + _NUMBERS[code].pack(value))
    else:
        out.append(_integer(int(value)))


def _write_text(text: str, out: list[bytes]) -> None:
    data = text.encode()
    out.append(_long(len(data)) + data)


def _long(value: int) -> bytes:
    return b"L" + _NUMBERS["L"].pack(value)


def _integer(value: int) -> bytes:
    """Encode in the smallest signed kind, by XGBoost's rule that the largest number of a kind goes to the next."""
    for code, bits in (("i", 7), ("I", 15), ("l", 31)):
        if -(1 << bits) < value < (1 << bits) - 1:
            return code.encode() + _NUMBERS[code].pack(value)
    return _long(value)
