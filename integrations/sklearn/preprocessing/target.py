"""`TargetEncoder` fitted over all sites."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn import preprocessing
from sklearn.model_selection import KFold, StratifiedKFold
from sklearn.utils.multiclass import type_of_target

from .. import categories
from ..federated import Federated, adopt, opened, plain_copy, refuse
from ..federation import Array, Federation
from .encoding import categories_of
from .tables import columns_of, table


class TargetEncoder(Federated, preprocessing.TargetEncoder):
    """`sklearn.preprocessing.TargetEncoder` fitted over all sites: means of the target of all rows together.

    `fit` and `transform` equal scikit-learn's. `fit_transform` splits the rows of each site into folds; a row is
    encoded by the rows of all sites that are not in its fold, as scikit-learn does with these folds.
    """

    def fit(self, X: Any, y: Any) -> Any:
        with opened(self, X) as federation:
            if federation is None:
                return super().fit(X, y)
            self._fit_on(federation, X, y, [])
            return self

    def fit_transform(self, X: Any, y: Any, **params: Any) -> Any:
        with opened(self, X) as federation:
            if federation is None:
                return super().fit_transform(X, y, **params)
            return self._fit_on(federation, X, y, None)

    def _fit_on(self, federation: Federation, X: Any, y: Any, folds: Any) -> Any:
        found = categories_of(federation, self, X)
        target, kind, classes = _target(federation, self, y)
        places = [categories.codes(column, known) for column, known in zip(columns_of(X), found, strict=True)]
        if folds is None:
            folds = self._folds(X, y, stratified=kind != "continuous")
        most = max(map(int, federation.union([str(len(folds))])))
        folds = [*folds, *[np.zeros(0, np.int64)] * (most - len(folds))]  # a small site may have fewer
        kept = [np.ones(len(target), bool), *(~np.isin(np.arange(len(target)), fold) for fold in folds)]
        sizes = [len(known) for known in found]
        encodings, means = _encodings(federation, places, sizes, target, kept, self.smooth)
        self._take(X, found, classes, kind)
        self.encodings_ = _by_class(encodings[0])
        self.target_mean_ = means[0] if kind == "multiclass" else means[0][0]
        result = np.empty((len(target), len(self.encodings_)))
        for fold, encoding, mean in zip(folds, encodings[1:], means[1:], strict=True):
            for number, values in enumerate(_by_class(encoding)):
                code = places[number // target.shape[1]][fold]
                result[fold, number] = np.where(code < 0, mean[number % target.shape[1]], values[code])
        return result

    def _folds(self, X: Any, y: Any, *, stratified: bool) -> list[Any]:
        if hasattr(self.cv, "split"):
            splitter = self.cv
        else:
            seed, shuffle = self.random_state, self.shuffle
            shuffle = True if shuffle == "deprecated" else shuffle  # from 1.9 on
            seed = None if seed == "deprecated" or not shuffle else seed
            kind = StratifiedKFold if stratified else KFold
            splitter = kind(5 if self.cv is None else self.cv, shuffle=shuffle, random_state=seed)
        return [test for _, test in splitter.split(X, y)]

    def _take(self, X: Any, found: Sequence[Any], classes: Any, kind: str) -> None:
        """Set what scikit-learn's own `fit` sets, by fitting it on a small table."""
        least = 1 if classes is None else len(classes)
        small = table(X, found, least=least)
        y = np.linspace(0.25, 0.75, len(small)) if classes is None else np.resize(classes, len(small))
        with np.errstate(invalid="ignore", divide="ignore"):
            adopt(self, plain_copy(self, target_type=kind).fit(small, y))


def _target(federation: Federation, estimator: Any, y: Any) -> tuple[Array, str, Any]:
    """The targets [rows, outputs], their type, and the classes, if there are any."""
    values = np.asarray(y)
    kinds = federation.union([type_of_target(values)]) if estimator.target_type == "auto" else [estimator.target_type]
    unknown = [kind for kind in kinds if kind not in ("binary", "multiclass", "continuous")]
    if unknown:
        refuse(estimator, "y", f"is of the type {unknown[0]!r}", "give one target: classes or numbers")
    if "continuous" in kinds:
        return np.asarray(values, np.float64)[:, None], "continuous", None
    classes = categories.unions(federation, [values], ["y"])[0]
    labels = categories.codes(values, classes)
    if len(classes) > 2:
        return (labels[:, None] == np.arange(len(classes))).astype(np.float64), "multiclass", classes
    return labels[:, None].astype(np.float64), "binary", classes


def _encodings(
    federation: Federation, places: list[Any], sizes: list[int], target: Array, kept: list[Any], smooth: Any
) -> tuple[list[list[Array]], Array]:
    """Encodings of each selection of rows: for each feature [categories, outputs]; and the means of the target."""

    def by_category(values: Array) -> Array:
        """Sums of the rows' values in each category, [selections, categories of all features, columns]."""
        result = np.zeros((len(kept), sum(sizes), values.shape[1]))
        starts = np.cumsum([0, *sizes])
        for number, rows in enumerate(kept):
            for code, start in zip(places, starts, strict=False):
                known = rows & (code >= 0)
                np.add.at(result[number], code[known] + start, values[known])
        return result

    selected = np.stack(kept).astype(np.float64)
    ones = np.ones((len(target), 1))
    sums = {"count": by_category(ones), "sum": by_category(target), "rows": selected.sum(1), "total": selected @ target}
    first = federation.sum(sums)
    mean = first["total"] / first["rows"][:, None]
    count, total = first["count"], first["sum"]
    if smooth != "auto":
        mixed = (total + smooth * mean[:, None]) / np.where(count + smooth > 0, count + smooth, 1.0)
        return _split(np.where(count + smooth > 0, mixed, mean[:, None]), sizes), mean
    inner = total / np.maximum(count, 1.0)
    squares = _squares(places, sizes, target, kept, inner)
    spread = np.stack([rows @ (target - m) ** 2 for rows, m in zip(selected, mean, strict=True)])
    second = federation.sum({"squares": squares, "spread": spread})
    variance = (second["spread"] / first["rows"][:, None])[:, None]
    with np.errstate(invalid="ignore", divide="ignore"):
        share = variance * count / (variance * count + second["squares"] / count)
    mixed = share * inner + (1 - share) * mean[:, None]
    return _split(np.where(np.isnan(share), mean[:, None], mixed), sizes), mean


def _squares(places: list[Any], sizes: list[int], target: Array, kept: list[Any], inner: Array) -> Array:
    """Sums of the squared differences from the means of the categories."""
    result = np.zeros_like(inner)
    for number, rows in enumerate(kept):
        for code, start in zip(places, np.cumsum([0, *sizes]), strict=False):
            known = rows & (code >= 0)
            at = code[known] + start
            np.add.at(result[number], at, (target[known] - inner[number, at]) ** 2)
    return result


def _split(values: Array, sizes: list[int]) -> list[list[Array]]:
    return [np.split(one, np.cumsum(sizes)[:-1]) for one in values]


def _by_class(encodings: list[Array]) -> list[Array]:
    """One array for each feature and class, in scikit-learn's order."""
    return [np.ascontiguousarray(column) for feature in encodings for column in feature.T]
