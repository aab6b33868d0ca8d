"""Measures how well an attacker tells members of the training data from others, without and with DP-SGD.

Two sites train a small network on the handwritten digits of scikit-learn, 300 rows each, of which every fifth has a
random label, as unreliable records do. The attacker has the final global model and takes a row for a member if its
loss is low (Yeom et al. 2018, "Privacy risk in machine learning"). Members are the sites' rows; the others are as many
rows that no site has seen. Needs the extras [torch,dp,examples], and about three minutes on two cores.

    python benchmarks/membership.py [--epsilon 8] [--seeds 0 1 2] [--out docs/membership]

Columns, means over the seeds: accuracy on further rows, with true labels; area under the attacker's ROC curve (0.5 is
guessing); share of the members that are found while 1 % of the others are taken for members; epsilon of a single
record, from the first site's ledger. Writes the curves to OUT.svg and the columns to OUT.csv. Ends with status 1
unless DP-SGD halves the attacker's advantage (2 area - 1).
"""

from __future__ import annotations

import argparse
import csv
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from opacus.data_loader import DPDataLoader
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score, roc_curve
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fl_adapters import DPSGD
from fl_adapters.participant.kit import read_kit
from fl_adapters.testing import LocalFederation, Place
from fl_adapters.torch import FederatedLoop
from fl_runtime.filters.ledger import Ledger

SITES, ROWS, ROUNDS, EVERY, BATCH, DELTA = 2, 300, 20, "5 epochs", 50, 1e-5


@dataclass(frozen=True)
class Rows:
    """Rows of one seed: those of the sites, as many others, and the rest with true labels for the accuracy."""

    members: TensorDataset
    others: TensorDataset
    test: TensorDataset


@dataclass(frozen=True)
class Attacked:
    """Result of one training: accuracy, epsilon, and the losses of members and others under the final model."""

    accuracy: float
    epsilon: float
    members: np.ndarray
    others: np.ndarray

    @property
    def scores(self) -> tuple[np.ndarray, np.ndarray]:
        """Whether each row is a member, and the attacker's score for it."""
        truth = np.r_[np.ones(len(self.members)), np.zeros(len(self.others))]
        return truth, -np.r_[self.members, self.others]

    @property
    def area(self) -> float:
        return float(roc_auc_score(*self.scores))

    @property
    def found(self) -> float:
        """Share of the members that are found at 1 % false alarms."""
        false, true, _ = roc_curve(*self.scores)
        return float(np.interp(0.01, false, true))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epsilon", type=float, default=8.0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("membership"))
    args = parser.parse_args()
    settings = {"without noise": None, f"DP-SGD, epsilon {args.epsilon:g}": DPSGD(epsilon=args.epsilon, delta=DELTA)}
    results = {name: [attacked(dp_sgd, seed) for seed in args.seeds] for name, dp_sgd in settings.items()}
    columns = ["training", "accuracy", "area", "found at 1 %", "epsilon"]
    table = Table(*columns)
    with args.out.with_suffix(".csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(columns)
        for name, runs in results.items():
            means = [
                mean(run.accuracy for run in runs),
                mean(run.area for run in runs),
                mean(run.found for run in runs),
            ]
            epsilon = max(run.epsilon for run in runs)
            cells = [name, *(f"{value:.3f}" for value in means), f"{epsilon:.3g}" if epsilon else "none"]
            table.add_row(*cells)
            rows.writerow(cells)
    Console().print(table)
    draw(results, args.out.with_suffix(".svg"))
    plain, private = (2 * mean(run.area for run in runs) - 1 for runs in results.values())
    raise SystemExit(private > plain / 2)


def mean(values: Any) -> float:
    return statistics.fmean(values)


def rows_of(seed: int) -> Rows:
    """Divide the digits, and give every fifth row of members and others a random label."""
    digits = load_digits()
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(digits.target))
    x = torch.tensor(digits.data[order] / 16, dtype=torch.float32)
    y = torch.tensor(digits.target[order])
    seen = SITES * ROWS
    y[: 2 * seen : 5] = torch.tensor(rng.integers(0, 10, len(y[: 2 * seen : 5])))
    parts = (slice(0, seen), slice(seen, 2 * seen), slice(2 * seen, None))
    return Rows(*(TensorDataset(x[part], y[part]) for part in parts))


def attacked(dp_sgd: DPSGD | None, seed: int) -> Attacked:
    """Train a federation, and look at the losses of members and others."""
    rows = rows_of(seed)
    torch.manual_seed(seed)
    start = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10)).state_dict()

    def site(place: Place) -> nn.Module:
        model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
        model.load_state_dict(start)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.5)
        own = TensorDataset(*rows.members[place.index * ROWS : (place.index + 1) * ROWS])
        loader = DataLoader(own, BATCH, shuffle=True, generator=torch.Generator().manual_seed(seed))
        batches = loader if dp_sgd is None else DPDataLoader.from_data_loader(loader)
        for round in FederatedLoop(model, optimizer, kit=place.kit, every=EVERY, dp_sgd=dp_sgd).rounds(batches):
            for x, y in round:
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x), y).backward()
                optimizer.step()
        return model

    with LocalFederation(sites=SITES, rounds=ROUNDS) as federation:
        model = federation.run(site, timeout_s=600)["site-1"]
        ledger = Ledger(Path(read_kit(federation.places[0].kit).folder))
        epsilon = ledger.spent("test", DELTA, unit="record")
    x, y = rows.test.tensors
    accuracy = float((model(x).argmax(-1) == y).float().mean())
    return Attacked(accuracy, epsilon, losses(model, rows.members), losses(model, rows.others))


@torch.no_grad()
def losses(model: nn.Module, rows: TensorDataset) -> np.ndarray:
    x, y = rows.tensors
    return nn.functional.cross_entropy(model(x), y, reduction="none").numpy()


def draw(results: dict[str, list[Attacked]], file: Path) -> None:
    """Draw the attacker's ROC curves, of all seeds together."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    matplotlib.rcParams["svg.hashsalt"] = "membership"
    figure, axes = plt.subplots(figsize=(5.2, 4))
    for name, runs in results.items():
        parts = [run.scores for run in runs]
        false, true, _ = roc_curve(np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts]))
        area = mean(run.area for run in runs)
        axes.plot(false, true, label=f"{name}: area {area:.2f}")
    axes.plot([0, 1], [0, 1], color="gray", linestyle="--", label="guessing: area 0.50")
    axes.set(
        xlim=(0, 1),
        ylim=(0, 1),
        xlabel="others taken for members",
        ylabel="members found",
        title="Membership inference by loss",
    )
    axes.legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None})


if __name__ == "__main__":
    main()
