"""The chaos suite: runs under seeded faults, each of which must end as if there had been none.

A fifth of the faults hit scripts of Hugging Face, Lightning, Keras and XGBoost, a fifth a provisioned federation with a
queue of jobs and site daemons: all its processes ("queue"), its sites alone ("daemon"), or one that has two servers
and a PostgreSQL ("failover"). The rest hit a bare loop.

usage: PYTHONPATH=tests/_support python tests/chaos/chaos.py [--seed 0] [--faults 500] [--target NAME] [--keep FOLDER]
"""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from chaos_checks import check, model_of
from chaos_disk import Disk
from chaos_federation import Federation
from chaos_plan import Fault, faults
from chaos_processes import ChaosError
from chaos_queue import QueueFederation
from chaos_targets import BARE, FAILOVER, FRAMEWORKS, QUEUES, Bits, QueueTarget, Target
from postgres import programs

_MIB = 256
_RUN_S, _FAULT_S = 900.0, 15.0
"""Time limits of a run, and of each fault in it: generous, since the machine may be busy; a hang lasts for ever."""

AnyTarget = Target | QueueTarget

Tally = dict[str, Counter[str]]
"""Name of a target -> number of faults of each kind, and of "(runs)"."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--faults", type=int, default=500)
    targets = {target.name: target for target in (*BARE, *_queues(), *FRAMEWORKS)}
    parser.add_argument("--target", choices=targets, help="this one alone")
    parser.add_argument("--keep", type=Path, help="leave the folders of the runs here")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # and no process is left behind
    shares = shared_out(args.faults)
    if args.target:
        shares = {targets[args.target]: args.faults}
    began, tally = time.monotonic(), Tally()
    try:
        suffer(args.seed, shares, tally, args.keep)
    except ChaosError as error:
        show(tally)
        sys.exit(f"FAILED with seed {args.seed}: {error}")
    print(f"{time.monotonic() - began:.0f} s, seed {args.seed}: every run ended with the bits of an undisturbed one,")
    print("no acknowledged update lost, none counted twice, no hang. Faults:")
    show(tally)


def shared_out(wanted: int) -> dict[AnyTarget, int]:
    """Divide the faults among the targets: at least a fifth to the frameworks, and a fifth to the queues."""
    shares: dict[AnyTarget, int] = {}
    for targets in (FRAMEWORKS, _queues()):
        shares |= dict.fromkeys(targets, -(-wanted // (5 * len(targets))))
    rest = max(wanted - sum(shares.values()), 0)
    return {**shares, **dict.fromkeys(BARE, -(-rest // len(BARE)))}


def _queues() -> tuple[QueueTarget, ...]:
    """The targets with a queue; that of failover needs PostgreSQL."""
    if programs() is None:
        print("without PostgreSQL, no fault hits failover: apt-get install postgresql", file=sys.stderr)
        return QUEUES
    return (*QUEUES, FAILOVER)


def suffer(seed: int, shares: Mapping[AnyTarget, int], tally: Tally, keep: Path | None = None) -> None:
    """Run the targets in turn until each has had its share of faults. Raises ChaosError."""
    plan, runs = faults(seed), 0
    tally.update({target.name: Counter() for target in shares})

    def missing(target: AnyTarget) -> int:
        return shares[target] - total(tally[target.name])

    while any(missing(target) > 0 for target in shares):
        target = max(shares, key=lambda target: missing(target) / max(shares[target], 1))
        counts = one_run(target, plan, missing(target), keep and keep / f"run-{runs}")
        tally[target.name].update(counts + Counter({"(runs)": 1}))
        runs += 1
        so_far = sum(map(total, tally.values()))
        print(f"run {runs}: {target.name}: {so_far} faults so far", file=sys.stderr, flush=True)


def one_run(target: AnyTarget, plan: Iterator[Fault], most: int, keep: Path | None = None) -> Counter[str]:
    """Run a target under at most `most` faults of the plan; count them by kind. Raises ChaosError."""
    wanted = target.wanted() if target.wanted else undisturbed(target)
    with running(target, keep) as federation:
        while not federation.over and total(federation.counts) < most:
            fault = next(plan)
            if target.framework and fault.after_s > 0:
                federation.gather(_RUN_S)
            time.sleep(fault.after_s)
            federation.watch()
            federation.suffer(fault)
        federation.finish(_RUN_S + _FAULT_S * total(federation.counts))
        _check(federation, wanted)
        return federation.counts


@cache
def undisturbed(target: Target) -> Bits:
    """Return the final model of a run without faults."""
    with running(target) as federation:
        federation.finish(_RUN_S)
        wanted = model_of(federation)
        check(federation, wanted)
        return wanted


def _check(federation: Federation | QueueFederation, wanted: Bits) -> None:
    if isinstance(federation, QueueFederation):
        federation.check(wanted)
    else:
        check(federation, wanted)


@contextmanager
def running(target: AnyTarget, keep: Path | None = None) -> Iterator[Federation | QueueFederation]:
    """Start a target's processes in a folder, which is kept if `keep` names it."""
    folder = keep or Path(tempfile.mkdtemp(prefix="chaos-"))
    folder.mkdir(parents=True, exist_ok=True)
    disk = Disk(folder / "server", _MIB)
    federation = _made(target, folder, disk)
    try:
        federation.start()
        yield federation
    finally:
        federation.close()
        if keep is not None:
            shutil.copytree(disk.folder, folder / "disk", dirs_exist_ok=True)
        disk.close()
        if keep is None:
            shutil.rmtree(folder, ignore_errors=True)


def _made(target: AnyTarget, folder: Path, disk: Disk) -> Federation | QueueFederation:
    if isinstance(target, Target):
        return Federation(target, folder, disk)
    if not target.two_servers:
        return QueueFederation(target, folder, disk)
    from chaos_failover import FailoverFederation  # needs PostgreSQL's driver

    return FailoverFederation(target, folder, disk)


def total(counts: Counter[str]) -> int:
    return sum(count for kind, count in counts.items() if not kind.startswith("("))


def show(tally: Tally) -> None:
    """Print a table: a row for each kind of fault, a column for each target."""
    kinds = sorted({kind for counts in tally.values() for kind in counts}, key=lambda kind: (kind[0] == "(", kind))
    print(" " * 32, *(f"{name:>{_width(name)}}" for name in tally), "    all")
    for kind in kinds:
        _row(kind, tally, [counts[kind] for counts in tally.values()])
    _row("all faults", tally, [total(counts) for counts in tally.values()])


def _row(title: str, tally: Tally, numbers: Sequence[int]) -> None:
    cells = [f"{number:{_width(name)}}" for name, number in zip(tally, numbers, strict=True)]
    print(f"  {title:30}", *cells, f"{sum(numbers):7}")


def _width(name: str) -> int:
    return max(len(name), 5)


if __name__ == "__main__":
    main()
