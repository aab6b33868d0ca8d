"""Encoders of categories and labels fitted over all sites."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn import preprocessing

from .. import categories
from ..federated import Federated, adopt, opened, plain_class, plain_copy
from ..federation import Federation
from ..trainer import counting
from .tables import column_names, columns_of, table


def categories_of(federation: Federation, estimator: Any, X: Any) -> list[Any]:
    """Return the categories of each column: those given to the estimator, else those of all sites."""
    columns = columns_of(X)
    if isinstance(estimator.categories, str):
        return categories.unions(federation, columns, column_names(X))
    if hasattr(estimator, "min_frequency"):
        plain_copy(estimator, **_COUNTED).fit(X)  # refuses what is not among the given categories
    return [
        np.asarray(c, dtype=object) if columns[n].dtype.kind in "OU" else np.asarray(c, dtype=columns[n].dtype)
        for n, c in enumerate(estimator.categories)
    ]


_COUNTED = {"min_frequency": None, "max_categories": None}


def fit_encoder(federation: Federation, estimator: Any, X: Any) -> Any:
    """Fit an encoder on a small table with the categories of all sites, and with their counts."""
    found = categories_of(federation, estimator, X)
    everywhere, rows = None, 0
    if estimator.min_frequency is not None or estimator.max_categories is not None:
        own = [categories.counts(column, values) for column, values in zip(columns_of(X), found, strict=True)]
        totals = federation.sum({"counts": np.concatenate(own), "rows": np.array([len(columns_of(X)[0])], float)})
        ends = np.cumsum([len(values) for values in found])[:-1]
        everywhere, rows = np.split(totals["counts"].astype(np.int64), ends), int(totals["rows"][0])
    fitted = counting(plain_class(estimator), everywhere, rows)(**estimator.get_params(deep=False))
    adopt(estimator, fitted.fit(table(X, found)))
    return estimator


class OneHotEncoder(Federated, preprocessing.OneHotEncoder):
    """`sklearn.preprocessing.OneHotEncoder` fitted over all sites: the categories that any site has.

    Without `categories=`, the sites send the distinct values of each column.
    """

    def fit(self, X: Any, y: Any = None) -> Any:
        with opened(self, X) as federation:
            return super().fit(X, y) if federation is None else fit_encoder(federation, self, X)


class OrdinalEncoder(Federated, preprocessing.OrdinalEncoder):
    """`sklearn.preprocessing.OrdinalEncoder` fitted over all sites: the categories that any site has.

    Without `categories=`, the sites send the distinct values of each column.
    """

    def fit(self, X: Any, y: Any = None) -> Any:
        with opened(self, X) as federation:
            return super().fit(X, y) if federation is None else fit_encoder(federation, self, X)


class LabelEncoder(Federated, preprocessing.LabelEncoder):
    """`sklearn.preprocessing.LabelEncoder` fitted over all sites: the labels that any site has."""

    def fit(self, y: Any) -> Any:
        with opened(self) as federation:
            if federation is None:
                return super().fit(y)
            labels = np.asarray(y) if hasattr(y, "dtype") else np.asarray(list(y))
            return super().fit(categories.unions(federation, [labels.reshape(-1)], ["y"])[0])

    def fit_transform(self, y: Any) -> Any:
        return self.fit(y).transform(y)
