"""Scalers fitted over all sites."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy import sparse, stats
from sklearn import preprocessing
from sklearn.utils.validation import FLOAT_DTYPES

from fl_adapters.loop.order import extremes, medians, present, quantiles

from ..federated import Federated, opened, refuse, refuse_partial_fit
from ..federation import Array, Federation
from ..moments import moments
from ..trainer import validated
from ..weights import checked_weights


def without_zeros(scale: Any, constant: Any = None) -> Any:
    """Replace the scale of constant features by 1, as scikit-learn does."""
    if constant is None:
        constant = scale < 10 * np.finfo(scale.dtype).eps
    return np.where(constant, scale.dtype.type(1), scale)


def dense(estimator: Any, X: Any) -> None:
    """Refuse a sparse matrix where a dense array is needed."""
    if sparse.issparse(X):
        refuse(estimator, "a sparse X", "has no quantiles here yet", "give a dense array, such as X.toarray()")


class StandardScaler(Federated, preprocessing.StandardScaler):
    """`sklearn.preprocessing.StandardScaler` fitted over all sites: means and variances of all rows together.

    Example:
        ```python
        scaler = StandardScaler().fit(X)  # this site's rows
        ```
    """

    def fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> Any:
        with opened(self, X) as federation:
            if federation is None:
                return super().fit(X, y, sample_weight)
            return self._fit_on(federation, X, sample_weight)

    def partial_fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> Any:
        refuse_partial_fit(self)
        return super().partial_fit(X, y, sample_weight)

    def _fit_on(self, federation: Federation, X: Any, sample_weight: Any) -> Any:
        X = validated(self, X, accept_sparse=("csr", "csc"), dtype=FLOAT_DTYPES, finite="allow-nan")
        if sparse.issparse(X) and self.with_mean:
            refuse(self, "with_mean", "would make a sparse X dense", "pass with_mean=False")
        found = moments(federation, X, checked_weights(sample_weight, X))
        count = found.count if sample_weight is not None else found.count.astype(np.int64)
        self.n_samples_seen_ = count[0] if np.allclose(count, count[0], rtol=1e-12, atol=0) else count
        wanted = self.with_std or (self.with_mean and not sparse.issparse(X))
        self.mean_ = found.mean if wanted else None
        self.var_ = self.scale_ = None
        if self.with_std:
            self.var_ = found.variance
            rounding = count * np.finfo(np.float64).eps
            constant = found.variance <= rounding * found.variance + (rounding * found.mean) ** 2
            self.scale_ = without_zeros(np.sqrt(found.variance), constant)
        return self


class MinMaxScaler(Federated, preprocessing.MinMaxScaler):
    """`sklearn.preprocessing.MinMaxScaler` fitted over all sites: smallest and largest values of all rows together."""

    def fit(self, X: Any, y: Any = None) -> Any:
        with opened(self, X) as federation:
            if federation is None:
                return super().fit(X, y)
            return self._fit_on(federation, X)

    def partial_fit(self, X: Any, y: Any = None) -> Any:
        refuse_partial_fit(self)
        return super().partial_fit(X, y)

    def _fit_on(self, federation: Federation, X: Any) -> Any:
        low, high = self.feature_range
        if low >= high:
            refuse(self, "feature_range", "has a minimum that is not below its maximum", "give (smaller, larger)")
        dense(self, X)
        X = validated(self, X, dtype=FLOAT_DTYPES, finite="allow-nan")
        smallest, largest = (found.astype(X.dtype) for found in extremes(federation, present(X)))
        self.n_samples_seen_ = _rows(federation, X)
        self.data_min_, self.data_max_, self.data_range_ = smallest, largest, largest - smallest
        self.scale_ = (high - low) / without_zeros(self.data_range_)
        self.min_ = low - smallest * self.scale_
        return self


class MaxAbsScaler(Federated, preprocessing.MaxAbsScaler):
    """`sklearn.preprocessing.MaxAbsScaler` fitted over all sites: largest absolute values of all rows together."""

    def fit(self, X: Any, y: Any = None) -> Any:
        with opened(self, X) as federation:
            if federation is None:
                return super().fit(X, y)
            return self._fit_on(federation, X)

    def partial_fit(self, X: Any, y: Any = None) -> Any:
        refuse_partial_fit(self)
        return super().partial_fit(X, y)

    def _fit_on(self, federation: Federation, X: Any) -> Any:
        X = validated(self, X, accept_sparse=("csr", "csc"), dtype=FLOAT_DTYPES, finite="allow-nan")
        sizes = _own_largest(X)
        largest = extremes(federation, [size[~np.isnan(size)] for size in sizes[:, None]])[1]
        self.max_abs_ = largest.astype(X.dtype)
        self.n_samples_seen_ = _rows(federation, X)
        self.scale_ = without_zeros(self.max_abs_)
        return self


class RobustScaler(Federated, preprocessing.RobustScaler):
    """`sklearn.preprocessing.RobustScaler` fitted over all sites: exact medians and quantiles of all rows together."""

    def fit(self, X: Any, y: Any = None) -> Any:
        with opened(self, X) as federation:
            if federation is None:
                return super().fit(X, y)
            return self._fit_on(federation, X)

    def _fit_on(self, federation: Federation, X: Any) -> Any:
        low, high = self.quantile_range
        if not 0 <= low <= high <= 100:
            refuse(self, "quantile_range", "is no range of percentages", "give (smaller, larger), such as (25.0, 75.0)")
        dense(self, X)
        X = validated(self, X, dtype=FLOAT_DTYPES, finite="allow-nan")
        columns = present(X)
        self.center_ = medians(federation, columns).astype(X.dtype) if self.with_centering else None
        self.scale_ = None
        if self.with_scaling:
            pairs = quantiles(federation, columns, [np.array([low, high]) / 100] * len(columns))
            spread: Array = np.array([pair[1] - pair[0] for pair in pairs])
            self.scale_ = without_zeros(spread)
            if self.unit_variance:
                self.scale_ = self.scale_ / (stats.norm.ppf(high / 100.0) - stats.norm.ppf(low / 100.0))
        return self


def _rows(federation: Federation, X: Any) -> int:
    return int(federation.sum({"rows": np.array([X.shape[0]], float)})["rows"][0])


def _own_largest(X: Any) -> Array:
    """Largest absolute value of each column at this site, NaN where there is none."""
    if sparse.issparse(X):
        columns = [np.abs(X.tocsc()[:, [number]].data) for number in range(X.shape[1])]
        columns = [column[~np.isnan(column)] for column in columns]
        return np.array([column.max(initial=0.0) if X.shape[0] else np.nan for column in columns], np.float64)
    columns = [np.abs(column) for column in present(X)]
    return np.array([column.max() if len(column) else np.nan for column in columns], np.float64)
