"""Measures what watching a run costs it: rounds of the bare exchange with the screen of a terminal, and without.

Within each run the screen is switched on and off every few rounds, so that both halves share processes, connections and
caches, and the noise of the machine. The duration of a round is the time from the end of one round to the end of the
next: whatever a listener takes is in it.

    python benchmarks/watched_exchange.py [--mib 1 64] [--sites 2] [--rounds 400] [--block 20] [--repeats 3]

Columns: model size in MiB; pairs of blocks; median seconds of a round without and with the screen; by how much a round
is longer, as the median over the pairs with its standard error; seconds that the report takes once, after the last
round.
"""

from __future__ import annotations

import argparse
import io
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fl_adapters import Job, Simulation
from fl_adapters.cli.live import live_table
from fl_adapters.environments.report import write_report
from fl_runtime.types import Event, Listener

HERE = Path(__file__).parent
WARM_UP = 5  # rounds in which connections and mappings warm up


class OnAndOff:
    """Listener that shows the screen in every second block of rounds, and notes how long each round took.

    Args:
        block: Rounds of a block. The first round of each, in which the screen appears or goes, is not counted.

    Attributes:
        blocks: Seconds of the rounds of each block, in order. The screen is on in the odd ones.
    """

    def __init__(self, block: int) -> None:
        self._block, self._ended, self._count = block, 0.0, -WARM_UP
        self._console = Console(file=io.StringIO(), force_terminal=True, width=100, height=30)
        self._shown = ExitStack()
        self._screen: Listener | None = None
        self.blocks: list[list[float]] = []

    def __call__(self, event: Event) -> None:
        if self._screen is not None:
            self._screen(event)
        if event.kind == "round_finished":
            now = time.perf_counter()
            self._count += 1
            if self._count > 0 and self._count % self._block:
                self.blocks[-1].append(now - self._ended)
            elif self._count >= 0:
                self._switch()
            self._ended = time.perf_counter()

    def _switch(self) -> None:
        self.close()
        if len(self.blocks) % 2:
            self._screen = self._shown.enter_context(live_table(self._console))
        self.blocks.append([])

    def close(self) -> None:
        """Take the screen away."""
        self._shown.close()
        self._screen = None


def watched(mib: float, sites: int, rounds: int, block: int) -> tuple[list[list[float]], float]:
    """Seconds of the rounds of each block of one run, and seconds of its report."""
    listener = OnAndOff(block)
    with tempfile.TemporaryDirectory() as folder:
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


def measure(mib: float, sites: int, rounds: int, block: int, repeats: int) -> dict[str, str]:
    """One row of the table."""
    pairs: list[tuple[float, float]] = []
    reports = []
    for _ in range(repeats):
        blocks, report_s = watched(mib, sites, rounds, block)
        pairs += pairs_of(blocks)
        reports.append(report_s)
    longer = [with_s / without_s - 1 for without_s, with_s in pairs]
    error = statistics.stdev(longer) / len(longer) ** 0.5 * 1.25 if len(longer) > 1 else 0.0  # of a median
    return {
        "MiB": f"{mib:g}",
        "pairs": str(len(pairs)),
        "without, s": f"{statistics.median(pair[0] for pair in pairs):.4g}",
        "with, s": f"{statistics.median(pair[1] for pair in pairs):.4g}",
        "longer by": f"{statistics.median(longer):+.1%} ± {error:.1%}",
        "report, s": f"{statistics.median(reports):.2g}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=float, nargs="+", default=[1.0, 64.0])
    parser.add_argument("--sites", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=400)
    parser.add_argument("--block", type=int, default=20, help="rounds with the screen, or without, at a stretch")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    table = Table(title=f"watched exchange, {args.sites} sites, {args.repeats} x {args.rounds} rounds")
    for mib in args.mib:
        rounds = args.rounds if mib < 16 else max(args.rounds // 4, 4 * args.block)
        row = measure(mib, args.sites, rounds, args.block, args.repeats)
        if not table.columns:
            for column in row:
                table.add_column(column, justify="right")
        table.add_row(*row.values())
    Console().print(table)


if __name__ == "__main__":
    main()
