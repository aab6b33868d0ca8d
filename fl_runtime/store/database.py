"""The contract of a database that a journal is kept in."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Protocol


class Database(Protocol):
    """A database with a table `meta` of keys and values, once its user has made that. It is not thread-safe.

    Statements are of the SQL that SQLite and PostgreSQL have in common, with "?" for values, and with the types of
    SQLite: INTEGER, REAL, TEXT, BLOB. Every method raises StoreError if the database fails.
    """

    @property
    def where(self) -> str:
        """Names the database in messages."""
        ...

    def rows(self, statement: str, *values: Any) -> list[Any]:
        """Return all rows of a query."""
        ...

    def run(self, statement: str, *values: Any) -> None:
        """Execute a statement, in a transaction of its own outside a `transaction` block."""
        ...

    def has_table(self, name: str) -> bool:
        """Return whether the database has a table of this name."""
        ...

    def get(self, key: str) -> str | None:
        """Return the value of a key in `meta`, or None."""
        rows = self.rows("SELECT value FROM meta WHERE key=?", key)
        return rows[0][0] if rows else None

    def put(self, key: str, value: str) -> None:
        """Set the value of a key in `meta`."""
        self.run("INSERT INTO meta VALUES (?, ?) ON CONFLICT (key) DO UPDATE SET value=excluded.value", key, value)

    def transaction(self) -> AbstractContextManager[None]:
        """Commit all statements of the block together, or none of them if it raises."""
        ...

    def close(self) -> None:
        """Close the connection; every later call raises StoreError."""
        ...
