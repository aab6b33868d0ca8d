"""Compares five uneven sites with their own pipelines, their federation, and all rows in one place.

python demo.py
python demo.py --data breast_cancer

Prints the area under the ROC curve (AUC) on held-out rows of a logistic regression and of boosted trees.
"""

from __future__ import annotations

import argparse
import json
import os
import re
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
SCORE = re.compile(r"^(\w+): AUC ([0-9.]+) on ", re.MULTILINE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder of the data set, or: breast_cancer")
    args = parser.parse_args()
    console = Console()
    given = ["--data", args.data] if args.data else []
    table = Table(title="area under the ROC curve on held-out rows", title_justify="left")
    for column in ("training", "rows", "logistic regression", "trees"):
        table.add_column(column, justify="left" if column == "training" else "right")
    with console.status("training ..."):
        alone = [trained(["--shard", f"{number}/{SITES}", *given]) for number in range(1, SITES + 1)]
        run = federated(given)
        everything = trained(["--shard", "1/1", *given])
    for number, scores in enumerate(alone, start=1):
        table.add_row(f"site-{number} alone", *shown(scores))
    rows = sum(scores["rows"] for scores in alone)
    table.add_row(
        "federated", *shown({"rows": rows, **printed(run / "sites" / "site-1" / "log.txt")}), style="bold green"
    )
    table.add_row("central", *shown(everything))
    console.print(table)
    console.print(f"Results of the federation in {os.path.relpath(run)}", soft_wrap=True)
    console.print("report.html, history.csv, the output of each site in sites/.")


def trained(arguments: list[str]) -> Any:
    """Run train.py, and return its scores."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "scores.json")
        output_of([sys.executable, str(HERE / "train.py"), *arguments, "--scores", str(file)])
        return json.loads(file.read_text())


def federated(arguments: list[str]) -> Path:
    """Run train_federated.py at all sites, and return the folder of the run."""
    simulate = [sys.executable, "-m", "fl_adapters", "simulate", str(HERE / "train_federated.py")]
    output = output_of([*simulate, "--sites", str(SITES), "--json", "--", *arguments])
    return Path(json.loads(output.splitlines()[-1])["folder"])


def printed(log: Path) -> dict[str, float]:
    """The scores in the output of a script."""
    return {name: float(score) for name, score in SCORE.findall(log.read_text("utf-8"))}


def output_of(command: list[str]) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return done.stdout


def shown(scores: Any) -> list[str]:
    return [f"{scores['rows']:,}", f"{scores['logistic']:.4f}", f"{scores['trees']:.4f}"]


if __name__ == "__main__":
    main()
