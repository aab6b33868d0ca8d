"""Shows what a federation of five uneven sites gains when they train trees together, in each of three modes.

python demo.py
python demo.py --rounds 80 --data breast_cancer --plot auc.png

Prints the area under the ROC curve (AUC) on held-out rows and the seconds of each training: each site alone, the
federation in each mode, and all rows in one place. Saves a plot of the AUC after every round.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xgboost
from fl_runtime.aggregation.metrics.quantiles import merged
from rich.console import Console
from rich.table import Table
from train import PARAMS

from data import SHARES, Part, load
from fl_adapters.xgboost.data import rows_of, summary
from fl_adapters.xgboost.engine import reference_rows

HERE = Path(__file__).parent
SITES = len(SHARES)
MODES = ("bagging", "cyclic", "histogram")
MAX_BIN = 256


@dataclass
class Row:
    """One row of the table.

    Attributes:
        name: Name of the training.
        rows: Number of training rows.
        auc: AUC on the held-out rows after the last round.
        curve: AUC after each round; empty if it was not measured.
        seconds: Duration of the training in seconds.
        note: Remark.
    """

    name: str
    rows: int
    auc: float
    curve: list[float] = field(default_factory=list)
    seconds: float = 0.0
    note: str = ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=80)
    parser.add_argument("--data", help="folder of the data set, or: breast_cancer")
    parser.add_argument("--plot", type=Path, default=Path("runs/xgboost-demo.png"))
    args = parser.parse_args()
    console = Console()
    parts = [load(args.data, f"{number}/{SITES}") for number in range(1, SITES + 1)]
    everything, test = load(args.data, "1/1"), matrix(parts[0].test)
    sizes = [len(part.train.y) for part in parts]

    console.rule(f"{everything.name}: {SITES} sites with {', '.join(map(str, sizes))} rows, {args.rounds} rounds")
    table = [alone(f"site-{n} alone", part.train, test, args.rounds) for n, part in enumerate(parts, start=1)]
    boosters: dict[str, xgboost.Booster] = {}
    for mode in MODES:
        with console.status(f"{mode} ..."):
            row, boosters[mode] = federated(mode, args, test, sum(sizes))
        table.append(row)
    central = alone("central, its own bins", everything.train, test, args.rounds)
    shared, same = central_on_shared_bins(parts, everything.train, test, args.rounds, boosters["histogram"])
    table += [central, shared]
    table[-3].note = f"{same} of {len(boosters['histogram'].get_dump())} trees equal those of central on the same bins"
    console.print(results_table(table))
    draw(table, args.plot, everything.name)
    console.print(f"plot: {args.plot}", highlight=False)


def matrix(part: Part, **options: Any) -> xgboost.DMatrix:
    return xgboost.DMatrix(part.x, part.y, enable_categorical=True, **options)


def alone(name: str, part: Part, test: xgboost.DMatrix, rounds: int) -> Row:
    log: dict[str, Any] = {}
    began = time.monotonic()
    xgboost.train(PARAMS, matrix(part), rounds, evals=[(test, "test")], evals_result=log, verbose_eval=False)
    curve = log["test"]["auc"]
    return Row(name, len(part.y), curve[-1], curve, time.monotonic() - began)


def federated(mode: str, args: Any, test: xgboost.DMatrix, rows: int) -> tuple[Row, xgboost.Booster]:
    """Run one simulation of train_federated.py. Returns its row and its final model."""
    given = ["--data", args.data] if args.data else []
    script = [str(HERE / "train_federated.py"), "--sites", str(SITES), "--json"]
    command = [sys.executable, "-m", "fl_adapters", "simulate", *script, "--"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--mode", mode, "--rounds", str(args.rounds), "--output", "runs/xgboost-demo.ubj", *given],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{mode} failed:\n{done.stderr[-2000:]}")
    result = json.loads(done.stdout.splitlines()[-1])
    booster = xgboost.Booster({"nthread": 1}, model_file=str(Path(result["model"], "model.ubj")))
    curve = [metrics["test-auc"] for metrics in result["metrics"]]
    row = Row(f"federated, {mode}", rows, exact_auc(booster, test), curve, result["wall_s"])
    row.note = f"{sum(result['round_s']) / len(result['round_s']):.2f} s per round"
    return row, booster


def central_on_shared_bins(
    parts: Any, everything: Part, test: xgboost.DMatrix, rounds: int, ours: xgboost.Booster
) -> tuple[Row, int]:
    """Train on all rows in one place, with the bins that the sites agree on.

    Returns its row, and the number of trees that equal those of `ours`.
    """
    matrices = [matrix(part.train) for part in parts]
    summaries = [summary(rows_of(data), data.feature_types, MAX_BIN, 10, 0.0) for data in matrices]
    types = matrices[0].feature_types
    reference = reference_rows(merged(summaries))
    bins = xgboost.QuantileDMatrix(reference, feature_types=types, enable_categorical=True, max_bin=len(reference))
    plain = matrix(everything)
    data = xgboost.QuantileDMatrix(
        plain.get_data(),
        everything.y,
        ref=bins,
        feature_names=plain.feature_names,
        feature_types=types,
        enable_categorical=True,
        max_bin=len(reference),
    )
    config = json.loads(ours.save_config())["learner"]["learner_model_param"]["base_score"]
    params = {**PARAMS, "base_score": float(config.strip("[]"))}
    began = time.monotonic()
    params |= {"seed_per_iteration": True, "max_bin": len(reference)}
    booster = xgboost.train(params, data, rounds)
    seconds = time.monotonic() - began
    codes = xgboost.DMatrix(
        test.get_data(),
        test.get_label(),
        feature_names=plain.feature_names,
        feature_types=types,
        enable_categorical=True,
    )
    row = Row("central, the sites' bins", len(everything.y), exact_auc(booster, codes), seconds=seconds)
    return row, sum(one == other for one, other in zip(booster.get_dump(), ours.get_dump(), strict=True))


def exact_auc(booster: xgboost.Booster, test: xgboost.DMatrix) -> float:
    """Area under the ROC curve on all rows, computed from ranks."""
    scores, labels = booster.predict(test, output_margin=True), test.get_label()
    _, where, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = np.cumsum(counts) - (counts - 1) / 2
    positives = labels.sum()
    area = ranks[where][labels == 1].sum() - positives * (positives + 1) / 2
    return float(area / (positives * (len(labels) - positives)))


def results_table(rows: list[Row]) -> Table:
    table = Table(title="area under the ROC curve on held-out rows")
    for name, justify in (("training", "left"), ("rows", "right"), ("AUC", "right"), ("s", "right"), ("", "left")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for row in rows:
        table.add_row(row.name, str(row.rows), f"{row.auc:.4f}", f"{row.seconds:.1f}", row.note)
    return table


def draw(rows: list[Row], path: Path, name: str) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    for row in rows:
        if row.curve:
            style = {"color": "0.75", "linewidth": 1} if row.name.endswith("alone") else {"linewidth": 2}
            axes.plot(range(1, len(row.curve) + 1), row.curve, label=row.name, **style)
    axes.set(title=name, xlabel="round", ylabel="AUC on held-out rows")
    axes.legend(fontsize="small")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
