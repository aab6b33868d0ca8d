"""What the MONAI example claims, as means over seeds: each site alone, federated, central.

All train with the same settings and the same passes over their data, and are scored on the same held-out volumes.

usage: accuracy_monai.py [--seeds 0 1 2] [--data made] [--bundle FOLDER] [--out accuracy_monai.csv]
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "examples" / "monai" / "spleen_bundle"))

from data import bundle
from demo import ROUNDS, compare, keeps_its_promise


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--data", help="folder of the hippocampus data (decathlon format), or: made")
    parser.add_argument("--bundle", help="folder of the spleen bundle")
    parser.add_argument("--out", type=Path, default=Path("accuracy_monai.csv"))
    args = parser.parse_args()
    by_name: dict[str, list[float]] = {}
    with args.out.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["bundle", "seed", "trained", "volumes", "dice"])
        for seed in args.seeds:
            for score in compare(args.data, args.bundle, ROUNDS, seed):
                rows.writerow([bundle(args.bundle).name, seed, score.name, score.volumes, f"{score.dice:.4f}"])
                by_name.setdefault(score.name, []).append(score.dice)
                file.flush()
    print(f"{bundle(args.bundle).name}, seeds {', '.join(map(str, args.seeds))}; Dice on held-out volumes")
    print(f"{'trained':14}    mean  lowest highest")
    for trained, values in by_name.items():
        print(f"{trained:14} {statistics.mean(values):7.4f} {min(values):7.4f} {max(values):7.4f}")
    kept = keeps_its_promise({trained: statistics.mean(values) for trained, values in by_name.items()})
    print("within two points of central and above every site alone:", "yes" if kept else "no")
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
