"""Least squares over all sites, from summed products of the columns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import linalg, sparse
from sklearn import linear_model

from ..federated import Federated, opened, refuse
from ..federation import Array, Federation
from ..leading import from_leader
from ..trainer import validated
from ..weights import checked_weights

_SMALLEST = 1e-12  # eigenvalues of the scaled products below this share of the largest belong to no direction
_REFINEMENTS = 3
MOST_FEATURES = 4096


@dataclass(frozen=True)
class Products:
    """Products of the centred columns over all sites.

    Attributes:
        gram: Products of the features, [features, features].
        cross: Products of the features with the targets, [features, targets].
        feature_mean: Means of the features; zeros without an intercept.
        target_mean: Means of the targets; zeros without an intercept.
        rows: Sum of the weights of all rows.
    """

    gram: Array
    cross: Array
    feature_mean: Array
    target_mean: Array
    rows: float


class Rows:
    """This site's rows, centred on the means of all sites.

    Args:
        federation: The federation.
        X: Features, dense or sparse.
        y: Targets, [rows] or [rows, targets].
        weights: Weight of each row, or None.
        centred: Whether means are taken off, for an intercept.
    """

    def __init__(self, federation: Federation, X: Any, y: Any, weights: Array | None, *, centred: bool) -> None:
        self._x: Any = sparse.csr_matrix(X, dtype=np.float64) if sparse.issparse(X) else np.asarray(X, np.float64)
        self._y = np.asarray(y, np.float64).reshape(len(y), -1)
        self._w = np.ones(len(y)) if weights is None else weights
        self._federation = federation
        sums = {"x": np.asarray(self._w @ self._x).ravel(), "y": self._w @ self._y, "w": np.array([self._w.sum()])}
        totals = federation.sum(sums)
        self.count = float(totals["w"][0])
        share = float(centred) / self.count
        self.feature_mean, self.target_mean = totals["x"] * share, totals["y"] * share

    def products(self) -> Products:
        """Return the summed products of the centred columns."""
        centred_y = self._y - self.target_mean
        if sparse.issparse(self._x):
            own = np.asarray((self._x.T @ self._x.multiply(self._w[:, None])).todense())
            mean, sums = self.feature_mean, np.asarray(self._w @ self._x).ravel()
            gram = own - np.outer(mean, sums) - np.outer(sums, mean) + self._w.sum() * np.outer(mean, mean)
            cross = self._x.T @ (self._w[:, None] * centred_y) - np.outer(mean, self._w @ centred_y)
        else:
            centred_x = self._x - self.feature_mean
            weighted = centred_x * self._w[:, None]
            gram, cross = centred_x.T @ weighted, weighted.T @ centred_y
        totals = self._federation.sum({"gram": gram, "cross": np.asarray(cross)})
        return Products(totals["gram"], totals["cross"], self.feature_mean, self.target_mean, self.count)

    def residual_products(self, coef: Array) -> Array:
        """Return the summed products of the features with the residuals: more exact than from the products."""
        fitted = np.asarray(self._x @ coef) - self.feature_mean @ coef
        residual = self._w[:, None] * (self._y - self.target_mean - fitted)
        own = np.asarray(self._x.T @ residual) - np.outer(self.feature_mean, residual.sum(axis=0))
        return np.asarray(self._federation.sum({"cross": own})["cross"])


class Directions:
    """Solves normal equations, in scaled columns; directions that no row has are left out.

    Args:
        gram: Products of the features, with what a penalty adds to its diagonal.
        cut: Directions are left out too if their singular value is at most this share of the largest, as
            `scipy.linalg.lstsq` does; 0 for none.
    """

    def __init__(self, gram: Array, cut: float) -> None:
        self._scale = np.sqrt(np.where(np.diag(gram) > 0, np.diag(gram), 1.0))
        values, vectors = linalg.eigh(gram / np.outer(self._scale, self._scale))
        kept = values > _SMALLEST * max(values[-1], 0.0)
        empty = vectors[:, ~kept] / self._scale[:, None]
        self._empty = np.linalg.qr(empty)[0] if empty.shape[1] else empty
        self._values, self._vectors = values[kept], vectors[:, kept]
        root = np.sqrt(self._values)[:, None] * (self._vectors.T * self._scale)  # root.T @ root is the gram matrix
        _, singular, directions = linalg.svd(root, full_matrices=False)
        large = singular > cut * singular.max(initial=0.0)
        if not large.all():  # columns of very different sizes
            self._values, self._vectors = singular[large] ** 2, directions[large].T
            self._scale, self._empty = np.ones(len(gram)), empty[:, :0]
        self.rank = len(self._values)
        self.singular = np.concatenate([singular, np.zeros(len(gram) - len(singular))])

    def solve(self, right: Array) -> Array:
        """Return the solution of smallest norm."""
        scaled = self._vectors.T @ (right / self._scale[:, None])
        found = (self._vectors @ (scaled / self._values[:, None])) / self._scale[:, None]
        return np.asarray(found - self._empty @ (self._empty.T @ found))


def solve(rows: Rows, products: Products, *, penalty: float = 0.0, cut: float = 0.0) -> tuple[Array, Directions]:
    """Solve the penalised normal equations, and refine the solution with residuals of the rows themselves.

    Args:
        rows: This site's rows.
        products: Products over all sites.
        penalty: What is added to the diagonal.
        cut: See `Directions`.

    Returns:
        Coefficients [features, targets], and the directions.
    """
    directions = Directions(products.gram + penalty * np.eye(len(products.gram)), cut)
    coef = directions.solve(products.cross)
    for _ in range(_REFINEMENTS):
        coef = coef + directions.solve(rows.residual_products(coef) - penalty * coef)
    return coef, directions


def check_width(estimator: Any, features: int) -> None:
    """Refuse more features than products of all pairs can be summed for."""
    if features > MOST_FEATURES:
        refuse(
            estimator,
            f"X with {features} columns",
            f"has too many columns: the sites add products of all pairs, for at most {MOST_FEATURES} columns",
            "reduce the columns first, such as with SelectKBest or TruncatedSVD",
        )


class LinearRegression(Federated, linear_model.LinearRegression):
    """`sklearn.linear_model.LinearRegression` fitted over all sites: the least squares of all rows together.

    Example:
        ```python
        model = LinearRegression().fit(X, y)  # this site's rows
        ```
    """

    def _check_federated(self) -> None:
        if self.positive:
            refuse(self, "positive", "is not solved from sums", "leave it out")

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Any:
        with opened(self, X) as federation:
            if federation is None:
                return super().fit(X, y, sample_weight)
            return self._fit_on(federation, X, y, sample_weight)

    def _fit_on(self, federation: Federation, X: Any, y: Any, sample_weight: Any) -> Any:
        X, y = validated(self, X, y, accept_sparse=["csr", "csc", "coo"], y_numeric=True, multi_output=True)
        check_width(self, X.shape[1])
        rows = Rows(federation, X, y, checked_weights(sample_weight, X), centred=self.fit_intercept)
        products = rows.products()
        cut = 0.0 if sparse.issparse(X) else getattr(self, "tol", np.finfo(np.float64).eps)  # tol: from 1.7 on
        own, directions = solve(rows, products, cut=cut)
        found = from_leader(federation, {"coef": own, "singular": directions.singular})
        if not sparse.issparse(X):
            self.rank_, self.singular_ = directions.rank, found["singular"]
        coef = found["coef"]
        set_solution(self, coef, products, one=y.ndim == 1)
        return self


class Ridge(Federated, linear_model.Ridge):
    """`sklearn.linear_model.Ridge` fitted over all sites: the penalised least squares of all rows together.

    The solution is exact, whatever `solver` says; `tol` and `max_iter` are not used.
    """

    def _check_federated(self) -> None:
        if self.positive:
            refuse(self, "positive", "is not solved from sums", "leave it out")

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Any:
        with opened(self, X) as federation:
            if federation is None:
                return super().fit(X, y, sample_weight=sample_weight)
            return self._fit_on(federation, X, y, sample_weight)

    def _fit_on(self, federation: Federation, X: Any, y: Any, sample_weight: Any) -> Any:
        accepted = ["csr", "csc", "coo"]
        X, y = validated(
            self, X, y, accept_sparse=accepted, dtype=[np.float64, np.float32], y_numeric=True, multi_output=True
        )
        check_width(self, X.shape[1])
        rows = Rows(federation, X, y, checked_weights(sample_weight, X), centred=self.fit_intercept)
        products = rows.products()
        alphas = np.asarray(self.alpha, np.float64).reshape(-1)
        if len(alphas) == 1:
            coef = solve(rows, products, penalty=alphas[0])[0]
        else:
            if len(alphas) != products.cross.shape[1]:
                refuse(
                    self, "alpha", f"has {len(alphas)} values for {products.cross.shape[1]} targets", "give one each"
                )
            coef = np.stack([solve(rows, products, penalty=a)[0][:, n] for n, a in enumerate(alphas)], axis=1)
        coef = from_leader(federation, {"coef": coef})["coef"]
        self.n_iter_ = None
        self.solver_ = "cholesky" if self.solver == "auto" else self.solver
        set_solution(self, coef, products, one=y.ndim == 1)
        return self


def set_solution(estimator: Any, coef: Array, products: Products, *, one: bool) -> None:
    """Set `coef_` and `intercept_` as scikit-learn does.

    Args:
        estimator: Gets the attributes.
        coef: Coefficients, [features, targets].
        products: Products with the means.
        one: Whether y is one-dimensional.
    """
    intercept: Any = products.target_mean - products.feature_mean @ coef
    estimator.coef_ = coef[:, 0] if one else coef.T
    if not estimator.fit_intercept:
        estimator.intercept_ = 0.0
    else:
        estimator.intercept_ = intercept[0] if one else intercept
