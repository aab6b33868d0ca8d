"""Lock on a run's folder: two servers that write the same journal and blobs would damage both."""

from __future__ import annotations

import os
from pathlib import Path

from fl_runtime.errors import StoreError
from fl_runtime.store.tensorfile import disk_error

_FILE = "lock"


class FolderLock:
    """Exclusive lock on a folder, held from construction until `close` or the death of the process.

    On systems without POSIX file locks (Windows) it does nothing.

    Args:
        folder: The folder to lock; created if missing.

    Raises:
        StoreError: If another process holds the lock, or the folder cannot be written.
    """

    def __init__(self, folder: Path) -> None:
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
                "another server is running this job", where=str(folder), fix="wait until it has ended, or stop it"
            ) from None
        except OSError as error:
            self.close()
            raise disk_error(error, folder / _FILE) from error

    def close(self) -> None:
        """Release the lock; further calls do nothing."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)
