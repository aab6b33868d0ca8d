"""Whether a federation's server can do its work: a check of its data folder and its queue."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

LEAST_FREE_BYTES = 2**26
"""Free space below which a disk counts as full. Journals and logs still fit, but no model does."""


@dataclass(frozen=True)
class Health:
    """The state of a server's data folder and of its queue.

    Attributes:
        folder: The server's data folder.
        halted: Returns why no job can run any more, "" while they can.
        least_free_bytes: Free space below which the disk counts as full.
    """

    folder: Path
    halted: Callable[[], str]
    least_free_bytes: int = LEAST_FREE_BYTES

    def faults(self) -> list[str]:
        """Return what is wrong, a line each; none if all is well."""
        found = [f"no job can run: {why}"] if (why := self.halted()) else []
        try:
            free = shutil.disk_usage(self.folder).free
            if free < self.least_free_bytes:
                found.append(f"disk full: {free} bytes are free at {self.folder}, {self.least_free_bytes} are needed")
            with tempfile.TemporaryFile(dir=self.folder) as probe:
                probe.write(bytes(4096))
                probe.flush()
        except OSError as error:
            found.append(f"journals cannot be written at {self.folder}: {error.strerror or error}")
        return found
