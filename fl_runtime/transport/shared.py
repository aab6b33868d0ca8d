"""Payloads in files that the server and a site on the same machine both map into memory: tensors cross no socket.

Calls, headers and digests are those of every transport; where frames would follow, a header names a file instead.
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import numpy as np

from fl_runtime.errors import ConnectionLostError, ProtocolError
from fl_runtime.types import Array

_MOST = 8


class SharedFolder:
    """A site's view of the server's files. Not thread-safe.

    Mappings are kept and found again whatever a file is called then, since filling a fresh one costs several times as
    much. A file that is mapped here keeps its number, so that no other file can be mistaken for it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._mapped: dict[tuple[int, int], Array] = {}

    def payload(self, name: str, nbytes: int) -> Array:
        """The last `nbytes` bytes of a file, uint8, shared with the server. ConnectionLostError if it is not there."""
        if Path(name).name != name:
            raise ProtocolError(f"{name!r} is no file of the shared folder")
        try:
            with open(self._folder / name, "r+b") as file:
                found = os.fstat(file.fileno())
                if found.st_size < max(nbytes, 1):
                    raise ProtocolError(f"the shared file {name} has {found.st_size} bytes, not {nbytes} or more")
                key = (found.st_dev, found.st_ino)
                whole = self._mapped.pop(key, None)
                if whole is None:
                    whole = np.frombuffer(mmap.mmap(file.fileno(), 0), np.uint8)
        except OSError as error:
            raise ConnectionLostError(
                f"a shared file cannot be opened: {error.strerror}", where=str(self._folder / name)
            ) from None
        self._mapped[key] = whole
        while len(self._mapped) > _MOST:
            del self._mapped[next(iter(self._mapped))]
        return whole[len(whole) - nbytes :]
