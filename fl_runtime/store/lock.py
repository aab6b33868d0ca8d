"""Lock on a folder: two servers that write the same journal and blobs would damage both."""

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
        busy: What is wrong if another process holds the lock. The number of that process is added.

    Raises:
        StoreError: If another process holds the lock, or the folder cannot be written.
    """

    def __init__(self, folder: Path, busy: str = "another server is running this job") -> None:
        self._descriptor = -1
        try:
            import fcntl
        except ImportError:
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(folder / _FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, str(os.getpid()).encode(), 0)
        except BlockingIOError:
            self.close()
            owner = lock_owner(folder)
            raise StoreError(
                f"{busy}{f' (process {owner})' if owner else ''}",
                where=str(folder),
                fix="wait until it has ended, or stop it",
            ) from None
        except OSError as error:
            self.close()
            raise disk_error(error, folder / _FILE) from error

    @property
    def descriptors(self) -> tuple[int, ...]:
        """The open file of the lock. A child process that inherits it holds the lock too, until it ends."""
        return (self._descriptor,) if self._descriptor >= 0 else ()

    def close(self) -> None:
        """Release the lock; further calls do nothing."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


def is_locked(folder: Path) -> bool | None:
    """Return whether a process holds the lock of a folder; None on systems without POSIX file locks.

    A lock that cannot be looked at counts as held.

    Args:
        folder: The folder, as the process names it.
    """
    try:
        import fcntl
    except ImportError:
        return None
    try:
        descriptor = os.open(folder / _FILE, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:  # nobody has ever locked it
        return False
    except OSError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def lock_owner(folder: Path) -> int | None:
    """Return the number of the process that last locked a folder, or None if it is not known."""
    try:
        return int((folder / _FILE).read_text("ascii"))
    except (OSError, ValueError):
        return None
