"""Stores: where a server keeps the journals and the tensors of its runs."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from fl_runtime.store.blobs import Blobs
from fl_runtime.store.journal import Journal

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
            StoreError: The store fails, or the journal is damaged or has a newer schema version.
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
