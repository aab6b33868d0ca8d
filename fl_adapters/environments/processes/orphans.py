"""Helper process of `SiteProcesses`: ends the site processes if the process that started them dies.

`SiteProcesses` runs this file as a script. It reads lines from stdin: "+PID" adds a process group to its list, "-PID"
removes one that has ended. At the end of stdin the parent is gone, and all groups still on the list are killed. It uses
the standard library only, since it starts without site-packages, and runs on POSIX only. `psutil` could list processes
in place of the parser of /proc, but it is a compiled package that the base install does not need for anything else.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterable

GRACE_S = 3.0


def main() -> None:
    """Keep the list until stdin ends, then end what is on it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    groups: set[int] = set()
    for line in sys.stdin:
        number = int(line[1:])
        if line[0] == "+":
            groups.add(number)
        else:
            groups.discard(number)
    family = descendants(groups)
    send(groups, signal.SIGTERM)
    end = time.monotonic() + GRACE_S
    while time.monotonic() < end and send(groups, 0):
        time.sleep(0.05)
    send(groups, signal.SIGKILL)
    send(family, signal.SIGKILL, single=True)


def send(targets: Iterable[int], number: int, *, single: bool = False) -> bool:
    """Send a signal to process groups, or to `single` processes. True if any of them still exists."""
    exists = False
    for target in targets:
        try:
            (os.kill if single else os.killpg)(target, number)
            exists = True
        except OSError:  # gone already
            pass
    return exists


def descendants(roots: Iterable[int]) -> set[int]:
    """All descendants of these processes. Linux only; empty elsewhere.

    Killing a process group is not enough: launchers such as torchrun put their workers into groups of their own.
    """
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc") if sys.platform == "linux" else ():
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat", "rb") as file:
                    fields = file.read().rpartition(b")")[2].split()  # after the name, which may hold any character
            except OSError:
                continue
            children.setdefault(int(fields[1]), []).append(int(name))
    family: set[int] = set()
    waiting = list(roots)
    while waiting:
        new = children.get(waiting.pop(), [])
        family.update(new)
        waiting.extend(new)
    return family


if __name__ == "__main__":
    main()
