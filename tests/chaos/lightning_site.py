"""A small module under Lightning's `Trainer`, for the chaos suite.

It has AdamW, a falling learning rate, dropout, shuffling, and batch statistics that stay at the site.
"""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from site_notes import FOLDER, acknowledged, final
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fl_adapters import site
from fl_adapters.lightning import FederatedCallback

ROWS, COLUMNS, WIDTH = 32, 64, 256


def loader(seed: int, shuffle: bool) -> DataLoader[Any]:
    x = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(seed))
    return DataLoader(TensorDataset(x, (x[:, 0] + x[:, 1] > 0).long()), batch_size=4, shuffle=shuffle)


class Classifier(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(COLUMNS, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU(), nn.Dropout(0.3))
        self.head = nn.Linear(WIDTH, 2)

    def loss(self, batch: Any) -> torch.Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self.head(self.body(x)), y)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.97)]


class Rounds(pl.Callback):
    """Notes each finished round of one epoch; it comes after the federation's callback."""

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        acknowledged(trainer.current_epoch + 1)


def main() -> None:
    pl.seed_everything(site().index, verbose=False)
    module = Classifier()
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=100,
        default_root_dir=FOLDER,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[FederatedCallback(keep_local=["body.1.*"]), Rounds()],
    )
    trainer.fit(module, loader(site().index, shuffle=True), loader(99, shuffle=False))
    final({name: tensor.numpy() for name, tensor in module.state_dict().items() if not name.startswith("body.1.")})


if __name__ == "__main__":
    main()
