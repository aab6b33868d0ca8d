"""Several files of a folder that change together: a process that is killed leaves all of them old, or all new.

What is to be written goes into one file first, in one step. If that file is there, whoever reads the folder next
writes what is in it.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from fl_runtime.errors import ConfigError
from fl_runtime.trust.files import open_lock, read_file, write_file

_Result = TypeVar("_Result")
_PENDING = ".replacing.json"
_LOCK = ".replacing.lock"


def replace_together(folder: Path, files: Mapping[str, bytes | None], *, secret: Collection[str] = ()) -> None:
    """Write files of a folder so that they change together. Hold `locked` while calling it.

    Args:
        folder: The folder.
        files: Path of each file within the folder -> its contents; None deletes it. Written in this order.
        secret: Those that only the owner may read.

    Raises:
        StoreError: If a file cannot be written. Nothing has changed then, or the rest is written later.
    """
    coded = {name: None if data is None else base64.b64encode(data).decode() for name, data in files.items()}
    pending = json.dumps({"files": coded, "secret": sorted(secret)}).encode()
    write_file(folder / _PENDING, pending, secret=True)
    _apply(folder)


def settle(folder: Path) -> None:
    """Finish what a killed process began to write with `replace_together`; otherwise do nothing.

    Args:
        folder: The folder.

    Raises:
        StoreError: If a file cannot be written.
    """
    if (folder / _PENDING).exists():
        with locked(folder):
            pass


def read_settled(folder: Path, read: Callable[[], _Result]) -> _Result:
    """Read files that change together, as they are before or after such a change.

    Args:
        folder: The folder.
        read: Reads the files. It is called again if it raises ConfigError while another process replaces them.

    Returns:
        What `read` returns.

    Raises:
        ConfigError: If `read` raises it and nobody replaces files.
    """
    while True:
        settle(folder)
        before = _stamp(folder)
        try:
            return read()
        except ConfigError:
            if before == _stamp(folder):
                raise


def _stamp(folder: Path) -> object:
    """What changes at the beginning and at the end of every replacement."""
    try:
        status = (folder / _LOCK).stat()
    except OSError:
        return None
    return status.st_size, (folder / _PENDING).exists()


def _apply(folder: Path) -> None:
    path = folder / _PENDING
    if not path.exists():  # another process was faster
        return
    pending = json.loads(read_file(path, "list of files to be replaced"))
    with open(folder / _LOCK, "ab") as lock:
        lock.write(b".")  # one more replacement, for those who are just reading
    for name, data in pending["files"].items():
        if data is None:
            (folder / name).unlink(missing_ok=True)
        else:
            write_file(folder / name, base64.b64decode(data), secret=name in pending["secret"])
    path.unlink()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes from changing a folder with `replace_together` during this block. Does not nest.

    What a killed process began to replace is finished first.

    Args:
        folder: The folder.

    Raises:
        StoreError: If the folder cannot be written.
    """
    descriptor = open_lock(folder / _LOCK)
    try:
        if os.name == "posix":  # other systems: only one process may change it
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX)
        _apply(folder)  # what a killed process has left
        yield
    finally:
        os.close(descriptor)
