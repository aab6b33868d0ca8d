"""The journal: what has happened in a run, so that a killed server goes on where it stopped (SQLite, WAL).

An entry is written after the bytes it speaks of are in place and before anyone is told. Commits are synced to the
device only where the job's durability is "power": else the promise is against the death of processes, not of machines.
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

# Came after the first journals of this schema version, which are without it.
_KEPT = "CREATE TABLE IF NOT EXISTS kept (version INTEGER PRIMARY KEY, blob TEXT NOT NULL, layout BLOB NOT NULL)"


_DEFAULTS = json.loads(json.dumps({f.name: f.default for f in fields(RunSettings) if f.default is not MISSING}))
"""For the settings that a journal of an earlier version is without."""

RESTORE = "put the file back from a copy, or begin the job anew under another name"


@dataclass(frozen=True)
class ModelEntry:
    """A committed global model: its version, blob name, layout and per-tensor digests."""

    version: int
    blob: str
    layout: bytes
    digests: bytes


@dataclass(frozen=True)
class KeptEntry:
    """What the strategy keeps at the server beside the newest model."""

    blob: str
    layout: bytes


@dataclass(frozen=True)
class UpdateEntry:
    """An accepted update: where its tensors lie, and its header (JSON values)."""

    round: int
    site: str
    digest: bytes
    blob: str
    layout: bytes
    header: Mapping[str, Any]


@dataclass(frozen=True)
class RoundEntry:
    """A round that was opened; `result` is None while it is not closed."""

    round: int
    participants: tuple[str, ...]
    opened_at: float
    result: Mapping[str, Any] | None


class Journal:
    """One run's journal. Not thread-safe: callers hold the run's lock."""

    def __init__(self, path: Path, *, durable: bool = False) -> None:
        """Open or create. StoreError if the file is damaged, unwritable or of a newer version.

        durable: every commit is on the device before it is believed.
        """
        self.path = path
        with self._mapped_errors():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA cache_size=-256")  # KiB: it is written from end to end, and hardly ever read
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
                fix="continue the run with the version that began it, or upgrade fl-adapters",
            )

    def begin(self, settings: RunSettings) -> None:
        """Record the job; ConfigError if the journal holds another one."""
        mine = json.dumps(asdict(settings), sort_keys=True)
        found = self._get("job")
        if found is None:
            with self._mapped_errors(), self._transaction():
                self._put("job", mine)
        elif {**_DEFAULTS, **json.loads(found)} != json.loads(mine):
            raise ConfigError(
                f"this folder holds another run ({json.loads(found)['name']!r}, or the same one with other settings)",
                where=str(self.path),
                fix="use a new name for the job, or start it with the settings it began with",
            )

    def close(self) -> None:
        self._db.close()

    # -- writing ---------------------------------------------------------------------------------------------

    def joined(self, site: str, attempt: int) -> None:
        self._run("INSERT INTO site VALUES (?, ?, NULL) ON CONFLICT (name) DO UPDATE SET attempt=excluded.attempt",
                  site, attempt)  # fmt: skip

    def left(self, site: str, left: bool) -> None:
        """That a site has left, or is back: a server that is started again does not wait for who has left."""
        before = self.who_left()
        if left == (site in before):
            return
        now = [*before, site] if left else [other for other in before if other != site]
        with self._mapped_errors(), self._transaction():
            self._put("left", json.dumps(now))

    def who_left(self) -> list[str]:
        found: list[str] = json.loads(self._get("left") or "[]")
        return found

    def registered(self, site: str, registration: Mapping[str, Any]) -> None:
        self._run("UPDATE site SET registration=? WHERE name=?", json.dumps(registration), site)

    def agreed(self, rounds: int, terms: Terms = Terms()) -> None:  # noqa: B008 (frozen)
        """What the handshake came to. A later call with fewer rounds ends the run early."""
        with self._mapped_errors(), self._transaction():
            self._put("rounds", str(rounds))
            self._put("terms", json.dumps(asdict(terms)))

    def layout(self, manifest: Manifest) -> None:
        message = manifest.to_proto().SerializeToString(deterministic=True)
        self._run("INSERT OR IGNORE INTO layout VALUES (?, ?)", manifest.layout, message)

    def round_opened(self, round: int, participants: tuple[str, ...], at: float) -> None:
        self._run("INSERT OR REPLACE INTO round VALUES (?, ?, ?, NULL)", round, json.dumps(participants), at)

    def round_dropped(self, round: int, again: int) -> None:
        """An open round is gone. again: how many times it has come to nothing, 0 where it will not be opened again."""
        with self._mapped_errors(), self._transaction():
            self._db.execute("DELETE FROM round WHERE round=?", (round,))
            self._db.execute("DELETE FROM update_ WHERE round=?", (round,))
            self._put("repeats", json.dumps([round, again]))

    def repeats(self, round: int) -> int:
        """How many times this round has come to nothing."""
        value = json.loads(self._get("repeats") or "[0, 0]")
        return int(value[1]) if value[0] == round else 0

    def accepted(self, entry: UpdateEntry) -> None:
        """The site's newest update. It stays on record when its round is closed, so that it counts only once."""
        with self._mapped_errors(), self._transaction():
            self._db.execute("DELETE FROM update_ WHERE site=?", (entry.site,))
            self._insert_update(entry)

    def buffered(self, entry: UpdateEntry) -> None:
        """An update of a run without rounds; `entry.round` is the site's own."""
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
        """A round is closed and its result is the global model: one transaction. Round 0 is the initial model.

        buffered: the (site, its round) that a run without rounds still has in its buffer.
        """
        with self._mapped_errors(), self._transaction():
            self._db.execute("INSERT INTO model VALUES (?, ?, ?, ?)",
                             (model.version, model.blob, model.layout, model.digests))  # fmt: skip
            self._db.execute("UPDATE round SET result=? WHERE round=?", (json.dumps(result), round))
            if buffered is not None:  # of all others, only a site's newest stays on record
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
        self._run("DELETE FROM model WHERE version=?", version)

    def scored(self, version: int, site: str, metrics: Mapping[str, Any], num_examples: int) -> None:
        self._run("INSERT OR REPLACE INTO score VALUES (?, ?, ?, ?)", version, site, json.dumps(metrics), num_examples)

    def ended(self, error: FederationError | None) -> None:
        with self._mapped_errors(), self._transaction():
            self._put("ended", json.dumps(error.to_wire() if error else None))

    # -- reading ---------------------------------------------------------------------------------------------

    def finished(self) -> bool:
        """The run has ended, and without an error."""
        return self._get("ended") == "null"

    def rounds(self) -> int | None:
        value = self._get("rounds")
        return int(value) if value else None

    def terms(self) -> Terms:
        """What the sites' scripts said at the handshake; the defaults before it, and in older journals."""
        value = self._get("terms")
        return Terms(**json.loads(value)) if value else Terms()

    def sites(self) -> Iterator[tuple[str, int, dict[str, Any] | None]]:
        """(name, attempt, registration) of every site that has ever joined."""
        for name, attempt, registration in self._all("SELECT name, attempt, registration FROM site"):
            yield name, attempt, json.loads(registration) if registration else None

    def manifest(self, layout: bytes) -> Manifest:
        rows = self._all("SELECT manifest FROM layout WHERE layout=?", layout)
        if not rows:
            raise StoreError("the journal names a layout that it does not hold", where=str(self.path))
        manifest = Manifest.from_proto(pb.Manifest.FromString(rows[0][0]))
        if manifest.layout != layout:
            raise self._damaged("a layout")
        return manifest

    def manifests(self) -> list[Manifest]:
        """All that the server had seen."""
        return [Manifest.from_proto(pb.Manifest.FromString(row[0])) for row in self._all("SELECT manifest FROM layout")]

    def models(self) -> list[ModelEntry]:
        return [ModelEntry(*row) for row in self._all("SELECT * FROM model ORDER BY version")]

    def kept(self) -> KeptEntry | None:
        """What the strategy has kept beside the newest model."""
        rows = self._all("SELECT blob, layout FROM kept")
        return KeptEntry(*rows[0]) if rows else None

    def round_entries(self) -> list[RoundEntry]:
        rows = self._all("SELECT round, participants, opened_at, result FROM round ORDER BY round")
        return [RoundEntry(r, tuple(json.loads(p)), at, json.loads(x) if x else None) for r, p, at, x in rows]

    def updates(self, round: int) -> list[UpdateEntry]:
        rows = self._all("SELECT round, site, digest, blob, layout, header FROM update_ WHERE round=?", round)
        return [self._update_of(row) for row in rows]

    def buffer(self) -> list[UpdateEntry]:
        """The updates in the buffer of a run without rounds, in the order of arrival."""
        rows = {(entry.site, entry.round): entry for entry in self.last_updates()}
        return [rows[site, number] for site, number in json.loads(self._get("buffer") or "[]")]

    def last_updates(self) -> list[UpdateEntry]:
        """Every site's newest update."""
        rows = self._all("SELECT round, site, digest, blob, layout, header FROM update_")
        return [self._update_of(row) for row in rows]

    def last_used(self) -> dict[str, int]:
        """Site -> the last round whose task it has answered with an update that was accepted."""
        rows = self._all("SELECT site, header FROM update_ ORDER BY round")
        return {site: json.loads(header.split("\n")[0])["round"] for site, header in rows}

    def scores(self) -> Iterator[tuple[int, str, dict[str, Any], int]]:
        for version, site, metrics, n in self._all("SELECT version, site, metrics, num_examples FROM score"):
            yield version, site, json.loads(metrics), n

    # -- plumbing --------------------------------------------------------------------------------------------

    def _insert_update(self, entry: UpdateEntry) -> None:
        header = json.dumps(entry.header)
        row = (entry.round, entry.site, entry.digest, entry.blob, entry.layout)
        self._db.execute("INSERT INTO update_ VALUES (?, ?, ?, ?, ?, ?)", (*row, f"{header}\n{_check_of(row, header)}"))

    def _update_of(self, row: tuple[Any, ...]) -> UpdateEntry:
        """The entry of a row, whose check sum must hold (SQLite has none); older journals are without."""
        round, site, digest, blob, layout, text = row
        header, _, check = text.partition("\n")
        if check and check != _check_of((round, site, digest, blob, layout), header):
            raise self._damaged("an update's entry")
        return UpdateEntry(round, site, digest, blob, layout, json.loads(header))

    def _damaged(self, what: str) -> StoreError:
        return StoreError(f"the journal is damaged: {what} is not what was written", where=str(self.path), fix=RESTORE)

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
        """Pages that do not fit together are met now, and not in the middle of the run."""
        found = self._db.execute("PRAGMA quick_check(1)").fetchone()[0]
        if found != "ok":
            raise sqlite3.DatabaseError(f"it is damaged: {found}")

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            with suppress(sqlite3.Error):  # a disk that is full lets SQLite end the transaction itself
                self._db.execute("ROLLBACK")
            raise

    @contextmanager
    def _mapped_errors(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise StoreError(
                f"the journal failed: {error}",
                where=str(self.path),
                fix="free disk space, or check that the file is writable and not damaged",
            ) from error


def _check_of(row: tuple[Any, ...], header: str) -> str:
    return xxhash.xxh3_64_hexdigest(repr((row, header)).encode())
