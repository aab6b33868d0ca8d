"""Demo of the image examples: trains four sites alone, together, and on all data in one place, and compares them."""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console

from comparison import Score, show, train_three_ways
from images import load

SITES = 4
ACCURACY = re.compile(r"^accuracy on \d+ held-out rows: ([0-9.]+)$", re.MULTILINE)


def compare(
    console: Console, script: Path, rounds: Mapping[str, int], *, rows: int, seed: int = 0, data: str | None = None
) -> list[Score]:
    """Train in all three ways and return the accuracies, in the order of the table.

    Args:
        console: Console for progress.
        script: The training script without federation.
        rounds: Number of rounds (each a pass over the data) by data set.
        rows: Training rows of all sites together; 0 for all.
        seed: Seed of the training.
        data: Folder of Fashion-MNIST's files, "digits", or None to use what is found.

    Returns:
        Scores of each site alone, "federated" and "central".
    """
    name = load(data, "1/1", rows).name
    arguments = ["--rows", str(rows), "--seed", str(seed), *(["--data", data] if data else [])]
    _, trained = train_three_ways(script, sites=SITES, rounds=rounds[name], arguments=arguments, console=console)
    return [Score(one.name, len(load(data, one.shard, rows).train[0]), printed(one.log), one.folder) for one in trained]


def printed(log: Path) -> float:
    """The accuracy at the end of a script's output."""
    return float(ACCURACY.findall(log.read_text("utf-8"))[-1])


def main(doc: str, script: Path, rounds: Mapping[str, int], rows: int, argv: Sequence[str] | None = None) -> None:
    """Command line of the demo; `doc` is its help text."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder of Fashion-MNIST's files, or: digits")
    parser.add_argument(
        "--rows", type=int, default=rows, help="training rows of all sites together; 0 for all (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=int, help="rounds, each a pass over the data (default: by data set)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    data = load(args.data, "1/1", args.rows)
    chosen = {data.name: args.rounds or rounds[data.name]}
    console, began = Console(), time.monotonic()
    scores = compare(console, script, chosen, rows=args.rows, seed=args.seed, data=args.data)
    console.print(f"{time.monotonic() - began:.0f} s in total.")
    title = f"{data.name}: accuracy on the same {len(data.test[0]):,} held-out rows"
    show(scores, title, "accuracy", console)
