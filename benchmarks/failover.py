"""Measures how long a federation under load stands still when the server that serves is killed (kill -9).

Two servers share a PostgreSQL of the benchmark's own and a folder. Two sites answer every task at once. After each kill
the time to the next update that a server acknowledges is measured, and the killed server is started again.

    python benchmarks/failover.py [--kills 20] [--mib 1]

Columns, in seconds from the kill: the next acknowledged update, as median, 90th percentile and maximum. A lease lasts
5 s, so a kill cannot be noticed much earlier. PostgreSQL must be installed (Debian: apt-get install postgresql).
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "_support"))

from federation_bench import Site
from postgres import postgres
from two_servers import TwoServers, two_servers

from fl_runtime.errors import AbortedError

SITES = ("north", "south")
WAIT_S = 60.0


class Load:
    """Sites that answer every task at once, and the times at which their updates were acknowledged."""

    def __init__(self, both: TwoServers, mib: float) -> None:
        self._start = {"w": np.zeros(int(mib * 2**20 / 4), np.float32)}
        self._changed = threading.Condition()
        self._newest = 0.0
        self._threads = [
            threading.Thread(target=self._answer, args=(both.site(name, WAIT_S),), daemon=True) for name in SITES
        ]
        for thread in self._threads:
            thread.start()

    def _answer(self, site: Site) -> None:
        try:
            site.join()
            site.register(self._start)
            task = site.start(self._start)
            while task.kind == "train":
                status = site.submit(task, {name: array + 1 for name, array in task.arrays.items()})
                with self._changed:
                    if status == "used":
                        self._newest = time.monotonic()
                    self._changed.notify_all()
                task = site.client.next_task()
        except AbortedError:
            pass

    def next_after(self, moment: float) -> float:
        """Wait for the next acknowledged update after a moment; returns the seconds between the two."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._newest > moment, WAIT_S):
                sys.exit(f"no update was acknowledged within {WAIT_S:g} s")
            return self._newest - moment

    def join(self) -> None:
        """Wait until the sites have ended."""
        for thread in self._threads:
            thread.join(WAIT_S)


def measured(kills: int, mib: float) -> list[float]:
    """Seconds to the next acknowledged update after each kill."""
    seconds: list[float] = []
    with tempfile.TemporaryDirectory() as folder, postgres() as url, two_servers(Path(folder), url, SITES) as both:
        both.ask("SubmitJob", job={"app": "load", "name": "load", "rounds": 10**6})
        load = Load(both, mib)
        for _ in range(kills):
            load.next_after(time.monotonic() + random.uniform(0.0, 1.0))
            active = both.active
            active.kill()
            moment = time.monotonic()
            active.log.write_text("")
            seconds.append(load.next_after(moment))
            print(f"{seconds[-1]:.2f} s", file=sys.stderr, flush=True)
            active.start()
            active.wait_for("standing by")
        both.ask("AbortJob", job="load", reason="the benchmark is over")
        load.join()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--mib", type=float, default=1.0)
    args = parser.parse_args()
    seconds = measured(args.kills, args.mib)
    table = Table("median, s", "90th percentile, s", "maximum, s", title=f"{args.kills} kills, {args.mib:g} MiB")
    table.add_row(*(f"{value:.2f}" for value in np.percentile(seconds, [50, 90, 100])))
    Console().print(table)


if __name__ == "__main__":
    main()
