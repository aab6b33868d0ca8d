"""Run as a script of its own by `SiteProcesses`: ends the site processes if the process that started them dies.

It reads "+PID" and "-PID" lines from stdin: process groups that are to die with the parent, and ones that no longer
exist. The end of stdin means that the parent is gone, however it went; then what is left on the list is killed.
Standard library only, POSIX only.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterable

GRACE_S = 3.0


def main() -> None:
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
    """Signal process groups, or `single` processes; True if any is still there."""
    found = False
    for target in targets:
        try:
            (os.kill if single else os.killpg)(target, number)
            found = True
        except OSError:  # gone already
            pass
    return found


def descendants(roots: Iterable[int]) -> set[int]:
    """Children of these processes, and theirs, and so on. A launcher such as torchrun gives its workers process
    groups of their own, so that killing the launcher's group leaves them. Linux only; empty elsewhere.
    """
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc") if sys.platform == "linux" else ():
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat", "rb") as file:
                    fields = file.read().rpartition(b")")[2].split()  # the name in brackets may hold anything
            except OSError:
                continue
            children.setdefault(int(fields[1]), []).append(int(name))
    found: set[int] = set()
    waiting = list(roots)
    while waiting:
        new = children.get(waiting.pop(), [])
        found.update(new)
        waiting.extend(new)
    return found


if __name__ == "__main__":
    main()
