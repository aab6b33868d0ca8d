"""`SimpleImputer` fitted over all sites."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn import impute

from fl_adapters.loop.order import medians

from .. import categories
from ..federated import Federated, adopt, opened, plain_copy, refuse
from ..federation import Federation
from .scaling import dense
from .tables import column_names, columns_of, table


class SimpleImputer(Federated, impute.SimpleImputer):
    """`sklearn.impute.SimpleImputer` fitted over all sites: the exact statistic of all rows together.

    With `strategy="most_frequent"` the sites send the distinct values of each column.
    """

    def _check_federated(self) -> None:
        if callable(self.strategy):
            refuse(self, "strategy", "would need the rows of all sites", 'give "mean", "median" or "most_frequent"')

    def fit(self, X: Any, y: Any = None) -> Any:
        with opened(self, X) as federation:
            return super().fit(X, y) if federation is None else self._fit_on(federation, X)

    def _fit_on(self, federation: Federation, X: Any) -> Any:
        dense(self, X)
        plain = plain_copy(self, keep_empty_features=True, add_indicator=False).fit(X)  # refuses what cannot be imputed
        mask = impute.MissingIndicator(missing_values=self.missing_values, features="all").fit_transform(X)
        columns = [np.asarray(column) for column in columns_of(X)]
        known = [column[~missing] for column, missing in zip(columns, mask.T, strict=True)]
        totals = federation.sum({"known": (~mask).sum(axis=0).astype(float), "missing": mask.sum(axis=0).astype(float)})
        values = self._statistics(federation, known, totals["known"], plain.statistics_, X)
        rows = []
        for value, there, missing in zip(values, totals["known"], totals["missing"], strict=True):
            first = value if there else self.missing_values
            rows.append(_pair(first, self.missing_values if missing else first))
        kinds = _common_dtypes(federation, columns)
        if self.strategy in ("mean", "median"):
            kinds = [kind if np.dtype(kind).kind == "f" else np.float64 for kind in kinds]
        small = table(X, [pair.astype(kind) for pair, kind in zip(rows, kinds, strict=True)])
        adopt(self, plain_copy(self).fit(small))
        return self

    def _statistics(self, federation: Federation, known: list[Any], counts: Any, own: Any, X: Any) -> list[Any]:
        """What replaces the missing values of each column."""
        if self.strategy == "constant":
            return list(own)
        if self.strategy == "most_frequent":
            return _modes(federation, known, column_names(X))
        numbers = [np.asarray(column, np.float64) for column in known]
        if self.strategy == "median":
            return list(medians(federation, numbers))
        sums = federation.sum({"sums": np.array([column.sum() for column in numbers])})["sums"]
        return list(np.divide(sums, counts, out=np.zeros_like(sums), where=counts > 0))


def _pair(first: Any, second: Any) -> Any:
    pair = np.empty(2, dtype=object)
    pair[:] = [first, second]
    return pair


def _common_dtypes(federation: Federation, columns: list[Any]) -> list[Any]:
    """The dtype of each column that holds the values of all sites."""
    texts = federation.union([f"{number}|{column.dtype.str}" for number, column in enumerate(columns)])
    found: list[list[str]] = [[] for _ in columns]
    for text in texts:
        number, _, dtype = text.partition("|")
        found[int(number)].append(dtype)
    return [object if any(d[1] in "OU" for d in dtypes) else np.result_type(*map(np.dtype, dtypes)) for dtypes in found]


def _modes(federation: Federation, known: list[Any], names: list[str]) -> list[Any]:
    """The most frequent value of each column, the smallest of several."""
    values = categories.unions(federation, known, names)
    own = [categories.counts(column, found) for column, found in zip(known, values, strict=True)]
    totals = federation.sum({"counts": np.concatenate(own)})["counts"]
    ends = np.cumsum([len(found) for found in values])[:-1]
    parts = zip(values, np.split(totals, ends), strict=True)
    return [found[int(np.argmax(counts))] if len(found) else None for found, counts in parts]
