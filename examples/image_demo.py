"""The demo of the image examples: four sites, each alone, together, and with all data in one place."""

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
    """The accuracy of each site alone, "federated" and "central". Trains all of them; shows what is going on.

    rounds: of the federation, and passes over the data, by data set.
    """
    name = load(data, "1/1", rows).name
    arguments = ["--rows", str(rows), "--seed", str(seed), *(["--data", data] if data else [])]
    _, trained = train_three_ways(script, sites=SITES, rounds=rounds[name], arguments=arguments, console=console)
    return [Score(one.name, len(load(data, one.shard, rows).train[0]), printed(one.log), one.folder) for one in trained]


def printed(log: Path) -> float:
    """The accuracy that the script has printed at its end."""
    return float(ACCURACY.findall(log.read_text("utf-8"))[-1])


def main(doc: str, script: Path, rounds: Mapping[str, int], rows: int, argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder of Fashion-MNIST's files, or: digits")
    parser.add_argument("--rows", type=int, default=rows, help="training rows of all sites together, 0: all")
    parser.add_argument("--rounds", type=int, help="one pass over the data each")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    data = load(args.data, "1/1", args.rows)
    chosen = {data.name: args.rounds or rounds[data.name]}
    console, began = Console(), time.monotonic()
    scores = compare(console, script, chosen, rows=args.rows, seed=args.seed, data=args.data)
    console.print(f"{time.monotonic() - began:.0f} s in all.")
    title = f"{data.name}: accuracy on the same {len(data.test[0]):,} held-out rows"
    show(scores, title, "accuracy", console)
