"""The results of a block's calls so far, kept at the site so that a script that is started again can get them anew."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import xxhash

from fl_runtime.aggregation.sums.call import Call, read_texts
from fl_runtime.aggregation.sums.strategy import CALL, SITES, TEXTS, VALUES
from fl_runtime.errors import ProtocolError
from fl_runtime.store.tensorfile import disk_error
from fl_runtime.types import Array, Arrays, Task

_MOST_BYTES = 2**30
"""Size of the results of one block from which on no more of them are kept. A script started again is refused then."""
_PARTS: dict[str, np.dtype[Any]] = {
    **{VALUES: np.dtype(np.float64), CALL: np.dtype(np.uint8)},
    **{SITES: np.dtype(np.uint8), TEXTS: np.dtype(np.uint8)},
}
_HEAD = struct.Struct("<6Q")  # number of the call, digest of the parts, size of each part in bytes


@dataclass(frozen=True)
class Result:
    """The result of one call.

    Attributes:
        call: What the sites called.
        values: The total of a sum, float64, one dimension.
        texts: The union of texts.
        sites: Names of the sites whose values are in it.
    """

    call: Call
    values: Array
    texts: tuple[str, ...]
    sites: tuple[str, ...]


class Replay:
    """The results of one block, by the number of the call.

    A script that is started again after its process died makes its calls from the beginning. It gets the results of
    those that are over from here; a task brings the newest one. They are kept beyond the end of the block, since the
    script may die in a later one.
    """

    def __init__(self, path: Path | None, *, fresh: bool = True) -> None:
        """Find the results that an earlier process has kept.

        Args:
            path: File in which they are kept; None if this site runs alone.
            fresh: Whether such a file belongs to another run.

        Raises:
            StoreError: The file cannot be read or written.
        """
        self._number = 0
        self._newest: tuple[int, Result] | None = None
        self._file = None if path is None else _ResultsFile(path, fresh=fresh)

    def next_number(self) -> int:
        """Return the number of the next call, from 1."""
        self._number += 1
        return self._number

    def learn(self, task: Task) -> None:
        """Take and keep the result that a task brings.

        Args:
            task: The task. Its arrays are copied.

        Raises:
            ProtocolError: The server sends no such result.
            StoreError: The disk is full or failed.
        """
        if task.version < 1:
            return
        parts = {name: np.copy(array) for found in (task.arrays, task.extras) for name, array in found.items()}
        self._newest = task.version, _parsed(parts, f"task of round {task.round}")
        if self._file is not None and task.version not in self._file:
            self._file.append(task.version, parts)

    def knows(self, number: int) -> bool:
        """Return whether the result of a call is there.

        Args:
            number: Number of the call.
        """
        newest = self._newest is not None and self._newest[0] == number
        return newest or (self._file is not None and number in self._file)

    def result(self, number: int) -> Result:
        """Return the result of a call.

        Args:
            number: Number of the call; `knows(number)` is true.

        Raises:
            StoreError: The file cannot be read.
        """
        if self._newest is not None and self._newest[0] == number:
            return self._newest[1]
        assert self._file is not None
        return _parsed(self._file.read(number), f"call {number}, as this site has kept it")

    def close(self) -> None:
        """Close the file in which results are kept. No call is possible any more."""
        if self._file is not None:
            self._file.close()


class _ResultsFile:
    """Results one after the other in a file. What a death has cut off at its end is dropped."""

    def __init__(self, path: Path, *, fresh: bool) -> None:
        self._path = path
        self._starts: dict[int, int] = {}
        self._end = 0
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file: BinaryIO = open(path, "w+b" if fresh or not path.exists() else "r+b", buffering=0)  # noqa: SIM115
            while (head := self._head(self._end)) is not None and self._is_whole(self._end, head):
                self._starts[head[0]] = self._end
                self._end += _HEAD.size + sum(head[2:])
            self._file.truncate(self._end)
        except OSError as error:
            raise disk_error(error, path) from error

    def __contains__(self, number: int) -> bool:
        return number in self._starts

    def append(self, number: int, parts: Arrays) -> None:
        if self._end > _MOST_BYTES:
            return
        data = [
            parts[name].astype(dtype, copy=False).tobytes() if name in parts else b"" for name, dtype in _PARTS.items()
        ]
        body = b"".join(data)
        record = _HEAD.pack(number, xxhash.xxh3_64_intdigest(body), *map(len, data)) + body
        try:
            self._file.seek(self._end)
            written = 0
            while written < len(record):
                written += self._file.write(record[written:])
        except OSError as error:
            raise disk_error(error, self._path) from error
        self._starts[number] = self._end
        self._end += len(record)

    def read(self, number: int) -> Arrays:
        start = self._starts[number]
        head = self._head(start)
        assert head is not None
        parts: dict[str, Array] = {}
        offset = start + _HEAD.size
        for (name, dtype), size in zip(_PARTS.items(), head[2:], strict=True):
            parts[name] = np.frombuffer(self._bytes(offset, size), dtype)
            offset += size
        return parts

    def close(self) -> None:
        self._file.close()

    def _head(self, start: int) -> tuple[int, ...] | None:
        data = self._bytes(start, _HEAD.size)
        return _HEAD.unpack(data) if len(data) == _HEAD.size else None

    def _is_whole(self, start: int, head: tuple[int, ...]) -> bool:
        size = sum(head[2:])
        body = self._bytes(start + _HEAD.size, size) if size <= _MOST_BYTES else b""
        return len(body) == size and xxhash.xxh3_64_intdigest(body) == head[1]

    def _bytes(self, start: int, size: int) -> bytes:
        try:
            self._file.seek(start)
            return self._file.read(size)
        except OSError as error:
            raise disk_error(error, self._path) from error


def _parsed(parts: Arrays, where: str) -> Result:
    """Read a result, which the server has sent."""
    try:
        call, values = Call.from_array(parts[CALL]), parts[VALUES]
        texts = read_texts(parts[TEXTS]) if call.kind == "union" else []
        sites = read_texts(parts[SITES])
        if values.shape != (call.size,) or values.dtype != np.float64 or not np.isfinite(values).all():
            raise ProtocolError("the total does not fit the call")
    except (KeyError, ProtocolError) as error:
        raise ProtocolError(
            f"the server sends a total that cannot be read: {error}",
            where=where,
            fix="use the same version of fl-adapters at the server and at every site",
        ) from None
    return Result(call, values, tuple(texts), tuple(sites))
