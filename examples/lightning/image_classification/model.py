"""Model of the example: a small convolutional network as an ordinary LightningModule."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn


class Classifier(pl.LightningModule):
    """Classifier of grey images with `side` x `side` pixels into ten classes."""

    def __init__(self, side: int, rate: float = 0.03) -> None:
        super().__init__()
        self.save_hyperparameters()
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
        images, labels = batch
        return nn.functional.cross_entropy(self.net(images), labels)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.score(batch, "val")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.score(batch, "test")

    def score(self, batch: Any, name: str) -> None:
        images, labels = batch
        scores = self.net(images)
        self.log(f"{name}_loss", nn.functional.cross_entropy(scores, labels))
        self.log(f"{name}_accuracy", (scores.argmax(-1) == labels).float().mean())

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=self.rate, momentum=0.9, weight_decay=1e-4)
        steps = int(self.trainer.estimated_stepping_batches)  # in a federation: of all rounds
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
