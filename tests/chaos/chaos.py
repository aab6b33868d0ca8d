"""The chaos suite: runs under faults that a seed decides, each of which must end as if there had been none.

usage: PYTHONPATH=tests/runtime python tests/chaos/chaos.py [--seed 0] [--faults 500] [--keep FOLDER]
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from chaos_checks import check
from chaos_disk import Disk
from chaos_federation import ChaosError, Federation
from chaos_plan import Fault, faults
from chaos_targets import Target, bare

TARGETS = (bare(3 * 2**10, 25), bare(200, 60), bare(9 * 2**10, 12))
_MIB = 256
_RUN_S, _FAULT_S = 180.0, 10.0
"""How long a run may take: generous, since the machine may be busy; what hangs, hangs for ever."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--faults", type=int, default=500)
    parser.add_argument("--keep", type=Path, help="leave the folders of the runs here")
    args = parser.parse_args()
    began = time.monotonic()
    try:
        counts, runs = suffered(args.seed, args.faults, args.keep)
    except ChaosError as error:
        sys.exit(f"FAILED with seed {args.seed}: {error}")
    print(f"{runs} runs in {time.monotonic() - began:.0f} s, seed {args.seed}: every one ended with the bits of an")
    print("undisturbed run, no acknowledged update lost, none counted twice, no hang. Faults:")
    for kind, count in sorted(counts.items()):
        print(f"  {count:5}  {kind}")
    print(f"  {total(counts):5}  in all")


def suffered(seed: int, wanted: int, keep: Path | None = None) -> tuple[Counter[str], int]:
    """Runs until `wanted` faults have happened: how many of each kind, and in how many runs. Raises ChaosError."""
    counts: Counter[str] = Counter()
    plan, runs = faults(seed, TARGETS[0].sites), 0
    while total(counts) < wanted:
        target = TARGETS[(seed + runs) % len(TARGETS)]
        counts += one_run(target, plan, wanted - total(counts), keep and keep / f"run-{runs}")
        runs += 1
        print(f"run {runs}: {target.name}: {total(counts)} faults so far", file=sys.stderr, flush=True)
    return counts, runs


def one_run(target: Target, plan: Iterator[Fault], most: int, keep: Path | None = None) -> Counter[str]:
    """A run under at most so many faults of the plan, and how many of each kind there were. Raises ChaosError."""
    folder = keep or Path(tempfile.mkdtemp(prefix="chaos-"))
    folder.mkdir(parents=True, exist_ok=True)
    disk = Disk(folder / "server", _MIB)
    federation = Federation(target, folder, disk)
    try:
        federation.start()
        while not federation.over and total(federation.counts) < most:
            fault = next(plan)
            time.sleep(fault.after_s)
            federation.watch()
            federation.suffer(fault)
        federation.finish(_RUN_S + _FAULT_S * total(federation.counts))
        check(federation)
        return federation.counts
    finally:
        federation.close()
        if keep is not None:
            shutil.copytree(disk.folder, folder / "disk", dirs_exist_ok=True)
        disk.close()
        if keep is None:
            shutil.rmtree(folder, ignore_errors=True)


def total(counts: Counter[str]) -> int:
    return sum(count for kind, count in counts.items() if not kind.startswith("("))


if __name__ == "__main__":
    main()
