"""The folder of a federation's server: it names its federation, and one server at a time uses it."""

from __future__ import annotations

import json
import os
from pathlib import Path

from fl_runtime.errors import ConfigError, StoreError
from fl_runtime.store import lock
from fl_runtime.store.lock import FolderLock
from fl_runtime.store.tensorfile import disk_error
from fl_runtime.version import check_format, stamp

FEDERATION_FILE = "federation.json"
STORE_MARK = ".store"
"""File with the identifier of the store that several servers share, of which the folder is a copy."""
_FORMAT = 1
_LOCK = ".server"


class DataFolder:
    """The data folder of a server, locked from construction until `close` or the death of the process.

    Attributes:
        path: The folder. Each job has a folder of its own in it.
    """

    def __init__(self, path: Path, federation: str) -> None:
        """Lock the folder, and note the federation's name in it.

        Args:
            path: The folder; created, readable by its owner alone, if missing.
            federation: Name of the federation.

        Raises:
            ConfigError: It is the folder of another federation.
            StoreError: Another server uses it, or it cannot be written.
        """
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise disk_error(error, path) from error
        check_federation(path, federation)
        self._lock = FolderLock(path / _LOCK, "another server of this federation uses this folder")
        try:
            _name_federation(path, federation)
        except OSError as error:
            self.close()
            raise disk_error(error, path) from error

    def close(self) -> None:
        """Let another server use the folder; further calls do nothing."""
        self._lock.close()


def check_federation(path: Path, federation: str) -> None:
    """Check that a data folder is that of a federation, or has not been used yet.

    Args:
        path: The folder.
        federation: Name of the federation.

    Raises:
        NewerFormatError: A later version wrote it.
        ConfigError: It is the folder of another federation.
        StoreError: It cannot be read.
    """
    try:
        fields = json.loads((path / FEDERATION_FILE).read_text("utf-8"))
        owner, version = fields["federation"], fields["format"]
    except FileNotFoundError:
        return
    except OSError as error:
        raise disk_error(error, path / FEDERATION_FILE) from error
    except (ValueError, KeyError, TypeError):
        raise StoreError(
            "this file does not name a federation",
            where=str(path / FEDERATION_FILE),
            fix="restore the folder from a backup, or delete this file if the jobs in the folder are your own",
        ) from None
    check_format(version, _FORMAT, "the data folder", where=str(path), version=fields.get("version"))
    if owner != federation:
        raise ConfigError(
            f"this is the data folder of the federation {owner}, not of {federation}",
            where=str(path),
            fix="give each federation's server a folder of its own with --data",
        )


def _name_federation(path: Path, federation: str) -> None:
    file = path / FEDERATION_FILE
    if not file.exists():
        partial = file.with_suffix(".partial")
        partial.write_text(json.dumps({**stamp(_FORMAT), "federation": federation}), "utf-8")
        os.replace(partial, file)


def is_locked(path: Path) -> bool:
    """Return whether a server uses a data folder at this moment."""
    return lock.is_locked(path / _LOCK) is True
