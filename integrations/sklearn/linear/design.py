"""This site's rows as a matrix with a column for the intercept, dense or sparse."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy import sparse

from ..federation import Array


class Design:
    """Rows of this site.

    Args:
        X: Features, dense or sparse.
        intercept: Value of a last column that is added, 0 for none.
    """

    def __init__(self, X: Any, intercept: float) -> None:
        column = np.full((X.shape[0], 1), float(intercept))
        if sparse.issparse(X):
            matrix = sparse.csr_matrix(X, dtype=np.float64)
            self._x: Any = sparse.hstack([matrix, column], format="csr") if intercept else matrix
        else:
            dense = np.asarray(X, np.float64)
            self._x = np.hstack([dense, column]) if intercept else dense
        self.width = int(self._x.shape[1])

    def scores(self, coef: Array) -> Array:
        """Return rows times coefficients [outputs, width], as [rows, outputs]."""
        return np.asarray(self._x @ coef.T)

    def pull(self, slopes: Array) -> Array:
        """Return the gradient [outputs, width] for slopes [rows, outputs]."""
        return np.asarray(self._x.T @ slopes).T

    def curve(self, weights: Array) -> Array:
        """Return the weighted products of all pairs of columns, [width, width], for weights [rows]."""
        if sparse.issparse(self._x):
            return np.asarray((self._x.T @ self._x.multiply(weights[:, None])).todense())
        return np.asarray(self._x.T @ (self._x * weights[:, None]))
