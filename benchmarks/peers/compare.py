"""Measures a round without training on fl-adapters, on a raw gRPC stream, on Flower and on NVIDIA FLARE. Linux only.

Sites add 1 to every weight. fl-adapters runs as a simulation with large models in shared files, and with all bytes over
gRPC. The raw stream carries the same bytes and does nothing else. Flower runs its simulation, and a SuperLink with
SuperNodes. FLARE runs its simulator, and its proof of concept, whose ports 8002 and 8003 must be free. The first call
installs the peers from the package index, each into an environment of its own (--cache).

    python benchmarks/peers/compare.py [--mib 1 256] [--sites 2] [--rounds 10]
    python benchmarks/peers/compare.py --virtual [--sites 100 1000] [--rounds 3]   virtual sites and Flower's simulation
    python benchmarks/peers/compare.py --only ours raw                                 without the peers

Columns: number of sites; model size in MiB; seconds of a round, as the median and the slowest of all but the first two;
seconds that the command takes beside its rounds; peak memory in MiB of all processes (sum of PSS), with and without
pages of files; load of the machine before (one minute). The memory of large models is measured in a run of its own.
Writes peers.csv, peers.md and, with matplotlib, peers.png to --out.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from environments import python_of

HERE = Path(__file__).parent.resolve()
sys.path.append(str(HERE.parent))
from tree_memory import PeakMemory, adopt_orphans, end_descendants  # noqa: E402

LARGE_MIB = 64
_MEMORY_ROUNDS = 3
_TAIL = 30
_QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0"}
_COMPILED = {"PYTHONDONTWRITEBYTECODE": ""}  # lets a checkout keep its bytecode, as installed packages do


@dataclass(frozen=True)
class Contender:
    """A command that runs the exchange.

    Attributes:
        name: Name in the table.
        group: Name for `--only`.
        script: Script, called as `script ARGS SITES ROUNDS MIB`.
        args: First arguments of the script.
        peer: Peer whose environment the script needs, or "" for ours.
    """

    name: str
    group: str
    script: str
    args: tuple[str, ...] = ()
    peer: str = ""


OURS = Contender("fl-adapters, simulation", "ours", "ours.py", ("simulation",))
GRPC = Contender("fl-adapters, over gRPC", "ours", "ours.py", ("grpc",))
VIRTUAL = Contender("fl-adapters, virtual sites", "ours", "ours.py", ("virtual",))
RAW = Contender("raw gRPC stream", "raw", "../raw_grpc.py")
FLOWER = Contender("Flower 1.41.0, simulation", "flower", "flower.py", ("simulation",), peer="flower")
FLOWER_GRPC = Contender("Flower 1.41.0, deployed", "flower", "flower.py", ("deployed",), peer="flower")
FLARE = Contender("FLARE 2.9.0, simulator", "nvflare", "flare.py", ("simulator",), peer="nvflare")
FLARE_GRPC = Contender("FLARE 2.9.0, PoC", "nvflare", "flare.py", ("poc",), peer="nvflare")


@dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        name: Name of the contender.
        sites: Number of sites.
        mib: Size of the model in MiB.
        rounds: Number of rounds.
        round_s: Median seconds of a round.
        slowest_s: Seconds of the slowest round.
        around_s: Seconds of the command beside its rounds.
        peak_mib: Peak memory of all processes, in MiB.
        without_files_mib: The same without pages of files.
        load: Load of the machine before the measurement, over one minute.
    """

    name: str
    sites: int
    mib: float
    rounds: int
    round_s: float
    slowest_s: float
    around_s: float
    peak_mib: float
    without_files_mib: float
    load: float


def measured(one: Contender, sites: int, rounds: int, mib: float, cache: Path) -> Row:
    """Run a contender in a process of its own. Ends this script with the end of its output if it fails.

    The memory of a large model is measured in a second run. A sample walks through all mapped pages, which slows the
    process down by a fifth and more.
    """
    load, memory = os.getloadavg()[0], PeakMemory()
    if mib < LARGE_MIB:
        with memory:
            seconds, wall_s = _exchanged(one, sites, rounds, mib, cache)
    else:
        seconds, wall_s = _exchanged(one, sites, rounds, mib, cache)
        with memory:
            _exchanged(one, sites, min(rounds, _MEMORY_ROUNDS), mib, cache)
    settled = seconds[2:] or seconds[1:] or seconds
    around_s = wall_s - sum(seconds)
    if len(seconds) < rounds:  # FLARE does not report its last round
        around_s -= statistics.median(settled)
    peak = memory.peak
    return Row(
        name=one.name,
        sites=sites,
        mib=mib,
        rounds=rounds,
        round_s=statistics.median(settled),
        slowest_s=max(settled),
        around_s=around_s,
        peak_mib=peak.all_mib,
        without_files_mib=peak.without_files_mib,
        load=load,
    )


def _exchanged(one: Contender, sites: int, rounds: int, mib: float, cache: Path) -> tuple[list[float], float]:
    """Seconds of each round, and of the whole command."""
    python = str(python_of(one.peer, cache)) if one.peer else sys.executable
    size = f"{mib:g}"
    numbers = [size, str(sites), str(rounds)] if one is RAW else [str(sites), str(rounds), size]
    command = [python, str(HERE / one.script), *one.args, *numbers]
    environment = {**os.environ, **_QUIET, **_COMPILED}
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, open(f"{folder}/log", "w+") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, cwd=folder, env=environment)
        try:
            out, _ = process.communicate()
            wall_s = time.monotonic() - began
        finally:
            end_descendants()  # peers leave processes behind, also when this script is interrupted
        if process.returncode:
            log.seek(0)
            output = "".join([out, *log.readlines()][-_TAIL:])
            sys.exit(f"{' '.join(command)} failed with status {process.returncode}:\n{output}")
    found = json.loads(next(line for line in reversed(out.splitlines()) if line[:1] in "[{"))
    if isinstance(found, list):  # raw_grpc.py
        found = {"round_s": found, "value": float(rounds)}
    if not math.isclose(found["value"], rounds, rel_tol=1e-4):  # some contenders' mean of equal numbers is not exact
        sys.exit(f"{one.name} computed {found['value']} after {rounds} rounds instead of {rounds}")
    return found["round_s"], wall_s


def cells(row: Row) -> list[str]:
    """Cells of a row, in the order of `HEADS`."""
    return [
        row.name,
        str(row.sites),
        f"{row.mib:g}",
        f"{row.round_s:.3g}",
        f"{row.slowest_s:.3g}",
        f"{row.around_s:.1f}",
        f"{row.peak_mib:.0f}",
        f"{row.without_files_mib:.0f}",
        f"{row.load:.1f}",
    ]


HEADS = (
    "",
    "sites",
    "MiB",
    "round, s",
    "slowest, s",
    "start and end, s",
    "peak memory, MiB",
    "without files, MiB",
    "load before",
)


def markdown(rows: Sequence[Row]) -> str:
    """Markdown table whose columns are also aligned as plain text."""
    lines = [list(HEADS), *(cells(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEADS))]
    lines.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    padded = [[line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in padded)


def write(rows: Sequence[Row], out: Path) -> None:
    """Write peers.csv, peers.md and, with matplotlib, peers.png."""
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "peers.csv", "w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, list(asdict(rows[0])))
        table.writeheader()
        table.writerows(asdict(row) for row in rows)
    (out / "peers.md").write_text(markdown(rows), encoding="utf-8")
    try:
        draw(rows, out / "peers.png")
    except ImportError:
        print("no plot: matplotlib is not installed", file=sys.stderr)


def draw(rows: Sequence[Row], path: Path) -> None:
    """Plot seconds of a round on a logarithmic axis, with a panel per number of sites and model size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = list(dict.fromkeys((row.sites, row.mib) for row in rows))
    figure, axes = pyplot.subplots(1, len(panels), figsize=(5 * len(panels), 3.2), squeeze=False, layout="constrained")
    for (sites, mib), ax in zip(panels, axes[0], strict=True):
        mine = [row for row in rows if (row.sites, row.mib) == (sites, mib)][::-1]
        bars = ax.barh([row.name for row in mine], [row.round_s for row in mine])
        ax.bar_label(bars, [f" {row.round_s:.3g} s" for row in mine])
        ax.set(xscale="log", title=f"{sites} sites, {mib:g} MiB", xlabel="seconds of a round without training")
        ax.margins(x=0.3)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=float, nargs="+")
    parser.add_argument("--sites", type=int, nargs="+")
    parser.add_argument("--rounds", type=int, help="default: 10; 8 for large models, 3 for virtual sites")
    parser.add_argument("--virtual", action="store_true")
    parser.add_argument("--only", nargs="+", choices=["ours", "raw", "flower", "nvflare"])
    parser.add_argument("--json", action="store_true", help="print the rows as one JSON list on stdout")
    parser.add_argument("--cache", type=Path, default=HERE.parents[1] / ".venv-peers", help="the peers' environments")
    parser.add_argument("--out", type=Path, default=Path("runs/peers"))
    args = parser.parse_args()
    adopt_orphans()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    contenders = [VIRTUAL, FLOWER] if args.virtual else [OURS, GRPC, RAW, FLOWER, FLARE, FLOWER_GRPC, FLARE_GRPC]
    contenders = [one for one in contenders if not args.only or one.group in args.only]
    rows: list[Row] = []
    for mib in args.mib or ([1.0] if args.virtual else [1.0, 256.0]):
        for sites in args.sites or ([100, 1000] if args.virtual else [2]):
            rounds = args.rounds or (3 if args.virtual else 8 if mib >= LARGE_MIB else 10)
            for one in contenders:
                print(f"{one.name}: {sites} sites, {mib:g} MiB, {rounds} rounds", file=sys.stderr, flush=True)
                rows.append(measured(one, sites, rounds, mib, args.cache))
                write(rows, args.out)  # after each row, in case a later one fails
    print(json.dumps([asdict(row) for row in rows]) if args.json else markdown(rows))


if __name__ == "__main__":
    main()
