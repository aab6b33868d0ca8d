"""The example's data: small grey images of ten classes, and what each site gets of them.

Fashion-MNIST where it is found, else scikit-learn's handwritten digits, which come in a package. The sites' shares of
each class are drawn from a Dirichlet distribution, so each site sees much of some classes and little of others.
"""

from __future__ import annotations

import gzip
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import TensorDataset

import fl_adapters

ROWS = 10_000  # for training, all sites together; keeps the example quick
TEST_ROWS = 2000
VALIDATION_SHARE = 10  # every tenth training row of a site is its validation data
ALPHA = 0.5  # of the Dirichlet draw: smaller is more uneven
SEED = 2024  # of the division, not of the training
HERE = Path(__file__).resolve()
FILES = ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz")


@dataclass(frozen=True)
class Data:
    """Images float32 [rows, 1, side, side] within 0 and 1, labels int64 [rows]."""

    train: TensorDataset
    validation: TensorDataset
    test: TensorDataset
    side: int
    name: str


def load(source: str | None = None, shard: str | None = None, rows: int = ROWS) -> Data:
    """The data of one site.

    source: the folder of Fashion-MNIST's files, "digits", or None: Fashion-MNIST where it is found, else digits.
    shard: "2/4" for the second of four parts; None: the part of the site that this process is, or everything.
    rows: how many rows to train on, all sites together; 0 for all there are.
    """
    images, labels, name = read(source)
    order = np.random.RandomState(SEED).permutation(len(images))  # RandomState: the same in every NumPy
    cut = min(TEST_ROWS, max(len(images) // 2, len(images) - 10_000, 1000))
    test, train = order[:cut], order[cut:][: rows or None]
    index, count = place(shard)
    mine = divide(labels[train], count)[index]
    held = np.arange(len(mine)) % VALIDATION_SHARE == 0
    part = lambda which: TensorDataset(torch.from_numpy(images[which][:, None]), torch.from_numpy(labels[which]))  # noqa: E731
    return Data(part(train[mine[~held]]), part(train[mine[held]]), part(test), images.shape[-1], name)


def place(shard: str | None) -> tuple[int, int]:
    """(index, count) of the part to train on: as `shard` says, else this site's place in the federation."""
    if shard is None:
        site = fl_adapters.site()  # outside of a federation: index 0 of 1
        return site.index, site.count
    number, _, count = shard.partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise SystemExit(f"--shard {shard}: write it like 2/4, the second of four parts")
    return int(number) - 1, int(count)


def divide(labels: np.ndarray, sites: int) -> list[np.ndarray]:
    """Row numbers of each site: every class's rows are cut at the shares of a Dirichlet draw."""
    draw = np.random.RandomState(SEED)
    parts: list[list[int]] = [[] for _ in range(sites)]
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        cuts = np.cumsum(draw.dirichlet([ALPHA] * sites))[:-1] * len(rows)
        for part, chunk in zip(parts, np.split(rows, cuts.astype(int)), strict=True):
            part.extend(chunk.tolist())
    return [np.array(sorted(part)) for part in parts]


def read(source: str | None) -> tuple[np.ndarray, np.ndarray, str]:
    """(images, labels, name of the data set)."""
    folder = Path(source) if source and source != "digits" else None
    if folder is None and source is None:
        beside = HERE.parents[4] / "shared" / "data"  # beside the checkout
        folder = Path(os.environ.get("FL_ADAPTERS_DATA", beside)) / "fashion_mnist"
        folder = folder if folder.is_dir() else None
    if folder is None:
        from sklearn.datasets import load_digits

        digits = load_digits()
        return (digits.images / 16).astype(np.float32), digits.target.astype(np.int64), "scikit-learn's digits"
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise SystemExit(f"--data {folder}: there is no {missing[0]} in this folder")
    images, labels = (np.frombuffer(gzip.decompress((folder / name).read_bytes()), np.uint8) for name in FILES)
    return images[16:].reshape(-1, 28, 28).astype(np.float32) / 255, labels[8:].astype(np.int64), "Fashion-MNIST"
