"""The server's disk, which can be filled: a small tmpfs where this machine lets us mount one, else a limit on how
long the files of the server's process may become."""

from __future__ import annotations

import resource
import subprocess
from contextlib import suppress
from pathlib import Path

_CHUNK = bytes(2**16)


class Disk:
    """`folder` and what it has room for. full: nothing more can be written there."""

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
        """process_id: the process that goes on with it, None if it has ended."""
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
