"""Journals in SQLite: a file for each run, on this machine."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fl_runtime.errors import StoreError
from fl_runtime.store.database import Database


class SqliteDatabase(Database):
    """A `Database` in an SQLite file, which reports every error as a StoreError. It is not thread-safe.

    Args:
        path: The database file; created, with its folder, if missing.
        durable: Whether every commit waits until it is on the device.

    Attributes:
        where: Path of the database file.

    Raises:
        StoreError: If the file is damaged or cannot be written. Every method raises it when the database fails.
    """

    def __init__(self, path: Path, *, durable: bool = False) -> None:
        self._where = str(path)
        with self._mapped_errors():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._connection = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
            self._connection.execute("PRAGMA journal_mode=WAL")
            self._connection.execute("PRAGMA cache_size=-256")  # KiB; it is appended to and hardly ever read
            self._connection.execute(f"PRAGMA synchronous={'FULL' if durable else 'OFF'}")
            self._check()

    @property
    def where(self) -> str:
        """Names the database in messages."""
        return self._where

    def rows(self, statement: str, *values: Any) -> list[Any]:
        """Return all rows of a query."""
        with self._mapped_errors():
            return self._connection.execute(statement, values).fetchall()

    def run(self, statement: str, *values: Any) -> None:
        """Execute a statement, in a transaction of its own outside a `transaction` block."""
        with self._mapped_errors():
            self._connection.execute(statement, values)

    def has_table(self, name: str) -> bool:
        """Return whether the database has a table of this name."""
        return bool(self.rows("SELECT 1 FROM sqlite_master WHERE name=?", name))

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Commit all statements of the block together, or none of them if it raises."""
        self.run("BEGIN IMMEDIATE")
        try:
            yield
            self.run("COMMIT")
        except BaseException:
            with suppress(sqlite3.Error):  # on a full disk, SQLite may have rolled back already
                self._connection.execute("ROLLBACK")
            raise

    def close(self) -> None:
        """Close the file; every later call raises StoreError."""
        self._connection.close()

    def _check(self) -> None:
        """Raise for damaged pages now, rather than in the middle of the run."""
        verdict = self._connection.execute("PRAGMA quick_check(1)").fetchone()[0]
        if verdict != "ok":
            raise sqlite3.DatabaseError(f"it is damaged: {verdict}")

    @contextmanager
    def _mapped_errors(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise StoreError(
                f"the journal cannot be read or written: {error}",
                where=self.where,
                fix="free disk space, or check that the file is writable and not damaged",
            ) from error
