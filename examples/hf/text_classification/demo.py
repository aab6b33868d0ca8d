"""Shows what a federation of three sites gains when they fine-tune MiniLM together.

python demo.py

Prints the accuracy of each site alone, of the federation, and of training on all data in one place, on the same
held-out rows. Ends with status 1 unless the federation is within 0.02 of central and above every site alone.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from rich.console import Console

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parents[1]))

from comparison import Score, show, train_three_ways  # noqa: E402
from data import ROWS, load  # noqa: E402

ROUNDS = 5


def compare(
    console: Console,
    *,
    sites: int = 3,
    rounds: int = ROUNDS,
    rows: int = ROWS,
    seed: int = 0,
    data: str | None = None,
) -> list[Score]:
    """Train in all three ways and return the accuracies: each site alone, "federated", "central"."""
    arguments = ["--rows", str(rows), "--seed", str(seed), *(["--data", data] if data else [])]
    script = HERE / "train.py"
    _, trained = train_three_ways(script, sites=sites, rounds=rounds, arguments=arguments, console=console)

    from evaluate import accuracy_of  # imports torch, which takes a while

    scores = []
    with console.status("scoring on the held-out rows ..."):
        for one in trained:
            own = load(data, one.shard, rows)
            scores.append(Score(one.name, len(own.train), accuracy_of(one.folder, own), one.folder))
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sites", type=int, default=3)
    parser.add_argument(
        "--rounds", type=int, default=ROUNDS, help="rounds, each a pass over the data (default: %(default)s)"
    )
    parser.add_argument(
        "--rows", type=int, default=ROWS, help="training rows of all sites together; 0 for all (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", help="file or folder with label and text, or a hub data set (default: docstrings)")
    args = parser.parse_args()
    console = Console()
    began = time.monotonic()
    scores = compare(console, **vars(args))
    console.print(f"{time.monotonic() - began:.0f} s in total.")
    show(scores, f"Accuracy on the same {len(load(args.data).test):,} held-out rows", "accuracy", console)


if __name__ == "__main__":
    main()
