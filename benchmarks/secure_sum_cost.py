"""Measures rounds with `secure_sum` beside plain ones: 8 sites in processes of their own, over loopback gRPC.

    python benchmarks/secure_sum_cost.py [--sites 8] [--mib 1.5] [--rounds 30]

The sites add 1 to every weight and do not train, so a round is what an exchange costs. Both kinds run in turns, three
times each, in one go. Columns: median and fastest time of a round; bytes of a round up and down at the server, over all
sites.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fl_adapters.testing import LocalFederation

SITE = Path(__file__).with_name("bare_site.py")
REPEATS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sites", type=int, default=8)
    parser.add_argument("--mib", type=float, default=1.5)
    parser.add_argument("--rounds", type=int, default=30)
    args = parser.parse_args()
    kinds: tuple[tuple[str, dict[str, object]], ...] = (
        ("plain", {}),
        ("secure_sum", {"secure_sum": True}),
    )
    seconds: dict[str, list[float]] = {name: [] for name, _ in kinds}
    nbytes: dict[str, float] = {}
    for _ in range(REPEATS):
        for name, settings in kinds:
            found, nbytes[name] = measured(args.sites, args.mib, args.rounds, settings)
            seconds[name] += found
    table = Table("updates", "round, ms", "fastest, ms", "MB a round", "time", "bytes")
    plain, plain_bytes = statistics.median(seconds["plain"]), nbytes["plain"]
    for name, found in seconds.items():
        median = statistics.median(found)
        table.add_row(
            name,
            f"{median * 1e3:.1f}",
            f"{min(found) * 1e3:.1f}",
            f"{nbytes[name] / 1e6:.2f}",
            f"{median / plain:.2f} x",
            f"{nbytes[name] / plain_bytes:.2f} x",
        )
    Console().print(table)


def measured(sites: int, mib: float, rounds: int, settings: dict[str, object]) -> tuple[list[float], float]:
    """Run a federation, and return the seconds of each round but the first two, and the bytes of a round."""
    command = [sys.executable, str(SITE), str(mib)]
    with LocalFederation(sites=sites, rounds=rounds, sockets=True, **settings) as federation:
        processes = [
            subprocess.Popen(command, env=os.environ | {"FL_ADAPTERS_KIT": place.kit}, stderr=subprocess.DEVNULL)
            for place in federation.places
        ]
        if any(process.wait() for process in processes):
            raise SystemExit("a site has failed")
        result = federation.result()
        times = [event.time for event in federation.events if event.kind == "round_finished"]
    between = [later - earlier for earlier, later in pairwise(times[1:])]
    return between, (result.bytes_up + result.bytes_down) / rounds


if __name__ == "__main__":
    main()
