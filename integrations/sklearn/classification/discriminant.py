"""Linear discriminant analysis over all sites."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy import linalg
from sklearn import discriminant_analysis

from .. import categories
from ..federated import Federated, opened, refuse
from ..federation import Array, Federation
from ..leading import from_leader
from ..linear import least_squares
from ..linear.logistic import known_classes
from ..trainer import discriminants_count_classes, set_components, validated
from .groups import Groups, grouped


class LinearDiscriminantAnalysis(Federated, discriminant_analysis.LinearDiscriminantAnalysis):
    """`sklearn.discriminant_analysis.LinearDiscriminantAnalysis` fitted over all sites.

    Means and covariances are those of all rows together.
    """

    def _check_federated(self) -> None:
        if self.covariance_estimator is not None:
            refuse(self, "covariance_estimator", "would need the rows of all sites", "leave it out")
        if self.shrinkage is not None and self.solver == "svd":
            refuse(self, "shrinkage", "is not known to the solver svd", 'give solver="lsqr"')
        if isinstance(self.shrinkage, str):
            refuse(self, "shrinkage", "is not computed over all sites", "give a number from 0 to 1")

    def fit(self, X: Any, y: Any) -> Any:
        with opened(self, X) as federation:
            return super().fit(X, y) if federation is None else self._fit_on(federation, X, y)

    def _fit_on(self, federation: Federation, X: Any, y: Any) -> Any:
        X, y = validated(self, X, y, dtype=[np.float64, np.float32])
        least_squares.check_width(self, X.shape[1])
        self.classes_ = known_classes(federation, y, self)
        groups = grouped(federation, X, categories.codes(y, self.classes_), len(self.classes_))
        rows = groups.count.sum()
        most = min(len(self.classes_) - 1, X.shape[1])
        if self.n_components is not None and self.n_components > most:
            refuse(self, "n_components", f"is more than {most} (classes less one, or columns)", "give fewer")
        components = most if self.n_components is None else self.n_components
        self.priors_ = groups.count / rows if self.priors is None else np.asarray(self.priors, np.float64)
        self.priors_ = self.priors_ / self.priors_.sum()
        self.means_, self.xbar_ = groups.mean, self.priors_ @ groups.mean
        within = _within(federation, groups, self.priors_)
        if self.solver == "svd":
            if self.store_covariance:
                self.covariance_ = within
            plain = within if self.priors is None else _within(federation, groups, groups.count / rows)
            solution = self._from_svd(plain, rows, components)
        else:
            mean = groups.count @ groups.mean / rows
            between = (groups.mean - mean).T @ ((groups.count / rows)[:, None] * (groups.mean - mean))
            total = between + (within if self.priors is None else _within(federation, groups, groups.count / rows))
            self.covariance_ = self._shrunk(within)
            solution = self._from_covariance(self._shrunk(total), components)
        solution = from_leader(federation, solution)
        if len(self.classes_) == 2:
            solution |= {name: np.diff(solution[name], axis=0) for name in ("coef_", "intercept_")}
        for name, value in solution.items():
            setattr(self, name, value.astype(X.dtype))
        set_components(self, components)
        return self

    def _shrunk(self, covariance: Array) -> Array:
        share = self.shrinkage or 0.0
        level = np.trace(covariance) / len(covariance)
        return np.asarray((1 - share) * covariance + share * level * np.eye(len(covariance)))

    def _from_svd(self, within: Array, rows: float, components: int) -> dict[str, Array]:
        spread = np.sqrt(np.diag(within))
        spread = np.where(spread == 0, 1.0, spread)
        values, vectors = linalg.eigh(within / np.outer(spread, spread))
        divided = rows - len(self.classes_) if discriminants_count_classes() else rows
        singular = np.sqrt(np.maximum(values[::-1], 0.0) * rows / divided)
        rank = int((singular > self.tol).sum())
        scalings = (vectors.T[::-1][:rank] / spread).T / singular[:rank]
        away = self.means_ - self.xbar_
        factor = np.sqrt(rows * self.priors_ / max(len(self.classes_) - 1, 1))
        _, size, turn = linalg.svd((factor[:, None] * away) @ scalings, full_matrices=False)
        rank = int((size > self.tol * size[0]).sum())
        scalings = scalings @ turn.T[:, :rank]
        coef = away @ scalings
        intercept = -0.5 * (coef**2).sum(axis=1) + np.log(self.priors_)
        coef = coef @ scalings.T
        return {
            "coef_": coef,
            "intercept_": intercept - self.xbar_ @ coef.T,
            "scalings_": scalings,
            "explained_variance_ratio_": (size**2 / (size**2).sum())[:components],
        }

    def _from_covariance(self, total: Array, components: int) -> dict[str, Array]:
        if self.solver == "lsqr":
            coef = linalg.lstsq(self.covariance_, self.means_.T)[0].T
            return {"coef_": coef, "intercept_": -0.5 * (self.means_ * coef).sum(axis=1) + np.log(self.priors_)}
        values, vectors = linalg.eigh(total - self.covariance_, self.covariance_)
        order = np.argsort(values)[::-1]
        scalings = vectors[:, order]
        coef = (self.means_ @ scalings) @ scalings.T
        return {
            "coef_": coef,
            "intercept_": -0.5 * (self.means_ * coef).sum(axis=1) + np.log(self.priors_),
            "scalings_": scalings,
            "explained_variance_ratio_": np.sort(values / values.sum())[::-1][:components],
        }


def _within(federation: Federation, groups: Groups, shares: Array) -> Array:
    """Covariance within the classes over all sites, each class with its share."""
    away = groups.deviations()
    weights = (shares / groups.count)[groups.labels]
    return np.asarray(federation.sum({"within": away.T @ (weights[:, None] * away)})["within"])
