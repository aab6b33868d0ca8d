"""Compares five uneven sites with their own pipelines, their federation, and all rows in one place.

python demo.py
python demo.py --data breast_cancer

Prints the area under the ROC curve (AUC) on held-out rows of a logistic regression and of boosted trees.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from data import SHARES

HERE = Path(__file__).parent
SITES = len(SHARES)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder of the data set, or: breast_cancer")
    args = parser.parse_args()
    console = Console()
    given = ["--data", args.data] if args.data else []
    table = Table(title="area under the ROC curve on held-out rows")
    for column in ("training", "rows", "logistic regression", "trees"):
        table.add_column(column, justify="left" if column == "training" else "right")
    with console.status("training ..."):
        alone = [trained(["--shard", f"{number}/{SITES}", *given]) for number in range(1, SITES + 1)]
        together, everything = federated(given), trained(["--shard", "1/1", *given])
    for number, scores in enumerate(alone, start=1):
        table.add_row(f"site-{number} alone", *shown(scores))
    rows = sum(scores["rows"] for scores in alone)
    table.add_row("federated", *shown({**together, "rows": rows}))
    table.add_row("central", *shown(everything))
    console.print(table)


def trained(arguments: list[str]) -> Any:
    """Run train.py, and return its scores."""
    return scores_of([sys.executable, str(HERE / "train.py"), *arguments])


def federated(arguments: list[str]) -> Any:
    """Run train_federated.py at all sites, and return the scores of one of them."""
    simulate = [sys.executable, "-m", "fl_adapters", "simulate", str(HERE / "train_federated.py")]
    return scores_of([*simulate, "--sites", str(SITES), "--", *arguments])


def scores_of(command: list[str]) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "scores.json")
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run([*command, "--scores", str(file)], capture_output=True, text=True, env=environment)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
        return json.loads(file.read_text())


def shown(scores: Any) -> list[str]:
    return [str(scores["rows"]), f"{scores['logistic']:.4f}", f"{scores['trees']:.4f}"]


if __name__ == "__main__":
    main()
