"""The journal of a run: a database from which a killed server continues where it stopped.

An entry is written after the blobs it names are in place, and before any site is told. Commits are synced to the device
only with the job's durability "power". Otherwise the journal survives the death of processes, not of machines.

Format, schema version 1 (TEXT columns other than names hold JSON). The default store keeps it in SQLite, in WAL mode.
The statements are those that SQLite and PostgreSQL have in common.

    meta      key, value: schema_version; written_by (the version of fl-adapters that began the run); job (the run's
              settings); rounds and terms (result of the handshake); left (names of sites that left); resting (those of
              them whose scripts may train again); lost (names of sites whose connection was lost for too long);
              refusals (site that was excluded -> its error); repeats ([round, number of failed tries, number of those
              for which sites were to blame]); suspected (site -> rounds for whose failures it was to blame); buffer
              ([[site, round], ...]); ended ("null", or the error); over ("true" once the job has ended with this
              run); restored (when the backup was made that this journal was restored from, in seconds since the
              epoch); files (see store/journal_parts/files.py)
    layout    layout (16 bytes, see wire/manifest.py), manifest (protobuf fl.v1.Manifest)
    site      name, attempt (number of the site's newest process), registration
    model     version (round whose result it is), blob (file name), layout, digests (8 bytes per tensor)
    round     round, participants, opened_at (seconds since the epoch), result (NULL while the round is open)
    update_   round, site, digest (16 bytes), blob, layout, header. After the header's JSON stand a newline and
              the xxh3-64 of the row as hexadecimal digits, because SQLite has no check sums. Older rows lack them.
    score     version, site, metrics, num_examples: a site's evaluation of a model
    kept      version, blob, layout: the strategy's own state beside the newest model (server optimizer moments)
    message   round, stage, step, site, body: answers to the steps of a secure sum (see store/journal_parts/messages.py)
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any

from fl_runtime.errors import ConfigError, FederationError
from fl_runtime.store.database import Database
from fl_runtime.store.journal_entries import ModelEntry, StrategyStateEntry, UpdateEntry, row_check
from fl_runtime.store.journal_parts.failures import FailureRecord
from fl_runtime.store.journal_parts.files import FilesJournal
from fl_runtime.store.journal_parts.messages import TABLE, MessageJournal
from fl_runtime.store.journal_reader import JournalReader
from fl_runtime.store.sqlite import SqliteDatabase
from fl_runtime.types import RunSettings, Terms
from fl_runtime.version import VERSION, check_format, later_data
from fl_runtime.wire.manifest import Manifest

SCHEMA_VERSION = 1
RESTORED = "restored"
"""Key in `meta` that is set when the journal comes from a backup."""

_SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE layout (layout BLOB PRIMARY KEY, manifest BLOB NOT NULL);
CREATE TABLE site (name TEXT PRIMARY KEY, attempt INTEGER NOT NULL, registration TEXT);
CREATE TABLE model (version INTEGER PRIMARY KEY, blob TEXT NOT NULL, layout BLOB NOT NULL, digests BLOB NOT NULL);
CREATE TABLE round (round INTEGER PRIMARY KEY, participants TEXT NOT NULL, opened_at REAL NOT NULL, result TEXT);
CREATE TABLE update_ (round INTEGER, site TEXT, digest BLOB NOT NULL, blob TEXT NOT NULL, layout BLOB NOT NULL,
    header TEXT NOT NULL, PRIMARY KEY (round, site));
CREATE TABLE score (version INTEGER, site TEXT, metrics TEXT NOT NULL, num_examples INTEGER NOT NULL,
    PRIMARY KEY (version, site));
"""

# The first journals of this schema version lack this table, and that of messages.
_KEPT = "CREATE TABLE IF NOT EXISTS kept (version INTEGER PRIMARY KEY, blob TEXT NOT NULL, layout BLOB NOT NULL)"


_DEFAULTS = json.loads(
    json.dumps(
        {f.name: f.default for f in fields(RunSettings) if f.default is not MISSING}
        | {f.name: f.default_factory() for f in fields(RunSettings) if f.default_factory is not MISSING}
    )
)
"""Values of the settings that journals of earlier versions lack."""


class Journal:
    """The journal of one run. It is not thread-safe: callers hold the run's lock.

    Methods named for an event (`joined`, `accepted`, `committed`) record that event. Every method raises StoreError if
    the database fails.

    Args:
        database: Where the entries are; the journal's tables are made if it has none. `close` closes it.

    Attributes:
        where: Names the database in messages.
        reader: Reads what the journal holds.
        files: Records the small files that sites have sent beside the final model.
        failures: Failed tries, and the sites that were to blame for them.
        messages: Records the answers of sites to the steps of a round.

    Raises:
        NewerFormatError: If a later version wrote it.
        StoreError: If the database is damaged, or cannot be written.
    """

    def __init__(self, database: Database) -> None:
        self.where = database.where
        self._db = database
        self.reader, self.files = JournalReader(self._db), FilesJournal(self._db)
        self.failures, self.messages = FailureRecord(self._db), MessageJournal(self._db)
        with self._db.transaction():
            if not self._db.has_table("meta"):
                for statement in _SCHEMA.split(";"):
                    self._db.run(statement)
                self._db.put("schema_version", str(SCHEMA_VERSION))
                self._db.put("written_by", VERSION)
            self._check_version()
            self._db.run(_KEPT)
            self._db.run(TABLE)

    @classmethod
    def in_file(cls, path: Path, *, durable: bool = False) -> Journal:
        """Open a journal in an SQLite file.

        Args:
            path: The file; created, with its folder, if missing.
            durable: Whether every commit waits until it is on the device.

        Returns:
            The journal.

        Raises:
            NewerFormatError: If a later version wrote it.
            StoreError: If the file is damaged, or cannot be written.
        """
        return cls(SqliteDatabase(path, durable=durable))

    def _check_version(self) -> None:
        """Refuse a journal of a later version, before anything in it is changed."""
        text, written_by = self._db.get("schema_version"), self._db.get("written_by")
        version: object = int(text) if text and text.isdigit() else text or 0
        check_format(version, SCHEMA_VERSION, "the journal", where=self.where, version=written_by)

    def begin(self, settings: RunSettings) -> None:
        """Record the job's settings, or compare them with those on record.

        Args:
            settings: The settings with which the server was started.

        Raises:
            NewerFormatError: If a later version began the run, with settings that this one does not know.
            ConfigError: If the journal belongs to another job, or to this job with other settings.
        """
        text = json.dumps(asdict(settings), sort_keys=True)
        recorded = self._db.get("job")
        if recorded is None:
            with self._db.transaction():
                self._db.put("job", text)
                self._db.put("over", "false")
            return
        before = json.loads(recorded)
        if unknown := sorted(set(before) - set(json.loads(text))):
            raise later_data(f"the run has the settings {', '.join(unknown)}", self.where, self._db.get("written_by"))
        if {**_DEFAULTS, **before} != json.loads(text):
            name = before["name"]
            raise ConfigError(
                f"this folder holds another run ({name!r}, or the same one with other settings)",
                where=self.where,
                fix="use a new name for the job, or start it with the settings it began with",
            )

    def close(self) -> None:
        self._db.close()

    @property
    def restored(self) -> bool:
        """Whether the journal was restored from a backup, so that sites may be ahead of it."""
        return self._db.get(RESTORED) is not None

    def joined(self, site: str, attempt: int) -> None:
        self._db.run("INSERT INTO site VALUES (?, ?, NULL) ON CONFLICT (name) DO UPDATE SET attempt=excluded.attempt",
                  site, attempt)  # fmt: skip

    def left(self, site: str, left: bool, *, stays: bool = False, refusal: FederationError | None = None) -> None:
        """Record whether a site has left: a restarted server does not wait for sites that have.

        Args:
            site: Name of the site.
            left: Whether it has left.
            stays: Whether its script goes on and may begin another training.
            refusal: The error with which it was excluded; None if it left by itself.
        """
        gone, resting = self.reader.who_left(), self.reader.who_rests()
        if left == (site in gone) and stays == (site in resting) and gone.get(site) == refusal:
            return
        errors = {name: error for name, error in {**gone, site: refusal}.items() if error is not None}
        with self._db.transaction():
            self._db.put("refusals", json.dumps({name: error.to_wire() for name, error in errors.items()}))
            self._db.put("left", json.dumps(_with(list(gone), site, wanted=left)))
            self._db.put("resting", json.dumps(_with(resting, site, wanted=stays)))

    def lost(self, site: str, lost: bool) -> None:
        """Record whether a site's connection has been lost for too long: a restarted server does not wait again.

        Args:
            site: Name of the site.
            lost: Whether it has.
        """
        names = self.reader.who_is_lost()
        if lost != (site in names):
            with self._db.transaction():
                self._db.put("lost", json.dumps(_with(names, site, wanted=lost)))

    def registered(self, site: str, registration: Mapping[str, Any] | None) -> None:
        """Record a site's part of the handshake, as JSON values; None if it no longer counts."""
        self._db.run("UPDATE site SET registration=? WHERE name=?", json.dumps(registration), site)

    def agreed(self, rounds: int, terms: Terms = Terms()) -> None:  # noqa: B008 (frozen)
        """Record the result of the handshake. A later call with fewer rounds ends the run early."""
        with self._db.transaction():
            self._db.put("rounds", str(rounds))
            self._db.put("terms", json.dumps(asdict(terms)))

    def layout(self, manifest: Manifest) -> None:
        """Record a manifest, so that entries can name it by its layout."""
        message = manifest.to_proto().SerializeToString(deterministic=True)
        self._db.run("INSERT INTO layout VALUES (?, ?) ON CONFLICT (layout) DO NOTHING", manifest.layout, message)

    def round_opened(self, round: int, participants: tuple[str, ...], at: float) -> None:
        """Record an open round, its sites, and the time in seconds since the epoch."""
        replaced = "participants=excluded.participants, opened_at=excluded.opened_at, result=NULL"
        self._db.run(
            f"INSERT INTO round VALUES (?, ?, ?, NULL) ON CONFLICT (round) DO UPDATE SET {replaced}",
            round,
            json.dumps(participants),
            at,
        )

    def round_dropped(self, round: int, again: int, suspects: Sequence[str] = ()) -> None:
        """Delete an open round and its updates.

        Args:
            round: Its number.
            again: Number of times it has failed; 0 if it will not be opened again.
            suspects: Sites that were to blame for its failure.
        """
        with self._db.transaction():
            self._db.run("DELETE FROM round WHERE round=?", round)
            self._db.run("DELETE FROM update_ WHERE round=?", round)
            self.failures.round_failed(round, again, suspects)

    def accepted(self, entry: UpdateEntry) -> None:
        """Record a site's newest update and delete its earlier one.

        The entry outlives its round: a site that sends the update again is answered and not counted twice.
        """
        with self._db.transaction():
            self._db.run("DELETE FROM update_ WHERE site=?", entry.site)
            self._insert_update(entry)

    def buffered(self, entry: UpdateEntry) -> None:
        """Record an update of a buffered run (FedBuff) and put it into the buffer."""
        with self._db.transaction():
            self._insert_update(entry)
            self._db.put("buffer", json.dumps([*json.loads(self._db.get("buffer") or "[]"), (entry.site, entry.round)]))

    def committed(
        self,
        model: ModelEntry,
        round: int,
        result: Mapping[str, Any],
        strategy_state: StrategyStateEntry | None = None,
        *,
        buffered: Sequence[tuple[str, int]] | None = None,
    ) -> None:
        """Record a closed round and the global model that it made, in one transaction.

        Args:
            model: The new global model.
            round: The round that made it; 0 for the initial model.
            result: JSON values about the round.
            strategy_state: The strategy's own state beside the model, if it has any.
            buffered: In a buffered run, the (site, round) of each update that is still in the buffer.
        """
        with self._db.transaction():
            self._db.run(
                "INSERT INTO model VALUES (?, ?, ?, ?)", model.version, model.blob, model.layout, model.digests
            )
            self._db.run("UPDATE round SET result=? WHERE round=?", json.dumps(result), round)
            if buffered is not None:  # of the others, keep each site's newest update
                self._db.put("buffer", json.dumps(buffered))
                newer = "SELECT 1 FROM update_ AS u WHERE u.site = update_.site AND u.round > update_.round"
                for site, number in self._db.rows(f"SELECT site, round FROM update_ WHERE EXISTS ({newer})"):
                    if (site, number) not in buffered:
                        self._db.run("DELETE FROM update_ WHERE site=? AND round=?", site, number)
            self._db.run("DELETE FROM kept")
            if strategy_state is not None:
                self._db.run(
                    "INSERT INTO kept VALUES (?, ?, ?)", model.version, strategy_state.blob, strategy_state.layout
                )

    def forget_model(self, version: int) -> None:
        """Delete the entry of a model that is neither the newest nor the best."""
        self._db.run("DELETE FROM model WHERE version=?", version)

    def scored(self, version: int, site: str, metrics: Mapping[str, Any], num_examples: int) -> None:
        """Record a site's evaluation of a model."""
        replaced = "metrics=excluded.metrics, num_examples=excluded.num_examples"
        self._db.run(
            f"INSERT INTO score VALUES (?, ?, ?, ?) ON CONFLICT (version, site) DO UPDATE SET {replaced}",
            version,
            site,
            json.dumps(metrics),
            num_examples,
        )

    def ended(self, error: FederationError | None) -> None:
        """Record the end of the run, and the error if it failed."""
        with self._db.transaction():
            self._db.put("ended", json.dumps(error.to_wire() if error else None))

    def resumed(self) -> None:
        """Record that a run that had failed goes on, with all of its sites."""
        with self._db.transaction():
            for key in ("left", "lost", "resting"):
                self._db.put(key, "[]")
            self._db.put("refusals", "{}")
            self.failures.forget()

    def over(self) -> None:
        """Record that the run was the last of its job, and that every site's script has ended."""
        with self._db.transaction():
            self._db.put("over", "true")

    def _insert_update(self, entry: UpdateEntry) -> None:
        header = json.dumps(entry.header)
        row = (entry.round, entry.site, entry.digest, entry.blob, entry.layout)
        self._db.run("INSERT INTO update_ VALUES (?, ?, ?, ?, ?, ?)", *row, f"{header}\n{row_check(row, header)}")


def _with(names: list[str], name: str, *, wanted: bool) -> list[str]:
    """Return the names with or without `name`, in their order."""
    others = [other for other in names if other != name]
    return [*others, name] if wanted else others
