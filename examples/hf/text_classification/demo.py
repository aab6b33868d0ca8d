"""Three sites fine-tune MiniLM together, and what that is worth: the accuracy of each site training alone, of the
federation, and of training on all data in one place, on the same held-out rows.
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
    """The scores of each site alone, "federated" and "central". Trains all of them; shows what is going on."""
    arguments = ["--rows", str(rows), "--seed", str(seed), *(["--data", data] if data else [])]
    script = HERE / "train.py"
    _, trained = train_three_ways(script, sites=sites, rounds=rounds, arguments=arguments, console=console)

    from evaluate import accuracy_of  # loads torch, which nothing above needs

    scores = []
    with console.status("scoring on the held-out rows ..."):
        for one in trained:
            own = load(data, one.shard, rows)
            scores.append(Score(one.name, len(own.train), accuracy_of(one.folder, own), one.folder))
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sites", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="one pass over the data each")
    parser.add_argument("--rows", type=int, default=ROWS, help="training rows of all sites together, 0: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", help="file or folder with label and text, or a hub data set; default: docstrings")
    args = parser.parse_args()
    console = Console()
    began = time.monotonic()
    scores = compare(console, **vars(args))
    console.print(f"{time.monotonic() - began:.0f} s in all.")
    show(scores, f"Accuracy on the same {len(load(args.data).test):,} held-out rows", "accuracy", console)


if __name__ == "__main__":
    main()
