"""Naive Bayes over all sites."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy import sparse
from sklearn import naive_bayes

from .. import categories
from ..federated import Federated, adopt, opened, plain_copy, refuse, refuse_partial_fit
from ..federation import Federation
from ..linear.logistic import known_classes
from ..moments import moments
from ..trainer import validated
from ..weights import checked_weights
from .groups import grouped


class GaussianNB(Federated, naive_bayes.GaussianNB):
    """`sklearn.naive_bayes.GaussianNB` fitted over all sites: means and variances of the classes of all rows."""

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Any:
        with opened(self, X) as federation:
            if federation is None:
                return super().fit(X, y, sample_weight)
            return self._fit_on(federation, X, y, sample_weight)

    def partial_fit(self, X: Any, y: Any, classes: Any = None, sample_weight: Any = None) -> Any:
        refuse_partial_fit(self)
        return super().partial_fit(X, y, classes, sample_weight)

    def _fit_on(self, federation: Federation, X: Any, y: Any, sample_weight: Any) -> Any:
        X, y = validated(self, X, y)
        self.classes_ = known_classes(federation, y, self)
        labels = categories.codes(y, self.classes_)
        of_columns = moments(federation, X)
        groups = grouped(federation, X, labels, len(self.classes_), checked_weights(sample_weight, X))
        away = groups.deviations()
        totals = federation.sum({"square": groups.member @ away**2, "rest": groups.member @ away})
        count = groups.count[:, None]
        self.epsilon_ = self.var_smoothing * of_columns.variance.max()
        self.theta_ = groups.mean
        self.var_ = (totals["square"] - totals["rest"] ** 2 / count) / count + self.epsilon_
        self.class_count_ = groups.count
        self.class_prior_ = self._priors()
        return self

    def _priors(self) -> Any:
        if self.priors is None:
            return self.class_count_ / self.class_count_.sum()
        priors = np.asarray(self.priors, np.float64)
        if len(priors) != len(self.class_count_) or not np.isclose(priors.sum(), 1.0) or (priors < 0).any():
            refuse(self, "priors", f"does not fit {len(self.class_count_)} classes", "give shares that add up to 1")
        return priors


class MultinomialNB(Federated, naive_bayes.MultinomialNB):
    """`sklearn.naive_bayes.MultinomialNB` fitted over all sites: counts of the features in the classes of all rows."""

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Any:
        with opened(self, X) as federation:
            if federation is None:
                return super().fit(X, y, sample_weight)
            return self._fit_on(federation, X, y, sample_weight)

    def partial_fit(self, X: Any, y: Any, classes: Any = None, sample_weight: Any = None) -> Any:
        refuse_partial_fit(self)
        return super().partial_fit(X, y, classes, sample_weight)

    def _fit_on(self, federation: Federation, X: Any, y: Any, sample_weight: Any) -> Any:
        X, y = validated(self, X, y, accept_sparse="csr")
        if (X.data if sparse.issparse(X) else X).min(initial=0) < 0:
            refuse(self, "X", "has negative values, which are no counts", "give counts or frequencies of 0 and more")
        classes = known_classes(federation, y, self)
        labels, weights = categories.codes(y, classes), checked_weights(sample_weight, X)
        given = np.ones(len(labels)) if weights is None else weights
        member = sparse.csr_matrix((given, (labels, np.arange(len(labels)))), shape=(len(classes), len(labels)))
        counted = member @ X
        own = {
            "features": np.asarray(counted.todense() if sparse.issparse(counted) else counted, np.float64),
            "classes": np.asarray(member.sum(axis=1), np.float64).ravel(),
        }
        totals = federation.sum(own)
        adopt(self, plain_copy(self).fit(totals["features"], classes))  # one row a class
        self.class_count_ = totals["classes"]
        if self.class_prior is None and self.fit_prior:
            self.class_log_prior_ = np.log(self.class_count_) - np.log(self.class_count_.sum())
        return self
