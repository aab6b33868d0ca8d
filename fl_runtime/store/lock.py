"""One server at a time for a run's folder: two that write the same journal and blobs would ruin both."""

from __future__ import annotations

import os
from pathlib import Path

from fl_runtime.errors import StoreError
from fl_runtime.store.tensorfile import disk_error

_FILE = "lock"


class FolderLock:
    """Held from the moment it is made until `close`, or the death of the process. Where there is no POSIX it holds
    nobody up."""

    def __init__(self, folder: Path) -> None:
        """StoreError if somebody else has it."""
        self._descriptor = -1
        try:
            import fcntl
        except ImportError:
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(folder / _FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise StoreError(
                "another server has this run", where=str(folder), fix="wait until it has ended, or stop it"
            ) from None
        except OSError as error:
            self.close()
            raise disk_error(error, folder / _FILE) from error

    def close(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)
