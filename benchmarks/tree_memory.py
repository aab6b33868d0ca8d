"""Measures the peak memory of all descendants of this process. Linux only."""

from __future__ import annotations

import ctypes
import os
import threading
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import psutil

INTERVAL_S = 0.1
_PR_SET_CHILD_SUBREAPER = 36


@dataclass
class Peak:
    """Largest sums of PSS over all processes.

    Attributes:
        all_mib: All pages, in MiB.
        without_files_mib: Pages that are not of files, in MiB. The system reclaims pages of files when it needs to.
    """

    all_mib: float = 0.0
    without_files_mib: float = 0.0


def adopt_orphans() -> None:
    """Make this process the parent of descendants whose own parents end, so that they stay in its tree."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def end_descendants() -> None:
    """Kill all descendants of this process."""
    left = psutil.Process().children(recursive=True)
    for process in left:
        process.kill()
    psutil.wait_procs(left, timeout=10)


class PeakMemory:
    """Samples the memory of all descendants of this process, in a thread, during a `with` block."""

    def __init__(self) -> None:
        self.peak = Peak()
        self._root = psutil.Process(os.getpid())
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(INTERVAL_S):
            try:
                tree = self._root.children(recursive=True)
            except psutil.Error:
                return
            now = [_pss_kib(process.pid) for process in tree]
            self.peak.all_mib = max(self.peak.all_mib, sum(both for both, _ in now) / 1024)
            self.peak.without_files_mib = max(self.peak.without_files_mib, sum(own for _, own in now) / 1024)


def numbers(text: str) -> dict[str, int]:
    """Numbers by name from a file under /proc such as smaps_rollup (in KiB) or status."""
    rows = (line.split() for line in text.splitlines())
    return {row[0].rstrip(":"): int(row[1]) for row in rows if len(row) > 1 and row[1].isdigit()}


def _pss_kib(pid: int) -> tuple[int, int]:
    """PSS of one process in KiB, with and without pages of files; zero if it has ended."""
    try:
        found = numbers(Path(f"/proc/{pid}/smaps_rollup").read_text())
    except OSError:
        return 0, 0
    return found["Pss"], found["Pss"] - found.get("Pss_File", 0)
