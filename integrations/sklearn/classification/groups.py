"""Sums over the rows of each class."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import sparse

from ..federation import Array, Federation


@dataclass(frozen=True)
class Groups:
    """This site's rows by class, and the means of the classes over all sites.

    Attributes:
        rows: This site's rows, [rows, features].
        labels: Number of each row's class.
        member: Weight of each row in its class, [classes, rows], sparse.
        count: Sum of the weights of each class over all sites, [classes].
        mean: Means of each class over all sites, [classes, features].
    """

    rows: Array
    labels: Any
    member: Any
    count: Array
    mean: Array

    def deviations(self) -> Array:
        """Return this site's rows less the means of their classes."""
        return self.rows - self.mean[self.labels]


def grouped(federation: Federation, X: Any, labels: Any, classes: int, weights: Array | None = None) -> Groups:
    """Sum the rows of each class over all sites.

    Args:
        federation: The federation.
        X: This site's rows, dense.
        labels: Number of each row's class.
        classes: Number of classes.
        weights: Weight of each row.
    """
    rows = np.asarray(X, np.float64)
    given = np.ones(len(rows)) if weights is None else weights
    member = sparse.csr_matrix((given, (labels, np.arange(len(rows)))), shape=(classes, len(rows)))
    totals = federation.sum({"count": np.asarray(member.sum(axis=1)).ravel(), "sum": np.asarray(member @ rows)})
    mean = totals["sum"] / np.maximum(totals["count"], np.finfo(float).tiny)[:, None]
    return Groups(rows, labels, member, totals["count"], mean)
