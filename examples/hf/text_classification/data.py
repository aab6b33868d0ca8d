"""Data of the example: the texts of one site, and test rows that are the same for all sites.

The training rows are divided unevenly: the sites' shares of each label are drawn from a Dirichlet distribution. No test
row, and no duplicate of one, is in any site's training rows.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import fl_adapters
import stdlib_docs

ROWS = 1600  # training rows of all sites together; few, to keep the example quick
TEST_ROWS = 1000
VALIDATION_SHARE = 10  # every tenth training row of a site is its validation data
ALPHA = 1.0  # of the Dirichlet distribution: smaller is more uneven
SEED = 2024  # divides the data; the training has a seed of its own

Row = tuple[str, int]
"""A text and the number of its label."""


@dataclass(frozen=True)
class Data:
    """Rows of one site for training and validation, test rows of all sites, and the names of the labels."""

    train: list[Row]
    validation: list[Row]
    test: list[Row]
    labels: list[str]


def load(source: str | None = None, shard: str | None = None, rows: int = ROWS) -> Data:
    """Load the data of one site.

    Args:
        source: File, folder or data set of the hub (see `read`). None takes docstrings of the standard library.
        shard: Part to train on, such as "2/3" for the second of three. None takes the part of this site, or everything
            outside a federation.
        rows: Training rows of all sites together; 0 for all.

    Returns:
        The site's training and validation rows, and the test rows of all sites.
    """
    texts = distinct(read(source) if source else stdlib_docs.rows())
    labels = sorted(set(texts.values()))
    everything = [(text, labels.index(label)) for text, label in sorted(texts.items())]
    order = np.random.RandomState(SEED).permutation(len(everything))  # RandomState: the same in every NumPy
    shuffled = [everything[i] for i in order]

    cut = min(TEST_ROWS, len(shuffled) // 4)
    test, train = shuffled[:cut], shuffled[cut:][: rows or None]
    index, count = place(shard)
    mine = divide([label for _, label in train], count)[index]
    return Data(
        train=[train[i] for i in mine if i % VALIDATION_SHARE],
        validation=[train[i] for i in mine if not i % VALIDATION_SHARE],
        test=test,
        labels=labels,
    )


def place(shard: str | None) -> tuple[int, int]:
    """Index and number of parts: those that `shard` names, else this site's index and the number of sites."""
    if shard is None:
        site = fl_adapters.site()  # outside a federation: index 0 of 1
        return site.index, site.count
    number, _, count = shard.partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise SystemExit(f"--shard {shard}: write it as 2/3 for the second of three parts")
    return int(number) - 1, int(count)


def divide(labels: list[int], sites: int) -> list[list[int]]:
    """Row numbers of each site. The rows of every label are divided by shares from a Dirichlet distribution."""
    draw = np.random.RandomState(SEED)
    parts: list[list[int]] = [[] for _ in range(sites)]
    for label in sorted(set(labels)):
        rows = [i for i, other in enumerate(labels) if other == label]
        cuts = np.cumsum(draw.dirichlet([ALPHA] * sites))[:-1] * len(rows)
        for part, chunk in zip(parts, np.split(np.array(rows), cuts.astype(int)), strict=True):
            part.extend(chunk.tolist())
    return [sorted(part) for part in parts]


def distinct(rows: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Label of each text. Texts that differ in case or spacing count as one; texts with two labels are left out."""
    first: dict[str, tuple[str, str]] = {}
    labels: dict[str, set[str]] = {}
    for label, text in rows:
        key = "".join(text.casefold().split())
        first[key] = min(first.get(key, (text, label)), (text, label))
        labels.setdefault(key, set()).add(label)
    return {text: label for key, (text, label) in first.items() if len(labels[key]) == 1}


def read(source: str) -> Iterable[tuple[str, str]]:
    """Rows (label, text) of a .csv or .tsv file, of the only such file in a folder, or of a data set of the hub."""
    path = Path(source)
    if path.is_dir():
        tables = sorted(p for p in path.iterdir() if p.suffix in {".csv", ".tsv"})
        if len(tables) != 1:
            raise SystemExit(f"--data {source}: expected one .csv or .tsv file in this folder, found {len(tables)}")
        path = tables[0]
    if path.is_file():
        return read_table(path)
    if path.suffix in {".csv", ".tsv"} or source.startswith((".", "/", "~")):
        raise SystemExit(f"--data {source}: there is no such file or folder")
    return read_hub(source)


def read_table(path: Path) -> Iterable[tuple[str, str]]:
    """Rows of a table: the columns `label` and `text` if its first line names them, else its first two columns."""
    tabs = path.suffix == ".tsv"
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.reader(
            file, "excel-tab" if tabs else "excel", quoting=csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL
        )
        lines = [line for line in reader if len(line) >= 2]
    if not lines:
        raise SystemExit(f"--data {path}: no line has a label and a text")
    header = [cell.strip().lower() for cell in lines[0]]
    if {"label", "text"} <= set(header):
        return [(line[header.index("label")], line[header.index("text")]) for line in lines[1:]]
    return [(line[0], line[1]) for line in lines]


def read_hub(name: str) -> Iterable[tuple[str, str]]:
    """Rows of the split `train` of a Hugging Face data set with the columns `text` and `label`."""
    from datasets import ClassLabel, load_dataset

    rows = load_dataset(name, split="train")
    if not {"text", "label"} <= set(rows.column_names):
        raise SystemExit(f"--data {name}: expected the columns text and label, found {', '.join(rows.column_names)}")
    feature = rows.features["label"]
    named = feature.int2str if isinstance(feature, ClassLabel) else str
    return [(named(row["label"]), row["text"]) for row in rows]
