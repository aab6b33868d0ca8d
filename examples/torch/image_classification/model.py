"""Model of the example, a small convolutional network, and its score."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def network(side: int) -> nn.Module:
    """Return a classifier of grey images with `side` x `side` pixels into ten classes."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * (side // 4) ** 2, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


@torch.no_grad()
def score(model: nn.Module, data: TensorDataset) -> tuple[dict[str, float], int]:
    """Return loss and accuracy of the model on `data`, and the number of images."""
    device = next(model.parameters()).device
    model.eval()
    loss = correct = 0.0
    for images, labels in DataLoader(data, batch_size=256):
        scores, labels = model(images.to(device)), labels.to(device)
        loss += nn.functional.cross_entropy(scores, labels, reduction="sum").item()
        correct += (scores.argmax(-1) == labels).sum().item()
    return {"loss": loss / len(data), "accuracy": correct / len(data)}, len(data)
