"""Mixtures of Gaussians over all sites: expectation maximisation on sums."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import linalg
from sklearn import cluster, mixture
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_random_state

from ..federated import Federated, opened, refuse
from ..federation import Array, Federation
from ..leading import Ask, lead
from ..moments import moments
from ..trainer import validated
from .kmeans import Points, first_centres, lloyd


@dataclass(frozen=True)
class Shape:
    """Shape of a mixture's parameters, and how they travel as one array.

    Attributes:
        components: Number of components.
        features: Number of features.
        kind: `covariance_type`.
    """

    components: int
    features: int
    kind: str

    def covariances(self) -> tuple[int, ...]:
        """Return the shape of `covariances_`."""
        k, f = self.components, self.features
        return {"full": (k, f, f), "tied": (f, f), "diag": (k, f), "spherical": (k,)}[self.kind]

    def pack(self, weights: Array, means: Array, covariances: Array, more: tuple[float, float, float]) -> Array:
        """Return all parameters and three further numbers in one flat array."""
        return np.concatenate([weights, means.ravel(), np.asarray(covariances).ravel(), more])

    def unpack(self, flat: Array) -> tuple[Array, Array, Array, Array]:
        """Return what `pack` has packed."""
        k, f = self.components, self.features
        weights, means, rest = np.split(flat, [k, k + k * f])
        return weights, means.reshape(k, f), rest[:-3].reshape(self.covariances()), rest[-3:]


class GaussianMixture(Federated, mixture.GaussianMixture):
    """`sklearn.mixture.GaussianMixture` fitted over all sites: expectation maximisation on all rows together.

    From the same `weights_init`, `means_init` and `precisions_init` it equals scikit-learn's. Without them it starts
    from `KMeans` over all sites.
    """

    def _check_federated(self) -> None:
        if self.init_params not in ("kmeans", "random"):
            refuse(self, "init_params", "would send rows of a site", 'give "kmeans" or "random"')
        if self.warm_start:
            refuse(self, "warm_start", "is not known over all sites", "pass weights_init, means_init, precisions_init")

    def fit(self, X: Any, y: Any = None) -> Any:
        with opened(self, X) as federation:
            if federation is None:
                return super().fit(X, y)
            self._fit_on(federation, X)
            return self

    def fit_predict(self, X: Any, y: Any = None) -> Any:
        with opened(self, X) as federation:
            if federation is None:
                return super().fit_predict(X, y)
            self._fit_on(federation, X)
        return self.predict(X)

    def _fit_on(self, federation: Federation, X: Any) -> None:
        X = np.asarray(validated(self, X, dtype=[np.float64, np.float32]), np.float64)
        shape = Shape(self.n_components, X.shape[1], self.covariance_type)
        seeds, best = check_random_state(self.random_state), None
        for _ in range(1 if self.means_init is not None else self.n_init):
            start = self._start(federation, X, shape, seeds)
            found = lead(federation, np.zeros_like(start), self._answer(X, shape), self._drive(start, shape))
            if best is None or found[-3] > best[-3]:
                best = found
        assert best is not None
        weights, means, covariances, (bound, iterations, converged) = shape.unpack(best)
        self._set(weights, means, covariances)
        self.lower_bound_, self.n_iter_, self.converged_ = float(bound), int(iterations), bool(converged)
        if not self.converged_:
            text = f"GaussianMixture has not converged in {self.n_iter_} iterations; raise max_iter"
            warnings.warn(text, ConvergenceWarning, stacklevel=4)

    def _start(self, federation: Federation, X: Array, shape: Shape, seeds: Any) -> Array:
        """Parameters to start from: those given, and else those of a first assignment of the rows."""
        given = (self.weights_init, self.means_init, self.precisions_init)
        chance = np.zeros((len(X), shape.components))
        if any(value is None for value in given):
            chance = self._assignment(federation, X, shape, seeds)
        middle = np.tile(moments(federation, X).mean, (shape.components, 1))
        totals = federation.sum(_summands(X, chance, middle, shape.kind))
        weights, means, covariances = _maximised(totals, shape, self.reg_covar, middle)
        if self.weights_init is not None:
            weights = np.asarray(self.weights_init, np.float64)
        if self.means_init is not None:
            means = np.asarray(self.means_init, np.float64)
        if self.precisions_init is not None:
            precisions = np.asarray(self.precisions_init, np.float64)
            flat = shape.kind in ("diag", "spherical")
            covariances = np.asarray(1.0 / precisions if flat else np.linalg.inv(precisions), np.float64)
        return shape.pack(weights, means, covariances, (0.0, 0.0, 0.0))

    def _assignment(self, federation: Federation, X: Array, shape: Shape, seeds: Any) -> Array:
        if self.init_params == "random":
            chance = seeds.uniform(size=(len(X), shape.components))
            return np.asarray(chance / chance.sum(axis=1, keepdims=True))
        points = Points(X, np.ones(len(X)))
        clusters = cluster.KMeans(shape.components, n_init=1)
        start = first_centres(federation, clusters, points, np.zeros(X.shape[1]), seeds)
        centres = lloyd(federation, points, start, clusters.max_iter, 0.0)[0]
        return np.eye(shape.components)[points.nearest(centres)[0]]

    def _answer(self, X: Array, shape: Shape) -> Any:
        own = mixture.GaussianMixture(shape.components, covariance_type=shape.kind)

        def answer(point: Array) -> Mapping[str, Array]:
            weights, means, covariances, _ = shape.unpack(point)
            _set(own, weights, means, covariances, shape.kind)
            fit = {"fit": np.array([own.score_samples(X).sum()])}
            return _summands(X, own.predict_proba(X), means, shape.kind) | fit

        return answer

    def _drive(self, start: Array, shape: Shape) -> Any:
        def drive(ask: Ask) -> Array:
            weights, means, covariances, _ = shape.unpack(start)
            bound, converged, iteration = -np.inf, 0.0, 0
            for _ in range(self.max_iter):
                iteration += 1
                totals = ask(shape.pack(weights, means, covariances, (0.0, 0.0, 0.0)))
                before, bound = bound, float(totals["fit"][0] / totals["rows"][0])
                weights, means, covariances = _maximised(totals, shape, self.reg_covar, means)
                if abs(bound - before) < self.tol:
                    converged = 1.0
                    break
            return shape.pack(weights, means, covariances, (bound, float(iteration), converged))

        return drive

    def _set(self, weights: Array, means: Array, covariances: Array) -> None:
        _set(self, weights, means, covariances, self.covariance_type)


def _summands(X: Array, chance: Array, means: Array, kind: str) -> dict[str, Array]:
    """Sums of this site's rows by component, squares taken from the present means."""
    size = chance.sum(axis=0)
    sums = {"rows": np.array([float(len(X))]), "size": size, "sum": chance.T @ X - size[:, None] * means}
    if kind == "full":
        away = [X - mean for mean in means]
        sums["square"] = np.stack([a.T @ (chance[:, [k]] * a) for k, a in enumerate(away)])
    elif kind == "tied":
        sums["square"] = np.asarray(sum((X - m).T @ (chance[:, [k]] * (X - m)) for k, m in enumerate(means)))
    else:
        sums["square"] = np.stack([chance[:, k] @ (X - mean) ** 2 for k, mean in enumerate(means)])
    return sums


def _maximised(totals: Mapping[str, Array], shape: Shape, floor: float, means: Array) -> tuple[Array, Array, Array]:
    """Weights, means and covariances that the sums over all sites make most likely."""
    size = totals["size"] + 10 * np.finfo(np.float64).eps
    shift = totals["sum"] / size[:, None]
    if shape.kind == "full":
        outer = shift[:, :, None] * shift[:, None, :]
        covariances = totals["square"] / size[:, None, None] - outer + floor * np.eye(shape.features)
    elif shape.kind == "tied":
        covariances = (totals["square"] - (size[:, None] * shift).T @ shift) / size.sum()
        covariances = covariances + floor * np.eye(shape.features)
    else:
        covariances = totals["square"] / size[:, None] - shift**2 + floor
        covariances = covariances.mean(axis=1) if shape.kind == "spherical" else covariances
    return size / size.sum(), means + shift, covariances


def _set(estimator: Any, weights: Array, means: Array, covariances: Array, kind: str) -> None:
    """Set the parameters of a mixture and what scikit-learn derives from them."""
    estimator.weights_, estimator.means_, estimator.covariances_ = weights, means, covariances
    if kind in ("diag", "spherical"):
        estimator.precisions_cholesky_ = 1.0 / np.sqrt(covariances)
        estimator.precisions_ = estimator.precisions_cholesky_**2
        return
    factors = np.stack([_inverse_factor(c) for c in (covariances if kind == "full" else [covariances])])
    precisions = factors @ factors.transpose(0, 2, 1)
    estimator.precisions_cholesky_ = factors if kind == "full" else factors[0]
    estimator.precisions_ = precisions if kind == "full" else precisions[0]


def _inverse_factor(covariance: Array) -> Array:
    lower = linalg.cholesky(covariance, lower=True)
    return np.asarray(linalg.solve_triangular(lower, np.eye(len(lower)), lower=True).T)
