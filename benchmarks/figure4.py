"""Measures the accuracy of FedAvg, FedProx, FedOpt and SCAFFOLD on unevenly divided data, round by round.

Repeats Figure 4 of "NVIDIA FLARE: Federated Learning from Simulation to Real-World" (Roth et al. 2022) on Fashion-MNIST
with 8 sites: (a) FedAvg with classes divided by Dirichlet distributions of alpha 1.0, 0.5, 0.3 and 0.1; (b) all four
methods at alpha 0.1. As in the paper's example, FedOpt is SGD with momentum 0.6 at the server, and FedProx has
mu = 1e-5. The sites are Lightning trainers in threads of this process, so durations mean nothing.

    python benchmarks/figure4.py --data ../shared/data/fashion_mnist [--seeds 0 1 2] [--rounds 20] [--out figure4]

Columns, accuracies from 0 to 1 of the global model on held-out images: mean over the seeds after half of the rounds and
after the last one; lowest and highest seed after the last one. Writes the curves to OUT.csv and OUT.png.
"""

from __future__ import annotations

import argparse
import csv
import logging
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))

import images

from fl_adapters.lightning import FederatedCallback
from fl_adapters.testing import LocalFederation, Place

SITES, ALPHAS = 8, (1.0, 0.5, 0.3, 0.1)
METHODS = {"FedAvg": "fedavg", "FedProx": "fedprox:mu=1e-5", "FedOpt": "fedavgm:momentum=0.6", "SCAFFOLD": "scaffold"}
BATCH = 32


@dataclass(frozen=True)
class Setting:
    """Setting of one curve: a method and the alpha of the Dirichlet distribution."""

    method: str
    alpha: float

    @property
    def name(self) -> str:
        return f"{self.method}, alpha {self.alpha:g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder of Fashion-MNIST's files (default: beside the checkout, else digits)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=2, help="epochs of local training in a round")
    parser.add_argument("--rows", type=int, default=8000, help="training images of all sites together")
    parser.add_argument("--rate", type=float, default=0.05, help="learning rate of the sites' SGD")
    parser.add_argument("--out", type=Path, default=Path("figure4"), help="path of the curves, without suffix")
    args = parser.parse_args()
    console = Console(stderr=True)
    torch.set_num_threads(1)  # the sites are threads
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)

    rows: list[dict[str, Any]] = []
    settings = [Setting("FedAvg", alpha) for alpha in ALPHAS] + [Setting(m, ALPHAS[-1]) for m in METHODS][1:]
    began = time.monotonic()
    for number, (setting, seed) in enumerate((s, seed) for seed in args.seeds for s in settings):
        accuracies = run(setting, seed, args)
        rows += [
            {"method": setting.method, "alpha": setting.alpha, "seed": seed, "round": n, "accuracy": f"{value:.4f}"}
            for n, value in enumerate(accuracies, 1)
        ]
        done = f"{number + 1} of {len(settings) * len(args.seeds)}, {time.monotonic() - began:.0f} s"
        console.print(f"{setting.name}, seed {seed}: {accuracies[-1]:.4f} after {args.rounds} rounds ({done})")
        write(args.out.with_suffix(".csv"), rows)
    show(rows, settings, console)
    draw(args.out.with_suffix(".png"), rows)
    console.print(f"written to {args.out.with_suffix('.csv')} and {args.out.with_suffix('.png')}")


# -- one run -------------------------------------------------------------------------------------------------------


class Net(pl.LightningModule):
    """A small convolutional network, trained by plain SGD."""

    def __init__(self, side: int, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.net = nn.Sequential(
            nn.Conv2d(1, 16, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32 * (side // 4) ** 2, 64),
            nn.ReLU(),
            nn.Linear(64, 10),
        )

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        pictures, labels = batch
        return nn.functional.cross_entropy(self.net(pictures), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.rate)


@dataclass
class Accuracy(pl.Callback):
    """Measures accuracy on held-out images at the start of every epoch, which after a round is the global model's."""

    test: TensorDataset
    at: list[float] = field(default_factory=list)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.at.append(self.of(pl_module))

    def of(self, module: Any) -> float:
        """Accuracy of a module on the held-out images."""
        pictures, labels = self.test.tensors
        with torch.no_grad():
            return float((module.net(pictures).argmax(-1) == labels).float().mean())


def run(setting: Setting, seed: int, args: argparse.Namespace) -> list[float]:
    """Train once. Returns the accuracy of the global model after each round."""
    parts, test = data(args, setting.alpha, seed)
    side = test.tensors[0].shape[-1]
    torch.manual_seed(seed)
    begin = Net(side, args.rate).state_dict()

    def work(place: Place) -> list[float]:
        module, accuracy = Net(side, args.rate), Accuracy(test)
        module.load_state_dict(begin)
        watching = [accuracy] if place.index == 0 else []
        trainer = pl.Trainer(
            accelerator="cpu",
            max_epochs=args.rounds * args.epochs,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[FederatedCallback(kit=place.kit, every=f"{args.epochs} epochs"), *watching],
        )
        order = torch.Generator().manual_seed(1000 * seed + place.index)
        trainer.fit(module, DataLoader(parts[place.index], BATCH, shuffle=True, generator=order))
        return [*accuracy.at[args.epochs :: args.epochs], accuracy.of(module)] if watching else []

    with LocalFederation(sites=SITES, rounds=args.rounds, strategy=METHODS[setting.method], seed=seed) as federation:
        return federation.run(work, timeout_s=3600)["site-1"]


def data(args: argparse.Namespace, alpha: float, seed: int) -> tuple[list[TensorDataset], TensorDataset]:
    """The sites' training images and the held-out images. The seed selects images and shares."""
    pictures, labels, _ = images.read(args.data)
    draw = np.random.RandomState(seed)
    order = draw.permutation(len(pictures))
    cut = min(images.TEST_ROWS, len(pictures) // 2)
    test, train = order[:cut], order[cut:][: args.rows]

    def taken(rows: Any) -> TensorDataset:
        return TensorDataset(torch.from_numpy(pictures[rows])[:, None], torch.from_numpy(labels[rows]))

    return [taken(train[part]) for part in shares(labels[train], alpha, draw)], taken(test)


def shares(labels: Any, alpha: float, draw: np.random.RandomState) -> Iterator[Any]:
    """Row numbers of each site, divided by shares from Dirichlet distributions. Draws again if a site has too few."""
    while True:
        parts: list[list[Any]] = [[] for _ in range(SITES)]
        for label in np.unique(labels):
            rows = np.flatnonzero(labels == label)
            cuts = (np.cumsum(draw.dirichlet([alpha] * SITES))[:-1] * len(rows)).astype(int)
            for part, chunk in zip(parts, np.split(rows, cuts), strict=True):
                part.append(chunk)
        rows_of_sites = [np.concatenate(part) for part in parts]
        if min(map(len, rows_of_sites)) >= 2 * BATCH:
            return iter(rows_of_sites)


# -- results -------------------------------------------------------------------------------------------------------


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows to a CSV file."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)


def curves(rows: list[dict[str, Any]], setting: Setting) -> dict[int, list[float]]:
    """Accuracies of all seeds, by round."""
    found: dict[int, list[float]] = {}
    for row in rows:
        if (row["method"], row["alpha"]) == (setting.method, setting.alpha):
            found.setdefault(row["round"], []).append(float(row["accuracy"]))
    return found


def show(rows: list[dict[str, Any]], settings: list[Setting], console: Console) -> None:
    """Print the table of all curves."""
    table = Table(title="accuracy of the global model, means over seeds", title_justify="left")
    for column in ("method", "alpha", "half-way", "last round", "lowest seed", "highest seed"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for setting in settings:
        found = curves(rows, setting)
        half, last = found[max(len(found) // 2, 1)], found[len(found)]
        values = (statistics.mean(half), statistics.mean(last), min(last), max(last))
        table.add_row(setting.method, f"{setting.alpha:g}", *(f"{value:.3f}" for value in values))
    console.print(table)


def draw(path: Path, rows: list[dict[str, Any]]) -> None:
    """Plot the curves with the range of their seeds."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    panels = (
        ("(a) FedAvg", [Setting("FedAvg", alpha) for alpha in ALPHAS], lambda s: f"alpha {s.alpha:g}"),
        (f"(b) alpha {ALPHAS[-1]:g}", [Setting(method, ALPHAS[-1]) for method in METHODS], lambda s: s.method),
    )
    for axes, (title, settings, label) in zip(figure.subplots(1, 2, sharey=True), panels, strict=True):
        for setting in settings:
            found = curves(rows, setting)
            rounds = sorted(found)
            means = [statistics.mean(found[n]) for n in rounds]
            lowest, highest = ([of(found[n]) for n in rounds] for of in (min, max))
            axes.plot(rounds, means, label=label(setting))
            axes.fill_between(rounds, lowest, highest, alpha=0.15)
        axes.set_title(title)
        axes.set_xlabel("round")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.axes[0].set_ylabel("accuracy on held-out images")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
