"""The journal of a run: an SQLite database from which a killed server continues where it stopped.

An entry is written after the blobs it names are in place, and before any site is told. Commits are synced to the device
only with the job's durability "power". Otherwise the journal survives the death of processes, not of machines.

Format, schema version 1 (SQLite in WAL mode; TEXT columns other than names hold JSON):

    meta      key, value: schema_version; job (the run's settings); rounds and terms (result of the handshake);
              left (names of sites that left); repeats ([round, number of failed tries]); buffer ([[site, round], ...]);
              ended ("null", or the error)
    layout    layout (16 bytes, see wire/manifest.py), manifest (protobuf fl.v1.Manifest)
    site      name, attempt (number of the site's newest process), registration
    model     version (round whose result it is), blob (file name), layout, digests (8 bytes per tensor)
    round     round, participants, opened_at (seconds since the epoch), result (NULL while the round is open)
    update_   round, site, digest (16 bytes), blob, layout, header. After the header's JSON stand a newline and
              the xxh3-64 of the row as hexadecimal digits, because SQLite has no check sums. Older rows lack them.
    score     version, site, metrics, num_examples: a site's evaluation of a model
    kept      version, blob, layout: the strategy's own state beside the newest model (server optimizer moments)
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

import xxhash

from fl_runtime.errors import ConfigError, FederationError, StoreError
from fl_runtime.types import RunSettings, Terms
from fl_runtime.wire.fl.v1 import federation_pb2 as pb
from fl_runtime.wire.manifest import Manifest

SCHEMA_VERSION = 1

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

# The first journals of this schema version lack this table.
_KEPT = "CREATE TABLE IF NOT EXISTS kept (version INTEGER PRIMARY KEY, blob TEXT NOT NULL, layout BLOB NOT NULL)"


_DEFAULTS = json.loads(json.dumps({f.name: f.default for f in fields(RunSettings) if f.default is not MISSING}))
"""Values of the settings that journals of earlier versions lack."""

RESTORE = "restore the file from a copy, or start the job again under another name"


@dataclass(frozen=True)
class ModelEntry:
    """A committed global model.

    Attributes:
        version: The round whose result it is; 0 for the initial model.
        blob: Name of the blob with its tensors.
        layout: Layout of its manifest, 16 bytes.
        digests: xxh3-64 of each tensor, in manifest order.
    """

    version: int
    blob: str
    layout: bytes
    digests: bytes


@dataclass(frozen=True)
class KeptEntry:
    """The strategy's own state beside the newest model, such as a server optimizer's moments.

    Attributes:
        blob: Name of the blob with its tensors.
        layout: Layout of its manifest, 16 bytes.
    """

    blob: str
    layout: bytes


@dataclass(frozen=True)
class UpdateEntry:
    """An accepted update.

    Attributes:
        round: The round it was accepted for; in a buffered run, the site's own round.
        site: Name of the site.
        digest: Identifier of layout and contents, 16 bytes.
        blob: Name of the blob with its tensors.
        layout: Layout of its manifest, 16 bytes.
        header: The other fields of the update as JSON values.
    """

    round: int
    site: str
    digest: bytes
    blob: str
    layout: bytes
    header: Mapping[str, Any]


@dataclass(frozen=True)
class RoundEntry:
    """A round that was opened.

    Attributes:
        round: Its number.
        participants: Names of the sites that take part.
        opened_at: Time of opening, in seconds since the epoch.
        result: JSON values recorded when it closed; None while it is open.
    """

    round: int
    participants: tuple[str, ...]
    opened_at: float
    result: Mapping[str, Any] | None


class Journal:
    """The journal of one run. It is not thread-safe: callers hold the run's lock.

    Methods named for an event (`joined`, `accepted`, `committed`) record that event. Every method raises StoreError if
    the database fails.

    Args:
        path: The database file; created, with its folder, if missing.
        durable: Whether every commit waits until it is on the device.

    Attributes:
        path: The database file.

    Raises:
        StoreError: If the file is damaged, cannot be written, or has a newer schema version.
    """

    def __init__(self, path: Path, *, durable: bool = False) -> None:
        self.path = path
        with self._mapped_errors():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA cache_size=-256")  # KiB; the journal is appended to and hardly ever read
            self._db.execute(f"PRAGMA synchronous={'FULL' if durable else 'OFF'}")
            self._check()
            with self._transaction():
                if not self._db.execute("SELECT 1 FROM sqlite_master WHERE name='meta'").fetchone():
                    for statement in _SCHEMA.split(";"):
                        self._db.execute(statement)
                    self._put("schema_version", str(SCHEMA_VERSION))
                self._db.execute(_KEPT)
        found = int(self._get("schema_version") or 0)
        if found != SCHEMA_VERSION:
            raise StoreError(
                f"the journal has schema version {found}; this version of fl-adapters reads {SCHEMA_VERSION}",
                where=str(path),
                fix="continue the run with the version that started it, or upgrade fl-adapters",
            )

    def begin(self, settings: RunSettings) -> None:
        """Record the job's settings, or compare them with those on record.

        Args:
            settings: The settings with which the server was started.

        Raises:
            ConfigError: If the journal belongs to another job, or to this job with other settings.
        """
        mine = json.dumps(asdict(settings), sort_keys=True)
        recorded = self._get("job")
        if recorded is None:
            with self._mapped_errors(), self._transaction():
                self._put("job", mine)
        elif {**_DEFAULTS, **json.loads(recorded)} != json.loads(mine):
            name = json.loads(recorded)["name"]
            raise ConfigError(
                f"this folder holds another run ({name!r}, or the same one with other settings)",
                where=str(self.path),
                fix="use a new name for the job, or start it with the settings it began with",
            )

    def close(self) -> None:
        """Close the database."""
        self._db.close()

    # -- writing ---------------------------------------------------------------------------------------------

    def joined(self, site: str, attempt: int) -> None:
        self._run("INSERT INTO site VALUES (?, ?, NULL) ON CONFLICT (name) DO UPDATE SET attempt=excluded.attempt",
                  site, attempt)  # fmt: skip

    def left(self, site: str, left: bool) -> None:
        """Record whether a site has left: a restarted server does not wait for sites that have."""
        before = self.who_left()
        if left == (site in before):
            return
        now = [*before, site] if left else [other for other in before if other != site]
        with self._mapped_errors(), self._transaction():
            self._put("left", json.dumps(now))

    def who_left(self) -> list[str]:
        """Return the names of the sites that have left and not come back."""
        sites: list[str] = json.loads(self._get("left") or "[]")
        return sites

    def registered(self, site: str, registration: Mapping[str, Any]) -> None:
        """Record a site's part of the handshake, as JSON values."""
        self._run("UPDATE site SET registration=? WHERE name=?", json.dumps(registration), site)

    def agreed(self, rounds: int, terms: Terms = Terms()) -> None:  # noqa: B008 (frozen)
        """Record the result of the handshake. A later call with fewer rounds ends the run early."""
        with self._mapped_errors(), self._transaction():
            self._put("rounds", str(rounds))
            self._put("terms", json.dumps(asdict(terms)))

    def layout(self, manifest: Manifest) -> None:
        """Record a manifest, so that entries can name it by its layout."""
        message = manifest.to_proto().SerializeToString(deterministic=True)
        self._run("INSERT OR IGNORE INTO layout VALUES (?, ?)", manifest.layout, message)

    def round_opened(self, round: int, participants: tuple[str, ...], at: float) -> None:
        """Record an open round, its sites, and the time in seconds since the epoch."""
        self._run("INSERT OR REPLACE INTO round VALUES (?, ?, ?, NULL)", round, json.dumps(participants), at)

    def round_dropped(self, round: int, again: int) -> None:
        """Delete an open round and its updates.

        Args:
            round: Its number.
            again: Number of times it has failed; 0 if it will not be opened again.
        """
        with self._mapped_errors(), self._transaction():
            self._db.execute("DELETE FROM round WHERE round=?", (round,))
            self._db.execute("DELETE FROM update_ WHERE round=?", (round,))
            self._put("repeats", json.dumps([round, again]))

    def repeats(self, round: int) -> int:
        """Return the number of times this round has failed."""
        value = json.loads(self._get("repeats") or "[0, 0]")
        return int(value[1]) if value[0] == round else 0

    def accepted(self, entry: UpdateEntry) -> None:
        """Record a site's newest update and delete its earlier one.

        The entry outlives its round: a site that sends the update again is answered and not counted twice.
        """
        with self._mapped_errors(), self._transaction():
            self._db.execute("DELETE FROM update_ WHERE site=?", (entry.site,))
            self._insert_update(entry)

    def buffered(self, entry: UpdateEntry) -> None:
        """Record an update of a buffered run (FedBuff) and put it into the buffer."""
        with self._mapped_errors(), self._transaction():
            self._insert_update(entry)
            self._put("buffer", json.dumps([*json.loads(self._get("buffer") or "[]"), (entry.site, entry.round)]))

    def committed(
        self,
        model: ModelEntry,
        round: int,
        result: Mapping[str, Any],
        kept: KeptEntry | None = None,
        *,
        buffered: Sequence[tuple[str, int]] | None = None,
    ) -> None:
        """Record a closed round and the global model that it made, in one transaction.

        Args:
            model: The new global model.
            round: The round that made it; 0 for the initial model.
            result: JSON values about the round.
            kept: The strategy's own state beside the model, if it has any.
            buffered: In a buffered run, the (site, round) of each update that is still in the buffer.
        """
        with self._mapped_errors(), self._transaction():
            self._db.execute("INSERT INTO model VALUES (?, ?, ?, ?)",
                             (model.version, model.blob, model.layout, model.digests))  # fmt: skip
            self._db.execute("UPDATE round SET result=? WHERE round=?", (json.dumps(result), round))
            if buffered is not None:  # of the others, keep each site's newest update
                self._put("buffer", json.dumps(buffered))
                newer = "SELECT 1 FROM update_ AS u WHERE u.site = update_.site AND u.round > update_.round"
                for site, number in self._db.execute(
                    f"SELECT site, round FROM update_ WHERE EXISTS ({newer})"
                ).fetchall():
                    if (site, number) not in buffered:
                        self._db.execute("DELETE FROM update_ WHERE site=? AND round=?", (site, number))
            self._db.execute("DELETE FROM kept")
            if kept is not None:
                self._db.execute("INSERT INTO kept VALUES (?, ?, ?)", (model.version, kept.blob, kept.layout))

    def forget_model(self, version: int) -> None:
        """Delete the entry of a model that is neither the newest nor the best."""
        self._run("DELETE FROM model WHERE version=?", version)

    def scored(self, version: int, site: str, metrics: Mapping[str, Any], num_examples: int) -> None:
        """Record a site's evaluation of a model."""
        self._run("INSERT OR REPLACE INTO score VALUES (?, ?, ?, ?)", version, site, json.dumps(metrics), num_examples)

    def ended(self, error: FederationError | None) -> None:
        """Record the end of the run, and the error if it failed."""
        with self._mapped_errors(), self._transaction():
            self._put("ended", json.dumps(error.to_wire() if error else None))

    # -- reading ---------------------------------------------------------------------------------------------

    def finished(self) -> bool:
        """Whether the run has ended without an error."""
        return self._get("ended") == "null"

    def rounds(self) -> int | None:
        """Return the number of rounds that the handshake agreed on, or None before it."""
        value = self._get("rounds")
        return int(value) if value else None

    def terms(self) -> Terms:
        """Return the terms that the sites' scripts agreed on; defaults before the handshake and in older journals."""
        value = self._get("terms")
        return Terms(**json.loads(value)) if value else Terms()

    def sites(self) -> Iterator[tuple[str, int, dict[str, Any] | None]]:
        """Yield (name, attempt, registration) of every site that has ever joined."""
        for name, attempt, registration in self._all("SELECT name, attempt, registration FROM site"):
            yield name, attempt, json.loads(registration) if registration else None

    def manifest(self, layout: bytes) -> Manifest:
        """Return the manifest that was recorded under a layout.

        Raises:
            StoreError: If there is none, or it is damaged.
        """
        rows = self._all("SELECT manifest FROM layout WHERE layout=?", layout)
        if not rows:
            raise StoreError(
                f"the journal is damaged: it has no manifest for layout {layout.hex()}",
                where=str(self.path),
                fix=RESTORE,
            )
        manifest = Manifest.from_proto(pb.Manifest.FromString(rows[0][0]))
        if manifest.layout != layout:
            raise self._damaged("a layout")
        return manifest

    def manifests(self) -> list[Manifest]:
        """Return every manifest on record."""
        return [Manifest.from_proto(pb.Manifest.FromString(row[0])) for row in self._all("SELECT manifest FROM layout")]

    def models(self) -> list[ModelEntry]:
        """Return the models on record, in the order of their versions."""
        return [ModelEntry(*row) for row in self._all("SELECT * FROM model ORDER BY version")]

    def kept(self) -> KeptEntry | None:
        """Return the strategy's own state beside the newest model, or None."""
        rows = self._all("SELECT blob, layout FROM kept")
        return KeptEntry(*rows[0]) if rows else None

    def round_entries(self) -> list[RoundEntry]:
        """Return all rounds on record, in order."""
        rows = self._all("SELECT round, participants, opened_at, result FROM round ORDER BY round")
        return [RoundEntry(r, tuple(json.loads(p)), at, json.loads(x) if x else None) for r, p, at, x in rows]

    def updates(self, round: int) -> list[UpdateEntry]:
        """Return the accepted updates of a round.

        Raises:
            StoreError: If an entry's check sum is wrong.
        """
        rows = self._all("SELECT round, site, digest, blob, layout, header FROM update_ WHERE round=?", round)
        return [self._update_of(row) for row in rows]

    def buffer(self) -> list[UpdateEntry]:
        """Return the updates in the buffer of a buffered run, in the order of arrival."""
        rows = {(entry.site, entry.round): entry for entry in self.last_updates()}
        return [rows[site, number] for site, number in json.loads(self._get("buffer") or "[]")]

    def last_updates(self) -> list[UpdateEntry]:
        """Return the newest update of every site, and in a buffered run those in the buffer."""
        rows = self._all("SELECT round, site, digest, blob, layout, header FROM update_")
        return [self._update_of(row) for row in rows]

    def last_used(self) -> dict[str, int]:
        """Return, for each site, the last round whose task it answered with an accepted update."""
        rows = self._all("SELECT site, header FROM update_ ORDER BY round")
        return {site: json.loads(header.split("\n")[0])["round"] for site, header in rows}

    def scores(self) -> Iterator[tuple[int, str, dict[str, Any], int]]:
        """Yield (version, site, metrics, number of examples) of every evaluation."""
        for version, site, metrics, n in self._all("SELECT version, site, metrics, num_examples FROM score"):
            yield version, site, json.loads(metrics), n

    # -- rows and transactions -------------------------------------------------------------------------------

    def _insert_update(self, entry: UpdateEntry) -> None:
        header = json.dumps(entry.header)
        row = (entry.round, entry.site, entry.digest, entry.blob, entry.layout)
        self._db.execute("INSERT INTO update_ VALUES (?, ?, ?, ?, ?, ?)", (*row, f"{header}\n{_check_of(row, header)}"))

    def _update_of(self, row: tuple[Any, ...]) -> UpdateEntry:
        """Return the entry of a row after comparing its check sum, which rows of older journals lack."""
        round, site, digest, blob, layout, text = row
        header, _, check = text.partition("\n")
        if check and check != _check_of((round, site, digest, blob, layout), header):
            raise self._damaged("an update's entry")
        return UpdateEntry(round, site, digest, blob, layout, json.loads(header))

    def _damaged(self, what: str) -> StoreError:
        return StoreError(
            f"the journal is damaged: {what} differs from what was written", where=str(self.path), fix=RESTORE
        )

    def _get(self, key: str) -> str | None:
        rows = self._all("SELECT value FROM meta WHERE key=?", key)
        return rows[0][0] if rows else None

    def _put(self, key: str, value: str) -> None:
        self._db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, value))

    def _run(self, statement: str, *values: Any) -> None:
        with self._mapped_errors():
            self._db.execute(statement, values)

    def _all(self, statement: str, *values: Any) -> list[Any]:
        with self._mapped_errors():
            return self._db.execute(statement, values).fetchall()

    def _check(self) -> None:
        """Raise for damaged pages now, rather than in the middle of the run."""
        verdict = self._db.execute("PRAGMA quick_check(1)").fetchone()[0]
        if verdict != "ok":
            raise sqlite3.DatabaseError(f"it is damaged: {verdict}")

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            with suppress(sqlite3.Error):  # on a full disk, SQLite may have rolled back already
                self._db.execute("ROLLBACK")
            raise

    @contextmanager
    def _mapped_errors(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise StoreError(
                f"the journal cannot be read or written: {error}",
                where=str(self.path),
                fix="free disk space, or check that the file is writable and not damaged",
            ) from error


def _check_of(row: tuple[Any, ...], header: str) -> str:
    return xxhash.xxh3_64_hexdigest(repr((row, header)).encode())
