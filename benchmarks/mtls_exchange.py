"""Measures a round of a provisioned federation over mutual TLS against a raw gRPC stream of the same bytes.

Sites add 1 to every weight; nothing is trained. The two run in turn, so that ratios hold on a noisy machine.

    python benchmarks/mtls_exchange.py [--mib 1 64] [--sites 2] [--rounds 20] [--repeats 3]

Columns, all medians: model size in MiB; seconds of a round, ours and of the raw stream; our throughput in MiB per
second and site, both directions together; our throughput as a share of the raw stream's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from kits import make_kits
from rich.console import Console
from rich.table import Table

from fl_adapters import Job, ProofOfConcept

HERE = Path(__file__).parent


def ours(mib: float, sites: int, rounds: int) -> list[float]:
    """Seconds of each round of a proof of concept: separate processes, startup kits, policy and audit log."""
    with tempfile.TemporaryDirectory() as folder:
        environment = ProofOfConcept(sites=sites, args=(str(mib),), folder=folder, quiet=True)
        result = Job(app=str(HERE / "bare_site.py"), rounds=rounds).run(environment)
        return [item.seconds for item in result.rounds]


def raw(mib: float, sites: int, rounds: int) -> list[float]:
    """Seconds of each round of the raw stream."""
    with tempfile.TemporaryDirectory() as folder:
        make_kits(Path(folder), ["site-1"])
        command = [sys.executable, str(HERE / "raw_grpc.py"), str(mib), str(sites), str(rounds), folder]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    seconds: list[float] = json.loads(done.stdout)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=float, nargs="+", default=[1.0, 64.0])
    parser.add_argument("--sites", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    title = f"mutual TLS, {args.sites} sites, medians of {args.repeats} x {args.rounds} rounds"
    table = Table("MiB", "round, s", "raw gRPC, s", "MiB/s per site", "throughput / raw", title=title)
    for mib in args.mib:
        mine, theirs = [], []
        for _ in range(args.repeats):  # the first two rounds warm up connections and buffers
            mine += ours(mib, args.sites, args.rounds)[2:]
            theirs += raw(mib, args.sites, args.rounds)[2:]
        our_s, raw_s = statistics.median(mine), statistics.median(theirs)
        row = (f"{mib:g}", f"{our_s:.4f}", f"{raw_s:.4f}", f"{2 * mib / our_s:.0f}", f"{raw_s / our_s:.2f}")
        table.add_row(*row)
    Console().print(table)


if __name__ == "__main__":
    main()
