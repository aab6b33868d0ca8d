"""Images of the examples as data sets of PyTorch. `images.py` loads and divides them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.utils.data import TensorDataset

import images

ROWS = 10_000  # training rows of all sites together; few, to keep the example quick


@dataclass(frozen=True)
class Data:
    """Images as float32 [rows, 1, side, side] from 0 to 1, with labels as int64 [rows]."""

    train: TensorDataset
    validation: TensorDataset
    test: TensorDataset
    side: int


def load(source: str | None = None, shard: str | None = None, rows: int = ROWS) -> Data:
    """Load images as `images.load` does, as data sets."""
    data = images.load(source, shard, rows)

    def part(given: images.Part) -> TensorDataset:
        return TensorDataset(torch.from_numpy(given[0][:, None]), torch.from_numpy(given[1]))

    return Data(part(data.train), part(data.validation), part(data.test), data.test[0].shape[-1])
