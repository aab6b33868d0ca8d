"""Small grey images of ten classes, and what each site gets of them. Used by the Lightning and the Keras example.

Fashion-MNIST where it is found, else scikit-learn's handwritten digits, which come in a package. The sites' shares of
each class are drawn from a Dirichlet distribution, so each site sees much of some classes and little of others.
"""

from __future__ import annotations

import gzip
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import fl_adapters

TEST_ROWS = 2000
VALIDATION_SHARE = 10  # every tenth training row of a site is its validation data
ALPHA = 0.5  # of the Dirichlet draw: smaller is more uneven
SEED = 2024  # of the division, not of the training
FILES = ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz")

Array = np.ndarray[Any, np.dtype[Any]]
Part = tuple[Array, Array]
"""Images, float32 [rows, side, side] from 0 to 1, and labels, int64 [rows]."""


@dataclass(frozen=True)
class Images:
    """What one site trains on, validates with, and what is held out for everybody. name: of the data set."""

    train: Part
    validation: Part
    test: Part
    name: str


def load(source: str | None, shard: str | None, rows: int) -> Images:
    """The data of one site.

    source: the folder of Fashion-MNIST's files, "digits", or None: Fashion-MNIST where it is found, else digits.
    shard: "2/4" for the second of four parts; None: the part of the site that this process is, or everything.
    rows: how many rows to train on, all sites together; 0 for all there are.
    """
    images, labels, name = read(source)
    order = np.random.RandomState(SEED).permutation(len(images))  # RandomState: the same in every NumPy
    cut = min(TEST_ROWS, max(len(images) // 2, 1000))  # of the digits more than half: there are few
    test, train = order[:cut], order[cut:][: rows or None]
    index, count = place(shard)
    mine = train[divide(labels[train], count)[index]]
    held_back = np.arange(len(mine)) % VALIDATION_SHARE == 0

    def part(chosen: Array) -> Part:
        return images[chosen], labels[chosen]

    return Images(part(mine[~held_back]), part(mine[held_back]), part(test), name)


def place(shard: str | None) -> tuple[int, int]:
    """(index, count) of the part to train on: as `shard` says, else this site's place in the federation."""
    if shard is None:
        site = fl_adapters.site()  # outside of a federation: index 0 of 1
        return site.index, site.count
    number, _, count = shard.partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise SystemExit(f"--shard {shard}: write it like 2/4, the second of four parts")
    return int(number) - 1, int(count)


def divide(labels: Array, sites: int) -> list[Array]:
    """Row numbers of each site: every label's rows are cut at the shares of a Dirichlet draw."""
    draw = np.random.RandomState(SEED)
    parts: list[list[Array]] = [[] for _ in range(sites)]
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        cuts = np.cumsum(draw.dirichlet([ALPHA] * sites))[:-1] * len(rows)
        for part, chunk in zip(parts, np.split(rows, cuts.astype(int)), strict=True):
            part.append(chunk)
    return [np.sort(np.concatenate(part)) for part in parts]


def read(source: str | None) -> tuple[Array, Array, str]:
    """(images, labels, name of the data set)."""
    folder = Path(source) if source and source != "digits" else None
    if source is None and beside_checkout().is_dir():
        folder = beside_checkout()
    if folder is None:
        from sklearn.datasets import load_digits

        digits = load_digits()
        return (digits.images / 16).astype(np.float32), digits.target.astype(np.int64), "digits"
    for name in FILES:
        if not (folder / name).is_file():
            raise SystemExit(f"--data {source}: there is no {name} in this folder; or write --data digits")
    images, labels = (np.frombuffer(gzip.decompress((folder / name).read_bytes()), np.uint8) for name in FILES)
    return images[16:].reshape(-1, 28, 28).astype(np.float32) / 255, labels[8:].astype(np.int64), "Fashion-MNIST"


def beside_checkout() -> Path:
    """Where Fashion-MNIST is looked for: in $FL_ADAPTERS_DATA, else in ../shared/data beside the checkout."""
    data = os.environ.get("FL_ADAPTERS_DATA", Path(__file__).resolve().parents[2] / "shared" / "data")
    return Path(data) / "fashion_mnist"
