"""The bare exchange beside a raw gRPC stream of the same bytes, in turn in the same run, so that the ratio holds
on a noisy machine. Sites add 1 to every weight; there is no training.

usage: bare_exchange.py [--mib 1 256] [--sites 2] [--rounds 30] [--repeats 3]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent


def ours(mib: float, sites: int, rounds: int) -> dict[str, Any]:
    """One simulation over gRPC; what `fl-adapters simulate --json` prints."""
    command = [sys.executable, "-m", "fl_adapters", "simulate", str(HERE / "bare_site.py"), str(mib)]
    with tempfile.TemporaryDirectory() as folder:
        out = _run([*command, "--sites", str(sites), "--rounds", str(rounds), "--json", "--folder", folder])
    result: dict[str, Any] = json.loads(out.splitlines()[-1])
    return result


def raw(mib: float, sites: int, rounds: int) -> list[float]:
    command = [sys.executable, str(HERE / "raw_grpc.py"), str(mib), str(sites), str(rounds)]
    seconds: list[float] = json.loads(_run(command))
    return seconds


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr}")
    return done.stdout


def measure(mib: float, sites: int, rounds: int, repeats: int) -> dict[str, float]:
    """Medians over all rounds but the first two of each repeat (connections and buffers warm up in them)."""
    our_rounds, raw_rounds, around = [], [], []
    for _ in range(repeats):
        result = ours(mib, sites, rounds)
        our_rounds += result["round_s"][2:]
        around.append(result["wall_s"] - sum(result["round_s"]))
        raw_rounds += raw(mib, sites, rounds)[2:]
    our_s, raw_s = statistics.median(our_rounds), statistics.median(raw_rounds)
    return {"mib": mib, "round_s": our_s, "raw_s": raw_s, "ratio": our_s / raw_s, "around_s": statistics.median(around)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=float, nargs="+", default=[1.0, 256.0])
    parser.add_argument("--sites", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    table = Table(title=f"bare exchange, {args.sites} sites, medians of {args.repeats} x {args.rounds} rounds")
    for column in ("MiB", "round, s", "raw gRPC, s", "ratio", "start and stop, s"):
        table.add_column(column, justify="right")
    for mib in args.mib:
        row = measure(mib, args.sites, max(args.rounds if mib < 64 else args.rounds // 5, 4), args.repeats)
        table.add_row(*(f"{row[key]:.4g}" for key in ("mib", "round_s", "raw_s", "ratio", "around_s")))
    Console().print(table)


if __name__ == "__main__":
    main()
