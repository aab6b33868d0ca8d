"""Slots for the commands of a site that may run at the same time."""

from __future__ import annotations

import os
from pathlib import Path
from typing import IO


def acquire_slot(folder: Path, most: int) -> IO[bytes] | None:
    """Lock one of `most` files, until it is closed. None if all are locked."""
    for number in range(most):
        file = open(folder / f"process-{number}.lock", "wb")  # noqa: SIM115 (open for as long as the slot is occupied)
        try:
            if os.name == "posix":
                import fcntl

                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except OSError:
            file.close()
    return None
