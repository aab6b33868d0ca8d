"""Four sites train together, and what that is worth: the accuracy of each site alone, of the federation, and of all
data in one place, on the same held-out rows, with the same settings and passes over the data.

python demo.py                   # Fashion-MNIST where it is found, else scikit-learn's digits
python demo.py --data digits

Ends with status 1 unless the federation is within two points of central and above every site alone.
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

ROUNDS = {"Fashion-MNIST": 20, "digits": 60}  # one pass over the data each; the digits are few


def compare(console: Console, *, seed: int, data: str | None = None) -> list[Score]:
    """The scores of each site alone, "federated" and "central"."""
    return image_demo.compare(console, HERE / "train.py", ROUNDS, rows=ROWS, seed=seed, data=data)


if __name__ == "__main__":
    image_demo.main(__doc__, HERE / "train.py", ROUNDS, ROWS)
