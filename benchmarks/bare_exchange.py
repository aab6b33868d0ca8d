"""Measures the seconds of a round without training: our simulation and our gRPC, against a raw gRPC stream.

Sites add 1 to every weight. The raw stream carries the same bytes and does nothing else. The three run in turn, so that
ratios hold on a noisy machine.

    python benchmarks/bare_exchange.py [--mib 1 256] [--sites 2] [--rounds 30] [--repeats 3]

Columns, all medians: model size in MiB; seconds of a round in a simulation (large models in shared files), with all
bytes over gRPC, and of the raw stream; the ratio of the last two; seconds of a simulation before and after its rounds.

With `--processor` it measures instead, over gRPC and of the raw stream, the processor time of server and sites in a
round. Other work on the machine changes that less. Start and end are taken away by a run of one round.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fl_adapters import Job, Simulation

HERE = Path(__file__).parent


def ours(mib: float, sites: int, rounds: int, *, share: bool) -> tuple[list[float], float]:
    """Seconds of each round of a simulation, and seconds of all that it does before and after them."""
    with tempfile.TemporaryDirectory() as folder:
        environment = Simulation(sites=sites, args=(str(mib),), folder=folder, quiet=True, share=share)
        result = Job(app=str(HERE / "bare_site.py"), rounds=rounds).run(environment)
    seconds = [item.seconds for item in result.rounds]
    return seconds, result.wall_s - sum(seconds)


def raw(mib: float, sites: int, rounds: int) -> list[float]:
    """Seconds of each round of the raw stream."""
    command = [sys.executable, str(HERE / "raw_grpc.py"), str(mib), str(sites), str(rounds)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr}")
    seconds: list[float] = json.loads(done.stdout)
    return seconds


def measure(mib: float, sites: int, rounds: int, repeats: int) -> dict[str, float]:
    """One row of the table. Leaves out the first two rounds of each repeat, in which connections warm up."""
    shared, sent, bare, around = [], [], [], []
    for _ in range(repeats):
        seconds, rest = ours(mib, sites, rounds, share=True)
        shared += seconds[2:]
        around.append(rest)
        sent += ours(mib, sites, rounds, share=False)[0][2:]
        bare += raw(mib, sites, rounds)[2:]
    sent_s, raw_s = statistics.median(sent), statistics.median(bare)
    return {
        "MiB": mib,
        "simulation, s": statistics.median(shared),
        "over gRPC, s": sent_s,
        "raw gRPC, s": raw_s,
        "gRPC / raw": sent_s / raw_s,
        "start and stop, s": statistics.median(around),
    }


def processor_s() -> float:
    """Processor seconds of this process, which is the server, and of all that have ended below it."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def processor_s_a_round(exchange: Callable[[int], object], rounds: int) -> float:
    """Processor seconds that each round after the first one takes."""
    taken = []
    for count in (1, 1 + rounds):
        before = processor_s()
        exchange(count)
        taken.append(processor_s() - before)
    return (taken[1] - taken[0]) / rounds


def processor_row(mib: float, sites: int, rounds: int, repeats: int) -> dict[str, float]:
    """One row of the table of `--processor`."""
    sent, bare = [], []
    for _ in range(repeats):
        sent.append(processor_s_a_round(lambda count: ours(mib, sites, count, share=False), rounds))
        bare.append(processor_s_a_round(lambda count: raw(mib, sites, count), rounds))
    sent_s, raw_s = statistics.median(sent), statistics.median(bare)
    return {"MiB": mib, "over gRPC, processor s": sent_s, "raw gRPC, processor s": raw_s, "gRPC / raw": sent_s / raw_s}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=float, nargs="+", default=[1.0, 256.0])
    parser.add_argument("--sites", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--processor", action="store_true", help="measure processor time in place of seconds")
    args = parser.parse_args()
    table = Table(title=f"bare exchange, {args.sites} sites, medians of {args.repeats} x {args.rounds} rounds")
    for mib in args.mib:
        rounds = max(args.rounds if mib < 64 else args.rounds // 5, 4)
        row = (processor_row if args.processor else measure)(mib, args.sites, rounds, args.repeats)
        if not table.columns:
            for column in row:
                table.add_column(column, justify="right")
        table.add_row(*(f"{value:.4g}" for value in row.values()))
    Console().print(table)


if __name__ == "__main__":
    main()
