"""Data of the example: Adult census income with its missing values, divided unevenly among the sites.

If that data set is not found, scikit-learn's breast cancer data takes its place, with a column of texts and with holes.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

import fl_adapters

SHARES = (0.45, 0.30, 0.15, 0.07, 0.03)  # of five sites in the rows
ALPHA = 2.0  # of the Dirichlet distribution by which the sites differ: smaller is more uneven
SEED = 1


@dataclass(frozen=True)
class Part:
    """Rows with their labels.

    Attributes:
        x: Features: numbers and texts, with missing values.
        y: Labels, 0 or 1, int [rows].
    """

    x: pd.DataFrame
    y: np.ndarray


@dataclass(frozen=True)
class Data:
    """Data of one site.

    Attributes:
        train: The site's training rows.
        test: Held-out rows, the same for all sites.
        name: Name of the data set.
    """

    train: Part
    test: Part
    name: str


def load(source: str | None = None, shard: str | None = None) -> Data:
    """Load the data of one site.

    Args:
        source: Folder of adult_train.csv.gz and adult_test.csv.gz, or "breast_cancer". None takes what is found.
        shard: Part to train on, such as "2/5" for the second of five. None takes the part of this site, or everything
            outside a federation.

    Returns:
        The site's training rows, and the held-out rows of all sites.
    """
    train, test, name = read(source)
    if shard is None:
        site = fl_adapters.site()  # outside a federation: index 0 of 1
        index, count = site.index, site.count
    else:
        index, count = int(shard.partition("/")[0]) - 1, int(shard.partition("/")[2])
    mine = divide(train.x.iloc[:, 0].to_numpy(), count)[index]
    return Data(Part(train.x.iloc[mine].reset_index(drop=True), train.y[mine]), test, name)


def divide(column: np.ndarray, sites: int) -> list[np.ndarray]:
    """Row numbers of each site. Each fifth of the first column's values has other shares, so the sites differ."""
    draw = np.random.RandomState(SEED)
    shares = np.array(SHARES if sites == len(SHARES) else [1 / sites] * sites)
    parts: list[list[np.ndarray]] = [[] for _ in range(sites)]
    for rows in np.array_split(np.argsort(column, kind="stable"), 5):
        cuts = (np.cumsum(draw.dirichlet(ALPHA * sites * shares))[:-1] * len(rows)).astype(int)
        for part, chunk in zip(parts, np.split(draw.permutation(rows), cuts), strict=True):
            part.append(chunk)
    return [np.sort(np.concatenate(part)) for part in parts]


def read(source: str | None) -> tuple[Part, Part, str]:
    """Training rows, held-out rows, and the name of the data set."""
    folder = Path(source) if source and source != "breast_cancer" else None
    if source is None and beside_checkout().is_dir():
        folder = beside_checkout()
    if folder is None:
        return (*cancer(), "breast cancer")
    files = [folder / f"adult_{part}.csv.gz" for part in ("train", "test")]
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise SystemExit(
            f"--data {source}: there is no {missing[0].name} in this folder; check it, or use --data breast_cancer"
        )
    frames = [pd.read_csv(file, na_values="?") for file in files]
    labels = [(frame.pop("income") == ">50K").to_numpy().astype(int) for frame in frames]
    return Part(frames[0], labels[0]), Part(frames[1], labels[1]), "Adult census income"


def cancer() -> tuple[Part, Part]:
    """Scikit-learn's breast cancer data: every third row held out, one column as texts, every ninth value missing."""
    from sklearn.datasets import load_breast_cancer

    x, y = load_breast_cancer(return_X_y=True, as_frame=True)
    x["size"] = pd.qcut(x.pop("mean area"), 4, labels=["small", "medium", "large", "huge"]).astype(object)
    holes = np.random.RandomState(SEED).random_sample(x.shape) < 1 / 9
    holes[:, 0] = False
    x, test = x.mask(holes), np.arange(len(y)) % 3 == 0
    return Part(x[~test], y[~test].to_numpy()), Part(x[test], y[test].to_numpy())


def beside_checkout() -> Path:
    """Default folder of the Adult data set: in $FL_ADAPTERS_DATA, else in ../shared/data beside the checkout."""
    data = os.environ.get("FL_ADAPTERS_DATA", Path(__file__).resolve().parents[3] / "shared" / "data")
    return Path(data) / "adult"
