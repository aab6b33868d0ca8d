"""The server's disk, which a fault can fill.

It is a small tmpfs where this machine allows mounting one, else a limit on the file sizes of the server's process.
"""

from __future__ import annotations

import resource
import subprocess
from contextlib import suppress
from pathlib import Path

_CHUNK = bytes(2**16)


class Disk:
    """A folder of limited size, which can be filled so that no more can be written."""

    def __init__(self, folder: Path, mib: int) -> None:
        self.folder, self.full = folder, False
        folder.mkdir(parents=True, exist_ok=True)
        command = ["mount", "-t", "tmpfs", "-o", f"size={mib}m", "none", str(folder)]
        try:
            self.mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
        except FileNotFoundError:
            self.mounted = False

    def fill(self, process_id: int) -> None:
        self.full = True
        if not self.mounted:
            _limit(process_id, 0)
            return
        with suppress(OSError), open(self.folder / "filler", "ab", buffering=0) as file:
            while True:
                file.write(_CHUNK)
        with suppress(OSError), open(self.folder / "filler", "ab", buffering=0) as file:
            while True:
                file.write(b"x" * 64)

    def free(self, process_id: int | None) -> None:
        """Make room again for the process `process_id`, or for none if it has ended (None)."""
        if self.mounted:
            (self.folder / "filler").unlink(missing_ok=True)
        elif process_id is not None:
            _limit(process_id, resource.RLIM_INFINITY)
        self.full = False

    def close(self) -> None:
        if self.mounted:
            subprocess.run(["umount", "-l", str(self.folder)], check=False)
            self.mounted = False


def _limit(process_id: int, file_bytes: int) -> None:
    with suppress(ProcessLookupError):
        hard = resource.prlimit(process_id, resource.RLIMIT_FSIZE)[1]
        resource.prlimit(process_id, resource.RLIMIT_FSIZE, (file_bytes, hard))
