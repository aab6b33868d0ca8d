"""Shared payload files: a site on the server's machine maps them into memory, so tensors cross no socket.

Calls, headers and digests are the same as over any transport. Only the frames are missing: the header names a file in
the shared folder, and the payload is the end of that file.
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import numpy as np

from fl_runtime.errors import ConnectionLostError, ProtocolError
from fl_runtime.types import Array

_MAX_MAPPINGS = 8


class SharedFolder:
    """A site's access to the server's payload files. It is not thread-safe.

    It caches mappings by inode, because a fresh mapping is several times slower to fill and the server renames files.
    An inode cannot be reused while its file is mapped.

    Args:
        folder: The folder that the server named in its reply to `Join`.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._mapped: dict[tuple[int, int], Array] = {}

    def payload(self, name: str, nbytes: int) -> Array:
        """Map the payload of a file.

        Args:
            name: File name as the server's header gives it.
            nbytes: Size of the payload, which is the end of the file.

        Returns:
            The payload, uint8, `nbytes` long. It is shared with the server: writing to it writes to the file. The
            server's protocol says until when the site may use it.

        Raises:
            ProtocolError: If `name` is not a plain file name, or the file is shorter than the payload.
            ConnectionLostError: If the file cannot be opened.
        """
        if Path(name).name != name:
            raise ProtocolError(f"{name!r} is not a file name in the shared folder")
        try:
            with open(self._folder / name, "r+b") as file:
                status = os.fstat(file.fileno())
                if status.st_size < max(nbytes, 1):
                    raise ProtocolError(
                        f"the shared file {name} has {status.st_size} bytes; at least {nbytes} were expected"
                    )
                key = (status.st_dev, status.st_ino)
                mapping = self._mapped.pop(key, None)
                if mapping is None:
                    mapping = np.frombuffer(mmap.mmap(file.fileno(), 0), np.uint8)
        except OSError as error:
            raise ConnectionLostError(
                f"a shared file cannot be opened: {error.strerror}", where=str(self._folder / name)
            ) from None
        self._mapped[key] = mapping
        while len(self._mapped) > _MAX_MAPPINGS:
            del self._mapped[next(iter(self._mapped))]
        return mapping[len(mapping) - nbytes :]
