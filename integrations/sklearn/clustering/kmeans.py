"""Lloyd's algorithm over all sites."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy import sparse
from sklearn import cluster
from sklearn.utils import check_random_state

from fl_runtime.errors import ConfigError

from ..federated import Federated, adopt, opened, plain_copy, refuse
from ..federation import Array, Federation
from ..leading import Ask, from_leader, lead
from ..moments import moments
from ..trainer import validated
from ..weights import checked_weights

_ROWS_A_CENTRE = 10  # a site's first centres stand for so many rows each, on average


class KMeans(Federated, cluster.KMeans):
    """`sklearn.cluster.KMeans` fitted over all sites: Lloyd's algorithm on all rows together.

    With an array as `init` the centres equal scikit-learn's. With "k-means++" each site clusters its own rows first,
    and the first centres are those of the sites' centres, so that no site sends a row. `labels_` are those of this
    site's rows. A cluster that loses all its rows keeps its centre.
    """

    def _check_federated(self) -> None:
        check_init(self, self.init)

    def fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> Any:
        with opened(self, X) as federation:
            if federation is None:
                return super().fit(X, y, sample_weight)
            return self._fit_on(federation, X, sample_weight)

    def _fit_on(self, federation: Federation, X: Any, sample_weight: Any) -> Any:
        X = validated(self, X, accept_sparse="csr", dtype=[np.float64, np.float32])
        given = checked_weights(sample_weight, X)
        weights = np.ones(X.shape[0]) if given is None else given
        of_columns = moments(federation, X)
        middle = np.zeros(X.shape[1]) if sparse.issparse(X) else of_columns.mean
        rows = Points(X if sparse.issparse(X) else np.asarray(X, np.float64) - middle, weights)
        tolerance = self.tol * of_columns.variance.mean()
        seeds, best = check_random_state(self.random_state), None
        for _ in range(_repeats(self)):
            start = first_centres(federation, self, rows, middle, seeds)
            found = lloyd(federation, rows, start, self.max_iter, tolerance)
            if best is None or found[1] < best[1]:
                best = found
        assert best is not None
        centres, inertia, iterations = best
        centres = (centres + middle).astype(X.dtype)
        adopt(self, plain_copy(self, init=centres, n_init=1, max_iter=1).fit(centres))
        self.cluster_centers_, self.inertia_, self.n_iter_ = centres, inertia, iterations
        self.labels_ = self.predict(X)
        return self


def check_init(estimator: Any, init: Any) -> None:
    """Refuse first centres that would be rows of a site."""
    if callable(init) or (isinstance(init, str) and init != "k-means++"):
        refuse(estimator, "init", "would send rows of a site", 'give "k-means++" or an array of centres')


def _repeats(estimator: Any) -> int:
    if not isinstance(estimator.init, str) or isinstance(estimator.n_init, str):
        return 1
    return int(estimator.n_init)


class Points:
    """This site's rows for distances to centres.

    Args:
        X: Rows, dense or sparse.
        weights: Weight of each row.
    """

    def __init__(self, X: Any, weights: Array) -> None:
        self.x, self.weights = X, weights
        square = X.multiply(X).sum(axis=1) if sparse.issparse(X) else (X * X).sum(axis=1)
        self._square = np.asarray(square, np.float64).ravel()

    def nearest(self, centres: Array) -> tuple[Any, Array]:
        """Return the number of each row's nearest centre and the squared distance to it."""
        away = (centres * centres).sum(axis=1) - 2 * np.asarray(self.x @ centres.T)
        labels = away.argmin(axis=1)
        return labels, np.maximum(away[np.arange(len(labels)), labels] + self._square, 0.0)

    def sums(self, labels: Any, clusters: int) -> dict[str, Array]:
        """Return sums of the rows and of the weights of each cluster."""
        member = sparse.csr_matrix((self.weights, (labels, np.arange(len(labels)))), shape=(clusters, len(labels)))
        total = member @ self.x
        dense = np.asarray(total.todense() if sparse.issparse(total) else total, np.float64)
        return {"sum": dense, "weight": np.asarray(member.sum(axis=1), np.float64).ravel()}


def lloyd(
    federation: Federation, rows: Points, start: Array, max_iter: int, tolerance: float
) -> tuple[Array, float, int]:
    """Return centres, sum of the squared distances and number of iterations."""
    clusters, width = start.shape
    before: list[Any] = [np.full(len(rows.weights), -1)]

    def answer(point: Array) -> Mapping[str, Array]:
        labels, distance = rows.nearest(point[:-2].reshape(clusters, width))
        changed, before[0] = float((labels != before[0]).sum()), labels
        more = {"changed": np.array([changed]), "inertia": np.array([rows.weights @ distance])}
        return rows.sums(labels, clusters) | more

    def drive(ask: Ask) -> Array:
        centres, iteration = start, 0
        for _ in range(max_iter):
            iteration += 1
            totals = ask(np.append(centres.ravel(), [0.0, 0.0]))
            full = totals["weight"] > 0
            moved = centres.copy()
            moved[full] = totals["sum"][full] / totals["weight"][full, None]
            shift, centres = float(((moved - centres) ** 2).sum()), moved
            if totals["changed"][0] == 0 or shift <= tolerance:
                break
        inertia = ask(np.append(centres.ravel(), [0.0, 0.0]))["inertia"][0]
        return np.append(centres.ravel(), [inertia, iteration])

    found = lead(federation, np.zeros(start.size + 2), answer, drive)
    return found[:-2].reshape(start.shape), float(found[-2]), int(found[-1])


def first_centres(federation: Federation, estimator: Any, rows: Points, middle: Array, seeds: Any) -> Array:
    """Return the centres to start from: those given, else the centres of the sites' own centres."""
    clusters, width = estimator.n_clusters, rows.x.shape[1]
    if not isinstance(estimator.init, str):
        given = np.asarray(estimator.init, np.float64)
        if given.shape != (clusters, width):
            refuse(estimator, "init", f"has the shape {given.shape}", f"give an array of shape {(clusters, width)}")
        return given - middle
    seed = int(seeds.randint(np.iinfo(np.int32).max))
    own = max(1, min(clusters, len(rows.weights) // _ROWS_A_CENTRE))
    local = cluster.KMeans(own, n_init=1, random_state=seed).fit(rows.x, sample_weight=rows.weights)
    slots = np.zeros((federation.site.count, clusters, width + 1))
    weight = np.bincount(local.labels_, rows.weights, own)
    slots[federation.site.index, :own] = np.hstack([local.cluster_centers_, weight[:, None]])
    sent = federation.sum({"centres": slots})["centres"].reshape(-1, width + 1)
    sent = sent[sent[:, -1] > 0]
    if len(sent) < clusters:
        raise ConfigError(
            f"all sites together have too few rows for {clusters} clusters to start from",
            where=f"{type(estimator).__name__}.fit",
            fix="give fewer clusters, or the first centres as init=",
        )
    joint = cluster.KMeans(clusters, n_init=10, random_state=seed).fit(sent[:, :-1], sample_weight=sent[:, -1])
    return from_leader(federation, {"centres": joint.cluster_centers_})["centres"]
