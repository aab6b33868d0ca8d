"""Rows of a data set, whatever its type: how many there are, what stands in a column, and a selection of them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from fl_runtime.errors import ConfigError
from fl_runtime.types import Array

_KINDS = (
    "an array, a list, a tuple of arrays, a pandas table, a data set of `datasets`, or a torch data set with a length"
)


def count_rows(data: Any) -> int:
    """Return the number of rows of a data set.

    Args:
        data: The data set.

    Returns:
        The number; of a tuple of arrays that of each of them.

    Raises:
        ConfigError: The data have no length, or the arrays of a tuple have different ones.
    """
    if isinstance(data, tuple):
        lengths = {count_rows(part) for part in data}
        if len(lengths) != 1:
            found = " and ".join(map(str, sorted(lengths))) or "no"
            fix = "give arrays of the same length: (x, y)"
            raise ConfigError(f"a tuple of arrays with {found} rows cannot be divided", where="data", fix=fix)
        return lengths.pop()
    if isinstance(data, (str, bytes, dict)) or not hasattr(data, "__getitem__"):
        raise ConfigError(f"{type(data).__name__} cannot be divided by rows", where="data", fix=f"give {_KINDS}")
    try:
        return int(data.shape[0]) if hasattr(data, "shape") else len(data)
    except (TypeError, IndexError, NotImplementedError):
        raise ConfigError(f"{type(data).__name__} has no length", where="data", fix=f"give {_KINDS}") from None


def values_of(data: Any, column: Any, what: str) -> Array:
    """Return a value for each row.

    Args:
        data: The data set.
        column: Name of a column of a table or of an attribute of a torch data set, number of a column of an array, or
            the values themselves.
        what: What they are, for errors: "label".

    Returns:
        The values: one dimension, as long as the data.

    Raises:
        ConfigError: There is no such column, or there is not one value for each row.
    """
    if isinstance(column, (str, int, np.integer)):
        values = _column(data, column if isinstance(column, str) else int(column), what)
    else:
        values = column
    if hasattr(values, "detach"):  # a tensor, maybe on a GPU
        values = values.detach().cpu().numpy()
    found = np.asarray(values)
    rows = count_rows(data)
    if found.ndim == 2 and found.shape[1] == 1:
        found = found[:, 0]
    if found.shape != (rows,):
        raise ConfigError(
            f"the {what} has the shape {found.shape}, the data have {rows} rows",
            where=what,
            fix=f"give one {what} for each row, or the name of a column",
        )
    return found


def select(data: Any, rows: Array) -> Any:
    """Return some rows of a data set, as a data set of the same type.

    Args:
        data: The data set.
        rows: Numbers of the rows.

    Returns:
        The rows. Of a torch data set a `Subset`; where the type allows it, nothing is copied.
    """
    if isinstance(data, tuple):
        return tuple(select(part, rows) for part in data)
    if _is_table(data):
        return data.iloc[rows]
    if _is_dataset(data):
        return data.select(rows)
    if _is_torch_dataset(data):
        from torch.utils.data import Subset

        return Subset(data, rows.tolist())
    return [data[row] for row in rows] if isinstance(data, Sequence) else data[rows]


def labelled(values: Array) -> tuple[tuple[str, ...], Array]:
    """Return the different values in order, as texts, and for each row the number of its value.

    Args:
        values: A value for each row. Missing ones (None, NaN) count as a value of their own, "missing".

    Returns:
        Names of the values, and numbers of the shape of `values`.
    """
    plain = ["missing" if _is_missing(value) else value for value in values.tolist()]
    different = list(dict.fromkeys(plain))
    try:
        different.sort()
    except TypeError:  # of several types
        different.sort(key=str)
    number = {value: index for index, value in enumerate(different)}
    return tuple(map(_text, different)), np.array([number[value] for value in plain], np.int64)


def _text(value: Any) -> str:
    """The name of a label: "1" for 1.0, as in a table of numbers with the label in a column."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _is_missing(value: Any) -> bool:
    try:
        return value is None or bool(value != value)
    except TypeError:  # pandas.NA
        return True


def _column(data: Any, column: str | int, what: str) -> Any:
    try:
        if _is_dataset(data):
            return np.asarray(data.with_format(None)[column])
        if _is_table(data) or getattr(getattr(data, "dtype", None), "names", None):
            return data[column]
        if _is_torch_dataset(data) and isinstance(column, str):
            return getattr(data, column)
        if getattr(data, "ndim", 1) == 2 and not isinstance(column, str):
            return data[:, column]
    except (KeyError, IndexError, AttributeError, ValueError):
        raise ConfigError(
            f"there is no {column!r} in these data", where=what, fix=f"they have: {_names(data)}"
        ) from None
    raise ConfigError(
        f"{type(data).__name__} has no column {column!r}", where=what, fix=f"give the {what} of every row as an array"
    )


def _names(data: Any) -> str:
    names = getattr(data, "column_names", None) or getattr(data, "columns", None)
    if names is None and hasattr(data, "dtype"):
        names = data.dtype.names or range(data.shape[1])
    if names is None:
        names = [name for name in vars(data) if not name.startswith("_")]
    return ", ".join(map(str, names))


def _is_table(data: Any) -> bool:
    return hasattr(data, "iloc")


def _is_dataset(data: Any) -> bool:
    return hasattr(data, "select") and hasattr(data, "column_names")


def _is_torch_dataset(data: Any) -> bool:
    torch_data = sys.modules.get("torch.utils.data")
    return torch_data is not None and isinstance(data, torch_data.Dataset)
