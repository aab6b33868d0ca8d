"""What the Keras example claims, as means over seeds: each site alone, federated, central.

All train with the same settings and the same passes over their data, and are scored on the same held-out rows.

usage: accuracy_keras.py [--seeds 0 1 2] [--data digits] [--out accuracy_keras.csv]
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "examples" / "keras" / "image_classification"))

from data import ROWS, load
from demo import ROUNDS, choose_backend, compare, keeps_its_promise


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--data", help="folder of Fashion-MNIST's files, or: digits")
    parser.add_argument("--out", type=Path, default=Path("accuracy_keras.csv"))
    args = parser.parse_args()
    choose_backend()
    name = load(args.data).name
    by_name: dict[str, list[float]] = {}
    with args.out.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["data", "seed", "trained", "rows", "accuracy"])
        for seed in args.seeds:
            for score in compare(args.data, ROWS, ROUNDS[name], seed):
                rows.writerow([name, seed, score.name, score.rows, f"{score.accuracy:.4f}"])
                by_name.setdefault(score.name, []).append(score.accuracy)
                file.flush()
    print(f"{name}, seeds {', '.join(map(str, args.seeds))}; accuracy")
    print(f"{'trained':14}    mean  lowest highest")
    for trained, values in by_name.items():
        print(f"{trained:14} {statistics.mean(values):7.4f} {min(values):7.4f} {max(values):7.4f}")
    kept = keeps_its_promise({trained: statistics.mean(values) for trained, values in by_name.items()})
    print("within two points of central and above every site alone:", "yes" if kept else "no")
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
