"""The lease of a federation: of several servers with one database, the one that holds it serves."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import psycopg

from fl_runtime.errors import ConfigError, StoreError
from fl_runtime.store.postgres import SCHEMA, connect, mapped_errors, name_of
from fl_runtime.version import VERSION, check_format

log = logging.getLogger(__name__)

LEASE_S = 5.0
"""How long a lease lasts after it was renewed, in seconds of the database's clock."""

_RENEW_S, _LOOK_S = 1.0, 0.5
_FORMAT = 1
_TABLES = f"""
SELECT pg_advisory_xact_lock(7305811);
CREATE SCHEMA IF NOT EXISTS {SCHEMA};
CREATE TABLE IF NOT EXISTS {SCHEMA}.lease (one BOOLEAN PRIMARY KEY DEFAULT true CHECK (one), epoch BIGINT NOT NULL,
    holder TEXT NOT NULL, until TIMESTAMPTZ NOT NULL);
INSERT INTO {SCHEMA}.lease VALUES (true, 0, '', '-infinity') ON CONFLICT DO NOTHING;
CREATE TABLE IF NOT EXISTS {SCHEMA}.meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
INSERT INTO {SCHEMA}.meta VALUES ('format', '{_FORMAT}'), ('version', '{VERSION}') ON CONFLICT DO NOTHING;
CREATE TABLE IF NOT EXISTS {SCHEMA}.run (folder TEXT PRIMARY KEY, number BIGSERIAL);
CREATE TABLE IF NOT EXISTS {SCHEMA}.record (path TEXT PRIMARY KEY, content BYTEA NOT NULL);
CREATE TABLE IF NOT EXISTS {SCHEMA}.event (number BIGSERIAL PRIMARY KEY, folder TEXT NOT NULL, line TEXT NOT NULL);
"""


class Lease:
    """The right to serve a federation, held by one server at a time and renewed by a thread of its own.

    The database's clock alone decides when a lease ends. Each holder has a higher epoch than the one before.

    Args:
        url: The database; see `fl_runtime.store.postgres.connect`.
        federation: Name of the federation.
        holder: Who takes the lease, for people to read.

    Raises:
        StoreError: The database fails.
        NewerFormatError: A later version made the tables.
        ConfigError: The database belongs to another federation.
    """

    def __init__(self, url: str, federation: str, holder: str) -> None:
        self.url, self._holder, self._where = url, holder, name_of(url)
        self._epoch = 0
        self._lost = threading.Event()
        self._closed = threading.Event()
        self._until = 0.0  # by this machine's monotonic clock, never later than by the database's
        self._reason = ""
        self._thread: threading.Thread | None = None
        self._connection = self._prepared(federation)

    @property
    def epoch(self) -> int:
        """Number of the lease, from 1; 0 before this server has held one."""
        return self._epoch

    @property
    def held(self) -> bool:
        """Whether this server may serve at this moment."""
        return self._epoch > 0 and not self._lost.is_set() and time.monotonic() < self._until

    @property
    def reason(self) -> str:
        """Why the lease was lost, for people to read."""
        return self._reason or "the lease was not renewed in time"

    def acquire(self, wait: Callable[[float], bool]) -> bool:
        """Wait until no other server holds the lease, and take it.

        Args:
            wait: Waits for so many seconds, and returns True to give up.

        Returns:
            True once this server holds it; False if `wait` has given up.

        Raises:
            StoreError: The database fails.
        """
        take = (
            f"UPDATE {SCHEMA}.lease SET epoch = epoch + 1, holder = %s, until = clock_timestamp() + %s * interval '1 s'"
            " WHERE until < clock_timestamp() RETURNING epoch"
        )
        while True:
            began = time.monotonic()
            row = self._ask(take, self._holder, LEASE_S)
            if row is not None:
                self._epoch, self._until = int(row[0]), began + LEASE_S
                self._thread = threading.Thread(target=self._renew, name="fl-lease", daemon=True)
                self._thread.start()
                return True
            if wait(_LOOK_S):
                return False

    def holder(self) -> str:
        """Return who has taken the lease last. Raises StoreError if the database fails."""
        row = self._ask(f"SELECT holder FROM {SCHEMA}.lease")
        return str(row[0]) if row else ""

    def give_up(self, reason: str) -> None:
        """Let the server stop, for example because it does not know any more what is in the database.

        Args:
            reason: Why, for people to read.
        """
        self._reason = self._reason or reason
        self._lost.set()

    def close(self) -> None:
        """Hand the lease back if it is held, so that another server need not wait for its end."""
        self._closed.set()
        if self._thread is not None:
            self._thread.join()
        try:
            self._ask(f"UPDATE {SCHEMA}.lease SET until = '-infinity' WHERE epoch = %s RETURNING epoch", self._epoch)
        except StoreError as error:
            log.warning("the lease could not be handed back: %s", error)
        self._connection.close()

    def _renew(self) -> None:
        """Renew the lease while it is held. After a failure it is tried again until the lease has ended."""
        renew = (
            f"UPDATE {SCHEMA}.lease SET until = clock_timestamp() + %s * interval '1 s' WHERE epoch = %s"
            " RETURNING epoch"
        )
        while not self._closed.wait(_RENEW_S) and not self._lost.is_set():
            began = time.monotonic()
            try:
                renewed = self._ask(renew, LEASE_S, self._epoch) is not None
            except StoreError as error:
                if time.monotonic() >= self._until:
                    self.give_up(error.what)
                continue
            if not renewed:
                self.give_up(f"another server has taken over: lease {self._epoch} has ended")
            else:
                self._until = began + LEASE_S

    def _ask(self, statement: str, *values: Any) -> tuple[Any, ...] | None:
        """Execute one statement; connects again if the connection was lost."""
        with mapped_errors(self._where):
            if self._connection.closed or self._connection.broken:
                self._connection = connect(self.url)
            row: tuple[Any, ...] | None = self._connection.execute(statement, values or None).fetchone()
            return row

    def _prepared(self, federation: str) -> psycopg.Connection[Any]:
        """Connect, and make the tables if there are none."""
        connection = connect(self.url)
        with mapped_errors(self._where):
            with connection.transaction():
                connection.execute(_TABLES)
                insert = f"INSERT INTO {SCHEMA}.meta VALUES ('federation', %s) ON CONFLICT DO NOTHING"
                connection.execute(insert, (federation,))
                meta = dict(connection.execute(f"SELECT key, value FROM {SCHEMA}.meta").fetchall())
                number = int(meta["format"]) if meta["format"].isdigit() else meta["format"]
                check_format(number, _FORMAT, "the database", where=self._where, version=meta.get("version"))
        if meta["federation"] != federation:
            raise ConfigError(
                f"this database holds the jobs of the federation {meta['federation']}, not of {federation}",
                where=self._where,
                fix="give each federation a database of its own",
            )
        return connection
