"""Copies of tensor files at a place that several servers share: a folder, or an S3-like service, through fsspec."""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import fsspec

from fl_runtime.errors import StoreError
from fl_runtime.store.lease import Lease
from fl_runtime.store.tensorfile import sync

log = logging.getLogger(__name__)

_STAMP = re.compile(r"\.(\d+)-\d+$")


class SharedPlace:
    """A place that several servers share.

    Args:
        url: A folder, or a URL that fsspec knows, such as "s3://bucket/prefix".

    Raises:
        StoreError: The place cannot be used, or what it needs is not installed. Every method raises it if it fails.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        with self._mapped_errors():
            files, root = fsspec.core.url_to_fs(url)
            self._files: Any = files
            self._root = str(root).rstrip("/")
            files.makedirs(self._root, exist_ok=True)
        self._local = "file" in (files.protocol if isinstance(files.protocol, tuple) else (files.protocol,))

    def put(self, file: Path, path: str, *, durable: bool = False) -> None:
        """Copy a file of this machine to a path of the place. With `durable`, wait until it is on the device."""
        target = f"{self._root}/{path}"
        with self._mapped_errors():
            self._files.makedirs(target.rpartition("/")[0], exist_ok=True)
            self._files.put_file(str(file), target)
            if durable and self._local:  # services keep what they have acknowledged
                sync(Path(target))
                sync(Path(target).parent)

    def get(self, path: str, file: Path) -> None:
        """Copy a file of the place to this machine, replacing one only when it is complete."""
        partial = file.with_name(file.name + ".partial")
        with self._mapped_errors():
            file.parent.mkdir(parents=True, exist_ok=True)
            self._files.get_file(f"{self._root}/{path}", str(partial))
            partial.replace(file)

    def names(self, folder: str) -> list[str]:
        """Return the names of the files in a folder of the place."""
        with self._mapped_errors():
            self._files.invalidate_cache()
            target = f"{self._root}/{folder}"
            if not self._files.exists(target):
                return []
            return [str(path).rpartition("/")[2] for path in self._files.ls(target, detail=False)]

    def delete(self, path: str) -> None:
        """Delete a file, or a folder with all that is in it. What is missing is deleted already."""
        with self._mapped_errors():
            with suppress(FileNotFoundError):
                self._files.rm(f"{self._root}/{path}", recursive=True)

    @contextmanager
    def _mapped_errors(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # each of fsspec's file systems has errors of its own
            raise StoreError(
                f"the shared place of tensors cannot be read or written: {error!r}",
                where=self._url,
                fix="check that it exists, that this machine may write there, and that it has room",
            ) from error


class SharedBlobs:
    """Copies of the blobs of one run; see `fl_runtime.store.blobs.BlobCopies`.

    A blob gets a name that no other server and no later blob of the same run ever uses: an earlier holder of the lease
    that wakes up can replace nothing. Nothing is deleted once the lease is not held.

    Args:
        place: Where the copies are.
        folder: Folder of the run at that place.
        lease: The server's lease.
    """

    def __init__(self, place: SharedPlace, folder: str, lease: Lease) -> None:
        self._place, self._folder, self._lease = place, folder, lease
        self._numbers = itertools.count()
        self._known: set[str] = set()

    def stamped(self, name: str) -> str:
        """Return a name for a blob that is used once."""
        return f"{_STAMP.sub('', name)}.{self._lease.epoch}-{next(self._numbers)}"

    def put(self, name: str, file: Path, *, durable: bool) -> None:
        """Copy a blob's file to the place, before the journal refers to it."""
        self._place.put(file, self._path(name), durable=durable)
        self._known.add(name)

    def get(self, name: str, file: Path) -> None:
        """Copy a blob's file from the place."""
        self._place.get(self._path(name), file)
        self._known.add(name)

    def delete(self, name: str) -> None:
        """Delete the copy of a blob that the journal does not refer to any more; blobs without a copy are passed."""
        if name in self._known and self._lease.held:
            self._known.discard(name)
            self._delete(name)

    def sweep(self, keep: set[str]) -> None:
        """Delete all copies but some. Those of a later holder of the lease stay."""
        if not self._lease.held:
            return
        for file in self._place.names(self._folder):
            stamp = _STAMP.search(file)
            if file not in keep and (stamp is None or int(stamp[1]) <= self._lease.epoch):
                self._delete(file)

    def _delete(self, name: str) -> None:
        try:
            self._place.delete(self._path(name))
        except StoreError as error:  # it only takes room, and the next sweep tries again
            log.warning("%s", error)

    def _path(self, name: str) -> str:
        return f"{self._folder}/{name}"
