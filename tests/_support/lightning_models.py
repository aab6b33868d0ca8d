"""Small modules, data and trainers for both packages of Lightning; the same seed gives the same ones."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from plain_torch import PlainTorch, weights
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from fl_adapters.lightning import FederatedCallback
from fl_adapters.testing import Trained, failing

STATES = [(torch.get_rng_state, torch.set_rng_state)]
PACKAGES = [n for n in ("lightning.pytorch", "pytorch_lightning") if importlib.util.find_spec(n.partition(".")[0])]
ROWS, BATCH = 24, 8
STEPS = ROWS // BATCH
RATE = 0.05


def package(name: str = PACKAGES[0]) -> Any:
    return importlib.import_module(name)


def network(width: int = 8, dropout: float = 0.25) -> nn.Sequential:
    """Return a network with buffers (batch normalization) and random numbers (dropout).

    The layer below the normalization has no bias: its gradient would be zero up to rounding, which Adam amplifies.
    """
    return nn.Sequential(
        nn.Linear(4, width, bias=False), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(dropout), nn.Linear(width, 2)
    )


def rows(seed: int, count: int = ROWS) -> TensorDataset:
    """Rows of four numbers; the label is whether the first two add up to more than zero."""
    x = torch.randn(count, 4, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(x, (x[:, 0] + x[:, 1] > 0).long())


def loader(seed: int = 0, count: int = ROWS, **options: Any) -> DataLoader:
    options = {"batch_size": BATCH, "shuffle": True, "generator": torch.Generator().manual_seed(seed), **options}
    return DataLoader(rows(seed, count), **options)


def validation(count: int = 16, seed: int = 99) -> DataLoader:
    return DataLoader(rows(seed, count), batch_size=8)


class Endless(IterableDataset):
    """A dataset of `count` rows without a length."""

    def __init__(self, count: int = ROWS) -> None:
        self.count = count

    def __iter__(self) -> Iterator[Any]:
        data = rows(0, self.count)
        return (data[i] for i in range(self.count))


def optimizer_for(parameters: Any, kind: str = "adam") -> torch.optim.Optimizer:
    if kind == "plain sgd":
        return torch.optim.SGD(parameters, lr=RATE)
    if kind == "sgd":
        return torch.optim.SGD(parameters, lr=RATE, momentum=0.9)
    return torch.optim.AdamW(parameters, lr=RATE)


def linear_schedule(optimizer: Any, total_steps: int) -> Any:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(1 - step / total_steps, 0.0))


def module(pl: Any = None, *, net: nn.Module | None = None, kind: str = "adam", fail_at: int = 0, **more: Any) -> Any:
    """Return a LightningModule over `network()` with a linear schedule over the run; it logs val_loss."""
    pl = pl or package()

    class Classifier(pl.LightningModule):
        def __init__(self, width: int = 8, dropout: float = 0.25) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.net = net if net is not None else network(width, dropout)
            self.rates: list[float] = []
            self.losses: list[float] = []

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(x)

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            if fail_at and self.global_step + 1 == fail_at:
                failing()
            x, y = batch
            loss = nn.functional.cross_entropy(self.net(x), y)
            self.losses.append(float(loss.detach()))
            return loss

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            self.rates.append(optimizer.param_groups[0]["lr"])

        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            x, y = batch
            scores = self.net(x)
            self.log("val_loss", nn.functional.cross_entropy(scores, y))
            self.log("val_acc", (scores.argmax(-1) == y).float().mean())

        def configure_optimizers(self) -> Any:
            optimizer = optimizer_for(self.parameters(), kind)
            total = self.trainer.estimated_stepping_batches
            schedule = linear_schedule(optimizer, int(total))
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    return Classifier(**more)


def trainer(callback: Any = None, *, pl: Any = None, callbacks: Any = (), **options: Any) -> Any:
    """Return a quiet Trainer on the CPU."""
    quiet = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_epochs": 1,
    }
    given = [*([callback] if callback is not None else []), *callbacks]
    return (pl or package()).Trainer(**{**quiet, "callbacks": given, **options})


def same(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    return all(np.asarray(found[name]).tobytes() == np.asarray(wanted[name]).tobytes() for name in wanted)


class Loop(PlainTorch):
    """One site's training in plain PyTorch, as the conformance suite's `PlainLoop`."""

    num_examples = ROWS

    def __init__(
        self,
        site: int,
        total_steps: int,
        accumulate: int = 1,
        kind: str = "adam",
        clip: float = 0.0,
        narrow: torch.dtype | None = None,
    ) -> None:
        torch.manual_seed(100 + site)
        self.module = nn.Module()
        self.module.net = network()
        self.optimizer = optimizer_for(self.module.parameters(), kind)
        self.clip, self.narrow = clip, narrow
        self.rates: list[float] = []
        self.schedule = linear_schedule(self.optimizer, total_steps)
        self.loader, self.batches, self.accumulate = loader(site), iter(()), accumulate
        self.losses: list[float] = []
        self.seen = 0

    def train(self, steps: int) -> None:
        self.module.train()
        for _ in range(steps):
            self.step()

    def step(self) -> None:
        self.optimizer.zero_grad()
        for _ in range(self.accumulate):
            if self.seen % STEPS == 0:  # as Lightning does: an iterator is not asked for more than its last batch
                self.batches = iter(self.loader)
            self.seen += 1
            x, y = next(self.batches)
            with torch.autocast("cpu", self.narrow or torch.bfloat16, enabled=self.narrow is not None):
                loss = nn.functional.cross_entropy(self.module.net(x), y)
            self.losses.append(float(loss.detach()))
            (loss / self.accumulate).backward()
            if self.seen % STEPS == 0:  # what an epoch leaves over is a step of its own
                break
        self.correct_gradients()
        if self.clip:
            nn.utils.clip_grad_norm_(self.module.parameters(), self.clip)
        self.rates.append(self.optimizer.param_groups[0]["lr"])
        self.optimizer.step()
        self.schedule.step()


class Example:
    """The training job of the conformance suite; `options` are passed to the Trainer."""

    personal = "net.1.*"
    states = STATES

    def __init__(self, pl: Any, kind: str = "adam", **options: Any) -> None:
        self.pl, self.kind, self.options = pl, kind, options
        self.plain_sgd, self.accumulate = kind == "plain sgd", options.get("accumulate_grad_batches", 1)
        self.steps_per_epoch = -(-STEPS // self.accumulate)

    def train(self, site: int, *, epochs: int, different: bool = False, fail_at: int = 0, **arguments: Any) -> Trained:
        torch.manual_seed(100 + site)
        built = module(self.pl, kind=self.kind, width=12 if different else 8, fail_at=fail_at)
        fitting = trainer(FederatedCallback(**arguments), pl=self.pl, max_epochs=epochs, **self.options)
        fitting.fit(built, loader(site))
        return Trained(weights(built), fitting.global_step)

    def plain(self, site: int, *, total_steps: int) -> Loop:
        narrow = torch.bfloat16 if self.options.get("precision") == "bf16-mixed" else None
        narrow = torch.float16 if "plugins" in self.options else narrow
        clip = self.options.get("gradient_clip_val", 0.0)
        return Loop(site, total_steps, self.accumulate, self.kind, clip, narrow)
