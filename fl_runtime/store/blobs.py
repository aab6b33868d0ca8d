"""Blobs: payloads in memory-mapped files, so that the server's memory does not grow with the number of sites.

A blob is a safetensors file (see store/tensorfile.py). Its space is allocated when it is created: a full disk is then
an error at once, not a bus error during a later write. Files are recycled with their mapping, because writing to a
reused mapping is about twenty times faster than writing to a new file. The process may be killed at any moment: bytes
written to a mapping are in the page cache and survive.
"""

from __future__ import annotations

import mmap
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from fl_runtime.errors import StoreError
from fl_runtime.store.tensorfile import disk_error, header_of, sync
from fl_runtime.types import Array, Arrays
from fl_runtime.wire.manifest import Manifest

UPLOAD = "upload-"
"""Prefix of the names of blobs that are being uploaded. They serve the process that creates them alone."""

_FREE = "free-"
_SUFFIX = ".safetensors"
_FREE_LAYOUTS = 4


class BlobCopies(Protocol):
    """Copies of blobs at a place that several servers share; see `fl_runtime.store.copies`."""

    def stamped(self, name: str) -> str:
        """Return a name for a blob that is used once."""
        ...

    def put(self, name: str, file: Path, *, durable: bool) -> None:
        """Copy a blob's file to the place, before the journal refers to it."""
        ...

    def get(self, name: str, file: Path) -> None:
        """Copy a blob's file from the place."""
        ...

    def delete(self, name: str) -> None:
        """Delete the copy of a blob that the journal does not refer to any more; blobs without a copy are passed."""
        ...

    def sweep(self, keep: set[str]) -> None:
        """Delete all copies but some."""
        ...


@dataclass
class Blob:
    """One tensor file that is mapped into memory.

    Attributes:
        name: File name in the folder, without suffix; `Blobs.rename` changes it.
        manifest: The tensors in the file.
        buffer: The payload, uint8, `manifest.nbytes` long. Writing to it writes to the file.
    """

    name: str
    manifest: Manifest
    buffer: Array

    def views(self) -> tuple[Arrays, Arrays]:
        """Return (arrays, extras) as views of the buffer; they are valid until the blob is freed."""
        return self.manifest.views(self.buffer)


class Blobs:
    """The blobs in one folder.

    It is not thread-safe: callers hold the run's lock for `create`, `rename`, `free` and `close`.

    Args:
        folder: Folder of the files; created if missing.
        durable: Whether `settle` waits until data is on the device (the job's durability "power").
        copies: Where blobs are copied to when they are settled, for other servers; None keeps them here alone.

    Attributes:
        folder: Folder of the files.
        closed: Whether `close` has been called.

    Raises:
        StoreError: If the folder cannot be created.
    """

    def __init__(self, folder: Path, *, durable: bool = False, copies: BlobCopies | None = None) -> None:
        self.folder, self._durable, self._copies = folder, durable, copies
        self._free: dict[bytes, list[Blob]] = {}  # by layout, the one freed last at the end
        self.closed = False
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise disk_error(error, folder) from error

    def create(self, name: str, manifest: Manifest) -> Blob:
        """Create a blob, or recycle a freed one of the same layout.

        Args:
            name: Its name; an existing file of that name is replaced. Blobs that are copied get a stamp added to it.
            manifest: The tensors that it will hold.

        Returns:
            A blob with undefined contents.

        Raises:
            StoreError: If the disk is full or cannot be written.
        """
        name = self._stamped(name)
        path = self._path(name)
        while self._free.get(manifest.layout):
            blob = self._free[manifest.layout].pop()
            if _is_backed_up(self._path(blob.name)):
                self.discard(blob)
                continue
            self._move(blob, name)
            return blob
        header = header_of(manifest)
        size = len(header) + manifest.nbytes
        try:
            if _is_backed_up(path):
                path.unlink()
            with open(path, "w+b") as file:
                file.write(header)
                file.flush()
                _preallocate(file.fileno(), size)
                return Blob(name, manifest, _mapped(file.fileno(), len(header)))
        except OSError as error:
            path.unlink(missing_ok=True)
            raise disk_error(error, path) from error

    def open(self, name: str, manifest: Manifest) -> Blob:
        """Open a blob that was written earlier, for example before a restart.

        Args:
            name: Its name.
            manifest: The tensors that the journal says it holds.

        Returns:
            The blob with its contents.

        Raises:
            StoreError: If the file is missing or its size does not match the manifest.
        """
        path, header = self._path(name), header_of(manifest)
        if self._copies is not None:
            self._copies.get(name, path)
        try:
            with open(path, "r+b") as file:
                if os.fstat(file.fileno()).st_size != len(header) + manifest.nbytes:
                    raise StoreError("the size of this file differs from the journal's record of it", where=str(path))
                return Blob(name, manifest, _mapped(file.fileno(), len(header)))
        except OSError as error:
            raise StoreError(f"this file of tensors cannot be read: {error.strerror}", where=str(path)) from error

    def path(self, blob: Blob) -> Path:
        """Return the path of a blob's file; the payload is the end of the file."""
        return self._path(blob.name)

    def rename(self, blob: Blob, name: str) -> None:
        """Rename a blob and its file, replacing a file of that name. Blobs that are copied get a stamp added to it.

        Raises:
            StoreError: If the file cannot be renamed.
        """
        self._move(blob, self._stamped(name))

    def _stamped(self, name: str) -> str:
        return name if self._copies is None else self._copies.stamped(name)

    def _move(self, blob: Blob, name: str) -> None:
        try:
            os.replace(self._path(blob.name), self._path(name))
        except OSError as error:
            raise disk_error(error, self._path(name)) from error
        blob.name = name

    def settle(self, blob: Blob) -> None:
        """Make a blob that is complete and has its final name durable, before the journal refers to it.

        With `durable`, this returns when its bytes and its name are on the device. A blob that is to be copied is
        copied. Otherwise it does nothing.

        Raises:
            StoreError: If the device reports an error.
        """
        if self._durable:
            sync(self._path(blob.name))
            sync(self.folder)
        if self._copies is not None:
            self._copies.put(blob.name, self._path(blob.name), durable=self._durable)

    def free(self, blob: Blob) -> None:
        """Give a blob's file and mapping back for reuse; nobody may use views of it afterwards."""
        if self.closed:
            return
        self._delete_copy(blob)
        self._move(blob, f"{_FREE}{id(blob):x}")
        layout = blob.manifest.layout
        free = self._free.pop(layout, [])
        free.append(blob)
        self._free[layout] = free
        while len(self._free) > _FREE_LAYOUTS:  # layouts that are not used again must not fill the disk
            for old in self._free.pop(next(iter(self._free))):
                with suppress(OSError):  # Windows does not delete mapped files
                    self._path(old.name).unlink(missing_ok=True)

    def discard(self, blob: Blob) -> None:
        """Delete a blob's file; nobody may use views of it afterwards."""
        if not self.closed:
            self._delete_copy(blob)
            with suppress(OSError):  # Windows does not delete mapped files
                self._path(blob.name).unlink(missing_ok=True)

    def _delete_copy(self, blob: Blob) -> None:
        if self._copies is not None:
            self._copies.delete(blob.name)

    def recycles(self, manifest: Manifest) -> bool:
        """Whether `create` would recycle a freed blob, and so take no more of the disk."""
        return bool(self._free.get(manifest.layout))

    def trim(self) -> None:
        """Delete the files that were freed for reuse."""
        for old in [blob for blobs in self._free.values() for blob in blobs]:
            self.discard(old)
        self._free.clear()

    def close(self) -> None:
        """Delete the buffers, and stop recycling.

        `free` does nothing from now on, since the folder may belong to another server or be gone.
        """
        if not self.closed:
            self._free.clear()
            for path in buffers(self.folder):
                with suppress(OSError):  # Windows does not delete mapped files
                    path.unlink()
        self.closed = True

    def forget(self, keep: set[str]) -> None:
        """Delete all files but some, those that were freed for reuse included. Nobody may use the others afterwards.

        Args:
            keep: Names of the blobs to leave alone.
        """
        self._free.clear()
        self.sweep(keep)

    def sweep(self, keep: set[str]) -> None:
        """Delete the files that a killed server left behind.

        Args:
            keep: Names of the blobs to leave alone.
        """
        for path in self.folder.glob(f"*{_SUFFIX}"):
            if path.name.removesuffix(_SUFFIX) not in keep:
                with suppress(PermissionError):  # Windows does not delete mapped files
                    path.unlink(missing_ok=True)
        if self._copies is not None:
            self._copies.sweep(keep)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}{_SUFFIX}"


def tensor_files(folder: Path) -> list[Path]:
    """List the files of the blobs that a journal may name, which are those that are no buffers.

    Args:
        folder: Folder of the blobs; it need not exist.
    """
    return [path for path in sorted(folder.glob(f"*{_SUFFIX}")) if not path.name.startswith((_FREE, UPLOAD))]


def buffers(folder: Path) -> list[Path]:
    """List the files that no journal names: broken uploads, and blobs that were freed for reuse.

    Args:
        folder: Folder of the blobs; it need not exist.
    """
    return [path for path in sorted(folder.glob(f"*{_SUFFIX}")) if path.name.startswith((_FREE, UPLOAD))]


def _is_backed_up(path: Path) -> bool:
    """Whether a backup has linked to a file, whose contents must then stay."""
    try:
        return path.stat().st_nlink > 1
    except OSError:
        return False


def _mapped(descriptor: int, header_bytes: int) -> Array:
    return np.frombuffer(mmap.mmap(descriptor, 0), np.uint8)[header_bytes:]


def _preallocate(descriptor: int, size: int) -> None:
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
        return
    os.lseek(descriptor, 0, os.SEEK_END)  # macOS and Windows lack posix_fallocate: write zeros
    missing = size - os.lseek(descriptor, 0, os.SEEK_CUR)
    zeros = bytes(2**20)
    while missing > 0:
        missing -= os.write(descriptor, zeros[: min(missing, len(zeros))])
