"""What the text classification example claims, as means over seeds: each site alone, federated, central.

All train with the same settings and the same passes over their data, and are scored on the same held-out rows.

usage: accuracy_hf.py [--seeds 0 1 2] [--out accuracy_hf.csv]     (about four minutes a seed on two cores)
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

sys.path.append(str(Path(__file__).resolve().parents[1] / "examples" / "hf" / "text_classification"))

from demo import compare


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("accuracy_hf.csv"))
    args = parser.parse_args()
    console = Console()
    by_name: dict[str, list[float]] = {}
    with args.out.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["seed", "trained", "rows", "accuracy"])
        for seed in args.seeds:
            console.rule(f"seed {seed}")
            for score in compare(console, seed=seed):
                rows.writerow([seed, score.name, score.rows, f"{score.accuracy:.4f}"])
                by_name.setdefault(score.name, []).append(score.accuracy)
            file.flush()
    table = Table(title=f"accuracy, seeds {', '.join(map(str, args.seeds))}")
    for column in ("trained", "mean", "lowest", "highest"):
        table.add_column(column, justify="left" if column == "trained" else "right")
    for name, values in by_name.items():
        table.add_row(name, *(f"{f(values):.3f}" for f in (statistics.mean, min, max)))
    console.print(table)
    console.print(f"written to {args.out}")


if __name__ == "__main__":
    main()
