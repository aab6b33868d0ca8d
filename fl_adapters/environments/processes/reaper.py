"""The helper process that ends the processes of the sites if this process is killed; see `orphans.py`."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress

from fl_adapters.environments.processes import orphans
from fl_adapters.environments.processes.interrupts import interrupts_held


class Reaper:
    """Starts the helper process, and tells it which process groups there are. Does nothing but on POSIX.

    Args:
        descriptors: Open file descriptors that the helper process inherits, such as that of a lock, which is then held
            until all processes are gone.
    """

    def __init__(self, descriptors: Sequence[int] = ()) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        if os.name != "posix":
            return
        command = [sys.executable, "-I", "-S", orphans.__file__]
        try:
            with interrupts_held():
                self._process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, start_new_session=True, pass_fds=descriptors
                )
        except BaseException:
            self.close()
            raise

    def add(self, process_id: int) -> None:
        """Have a process group ended with this process."""
        self._tell(f"+{process_id}\n")

    def remove(self, process_id: int) -> None:
        """Forget a process group that has ended."""
        self._tell(f"-{process_id}\n")

    def close(self) -> None:
        """End the helper process, and the process groups that it still knows."""
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()
            self._process.wait()

    def let_go(self) -> None:
        """Close the inherited end of the helper's pipe, in a forked copy of this process.

        While a copy holds it, the helper does not see that this process is gone.
        """
        if self._process is not None and self._process.stdin is not None:
            with suppress(OSError):
                self._process.stdin.close()

    def _tell(self, line: str) -> None:
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.write(line.encode())
            self._process.stdin.flush()
