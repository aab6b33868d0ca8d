"""The part of a run's journal that is about the small files beside its final model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from fl_runtime.store.database import Database

_KEY = "files"


class FilesJournal:
    """Records what sites have sent beside the final model. It is not thread-safe: callers hold the run's lock.

    The record has the keys `sent` (site -> name of a file -> its digest) and, of the files that are kept, `site`,
    `blob`, `layout` and `weights_file`.
    """

    def __init__(self, database: Database) -> None:
        self._db = database

    def write(self, record: Mapping[str, Any]) -> None:
        """Record what was sent, in place of the record before. Raises StoreError if the database fails."""
        with self._db.transaction():
            self._db.put(_KEY, json.dumps(record))

    def read(self) -> dict[str, Any] | None:
        """Return the record, or None if no site has sent files. Raises StoreError if the database fails."""
        value = self._db.get(_KEY)
        return json.loads(value) if value else None
