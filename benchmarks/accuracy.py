"""Measures the score of a federation against each site training alone and against training on all data in one place.

The trainings are those of the examples' demos, repeated with several seeds. All have the same settings and the same
passes over their data, and are scored on the same held-out rows. Takes two to four minutes for a seed and an example on
two cores.

    python benchmarks/accuracy.py [hf|lightning|torch|keras|monai ...] [--seeds 0 1 2] [--out accuracy.csv]

Columns: mean, lowest and highest score over the seeds, from 0 to 1 (accuracy; Dice for monai). The CSV file has a row
for each seed. Ends with status 1 unless every federation's mean is within 0.02 of central and above every site alone.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1] / "examples"
sys.path.append(str(ROOT))

from comparison import keeps_its_promise  # noqa: E402

EXAMPLES = {
    "hf": ROOT / "hf" / "text_classification",
    "lightning": ROOT / "lightning" / "image_classification",
    "torch": ROOT / "torch" / "image_classification",
    "keras": ROOT / "keras" / "image_classification",
    "monai": ROOT / "monai" / "spleen_bundle",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("examples", nargs="*", metavar="EXAMPLE", help=f"one of {', '.join(EXAMPLES)} (default: all)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("accuracy.csv"))
    args = parser.parse_args()
    if unknown := set(args.examples) - set(EXAMPLES):
        parser.error(f"no such example: {', '.join(sorted(unknown))}; there are {', '.join(EXAMPLES)}")
    console = Console()
    kept = True
    with args.out.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["example", "seed", "trained", "rows", "score"])
        for example in args.examples or EXAMPLES:
            demo = demo_of(EXAMPLES[example])
            by_name: dict[str, list[float]] = {}
            for seed in args.seeds:
                console.rule(f"{example}, seed {seed}")
                for score in demo.compare(console, seed=seed):
                    rows.writerow([example, seed, score.name, score.rows, f"{score.score:.4f}"])
                    by_name.setdefault(score.name, []).append(score.score)
                file.flush()
            show(example, args.seeds, by_name, console)
            kept &= keeps_its_promise({name: statistics.mean(values) for name, values in by_name.items()})
    console.print(f"written to {args.out}")
    if not kept:
        sys.exit("a federation scores more than 0.02 below central, or not above every site alone")


def demo_of(folder: Path) -> ModuleType:
    """Import an example's demo.py as if it had been started in its folder."""
    for name in ("data", "model", "evaluate", "demo"):  # modules of the previous example
        sys.modules.pop(name, None)
    sys.path.insert(0, str(folder))
    spec = spec_from_file_location("demo", folder / "demo.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look up their module there
    spec.loader.exec_module(module)
    return module


def show(example: str, seeds: list[int], by_name: dict[str, list[float]], console: Console) -> None:
    """Print the table of one example."""
    table = Table(title=f"{example}, seeds {', '.join(map(str, seeds))}", title_justify="left")
    for column in ("training", "mean", "lowest", "highest"):
        table.add_column(column, justify="left" if column == "training" else "right")
    for name, values in by_name.items():
        table.add_row(name, *(f"{f(values):.3f}" for f in (statistics.mean, min, max)))
    console.print(table)


if __name__ == "__main__":
    main()
