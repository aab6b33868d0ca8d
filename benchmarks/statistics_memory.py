"""Measures memory and time of `fl_adapters.statistics.describe` over large tables, read chunk by chunk. Linux only.

    python benchmarks/statistics_memory.py [--rows 10000000] [--sites 2] [--chunk 200000]

Each site is a process with a table of 5 columns of random floats, an integer, a text with 12 categories, and gaps.
Rows: a site's peak memory as the system counts it (VmHWM, with Python and its libraries), the seconds of `describe`,
and the largest error of a quantile beside the bound that the result states.

Ends with status 1 if a site needs more than 500 MB, or if a quantile is further off than its bound.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd

from fl_adapters.testing import LocalFederation

MOST_MB = 500


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--sites", type=int, default=2)
    parser.add_argument("--chunk", type=int, default=200_000)
    parser.add_argument("--as-site", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.as_site is not None:
        describe_chunks(args.rows, args.chunk, args.as_site)
        return
    command = [sys.executable, str(Path(__file__).resolve()), "--rows", str(args.rows), "--chunk", str(args.chunk)]
    with LocalFederation(sites=args.sites, sockets=True) as federation:
        sites = [
            subprocess.Popen(
                [*command, "--as-site", str(number)],
                env=os.environ | {"FL_ADAPTERS_KIT": place.kit, "OMP_NUM_THREADS": "1"},
            )
            for number, place in enumerate(federation.places)
        ]
        failed = sum(site.wait() for site in sites) > 0  # waits for all
        federation.result()
    sys.exit(1 if failed else 0)


def chunks(rows: int, size: int, seed: int) -> Iterator[pd.DataFrame]:
    """Frames of random rows; the column "even" holds 0 to 1 in equal steps, so that its quantiles are known."""
    draw = np.random.default_rng(seed)
    for start in range(0, rows, size):
        count = min(size, rows - start)
        frame = pd.DataFrame(draw.normal(50, 20, (count, 4)), columns=["a", "b", "c", "d"])
        frame.loc[draw.random(count) < 0.1, "d"] = np.nan
        frame["even"] = (np.arange(start, start + count) * 7_919 % rows) / (rows - 1)
        frame["whole"] = draw.integers(0, 1_000_000, count)
        frame["text"] = draw.choice([f"kind {number}" for number in range(12)], count)
        yield frame


def describe_chunks(rows: int, size: int, number: int) -> None:
    """Describe the table of a site and print its row."""
    from fl_adapters.statistics import Numeric, describe

    began = time.perf_counter()
    found = describe(chunks(rows, size, number))
    seconds = time.perf_counter() - began
    status = Path("/proc/self/status").read_text("ascii").splitlines()
    peak_mb = int(next(line.split()[1] for line in status if line.startswith("VmHWM"))) * 1024 / 1e6
    even = found.features["even"]
    assert isinstance(even, Numeric)
    errors = {level: abs(value - level) for level, value in even.quantiles.items() if value is not None}
    within = all(error <= even.value_error[level] for level, error in errors.items())
    print(
        f"{rows} rows at site {number + 1} of {len(found.sites)}: {peak_mb:.0f} MB, {seconds:.0f} s, quantiles off by "
        f"{max(errors.values()):.1e}, bound {max(even.value_error.values()):.1e}",
        flush=True,
    )
    if peak_mb > MOST_MB or not within:
        sys.exit(1)


if __name__ == "__main__":
    main()
