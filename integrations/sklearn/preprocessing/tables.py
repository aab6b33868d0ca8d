"""Small tables that make scikit-learn's own `fit` find what the rows of all sites would make it find."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..trainer import checked_column


def columns_of(X: Any) -> list[Any]:
    """Return the columns of a table or an array as one-dimensional arrays, each with its own dtype."""
    if hasattr(X, "iloc"):
        return [checked_column(X.iloc[:, number]) for number in range(X.shape[1])]
    array = X if hasattr(X, "dtype") else np.asarray(X)
    if not hasattr(X, "dtype") and array.dtype.kind == "U":
        array = np.asarray(X, dtype=object)  # as scikit-learn reads lists of texts
    return [array[:, number] for number in range(array.shape[1])]


def column_names(X: Any) -> list[str]:
    """Return how messages call the columns."""
    if hasattr(X, "columns"):
        return [f"the column {str(name)!r}" for name in X.columns]
    return [f"column {number}" for number in range(np.shape(X)[1])]


def table(X: Any, columns: Sequence[Any], *, least: int = 1) -> Any:
    """Return a table with these columns, of the kind of X and with its names.

    Args:
        X: A data frame or an array-like of this site.
        columns: Values of each column, of any lengths above 0; the first value of a shorter one is repeated.
        least: Fewest rows of the table.
    """
    rows = max([least, *(len(column) for column in columns)])
    filled = [np.concatenate([column, np.repeat(column[:1], rows - len(column))]) for column in columns]
    if hasattr(X, "iloc"):
        pandas = sys.modules["pandas"]
        frame = pandas.DataFrame({number: pandas.Series(column) for number, column in enumerate(filled)})
        frame.columns = X.columns
        return frame
    dtypes = [column.dtype for column in filled]
    dtype = object if any(d.kind == "O" for d in dtypes) else np.result_type(*dtypes)
    return np.stack([column.astype(dtype) for column in filled], axis=1)
