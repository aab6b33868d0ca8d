"""Blobs: payloads on disk, mapped into memory, so that the server's memory does not grow with sites.

A blob file is preallocated (a full disk is met then, not as a bus error in the mapping) and recycled with its
mapping: a reused mapping takes bytes about twenty times faster than a fresh file does. The process may be killed
at any moment: what was written to a mapping is in the page cache and survives it.
"""

from __future__ import annotations

import mmap
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fl_runtime.errors import StoreError
from fl_runtime.store.tensorfile import disk_error, header_of, sync
from fl_runtime.types import Array, Arrays
from fl_runtime.wire.manifest import Manifest

_SUFFIX = ".safetensors"
_FREE_LAYOUTS = 4


@dataclass
class Blob:
    """One file of tensors. `buffer` is the payload, uint8, `manifest.nbytes` long, shared with the file."""

    name: str
    manifest: Manifest
    buffer: Array

    def views(self) -> tuple[Arrays, Arrays]:
        return self.manifest.views(self.buffer)


class Blobs:
    """The blobs of one folder, by name. Not thread-safe: callers hold the run's lock for create, rename, free and
    close.

    durable: `settle` waits for the disk.
    """

    def __init__(self, folder: Path, *, durable: bool = False) -> None:
        self.folder, self._durable = folder, durable
        self._free: dict[bytes, list[Blob]] = {}  # by layout, the one freed last at the end
        self.closed = False
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise disk_error(error, folder) from error

    def create(self, name: str, manifest: Manifest) -> Blob:
        """A blob to be filled; its contents are undefined. StoreError when the disk is full."""
        path = self._path(name)
        if self._free.get(manifest.layout):
            blob = self._free[manifest.layout].pop()
            self.rename(blob, name)
            return blob
        header = header_of(manifest)
        size = len(header) + manifest.nbytes
        try:
            with open(path, "w+b") as file:
                file.write(header)
                file.flush()
                _preallocate(file.fileno(), size)
                return Blob(name, manifest, _mapped(file.fileno(), len(header)))
        except OSError as error:
            path.unlink(missing_ok=True)
            raise disk_error(error, path) from error

    def open(self, name: str, manifest: Manifest) -> Blob:
        """A blob that is there already. StoreError if it is missing or not as long as its manifest says."""
        path, header = self._path(name), header_of(manifest)
        try:
            with open(path, "r+b") as file:
                if os.fstat(file.fileno()).st_size != len(header) + manifest.nbytes:
                    raise StoreError("a blob does not have the size that the journal says", where=str(path))
                return Blob(name, manifest, _mapped(file.fileno(), len(header)))
        except OSError as error:
            raise StoreError(f"a blob cannot be read: {error.strerror}", where=str(path)) from error

    def path(self, blob: Blob) -> Path:
        """Its file; the payload is at the end of it."""
        return self._path(blob.name)

    def rename(self, blob: Blob, name: str) -> None:
        try:
            os.replace(self._path(blob.name), self._path(name))
        except OSError as error:
            raise disk_error(error, self._path(name)) from error
        blob.name = name

    def settle(self, blob: Blob) -> None:
        """The blob is whole and has its name: what is said of it from now on must hold. Where that includes the death
        of the machine, this returns when its bytes and its name are on the device."""
        if self._durable:
            sync(self._path(blob.name))
            sync(self.folder)

    def free(self, blob: Blob) -> None:
        """The blob's file and mapping may be used again; nobody may hold views of it any more."""
        if self.closed:
            return
        self.rename(blob, f"free-{id(blob):x}")
        layout = blob.manifest.layout
        free = self._free.pop(layout, [])
        free.append(blob)
        self._free[layout] = free
        while len(self._free) > _FREE_LAYOUTS:  # a layout that does not come back must not hold the disk
            for old in self._free.pop(next(iter(self._free))):
                with suppress(OSError):  # what is mapped cannot be deleted everywhere
                    self._path(old.name).unlink(missing_ok=True)

    def close(self) -> None:
        """From now on `free` leaves every file alone: the folder may be another server's by then, or gone."""
        self.closed = True

    def sweep(self, keep: set[str]) -> None:
        """Delete every file that is not in `keep`: what a killed server left behind."""
        for path in self.folder.glob(f"*{_SUFFIX}"):
            if path.name.removesuffix(_SUFFIX) not in keep:
                path.unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}{_SUFFIX}"


def _mapped(descriptor: int, header_bytes: int) -> Array:
    return np.frombuffer(mmap.mmap(descriptor, 0), np.uint8)[header_bytes:]


def _preallocate(descriptor: int, size: int) -> None:
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
        return
    os.lseek(descriptor, 0, os.SEEK_END)  # macOS and Windows have no such call: write the zeros
    left = size - os.lseek(descriptor, 0, os.SEEK_CUR)
    zeros = bytes(2**20)
    while left > 0:
        left -= os.write(descriptor, zeros[: min(left, len(zeros))])
