"""Journals in PostgreSQL: a schema for each run, and no write of a server whose lease has passed to another."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Protocol

import psycopg

from fl_runtime.errors import StoreError
from fl_runtime.store.database import Database

SCHEMA = "fl_adapters"
"""Schema of the tables that all runs share."""

_ANSWER_MS = 5000  # a statement, or a connection, that hears nothing for so long has failed
_IDLE_MS = 3000  # so long a machine that stands still within a transaction may keep another one's statements waiting
_TYPES = {"INTEGER": "BIGINT", "REAL": "DOUBLE PRECISION", "BLOB": "BYTEA"}
_REACH = {
    "connect_timeout": 3,
    "keepalives_idle": 2,
    "keepalives_interval": 1,
    "keepalives_count": 3,
    "tcp_user_timeout": _ANSWER_MS,
}


class Fence(Protocol):
    """Tells writes of the server that holds the lease from those of an earlier one."""

    @property
    def epoch(self) -> int:
        """Number of the lease; every holder has a higher one."""
        ...

    def give_up(self, reason: str) -> None:
        """Let the server stop: it does not know any more what is in the database."""
        ...


def connect(url: str) -> psycopg.Connection[Any]:
    """Connect to a database, with every statement a transaction of its own.

    Args:
        url: "postgresql://user@host/database", or another text that libpq understands.

    Returns:
        The connection, which several threads may use.

    Raises:
        StoreError: The database does not answer, or refuses the connection.
    """
    with mapped_errors(name_of(url)):
        connection = psycopg.connect(url, autocommit=True, **_REACH)  # type: ignore[arg-type]
        connection.execute(f"SET statement_timeout = {_ANSWER_MS}")
        connection.execute(f"SET idle_in_transaction_session_timeout = {_IDLE_MS}")
        return connection


def name_of(url: str) -> str:
    """Return the text of a URL without its password, for messages."""
    without = re.sub(r"(://[^:/@]*):[^@]*@", r"\1@", url)
    return re.sub(r"(password=)('[^']*'|\S+)", r"\1...", without)


@contextmanager
def mapped_errors(where: str) -> Iterator[None]:
    """Report errors of PostgreSQL within the block as StoreErrors.

    Args:
        where: Names the database in the message.
    """
    try:
        yield
    except psycopg.Error as error:
        failure = StoreError(
            f"the database cannot be read or written: {str(error).strip() or type(error).__name__}",
            where=where,
            fix="check that PostgreSQL runs, and that this machine can reach it",
        )
        failure.away = isinstance(error, (psycopg.OperationalError, psycopg.InterfaceError))
        raise failure from error


class PostgresDatabase(Database):
    """A `Database` in a schema of PostgreSQL. Threads may share it.

    Every transaction that writes first locks the row of the lease and compares its epoch. A server that takes the lease
    over changes that row, and so waits for the transactions under way. None of an earlier epoch can follow.

    Args:
        url: The database; see `connect`.
        schema: The schema, which exists.
        fence: The server's lease.
        durable: Whether a commit waits until it is on the device of the database.

    Raises:
        StoreError: The database fails. Every method raises it.
    """

    def __init__(self, url: str, schema: str, fence: Fence, *, durable: bool = True) -> None:
        self._name, self._schema, self._fence = f"{name_of(url)}, schema {schema}", schema, fence
        self._lock = threading.RLock()
        self._within = False
        self._connection = connect(url)
        with mapped_errors(self._name):
            self._connection.execute(f"SET search_path = {schema}")
            if not durable:
                self._connection.execute("SET synchronous_commit = off")

    @property
    def where(self) -> str:
        """Names the database in messages."""
        return self._name

    def rows(self, statement: str, *values: Any) -> list[Any]:
        """Return all rows of a query."""
        with self._lock, mapped_errors(self._name):
            return self._connection.execute(_translated(statement), values).fetchall()

    def run(self, statement: str, *values: Any) -> None:
        """Execute a statement, in a transaction of its own outside a `transaction` block."""
        with self._lock:
            if not self._within:
                with self.transaction():
                    self.run(statement, *values)
            elif statement.strip():
                with mapped_errors(self._name):
                    self._connection.execute(_translated(statement), values)

    def has_table(self, name: str) -> bool:
        """Return whether the database has a table of this name."""
        query = "SELECT 1 FROM information_schema.tables WHERE table_schema=? AND table_name=?"
        return bool(self.rows(query, self._schema, name))

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Commit all statements of the block together, or none of them if it raises or the lease is another's."""
        with self._lock:
            self._begin()
            self._within = True
            try:
                yield
                with mapped_errors(self._name):
                    self._connection.execute("COMMIT")
            except BaseException as error:
                if isinstance(error, StoreError):
                    self._fence.give_up(error.what)  # perhaps it was committed, and only the answer was lost
                with suppress(psycopg.Error):
                    self._connection.execute("ROLLBACK")
                raise
            finally:
                self._within = False

    def close(self) -> None:
        """Close the connection; every later call raises StoreError."""
        self._connection.close()

    def _begin(self) -> None:
        try:
            with mapped_errors(self._name):
                self._connection.execute("BEGIN")
                query = f"SELECT 1 FROM {SCHEMA}.lease WHERE epoch = %s FOR SHARE"
                held = self._connection.execute(query, (self._fence.epoch,)).fetchone()
            if held is None:
                lost = StoreError(
                    f"another server has taken over: lease {self._fence.epoch} has ended",
                    where=self._name,
                    fix="nothing is lost; this server waits until it is needed again",
                )
                lost.away = True
                raise lost
        except StoreError as error:
            self._fence.give_up(error.what)
            with suppress(psycopg.Error):
                self._connection.execute("ROLLBACK")
            raise


def _translated(statement: str) -> str:
    """Put a statement into PostgreSQL's terms: its types, and its sign for values."""
    if statement.lstrip().startswith("CREATE"):
        return re.sub(r"\b(INTEGER|REAL|BLOB)\b", lambda found: _TYPES[found[0]], statement)
    return statement.replace("?", "%s")
