"""Counts, means and variances of columns over all sites, in two passes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import sparse

from .federation import Array, Federation


@dataclass(frozen=True)
class Moments:
    """Moments of each column over all sites, missing values left out.

    Attributes:
        count: Number (or sum of weights) of the values.
        mean: Mean, NaN for a column without values.
        variance: Variance, divided by the count.
    """

    count: Array
    mean: Array
    variance: Array


def moments(federation: Federation, X: Any, weights: Array | None = None) -> Moments:
    """Compute the moments of all columns.

    The second pass adds squares of differences from the mean of all sites, so that large means cost no digits.

    Args:
        federation: The federation.
        X: Rows of this site, dense or sparse, with NaN for missing values.
        weights: Weight of each row.

    Returns:
        The moments over all sites.
    """
    columns = _Sparse(X, weights) if sparse.issparse(X) else _Dense(X, weights)
    first = federation.sum({"count": columns.count, "sum": columns.total()})
    count = first["count"]
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = first["sum"] / count
    centre = np.nan_to_num(mean)
    square, rest = columns.deviations(centre)
    second = federation.sum({"square": square, "rest": rest})
    with np.errstate(invalid="ignore", divide="ignore"):
        variance = (second["square"] - second["rest"] ** 2 / count) / count
    return Moments(count, mean, variance)


class _Dense:
    """Columns of a dense array."""

    def __init__(self, X: Any, weights: Array | None) -> None:
        self._x = np.asarray(X, np.float64)
        self._weights = np.ones(len(self._x)) if weights is None else np.asarray(weights, np.float64)
        self._there = ~np.isnan(self._x)
        self.count: Array = self._weights @ self._there

    def total(self) -> Array:
        return np.asarray(self._weights @ np.where(self._there, self._x, 0.0))

    def deviations(self, centre: Array) -> tuple[Array, Array]:
        """Weighted sums of the squared and of the plain differences from the centre."""
        away = np.where(self._there, self._x - centre, 0.0)
        return np.asarray(self._weights @ away**2), np.asarray(self._weights @ away)


class _Sparse:
    """Columns of a sparse matrix, where what is not stored is zero."""

    def __init__(self, X: Any, weights: Array | None) -> None:
        self._x = sparse.csr_matrix(X, dtype=np.float64, copy=True)
        self._weights = np.ones(self._x.shape[0]) if weights is None else np.asarray(weights, np.float64)
        self._missing = np.isnan(self._x.data)
        self.count: Array = self._weights.sum() - self._weighted(self._missing.astype(np.float64))
        self._stored = self._weighted(np.where(self._missing, 0.0, 1.0))
        self._x.data[self._missing] = 0.0

    def _weighted(self, data: Array) -> Array:
        matrix = sparse.csr_matrix((data, self._x.indices, self._x.indptr), shape=self._x.shape)
        return np.asarray(self._weights @ matrix).ravel()

    def total(self) -> Array:
        return self._weighted(self._x.data)

    def deviations(self, centre: Array) -> tuple[Array, Array]:
        away = np.where(self._missing, 0.0, self._x.data - centre[self._x.indices])
        zeros = self.count - self._stored
        return self._weighted(away**2) + zeros * centre**2, self._weighted(away) - zeros * centre
