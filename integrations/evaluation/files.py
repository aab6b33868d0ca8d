"""Predictions in a CSV file: a row for each case, a column for the truth, for each model and for each subgroup."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fl_runtime.errors import ConfigError


def read_columns(path: Path, names: Sequence[str]) -> dict[str, list[str]]:
    """Read columns of a CSV file with a heading.

    Args:
        path: The file, UTF-8.
        names: Names of the columns.

    Returns:
        Name -> the texts of the column, "" where there is none.

    Raises:
        ConfigError: The file cannot be read, or has no such column.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file)
            headings = list(rows.fieldnames or ())
            for name in names:
                if name not in headings:
                    raise ConfigError(
                        f"there is no column {name!r}", where=str(path), fix=f"the columns are: {', '.join(headings)}"
                    )
            table = list(rows)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(
            f"the predictions cannot be read: {error}",
            where=str(path),
            fix="name a CSV file in UTF-8 with a heading; {site} stands for the name of the site",
        ) from None
    return {name: [row[name] or "" for row in table] for name in names}


def numbers(name: str, texts: Sequence[str]) -> npt.NDArray[np.float64]:
    """Return a column as numbers. Raises ConfigError if one is not."""
    try:
        return np.array([float(text) for text in texts], np.float64)
    except ValueError as error:
        raise ConfigError(f"the column {name!r} holds no numbers: {error}", fix="leave out such rows") from None


def labels(texts: Sequence[str]) -> npt.NDArray[Any]:
    """Return a column of labels: numbers if all are, so that 1 and 1.0 are the same label."""
    try:
        return np.array([float(text) for text in texts], np.float64)
    except ValueError:
        return subgroups(texts)


def predictions(texts: Sequence[str]) -> npt.NDArray[Any]:
    """Return the predictions of one model: labels if all are whole numbers or one is no number, otherwise scores."""
    try:
        values = [float(text) for text in texts]
    except ValueError:
        return np.array(texts, object)
    if texts and all(text.strip().lstrip("+-").isdecimal() for text in texts):
        return np.array([int(text) for text in texts], np.int64)
    return np.array(values, np.float64)


def subgroups(texts: Sequence[str]) -> npt.NDArray[np.object_]:
    """Return a column of subgroups, None where there is none."""
    return np.array([text or None for text in texts], object)
