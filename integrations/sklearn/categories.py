"""Union of categories and labels over all sites: as texts that give back the exact values."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from fl_runtime.errors import ConfigError, HandshakeError

from .federation import Array, Federation, large_union


def unions(federation: Federation, columns: Sequence[Any], names: Sequence[str]) -> list[Any]:
    """Return the distinct values that each column has at any site.

    Args:
        federation: The federation.
        columns: Columns of this site: one-dimensional arrays of numbers, booleans or texts, or objects of these.
        names: How errors call the columns.

    Returns:
        An array for each column: sorted where its values can be compared, missing values at the end. Its dtype is the
        one that holds the values of all sites.

    Raises:
        ConfigError: A column holds something else.
        HandshakeError: A column has texts at one site and numbers at another.
    """
    texts = []
    for number, column in enumerate(columns):
        array = np.asarray(column)
        dtype = "U" if array.dtype.kind == "U" else array.dtype.str
        texts += [f"{number}|d:{dtype}", *(f"{number}|{_text(value, names[number])}" for value in _distinct(array))]
    by_column: list[list[str]] = [[] for _ in columns]
    for text in large_union(federation, sorted(set(texts))):
        owner, _, rest = text.partition("|")
        by_column[int(owner)].append(rest)
    return [_array(found, name) for found, name in zip(by_column, names, strict=True)]


def codes(values: Any, categories: Any) -> Any:
    """Return the position of each value among the categories, -1 where it is none of them."""
    place = {key(category): number for number, category in enumerate(np.asarray(categories).tolist())}
    return np.array([place.get(key(value), -1) for value in np.asarray(values).tolist()], dtype=np.int64)


def counts(values: Any, categories: Any, weights: Array | None = None) -> Array:
    """Return how often (or with which weight) each category occurs at this site."""
    found = codes(values, categories)
    kept = found >= 0
    return np.bincount(found[kept], None if weights is None else weights[kept], len(categories)).astype(np.float64)


def key(value: Any) -> Any:
    """A hashable value that is equal where scikit-learn takes two values for the same category."""
    return "NaN" if isinstance(value, float) and math.isnan(value) else (type(value) is str, value)


def _distinct(array: Any) -> list[Any]:
    if array.dtype.kind in "biufU":
        return list(np.unique(array).tolist())
    if array.dtype.kind != "O":
        return [array.dtype.type(0) if array.dtype.kind in "Mm" else b""]  # refused by _text
    return list({key(value): value for value in array.tolist()}.values())


def _text(value: Any, name: str) -> str:
    value = value.item() if isinstance(value, np.generic) else value
    if value is None:
        return "n:"
    for kind, letter in ((bool, "b"), (int, "i"), (float, "f")):
        if isinstance(value, kind):
            return f"{letter}:{float(value)!r}" if kind is float else f"{letter}:{int(value)}"
    if isinstance(value, str):
        return f"s:{json.dumps(value)}"
    raise ConfigError(
        f"{name} holds {type(value).__name__} values, which are no texts, numbers or booleans",
        where="fit",
        fix="turn them into texts first, in the same way at every site",
    )


def _value(text: str) -> Any:
    kind, _, rest = text.partition(":")
    if kind == "s":
        return str(json.loads(rest))
    if kind == "n":
        return None
    return float(rest) if kind == "f" else bool(int(rest)) if kind == "b" else int(rest)


def _array(texts: Sequence[str], name: str) -> Any:
    dtypes = {text[2:] for text in texts if text.startswith("d:")}
    values = list({key(v): v for v in (_value(text) for text in texts if not text.startswith("d:"))}.values())
    objects = {dtype for dtype in dtypes if dtype.startswith("|O")}
    numeric = dtypes - objects - {"U"}
    strings = any(isinstance(value, str) for value in values)
    numbers = any(
        isinstance(value, int | float) and not (isinstance(value, float) and math.isnan(value)) for value in values
    )
    if strings and numbers:
        raise HandshakeError(
            f"{name} has texts at one site and numbers at another",
            where="fit",
            fix="give the column the same type at every site",
        )
    missing = [value for value in values if value is None or (isinstance(value, float) and math.isnan(value))]
    known = sorted(value for value in values if not any(value is m for m in missing))
    ordered = known + sorted(missing, key=lambda value: value is not None)
    if strings and numeric:  # at some sites no value is known
        objects, numeric = {"|O"}, set()
    if objects:
        result = np.empty(len(ordered), dtype=object)
        result[:] = ordered
        return result
    return np.array(ordered) if not numeric else np.array(ordered, dtype=np.result_type(*map(np.dtype, numeric)))
