"""Transformers that need quantiles of each feature, fitted over all sites."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from sklearn import preprocessing

from fl_adapters.loop.order import extremes, present, quantiles

from ..clustering.kmeans import Points, lloyd
from ..federated import Federated, adopt, opened, plain_copy, refuse
from ..federation import Array, Federation
from ..moments import moments
from ..trainer import validated
from .scaling import dense

_WIDTH = 1e-8  # narrower bins are removed, as scikit-learn does


class QuantileTransformer(Federated, preprocessing.QuantileTransformer):
    """`sklearn.preprocessing.QuantileTransformer` fitted over all sites: exact quantiles of all rows together.

    `subsample` is not applied: all rows count, as with `subsample=None`.
    """

    def fit(self, X: Any, y: Any = None) -> Any:
        with opened(self, X) as federation:
            return super().fit(X, y) if federation is None else self._fit_on(federation, X)

    def _fit_on(self, federation: Federation, X: Any) -> Any:
        dense(self, X)
        X = validated(self, X, dtype=[np.float64, np.float32], finite="allow-nan")
        rows = int(federation.sum({"rows": np.array([len(X)], float)})["rows"][0])
        if self.n_quantiles > rows:
            warnings.warn(f"n_quantiles={self.n_quantiles} is more than the {rows} rows of all sites", stacklevel=4)
        self.n_quantiles_ = max(1, min(self.n_quantiles, rows))
        self.references_ = np.linspace(0, 1, self.n_quantiles_, endpoint=True)
        columns = present(X)
        levels = self.references_ * 100 / 100  # scikit-learn's way over percentages, with its rounding
        found = quantiles(federation, columns, [levels] * len(columns))
        self.quantiles_ = np.maximum.accumulate(np.stack(found, axis=1))
        return self


class KBinsDiscretizer(Federated, preprocessing.KBinsDiscretizer):
    """`sklearn.preprocessing.KBinsDiscretizer` fitted over all sites: the bins of all rows together.

    `subsample` is not applied: all rows count, as with `subsample=None`.
    """

    def fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> Any:
        with opened(self, X) as federation:
            if federation is None:
                return super().fit(X, y, sample_weight)
            if sample_weight is not None:
                refuse(self, "sample_weight", "cannot be used for bins over all sites", "leave it out")
            return self._fit_on(federation, X)

    def _fit_on(self, federation: Federation, X: Any) -> Any:
        X = validated(self, X, dtype="numeric")
        columns = present(X)
        low, high = extremes(federation, columns)
        wanted = np.broadcast_to(np.asarray(self.n_bins, int), X.shape[1])
        if self.strategy == "uniform":
            edges = [np.linspace(a, b, n + 1) for a, b, n in zip(low, high, wanted, strict=True)]
        elif self.strategy == "kmeans":
            edges = _by_means(federation, np.asarray(X, np.float64), low, high, wanted)
        else:
            method = getattr(self, "quantile_method", "linear")
            method = "linear" if method == "warn" else method
            levels = [np.linspace(0, 100, n + 1) / 100 for n in wanted]
            edges = [_wide(found) for found in quantiles(federation, columns, levels, method)]
        constant = low == high
        self._take(X, [np.array([-np.inf, np.inf]) if c else e for c, e in zip(constant, edges, strict=True)])
        return self

    def _take(self, X: Any, edges: list[Array]) -> None:
        """Set what scikit-learn's own `fit` sets, by fitting it on a small table first."""
        bins = np.array([len(found) - 1 for found in edges])
        two = np.stack([np.zeros(len(bins)), np.where(bins > 1, 1.0, 0.0)]).astype(X.dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about features that are constant
            adopt(self, plain_copy(self, strategy="uniform", subsample=None, n_bins=np.maximum(bins, 2)).fit(two))
        self.bin_edges_ = np.empty(len(edges), dtype=object)
        self.bin_edges_[:] = edges
        self.n_bins_ = bins


def _by_means(federation: Federation, X: Array, low: Array, high: Array, bins: Any) -> list[Array]:
    """Edges in the middle between the centres of each feature's clusters."""
    of_columns = moments(federation, X)
    edges = []
    for number, column in enumerate(X.T):
        even = np.linspace(low[number], high[number], bins[number] + 1)
        if low[number] == high[number]:  # replaced by one bin
            edges.append(even)
            continue
        middle = of_columns.mean[number]
        start = (even[1:] + even[:-1])[:, None] * 0.5 - middle
        points = Points(column[:, None] - middle, np.ones(len(column)))
        centres = np.sort(lloyd(federation, points, start, 300, 1e-4 * of_columns.variance[number])[0][:, 0]) + middle
        edges.append(_wide(np.r_[low[number], (centres[1:] + centres[:-1]) * 0.5, high[number]]))
    return edges


def _wide(edges: Array) -> Array:
    """Leave out edges that make a bin too narrow."""
    return edges[np.ediff1d(edges, to_begin=np.inf) > _WIDTH]
