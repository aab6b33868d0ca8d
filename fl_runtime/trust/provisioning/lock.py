"""The lock of an authority's folder: commands and the dashboard change it one after the other."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fl_runtime.errors import StoreError
from fl_runtime.trust.files import open_lock, unwritable

_LOCK = ".lock"
_LOOK_S = 0.05
_WAIT_S = 10.0


@contextmanager
def changing(authority_folder: Path, *, create: bool = False) -> Iterator[None]:
    """Keep other processes and threads from changing an authority's folder during this block. Does not nest.

    Read the authority within the block: what was read before may have changed. The death of the process ends the lock.

    Args:
        authority_folder: The authority's folder. If it is missing, there is nothing to lock.
        create: Whether to make the folder, and that of the kits around it, if they are missing.

    Raises:
        StoreError: If another process does not finish in time, or the folder cannot be written.
    """
    if not create and not authority_folder.is_dir():
        yield  # whoever reads the authority says that there is none
        return
    try:
        authority_folder.parent.mkdir(parents=True, exist_ok=True, mode=0o755)
        authority_folder.mkdir(exist_ok=True, mode=0o700)
    except OSError as error:
        raise unwritable(authority_folder, error) from None
    descriptor = open_lock(authority_folder / _LOCK)
    try:
        if os.name == "posix":  # other systems: only one process may change it
            _wait(descriptor, authority_folder)
        yield
    finally:
        os.close(descriptor)


def _wait(descriptor: int, folder: Path) -> None:
    import fcntl

    end = time.monotonic() + _WAIT_S
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= end:
                owner = os.pread(descriptor, 20, 0).decode("ascii", "replace")
                raise StoreError(
                    f"another command is changing this authority{f' (process {owner})' if owner else ''}",
                    where=str(folder),
                    fix="wait until it has ended, or stop it",
                ) from None
            time.sleep(_LOOK_S)
        else:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, str(os.getpid()).encode(), 0)
            return
