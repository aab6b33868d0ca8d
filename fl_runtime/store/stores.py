"""Stores: where a server keeps the journals and the tensors of its runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from fl_runtime.store.blobs import Blobs
from fl_runtime.store.journal import Journal
from fl_runtime.types import Listener

JOURNAL_FILE, BLOBS_FOLDER = "journal.sqlite", "blobs"


class Store(Protocol):
    """Keeps the journals and the tensors of runs. A run is named by its folder at the server, which it may use."""

    def holds(self, folder: Path) -> bool:
        """Return whether there is a journal of a run.

        Args:
            folder: Folder of the run.

        Raises:
            StoreError: The store fails.
        """
        ...

    def journal(self, folder: Path, *, durable: bool = False) -> Journal:
        """Open the journal of a run, or make it. The caller closes it.

        Args:
            folder: Folder of the run.
            durable: Whether every commit waits until it is on the device.

        Returns:
            The journal.

        Raises:
            NewerFormatError: A later version wrote the journal.
            StoreError: The store fails, or the journal is damaged.
        """
        ...

    def blobs(self, folder: Path, *, durable: bool = False) -> Blobs:
        """Open the tensor files of a run.

        Args:
            folder: Folder of the run.
            durable: Whether a settled file is on the device.

        Returns:
            The files.

        Raises:
            StoreError: The store fails.
        """
        ...

    def recorder(self, folder: Path) -> Listener | None:
        """Make the listener that keeps the events of a training, and write what it has kept into the folder.

        Args:
            folder: Folder of the training.

        Returns:
            The listener; None if its folder keeps them.

        Raises:
            StoreError: The store fails.
        """
        ...


class SharedFiles(Protocol):
    """Copies of a server's own files that another server needs to take over.

    Every method raises StoreError if it fails, or if this server may not write any more.
    """

    def keep(self, file: Path, data: bytes) -> None:
        """Keep the contents of a file, before it is written."""
        ...

    def kept(self, name: str) -> bytes | None:
        """Return what was kept of a file of the kit, by its name; None if nothing was."""
        ...

    def remove(self, file: Path) -> None:
        """Remove what was kept of a file."""
        ...

    def keep_results(self, folder: Path, files: Sequence[str]) -> None:
        """Keep the result files of a job.

        Args:
            folder: Folder of the job.
            files: Their paths in it.
        """
        ...

    def restore_results(self, folder: Path) -> None:
        """Copy the result files of a job into its folder, if they are not there yet."""
        ...

    def forget_tensors(self, folder: Path) -> None:
        """Delete the tensors of a job that has finished. Its models are among its results."""
        ...

    def forget(self, folder: Path) -> None:
        """Delete everything about a job: journals, tensors, files."""
        ...


class Unshared:
    """`SharedFiles` of a server that stands alone: its folder is all there is."""

    def keep(self, file: Path, data: bytes) -> None:
        """Do nothing; see `SharedFiles`."""

    def kept(self, name: str) -> bytes | None:
        """Return None; see `SharedFiles`."""
        return None

    def remove(self, file: Path) -> None:
        """Do nothing; see `SharedFiles`."""

    def keep_results(self, folder: Path, files: Sequence[str]) -> None:
        """Do nothing; see `SharedFiles`."""

    def restore_results(self, folder: Path) -> None:
        """Do nothing; see `SharedFiles`."""

    def forget_tensors(self, folder: Path) -> None:
        """Do nothing; see `SharedFiles`."""

    def forget(self, folder: Path) -> None:
        """Do nothing; see `SharedFiles`."""


class FolderStore:
    """The default store: an SQLite file and a folder of tensor files in the folder of each run."""

    def holds(self, folder: Path) -> bool:
        """Return whether there is a journal of a run; see `Store`."""
        return (folder / JOURNAL_FILE).exists()

    def journal(self, folder: Path, *, durable: bool = False) -> Journal:
        """Open the journal of a run, or make it; see `Store`."""
        return Journal.in_file(folder / JOURNAL_FILE, durable=durable)

    def blobs(self, folder: Path, *, durable: bool = False) -> Blobs:
        """Open the tensor files of a run; see `Store`."""
        return Blobs(folder / BLOBS_FOLDER, durable=durable)

    def recorder(self, folder: Path) -> Listener | None:
        """Return None: the history in the folder is all there is; see `Store`."""
        return None


@dataclass(frozen=True)
class Storage:
    """Where a federation's server keeps everything.

    Attributes:
        runs: Keeps journals and tensors.
        files: Keeps copies of the server's own files.
        shared: Whether another server may take over from here. Nothing that matters may lie in a folder alone.
    """

    runs: Store = field(default_factory=FolderStore)
    files: SharedFiles = field(default_factory=Unshared)
    shared: bool = False
