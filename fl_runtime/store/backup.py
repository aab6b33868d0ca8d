"""Backups of a server's data folder, made while the server runs or stands still, and their restoration.

A backup is a folder with copies of all files that a server needs to go on, and `backup.json`: the federation, the time,
and SHA-256 and size of every file. It is one moment of each training. Its journal is copied by SQLite's backup API, and
the tensor files that the journal names are pinned by hard links until they are copied: the server never writes to a
file that has a second link. Should the journal change between both, they are taken again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from fl_runtime.errors import ConfigError, StoreError
from fl_runtime.store.blobs import tensor_files
from fl_runtime.store.data_folder import FEDERATION_FILE, STORE_MARK, check_federation, is_locked
from fl_runtime.store.journal import RESTORED
from fl_runtime.store.lock import FolderLock
from fl_runtime.store.sqlite import SqliteDatabase
from fl_runtime.store.stores import BLOBS_FOLDER, JOURNAL_FILE
from fl_runtime.store.tensorfile import disk_error
from fl_runtime.version import check_format, stamp

BACKUP_FILE = "backup.json"
KIT_PART = ".server-kit"
"""Folder of a backup with what changes in the server's kit."""
_FORMAT = 1
_STAGING = ".backup"
_PARTIAL = ".partial"
_DATABASE = ".sqlite"
_COPY_BYTES = 2**20
_MOST_TRIES = 200
_JOB_FILES = ("job.json", "outcome.json")


@dataclass(frozen=True)
class Backup:
    """A backup that is complete.

    Attributes:
        folder: Its folder.
        federation: Name of the federation.
        made_at: When it was made, in seconds since the epoch.
        jobs: Names of the jobs in it.
        files: Path of each file below the folder -> its size in bytes and its SHA-256 digest in hexadecimal.
    """

    folder: Path
    federation: str
    made_at: float
    jobs: tuple[str, ...]
    files: Mapping[str, tuple[int, str]]

    @property
    def nbytes(self) -> int:
        """Size of all files in bytes."""
        return sum(size for size, _ in self.files.values())


def back_up(data: Path, out: Path, federation: str, copy_kit: Callable[[Path], object] | None = None) -> Backup:
    """Copy a server's data folder, consistently while the server runs.

    Args:
        data: The data folder.
        out: Folder for the backup, which must not exist or be empty.
        federation: Name of the federation whose folder it should be.
        copy_kit: Copies what changes in the server's kit, such as its audit log, into a folder. It is called when the
            jobs are copied, so that the log has a line for all that they hold.

    Returns:
        The backup.

    Raises:
        ConfigError: `data` is not the folder of this federation's server, or `out` holds something.
        StoreError: A file cannot be read or written, or another backup is being made.
    """
    if not (data / FEDERATION_FILE).is_file():
        raise ConfigError("this is not the data folder of a server", where=str(data), fix="name it with --data")
    if (data / STORE_MARK).exists():
        raise ConfigError(
            "the jobs of this server are in the store that it shares with others",
            where=str(data),
            fix="back up the database and the shared place that its --store names",
        )
    check_federation(data, federation)
    with _new_folder(out) as partial, _staging(data) as staging:
        copies = _Copies(partial)
        copies.file(data / FEDERATION_FILE, FEDERATION_FILE)
        jobs = []
        for folder in sorted(path for path in data.iterdir() if (path / _JOB_FILES[0]).is_file()):
            if _copy_job(folder, copies, staging):
                jobs.append(folder.name)
        for path in sorted(data.iterdir()):
            if path.is_file() and not _is_passing(path) and path.name not in copies.made:
                copies.file(path, path.name)
        if copy_kit is not None:
            (partial / KIT_PART).mkdir(mode=0o700)
            copy_kit(partial / KIT_PART)
            for path in sorted((partial / KIT_PART).iterdir()):
                copies.note(f"{KIT_PART}/{path.name}")
        backup = Backup(out, federation, time.time(), tuple(jobs), copies.made)
        fields = {**stamp(_FORMAT), **asdict(backup), "folder": None}
        (partial / BACKUP_FILE).write_text(json.dumps(fields, indent=1), "utf-8")
    return backup


def restore(backup_folder: Path, data: Path, federation: str) -> Backup:
    """Make a data folder from a backup. A server that is started with it goes on from there.

    What the backup has of the server's kit is in the folder `KIT_PART`, for the caller to put into the kit.

    Args:
        backup_folder: The backup.
        data: The data folder, which must not exist or be empty.
        federation: Name of the federation whose backup it should be.

    Returns:
        The backup.

    Raises:
        ConfigError: It is not a backup of this federation, or `data` holds something.
        StoreError: A file of the backup is missing or damaged, or cannot be written.
    """
    backup = read_backup(backup_folder)
    if backup.federation != federation:
        raise ConfigError(
            f"this is a backup of the federation {backup.federation}, not of {federation}",
            where=str(backup_folder),
            fix="use the kit of that federation's server",
        )
    if data.is_dir() and is_locked(data):
        raise ConfigError("a server uses this folder", where=str(data), fix="stop it first")
    with _new_folder(data) as partial:
        copies = _Copies(partial)
        for name, (size, digest) in backup.files.items():
            with suppress(FileNotFoundError):
                copies.file(backup_folder / name, name)
            if copies.made.get(name) != (size, digest):
                raise StoreError(
                    f"{name} is not what was backed up", where=str(backup_folder), fix="use another backup"
                )
        for journal in partial.rglob(JOURNAL_FILE):
            with closing(SqliteDatabase(journal)) as database:
                database.put(RESTORED, str(backup.made_at))
    return backup


def read_backup(folder: Path) -> Backup:
    """Read what is in a backup.

    Args:
        folder: Its folder.

    Raises:
        NewerFormatError: A later version made it.
        ConfigError: The folder is not a backup.
    """
    try:
        fields = json.loads((folder / BACKUP_FILE).read_text("utf-8"))
        check_format(fields["format"], _FORMAT, "the backup", where=str(folder), version=fields.get("version"))
        files = {str(name): (int(size), str(digest)) for name, (size, digest) in fields["files"].items()}
        backup = Backup(
            folder, str(fields["federation"]), float(fields["made_at"]), tuple(map(str, fields["jobs"])), files
        )
        inside = all(
            ".." not in (path := PurePosixPath(name)).parts and not path.is_absolute() and name for name in files
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"this is not a backup: {error}", where=str(folder), fix=_WHICH) from None
    if not inside:
        raise ConfigError("this backup names files outside its folder", where=str(folder), fix=_WHICH)
    return backup


_WHICH = "name a folder that `fl-adapters server backup` has made"


class _Copies:
    """Copies of files in a new folder, and what is in each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.made: dict[str, tuple[int, str]] = {}

    def file(self, source: Path, name: str) -> None:
        """Copy a file as far as it is written now."""
        target = self.folder / name
        digest, size = hashlib.sha256(), 0
        try:
            target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with source.open("rb") as read, target.open("wb") as write:
                while piece := read.read(_COPY_BYTES):
                    digest.update(piece)
                    size += len(piece)
                    write.write(piece)
            shutil.copymode(source, target)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise disk_error(error, target) from error
        self.made[name] = size, digest.hexdigest()

    def database(self, source: Path, name: str) -> None:
        """Copy the state of an SQLite database after its last commit."""
        target = self.folder / name
        target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        target.unlink(missing_ok=True)
        with _reading(source) as connection, closing(sqlite3.connect(target)) as copy:
            connection.backup(copy)
        self.note(name)

    def note(self, name: str) -> None:
        """Note a file that something else has written."""
        data = self.folder / name
        with data.open("rb") as file:
            self.made[name] = data.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()

    def forget(self, prefix: str) -> None:
        """Delete a folder, to copy it again."""
        shutil.rmtree(self.folder / prefix, ignore_errors=True)
        self.made = {name: made for name, made in self.made.items() if not name.startswith(f"{prefix}/")}


def _copy_job(folder: Path, copies: _Copies, staging: Path) -> bool:
    """Copy a job as it stands at one moment. Returns False if it was deleted meanwhile."""
    for _ in range(_MOST_TRIES):
        try:
            before = (folder / _JOB_FILES[0]).read_bytes()
            _copy_tree(folder, folder.name, copies, staging)
            if (folder / _JOB_FILES[0]).read_bytes() == before:
                return True
        except FileNotFoundError:
            if not (folder / _JOB_FILES[0]).exists():
                copies.forget(folder.name)
                return False
        copies.forget(folder.name)
    raise StoreError(f"the job {folder.name} does not stand still", where=str(folder), fix="make the backup later")


def _copy_tree(folder: Path, name: str, copies: _Copies, staging: Path) -> None:
    if (folder / JOURNAL_FILE).is_file():
        _copy_training(folder, name, copies, staging)
        return
    for path in sorted(folder.iterdir()):
        if _is_passing(path):
            continue
        if path.is_dir():
            _copy_tree(path, f"{name}/{path.name}", copies, staging)
        elif path.name.endswith(_DATABASE):
            copies.database(path, f"{name}/{path.name}")
        else:
            copies.file(path, f"{name}/{path.name}")


def _copy_training(folder: Path, name: str, copies: _Copies, staging: Path) -> None:
    """Copy the server's part of a training: its journal, the tensor files that it names, and ledgers."""
    with _reading(folder / JOURNAL_FILE) as journal:
        for _ in range(_MOST_TRIES):
            state = _state_of(journal)
            copies.database(folder / JOURNAL_FILE, f"{name}/{JOURNAL_FILE}")
            pinned = _pinned(folder / BLOBS_FOLDER, staging)
            if _state_of(journal) == state:
                break
        else:
            raise StoreError("the journal does not stand still", where=str(folder), fix="make the backup later")
    for path in pinned:
        copies.file(path, f"{name}/{BLOBS_FOLDER}/{path.name}")
    for path in sorted(folder.iterdir()):  # after the journal: a ledger may be ahead of it, but never behind
        if path.is_file() and not _is_passing(path) and path.name != JOURNAL_FILE:
            copy = copies.database if path.name.endswith(_DATABASE) else copies.file
            copy(path, f"{name}/{path.name}")


def _pinned(blobs: Path, staging: Path) -> list[Path]:
    """Link to the tensor files of a training, so that their contents stay. One that has just gone is left out."""
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    pinned = []
    for path in tensor_files(blobs):
        with suppress(FileNotFoundError):
            try:
                os.link(path, staging / path.name)
            except FileNotFoundError:
                raise
            except OSError:  # a file system without hard links; the journal tells if the server was faster
                shutil.copyfile(path, staging / path.name)
            pinned.append(staging / path.name)
    return pinned


def _state_of(journal: sqlite3.Connection) -> Any:
    """A number that changes with every commit of another connection."""
    return journal.execute("PRAGMA data_version").fetchone()


@contextmanager
def _reading(path: Path) -> Iterator[sqlite3.Connection]:
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=rw", uri=True, timeout=30)) as connection:
            yield connection
    except sqlite3.Error as error:
        if not path.exists():
            raise FileNotFoundError(path) from error
        raise StoreError(
            f"the journal cannot be copied: {error}", where=str(path), fix="see if it is damaged"
        ) from error


@contextmanager
def _staging(data: Path) -> Iterator[Path]:
    """Yield a folder for links on the disk of the data folder. One backup is made at a time."""
    place = data / _STAGING
    lock = FolderLock(place, "another backup of this folder is being made")
    try:
        yield place / "links"
    finally:
        shutil.rmtree(place / "links", ignore_errors=True)
        lock.close()


@contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """Yield a folder that takes the name `folder` when the block is left without an error, and is deleted otherwise."""
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ConfigError("this folder is not empty", where=str(folder), fix="name a new one, or move it away")
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = folder.with_name(folder.name + _PARTIAL)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(mode=0o700)
    except OSError as error:
        raise disk_error(error, folder) from error
    try:
        yield partial
        if folder.exists():
            folder.rmdir()
        os.replace(partial, folder)
    except OSError as error:
        raise disk_error(error, folder) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _is_passing(path: Path) -> bool:
    """Whether a file or folder serves running processes alone."""
    name = path.name
    return name.startswith(".") or name == "lock" or name.endswith((_PARTIAL, "-wal", "-shm", "-journal"))
