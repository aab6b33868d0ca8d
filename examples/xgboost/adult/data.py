"""Data of the example: Adult census income, divided unevenly among the sites.

If that data set is not found, scikit-learn's breast cancer data takes its place.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

import fl_adapters

SHARES = (0.28, 0.24, 0.20, 0.16, 0.12)  # average share of each of five sites in the rows of a kind
ALPHA = 0.5  # of the Dirichlet distribution: smaller is more uneven
SEED = 1


@dataclass(frozen=True)
class Part:
    """Rows with their labels.

    Attributes:
        x: Features, with the same columns and categories at every site.
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
    index, count = place(shard)
    mine = divide(kinds(train.x), count)[index]
    return Data(Part(train.x.iloc[mine], train.y[mine]), test, name)


def place(shard: str | None) -> tuple[int, int]:
    """Index and number of parts: those that `shard` names, else this site's index and the number of sites."""
    if shard is None:
        site = fl_adapters.site()  # outside a federation: index 0 of 1
        return site.index, site.count
    number, _, count = shard.partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise SystemExit(f"--shard {shard}: write it as 2/5 for the second of five parts")
    return int(number) - 1, int(count)


def divide(kinds: np.ndarray, sites: int) -> list[np.ndarray]:
    """Row numbers of each site. The rows of each kind are divided by shares from a Dirichlet distribution."""
    draw = np.random.RandomState(SEED)
    shares = np.array(SHARES if sites == len(SHARES) else [1 / sites] * sites)
    parts: list[list[np.ndarray]] = [[] for _ in range(sites)]
    for kind in np.unique(kinds):
        rows = draw.permutation(np.flatnonzero(kinds == kind))
        cuts = (np.cumsum(draw.dirichlet(ALPHA * sites * shares))[:-1] * len(rows)).astype(int)
        for part, chunk in zip(parts, np.split(rows, cuts), strict=True):
            part.append(chunk)
    return [np.sort(np.concatenate(part)) for part in parts]


def kinds(x: pd.DataFrame) -> np.ndarray:
    """Kind of each row, in which the sites differ: the level of education, else the decile of the first column."""
    if "education" in x:
        return x["education"].cat.codes.to_numpy()
    return pd.qcut(x.iloc[:, 0], 10, labels=False).to_numpy()


def read(source: str | None) -> tuple[Part, Part, str]:
    """Training rows, held-out rows, and the name of the data set."""
    folder = Path(source) if source and source != "breast_cancer" else None
    if source is None and beside_checkout().is_dir():
        folder = beside_checkout()
    if folder is None:
        from sklearn.datasets import load_breast_cancer

        x, y = load_breast_cancer(return_X_y=True, as_frame=True)
        test = np.arange(len(y)) % 3 == 0
        return Part(x[~test], y[~test].to_numpy()), Part(x[test], y[test].to_numpy()), "breast cancer"
    files = [folder / f"adult_{part}.csv.gz" for part in ("train", "test")]
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise SystemExit(
            f"--data {source}: there is no {missing[0].name} in this folder; check it, or use --data breast_cancer"
        )
    frames = [pd.read_csv(file, na_values="?") for file in files]
    labels = [(frame.pop("income") == ">50K").to_numpy().astype(int) for frame in frames]
    for column in frames[0].select_dtypes(exclude="number").columns:
        kinds = pd.CategoricalDtype(sorted(frames[0][column].dropna().unique()))  # the same at every site
        for frame in frames:
            frame[column] = frame[column].astype(kinds)
    return Part(frames[0], labels[0]), Part(frames[1], labels[1]), "Adult census income"


def beside_checkout() -> Path:
    """Default folder of the Adult data set: in $FL_ADAPTERS_DATA, else in ../shared/data beside the checkout."""
    data = os.environ.get("FL_ADAPTERS_DATA", Path(__file__).resolve().parents[4] / "shared" / "data")
    return Path(data) / "adult"
