"""The file in which a site keeps what it has signed in secure sums, so that its rules outlive its process."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fl_runtime.errors import ConfigError
from fl_runtime.store.tensorfile import replacing
from fl_runtime.text import parse_json

RECORD = "secure-sum.json"
"""Name of the file in a site's own folder."""

_MAX_CHARS = 2**16


class SumRecord:
    """The record of one site in one run. It holds no secret.

    Args:
        folder: The site's own folder in the run.
        fresh: Whether a record in the folder belongs to another run, and is ignored.
        durable: Whether `write` waits for the disk. A file that is only written outlives the process, and not a power
            failure.
    """

    def __init__(self, folder: Path, *, fresh: bool, durable: bool = True) -> None:
        self._path, self._fresh, self._durable = folder / RECORD, fresh, durable

    def read(self) -> Mapping[str, Any] | None:
        """Return what an earlier process of the site has written, or None if it has signed nothing.

        Raises:
            ConfigError: The file cannot be read.
        """
        if self._fresh or not self._path.exists():
            return None
        try:
            record = parse_json(self._path.read_bytes(), limit_chars=_MAX_CHARS)
            if not isinstance(record, dict):
                raise ValueError("it holds no JSON object")
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"what this site has signed in secure sums cannot be read: {error}",
                where=str(self._path),
                fix="restore the file; without it this site cannot keep its rules in this run",
            ) from None
        return record

    def write(self, record: Mapping[str, Any]) -> None:
        """Replace the record in one step, and wait until it is on disk if it is to be durable.

        Args:
            record: JSON values.

        Raises:
            StoreError: The disk is full or failed.
        """
        with replacing(self._path, durable=self._durable) as partial:
            partial.write_text(json.dumps(record), encoding="utf-8")
