"""Data of the image examples: small grey images of ten classes, divided unevenly among the sites.

The images are Fashion-MNIST if it is found, else scikit-learn's handwritten digits, which come in a package. The sites'
shares of each class are drawn from a Dirichlet distribution: each site has many images of some classes and few of
others.
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
ALPHA = 0.5  # of the Dirichlet distribution: smaller is more uneven
SEED = 2024  # divides the data; the training has a seed of its own
FILES = ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz")

Array = np.ndarray[Any, np.dtype[Any]]
Part = tuple[Array, Array]
"""Images, float32 [rows, side, side] from 0 to 1, and their labels, int64 [rows]."""


@dataclass(frozen=True)
class Images:
    """Data of one site.

    Attributes:
        train: The site's training images.
        validation: The site's validation images.
        test: Held-out images, the same for all sites.
        name: Name of the data set.
    """

    train: Part
    validation: Part
    test: Part
    name: str


def load(source: str | None, shard: str | None, rows: int) -> Images:
    """Load the data of one site.

    Args:
        source: Folder of Fashion-MNIST's files, or "digits". None takes Fashion-MNIST if it is found, else the digits.
        shard: Part to train on, such as "2/4" for the second of four. None takes the part of this site, or everything
            outside a federation.
        rows: Training rows of all sites together; 0 for all.

    Returns:
        The site's training and validation images, and the test images of all sites.
    """
    images, labels, name = read(source)
    order = np.random.RandomState(SEED).permutation(len(images))  # RandomState: the same in every NumPy
    cut = min(TEST_ROWS, max(len(images) // 2, 1000))  # more than half of the digits, since there are few
    test, train = order[:cut], order[cut:][: rows or None]
    index, count = place(shard)
    mine = train[divide(labels[train], count)[index]]
    held_back = np.arange(len(mine)) % VALIDATION_SHARE == 0

    def part(chosen: Array) -> Part:
        return images[chosen], labels[chosen]

    return Images(part(mine[~held_back]), part(mine[held_back]), part(test), name)


def place(shard: str | None) -> tuple[int, int]:
    """Index and number of parts: those that `shard` names, else this site's index and the number of sites."""
    if shard is None:
        site = fl_adapters.site()  # outside a federation: index 0 of 1
        return site.index, site.count
    number, _, count = shard.partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise SystemExit(f"--shard {shard}: write it as 2/4 for the second of four parts")
    return int(number) - 1, int(count)


def divide(labels: Array, sites: int) -> list[Array]:
    """Row numbers of each site. The rows of every label are divided by shares from a Dirichlet distribution."""
    draw = np.random.RandomState(SEED)
    parts: list[list[Array]] = [[] for _ in range(sites)]
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        cuts = np.cumsum(draw.dirichlet([ALPHA] * sites))[:-1] * len(rows)
        for part, chunk in zip(parts, np.split(rows, cuts.astype(int)), strict=True):
            part.append(chunk)
    return [np.sort(np.concatenate(part)) for part in parts]


def read(source: str | None) -> tuple[Array, Array, str]:
    """Images, labels and name of the data set."""
    folder = Path(source) if source and source != "digits" else None
    if source is None and beside_checkout().is_dir():
        folder = beside_checkout()
    if folder is None:
        from sklearn.datasets import load_digits

        digits = load_digits()
        return (digits.images / 16).astype(np.float32), digits.target.astype(np.int64), "digits"
    for name in FILES:
        if not (folder / name).is_file():
            raise SystemExit(
                f"--data {source}: there is no {name} in this folder; check the path, or use --data digits"
            )
    images, labels = (np.frombuffer(gzip.decompress((folder / name).read_bytes()), np.uint8) for name in FILES)
    return images[16:].reshape(-1, 28, 28).astype(np.float32) / 255, labels[8:].astype(np.int64), "Fashion-MNIST"


def beside_checkout() -> Path:
    """Default folder of Fashion-MNIST: in $FL_ADAPTERS_DATA, else in ../shared/data beside the checkout."""
    data = os.environ.get("FL_ADAPTERS_DATA", Path(__file__).resolve().parents[2] / "shared" / "data")
    return Path(data) / "fashion_mnist"
