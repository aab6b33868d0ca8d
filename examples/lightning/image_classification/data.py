"""The example's data, as data sets of torch. What it is and how it is divided among the sites: ../../images.py."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.data import TensorDataset

sys.path.append(str(Path(__file__).resolve().parents[2]))

import images

ROWS = 10_000  # for training, all sites together; keeps the example quick


@dataclass(frozen=True)
class Data:
    """Images float32 [rows, 1, side, side] within 0 and 1, labels int64 [rows]."""

    train: TensorDataset
    validation: TensorDataset
    test: TensorDataset
    side: int


def load(source: str | None = None, shard: str | None = None, rows: int = ROWS) -> Data:
    """As `images.load`."""
    data = images.load(source, shard, rows)

    def part(given: images.Part) -> TensorDataset:
        return TensorDataset(torch.from_numpy(given[0][:, None]), torch.from_numpy(given[1]))

    return Data(part(data.train), part(data.validation), part(data.test), data.test[0].shape[-1])
