"""Scripts of an earlier site daemon that still run, although their daemon and its helper process were killed."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from fl_adapters.environments.processes import orphans
from fl_adapters.participant.kit import KIT_VARIABLE


def end_leftovers(jobs: Path) -> None:
    """End all processes of scripts that were started for jobs of this site. Linux only.

    Args:
        jobs: Folder of the site's jobs. The scripts are known by their kits, which lie below it.
    """
    found = _processes_of(jobs)
    orphans.send(found, signal.SIGTERM, single=True)
    end = time.monotonic() + orphans.GRACE_S
    while found and time.monotonic() < end:
        time.sleep(0.05)
        found = found & _processes_of(jobs)
    orphans.send(found, signal.SIGKILL, single=True)


def _processes_of(jobs: Path) -> set[int]:
    """Numbers of the processes whose environment names a kit below `jobs`."""
    wanted = f"{KIT_VARIABLE}={jobs}{os.sep}".encode()
    found = set()
    for name in os.listdir("/proc") if sys.platform == "linux" else ():
        if name.isdigit() and int(name) != os.getpid():
            try:
                environment = Path("/proc", name, "environ").read_bytes()
            except OSError:  # of another user, or gone
                continue
            if any(entry.startswith(wanted) for entry in environment.split(b"\0")):
                found.add(int(name))
    return found
