"""Nearest centroids over all sites."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn import neighbors
from sklearn.utils.multiclass import check_classification_targets

from fl_adapters.loop.order import medians

from .. import categories
from ..federated import Federated, opened, refuse
from ..federation import Federation
from ..linear.logistic import known_classes
from ..preprocessing.scaling import dense
from ..trainer import validated
from .groups import grouped


class NearestCentroid(Federated, neighbors.NearestCentroid):
    """`sklearn.neighbors.NearestCentroid` fitted over all sites: means or exact medians of the classes of all rows."""

    def fit(self, X: Any, y: Any) -> Any:
        with opened(self, X) as federation:
            return super().fit(X, y) if federation is None else self._fit_on(federation, X, y)

    def _fit_on(self, federation: Federation, X: Any, y: Any) -> Any:
        dense(self, X)
        X, y = validated(self, X, y)
        check_classification_targets(y)
        self.classes_ = known_classes(federation, y, self)
        classes = len(self.classes_)
        labels = categories.codes(y, self.classes_)
        groups = grouped(federation, X, labels, classes)
        rows, width = groups.count.sum(), X.shape[1]
        self.class_prior_ = self._priors(groups.count)
        self.centroids_ = groups.mean
        if self.metric == "manhattan":
            columns = [groups.rows[labels == k, column] for k in range(classes) for column in range(width)]
            self.centroids_ = medians(federation, columns).reshape(classes, width)
        square = ((groups.rows - self.centroids_[labels]) ** 2).sum(axis=0)
        self.within_class_std_dev_ = np.sqrt(federation.sum({"square": square})["square"] / (rows - classes))
        middle = groups.count @ groups.mean / rows
        share = np.sqrt(1.0 / groups.count - 1.0 / rows)[:, None]
        scale = share * (self.within_class_std_dev_ + np.median(self.within_class_std_dev_))
        if not scale.all():
            refuse(self, "X", "has no feature that varies within a class", "give features that vary")
        self.deviations_ = (self.centroids_ - middle) / scale
        if self.shrink_threshold:
            size = np.maximum(np.abs(self.deviations_) - self.shrink_threshold, 0)
            self.deviations_ = size * np.sign(self.deviations_)
            self.centroids_ = middle + scale * self.deviations_
        return self

    def _priors(self, count: Any) -> Any:
        priors = getattr(self, "priors", "uniform")  # from 1.6 on
        if isinstance(priors, str):
            return count / count.sum() if priors == "empirical" else np.full(len(count), 1.0 / len(count))
        return np.asarray(priors, np.float64) / np.sum(priors)
