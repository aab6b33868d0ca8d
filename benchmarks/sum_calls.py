"""Measures a call of `fl_adapters.sums` beside a round of `fl_adapters.connect`, with processes over loopback gRPC.

    python benchmarks/sum_calls.py [--sites 3] [--numbers 50] [--calls 300]

Rows: median and fastest time of a call at the first site, and CPU time of the server for each.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

import fl_adapters as fl
from fl_adapters.testing import LocalFederation


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sites", type=int, default=3)
    parser.add_argument("--numbers", type=int, default=50)
    parser.add_argument("--calls", type=int, default=300)
    parser.add_argument("--as-site", choices=("sum", "round"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.as_site:
        seconds = summed(args.numbers, args.calls) if args.as_site == "sum" else trained(args.numbers, args.calls)
        print(f"median {statistics.median(seconds) * 1e3:.1f} ms, fastest {min(seconds) * 1e3:.1f} ms")
        return
    for kind in ("sum", "round"):
        measure(kind, args)


def measure(kind: str, args: argparse.Namespace) -> None:
    """Run the sites and print a row."""
    command = [sys.executable, str(Path(__file__).resolve()), "--as-site", kind]
    command += ["--numbers", str(args.numbers), "--calls", str(args.calls)]
    with LocalFederation(sites=args.sites, sockets=True) as federation:
        began = time.process_time()
        sites = [
            subprocess.Popen(
                command, env=os.environ | {"FL_ADAPTERS_KIT": place.kit}, stdout=subprocess.PIPE, text=True
            )
            for place in federation.places
        ]
        said = [site.communicate()[0].strip() for site in sites]
        cpu_ms = (time.process_time() - began) / args.calls * 1e3
        federation.result()
    print(f"{kind:5}  {args.sites} sites, {args.numbers} numbers: {said[0]}, server {cpu_ms:.1f} ms of CPU time")


def summed(numbers: int, calls: int) -> list[float]:
    """Seconds of each call of `sum`, but for the first."""
    values, seconds = {"x": np.ones(numbers)}, []
    with fl.sums() as federation:
        federation.sum(values)
        for _ in range(calls - 1):
            began = time.perf_counter()
            federation.sum(values)
            seconds.append(time.perf_counter() - began)
    return seconds


def trained(numbers: int, calls: int) -> list[float]:
    """Seconds of each round without training, but for the first."""
    seconds, began = [], 0.0
    with fl.connect() as site:
        for task in site.tasks(initial={"x": np.ones(numbers)}, rounds=calls):
            if task.round > 2:
                seconds.append(time.perf_counter() - began)
            began = time.perf_counter()
            task.submit(task.arrays, num_examples=1)
    return seconds


if __name__ == "__main__":
    main()
