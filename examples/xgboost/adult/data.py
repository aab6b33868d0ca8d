"""Adult census income, dealt out unevenly; breast cancer data of scikit-learn where it is absent.

usage elsewhere: `data = load()`; a site of a federation gets its own rows, `--shard 2/5` the second of five parts.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

import fl_adapters

SHARES = (0.34, 0.27, 0.20, 0.13, 0.06)  # of the rows, for five sites
SEED = 0


@dataclass(frozen=True)
class Part:
    """x: a frame, the same columns and categories everywhere. y: 0 or 1."""

    x: pd.DataFrame
    y: np.ndarray


@dataclass(frozen=True)
class Data:
    """train: this site's rows. test: held out, the same for all."""

    train: Part
    test: Part
    name: str


def load(source: str | None = None, shard: str | None = None) -> Data:
    """source: folder of adult_train.csv.gz and adult_test.csv.gz, or "breast_cancer"."""
    train, test, name = read(source)
    index, count = place(shard)
    mine = divide(len(train.y), count)[index]
    return Data(Part(train.x.iloc[mine], train.y[mine]), test, name)


def place(shard: str | None) -> tuple[int, int]:
    """(index, count) of the part to train on: as `shard` says, else this site's place in the federation."""
    if shard is None:
        site = fl_adapters.site()  # outside of a federation: index 0 of 1
        return site.index, site.count
    number, _, count = shard.partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise SystemExit(f"--shard {shard}: write it like 2/5, the second of five parts")
    return int(number) - 1, int(count)


def divide(rows: int, sites: int) -> list[np.ndarray]:
    """Row numbers of each site."""
    shares = np.array(SHARES if sites == len(SHARES) else np.arange(sites, 0, -1), dtype=float)
    cuts = (np.cumsum(shares / shares.sum())[:-1] * rows).astype(int)
    return [np.sort(part) for part in np.split(np.random.RandomState(SEED).permutation(rows), cuts)]


def read(source: str | None) -> tuple[Part, Part, str]:
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
            f"--data {source}: there is no {missing[0].name} in this folder; or write --data breast_cancer"
        )
    frames = [pd.read_csv(file, na_values="?") for file in files]
    labels = [(frame.pop("income") == ">50K").to_numpy().astype(int) for frame in frames]
    for column in frames[0].select_dtypes(exclude="number").columns:
        kinds = pd.CategoricalDtype(sorted(frames[0][column].dropna().unique()))  # the same at every site
        for frame in frames:
            frame[column] = frame[column].astype(kinds)
    return Part(frames[0], labels[0]), Part(frames[1], labels[1]), "Adult census income"


def beside_checkout() -> Path:
    """Where Adult is looked for: in $FL_ADAPTERS_DATA, else in ../shared/data beside the checkout."""
    data = os.environ.get("FL_ADAPTERS_DATA", Path(__file__).resolve().parents[4] / "shared" / "data")
    return Path(data) / "adult"
