"""Measures what watching a run costs it: rounds of the bare exchange with the screen and tracking, and without.

Within each run the screen of a terminal and the trackers are switched on and off every few rounds, so that both halves
share processes, connections and caches, and the noise of the machine. Tracked is into TensorBoard's and MLflow's files
(SQLite) on this machine, as far as these packages are installed; `--track none` leaves it to the screen. The duration
of a round is the time from the end of one round to the end of the next: whatever a listener takes is in it.

    python benchmarks/watched_exchange.py [--mib 1 64] [--sites 2] [--rounds 400] [--block 20] [--repeats 3]

Columns: model size in MiB; pairs of blocks; median seconds of a round without and with them; by how much a round is
longer, as the mean over the pairs with its 95 % interval; seconds that the report takes once, after the last round.
A line for each size sums it up. More `--repeats` make the interval narrower.
"""

from __future__ import annotations

import argparse
import io
import math
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fl_adapters import Job, Simulation
from fl_adapters.cli.live import live_table
from fl_adapters.environments.report import write_report
from fl_adapters.environments.tracking import Tracking
from fl_runtime.types import Event, Listener

HERE = Path(__file__).parent
WARM_UP = 5  # rounds in which connections and mappings warm up
SETTLING = 2  # rounds after a switch that are not counted


class OnAndOff:
    """Listener that shows the screen and tracks in every second block of rounds, and notes how long each round took.

    Args:
        block: Rounds of a block. The first ones, in which the screen appears or goes, are not counted.
        folder: Folder for what the trackers write.
        tools: Names of the trackers: "tensorboard", "mlflow".

    Attributes:
        blocks: Seconds of the rounds of each block, in order. The screen is on in the odd ones.
    """

    def __init__(self, block: int, folder: Path, tools: Sequence[str]) -> None:
        places = {"tensorboard": f"tensorboard:{folder / 'curves'}", "mlflow": f"mlflow:sqlite:///{folder}/mlflow.db"}
        targets = [places[tool] for tool in tools]
        first = Tracking(targets, "watched", "watched", {})  # imports the packages, and makes the files
        first(Event("started", time.time()))
        first.close(None, folder)
        self._folder, self._tracked = folder, Tracking(targets, "watched", "watched", {})
        self._block, self._ended, self._count = block, 0.0, -WARM_UP
        self._console = Console(file=io.StringIO(), force_terminal=True, width=100, height=30)
        self._shown = ExitStack()
        self._screen: Listener | None = None
        self.blocks: list[list[float]] = []

    def __call__(self, event: Event) -> None:
        if self._screen is not None:
            self._screen(event)
            self._tracked(event)
        if event.kind == "round_finished":
            self._count += 1
            if self._count >= 0 and self._count % self._block == 0:
                self._switch()
            elif self._count > 0 and self._count % self._block > SETTLING:
                self.blocks[-1].append(event.time - self._ended)  # events wait in a queue: not when this one was taken
            self._ended = event.time

    def _switch(self) -> None:
        self._shown.close()
        self._screen = self._shown.enter_context(live_table(self._console)) if len(self.blocks) % 2 else None
        self.blocks.append([])

    def close(self) -> None:
        """Take the screen away, and wait until the trackers have written all."""
        self._shown.close()
        self._tracked.close(None, self._folder)


def watched(mib: float, sites: int, rounds: int, block: int, tools: Sequence[str]) -> tuple[list[list[float]], float]:
    """Seconds of the rounds of each block of one run, and seconds of its report."""
    with tempfile.TemporaryDirectory() as folder:
        listener = OnAndOff(block, Path(folder), tools)
        environment = Simulation(sites=sites, args=(str(mib),), folder=folder, quiet=True, listeners=[listener])
        result = Job(app=str(HERE / "bare_site.py"), rounds=rounds).run(environment)
        listener.close()
        began = time.perf_counter()
        write_report(result.folder)
        return listener.blocks, time.perf_counter() - began


def pairs_of(blocks: Sequence[Sequence[float]]) -> list[tuple[float, float]]:
    """Median round without and with the screen, for each pair of neighbouring blocks."""
    whole = [statistics.median(block) for block in blocks if len(block) > 1]
    return [(whole[at], whole[at + 1]) for at in range(0, len(whole) - 1, 2)]


def measure(mib: float, rounds: int, args: argparse.Namespace) -> tuple[dict[str, str], str]:
    """One row of the table, and the line that sums it up."""
    pairs: list[tuple[float, float]] = []
    reports = []
    for _ in range(args.repeats):
        blocks, report_s = watched(mib, args.sites, rounds, args.block, args.track)
        pairs += pairs_of(blocks)
        reports.append(report_s)
    longer = [with_s / without_s - 1 for without_s, with_s in pairs]
    mean = statistics.mean(longer)
    half = 1.96 * statistics.stdev(longer) / len(longer) ** 0.5 if len(longer) > 1 else math.inf
    watched_by = " and ".join(["the screen", *args.track])
    interval = f"95 % interval {mean - half:+.2%} to {mean + half:+.2%}"
    line = f"{mib:g} MiB: a round with {watched_by} is {mean:+.2%} longer, {interval}"
    row = {
        "MiB": f"{mib:g}",
        "pairs": str(len(pairs)),
        "without, s": f"{statistics.median(pair[0] for pair in pairs):.4g}",
        "with, s": f"{statistics.median(pair[1] for pair in pairs):.4g}",
        "longer by": f"{mean:+.1%} ± {half:.1%}",
        "report, s": f"{statistics.median(reports):.2g}",
    }
    return row, line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=float, nargs="+", default=[1.0, 64.0])
    parser.add_argument("--sites", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=400)
    parser.add_argument("--block", type=int, default=20, help="rounds with them, or without, at a stretch")
    parser.add_argument("--repeats", type=int, default=3)
    installed = [tool for tool in ("tensorboard", "mlflow") if find_spec(tool)]
    parser.add_argument("--track", nargs="+", choices=[*installed, "none"], default=installed, help="trackers, or none")
    args = parser.parse_args()
    args.track = [tool for tool in args.track if tool != "none"]
    table = Table(title=f"watched exchange, {args.sites} sites, {args.repeats} x {args.rounds} rounds")
    lines = []
    for mib in args.mib:
        rounds = args.rounds if mib < 16 else max(args.rounds // 4, 4 * args.block)
        row, line = measure(mib, rounds, args)
        lines.append(line)
        if not table.columns:
            for column in row:
                table.add_column(column, justify="right")
        table.add_row(*row.values())
    Console().print(table)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
