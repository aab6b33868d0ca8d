"""The store of several servers: journals, records and events in PostgreSQL, tensors and results at a shared place."""

from __future__ import annotations

import json
import logging
import shutil
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

from fl_runtime.errors import ConfigError, StoreError
from fl_runtime.store.blobs import Blobs
from fl_runtime.store.copies import SharedBlobs, SharedPlace
from fl_runtime.store.data_folder import STORE_MARK
from fl_runtime.store.journal import Journal
from fl_runtime.store.lease import Lease
from fl_runtime.store.postgres import SCHEMA, PostgresDatabase
from fl_runtime.store.tensorfile import disk_error
from fl_runtime.trainings import EVENTS
from fl_runtime.types import Event, Listener

log = logging.getLogger(__name__)

_OF_KIT = ("crl.pem", "members.json", "renewals.json")
_RESULTS = "@results"  # record of a job's result files; no file of a job has this name


class SharedStore:
    """A `Store` and `SharedFiles` of the server that holds the lease.

    Args:
        lease: The lease, which is held.
        place: Where tensors and results are.
        root: This server's folder for runs. What is in it is written again when the store is opened.
        line_of: Writes an event as one line of JSON.

    Raises:
        StoreError: The database or the place fails. Every method raises it.
    """

    def __init__(self, lease: Lease, place: SharedPlace, root: Path, line_of: Callable[[Event], str]) -> None:
        self._lease, self._place, self._root, self._line_of = lease, place, root, line_of
        self._db = PostgresDatabase(lease.url, SCHEMA, lease)

    # -- runs ---------------------------------------------------------------------------------------------------

    def holds(self, folder: Path) -> bool:
        """Return whether there is a journal of a run; see `Store`."""
        return bool(self._db.rows("SELECT 1 FROM run WHERE folder=?", self._name(folder)))

    def journal(self, folder: Path, *, durable: bool = False) -> Journal:
        """Open the journal of a run, or make it; see `Store`. Commits are always on the device of the database."""
        name = self._name(folder)
        with self._db.transaction():
            self._db.run("INSERT INTO run (folder) VALUES (?) ON CONFLICT (folder) DO NOTHING", name)
            ((number,),) = self._db.rows("SELECT number FROM run WHERE folder=?", name)
            self._db.run(f"CREATE SCHEMA IF NOT EXISTS fl_run_{number}")
        return Journal(PostgresDatabase(self._lease.url, f"fl_run_{number}", self._lease))

    def blobs(self, folder: Path, *, durable: bool = False) -> Blobs:
        """Open the tensor files of a run; see `Store`."""
        copies = SharedBlobs(self._place, f"tensors/{self._name(folder)}", self._lease)
        return Blobs(folder / "blobs", durable=durable, copies=copies)

    def recorder(self, folder: Path) -> Listener | None:
        """Make the listener that keeps the events of a training, and write events.jsonl anew; see `Store`."""
        name = self._name(folder)
        lines = [line for (line,) in self._db.rows("SELECT line FROM event WHERE folder=? ORDER BY number", name)]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / EVENTS).write_text("".join(lines), encoding="utf-8")
        except OSError as error:
            raise disk_error(error, folder) from error

        def record(event: Event) -> None:
            try:
                self._db.run("INSERT INTO event (folder, line) VALUES (?, ?)", name, self._line_of(event))
            except StoreError as error:  # the lease is given up with it: another server goes on
                log.warning("an event is not on record: %s", error.what)

        return record

    # -- files --------------------------------------------------------------------------------------------------

    def restore(self) -> None:
        """Replace all jobs in this server's folder by those on record.

        Raises:
            ConfigError: The folder holds jobs that were not written from this store.
        """
        kept = {path: bytes(content) for path, content in self._db.rows("SELECT path, content FROM record")}
        mark, own = self._root / STORE_MARK, self._identifier()
        try:
            jobs = [file.parent for file in self._root.glob("*/job.json")]
            if jobs and not (mark.is_file() and mark.read_text() == own):
                raise ConfigError(
                    f"this folder holds jobs that are not in {self._db.where}, such as {jobs[0].name}",
                    where=str(self._root),
                    fix="choose another folder for a server with --store",
                )
            for folder in jobs:
                shutil.rmtree(folder)
            self._root.mkdir(parents=True, exist_ok=True)
            mark.write_text(own)
            for path, content in kept.items():
                file = self._root / path
                if "@" not in path:
                    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                    file.write_bytes(content)
        except OSError as error:
            raise disk_error(error, self._root) from error

    def kept(self, name: str) -> bytes | None:
        """Return what was kept of a file of the kit, by its name; None if nothing was."""
        rows = self._db.rows("SELECT content FROM record WHERE path=?", f"@{name}")
        return bytes(rows[0][0]) if rows else None

    def keep(self, file: Path, data: bytes) -> None:
        """Keep the contents of a file, before it is written; see `SharedFiles`."""
        self._put(self._name(file), data)

    def remove(self, file: Path) -> None:
        """Remove what was kept of a file; see `SharedFiles`."""
        self._db.run("DELETE FROM record WHERE path=?", self._name(file))

    def keep_results(self, folder: Path, files: Sequence[str]) -> None:
        """Keep the result files of a job; see `SharedFiles`."""
        name = self._name(folder)
        place = f"results/{name}/{self._lease.epoch}"
        for file in files:
            self._place.put(folder / file, f"{place}/{file}")
        self._put(f"{name}/{_RESULTS}", json.dumps({"place": place, "files": list(files)}).encode())

    def restore_results(self, folder: Path) -> None:
        """Copy the result files of a job into its folder, if they are not there yet; see `SharedFiles`."""
        rows = self._db.rows("SELECT content FROM record WHERE path=?", f"{self._name(folder)}/{_RESULTS}")
        if not rows:
            return
        results = json.loads(bytes(rows[0][0]))
        mark = folder / ".results"  # which of them this folder has
        if mark.is_file() and mark.read_text() == results["place"]:
            return
        for file in results["files"]:
            self._place.get(f"{results['place']}/{file}", folder / file)
        mark.write_text(results["place"])

    def forget_tensors(self, folder: Path) -> None:
        """Delete the tensors of a job that has finished; see `SharedFiles`."""
        if not self._lease.held:
            return
        try:
            self._place.delete(f"tensors/{self._name(folder)}")
        except StoreError as error:  # they only take room, until the job is deleted
            log.warning("%s", error)

    def forget(self, folder: Path) -> None:
        """Delete everything about a job; see `SharedFiles`."""
        name = self._name(folder)
        with self._db.transaction():
            for (number,) in self._db.rows("SELECT number FROM run WHERE starts_with(folder, ?)", f"{name}/"):
                self._db.run(f"DROP SCHEMA IF EXISTS fl_run_{number} CASCADE")
            self._db.run("DELETE FROM run WHERE starts_with(folder, ?)", f"{name}/")
            self._db.run("DELETE FROM event WHERE folder=? OR starts_with(folder, ?)", name, f"{name}/")
            self._db.run("DELETE FROM record WHERE starts_with(path, ?)", f"{name}/")
        for part in ("tensors", "results"):
            self._place.delete(f"{part}/{name}")

    def close(self) -> None:
        """Close the connection to the database."""
        self._db.close()

    def _identifier(self) -> str:
        self._db.run("INSERT INTO meta VALUES ('identifier', ?) ON CONFLICT (key) DO NOTHING", uuid.uuid4().hex)
        return str(self._db.get("identifier"))

    def _put(self, path: str, data: bytes) -> None:
        replaced = "ON CONFLICT (path) DO UPDATE SET content=excluded.content"
        self._db.run(f"INSERT INTO record VALUES (?, ?) {replaced}", path, data)

    def _name(self, file: Path) -> str:
        """Return the path of a file below the folder of runs; "@" and its name for a file of the kit."""
        if file.name in _OF_KIT:
            return f"@{file.name}"
        return file.relative_to(self._root).as_posix()
