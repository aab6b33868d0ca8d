"""Shows what a federation of four sites gains when they train an image classifier together.

python demo.py                   # on Fashion-MNIST if it is found, else on scikit-learn's digits
python demo.py --data digits

Prints the accuracy of each site alone, of the federation, and of training on all data in one place, on the same
held-out images. Ends with status 1 unless the federation is within 0.02 of central and above every site alone.
"""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parents[1]))

import image_demo  # noqa: E402
from comparison import Score  # noqa: E402
from data import ROWS  # noqa: E402

ROUNDS = {"Fashion-MNIST": 20, "digits": 60}  # each a pass over the data; more for the digits, which are few


def compare(console: Console, *, seed: int, data: str | None = None) -> list[Score]:
    """Train in all three ways and return the accuracies: each site alone, "federated", "central"."""
    return image_demo.compare(console, HERE / "train.py", ROUNDS, rows=ROWS, seed=seed, data=data)


if __name__ == "__main__":
    image_demo.main(__doc__, HERE / "train.py", ROUNDS, ROWS)
