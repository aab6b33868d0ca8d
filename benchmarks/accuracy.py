"""What an example claims, as means over seeds: each site alone, federated, central.

All train with the same settings and the same passes over their data, and are scored on the same held-out rows.

usage: accuracy.py [hf|lightning|keras|monai ...] [--seeds 0 1 2] [--out accuracy.csv]   (two to four minutes a seed and
example on two cores)
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
    "keras": ROOT / "keras" / "image_classification",
    "monai": ROOT / "monai" / "spleen_bundle",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("examples", nargs="*", metavar="EXAMPLE", help=f"of {', '.join(EXAMPLES)}; default: all")
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
        sys.exit("a federation is not within two points of central, or not above every site alone")


def demo_of(folder: Path) -> ModuleType:
    """The example's demo.py, imported as if it had been started: its neighbours are found beside it."""
    for name in ("data", "model", "evaluate", "demo"):  # of the example before
        sys.modules.pop(name, None)
    sys.path.insert(0, str(folder))
    spec = spec_from_file_location("demo", folder / "demo.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[spec.name] = module  # where its dataclasses look for their own names
    spec.loader.exec_module(module)
    return module


def show(example: str, seeds: list[int], by_name: dict[str, list[float]], console: Console) -> None:
    table = Table(title=f"{example}, seeds {', '.join(map(str, seeds))}", title_justify="left")
    for column in ("trained", "mean", "lowest", "highest"):
        table.add_column(column, justify="left" if column == "trained" else "right")
    for name, values in by_name.items():
        table.add_row(name, *(f"{f(values):.3f}" for f in (statistics.mean, min, max)))
    console.print(table)


if __name__ == "__main__":
    main()
