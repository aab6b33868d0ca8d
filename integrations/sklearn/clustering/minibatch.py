"""Mini-batch k-means over all sites."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn import cluster
from sklearn.utils import check_random_state

from ..federated import Federated, adopt, opened, plain_copy, refuse_partial_fit
from ..federation import Array, Federation
from ..leading import Ask, lead
from ..moments import moments
from ..trainer import validated
from ..weights import checked_weights
from .kmeans import Points, check_init, first_centres


class MiniBatchKMeans(Federated, cluster.MiniBatchKMeans):
    """`sklearn.cluster.MiniBatchKMeans` fitted over all sites: each batch holds rows of every site.

    A site draws its share of `batch_size`. The first centres are those of the sites' own centres, and a cluster that
    loses all its rows keeps its centre. `labels_` are those of this site's rows.
    """

    def _check_federated(self) -> None:
        check_init(self, self.init)

    def fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> Any:
        with opened(self, X) as federation:
            if federation is None:
                return super().fit(X, y, sample_weight)
            return self._fit_on(federation, X, sample_weight)

    def partial_fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> Any:
        refuse_partial_fit(self)
        return super().partial_fit(X, y, sample_weight)

    def _fit_on(self, federation: Federation, X: Any, sample_weight: Any) -> Any:
        X = validated(self, X, accept_sparse="csr", dtype=[np.float64, np.float32])
        given = checked_weights(sample_weight, X)
        rows = Points(X, np.ones(X.shape[0]) if given is None else given)
        of_columns = moments(federation, X)
        total = int(of_columns.count.max())
        seeds = check_random_state(self.random_state)
        start = first_centres(federation, self, rows, np.zeros(X.shape[1]), seeds)
        batch = max(1, round(self.batch_size * X.shape[0] / total))
        steps = max(1, self.max_iter * total // min(self.batch_size, total))
        limits = _Limits(
            steps,
            self.tol * of_columns.variance.mean(),
            self.max_no_improvement or steps,
            _share(self.batch_size, total),
        )
        found = _steps(federation, rows, start, batch, limits, seeds)
        centres = found[:-2].reshape(start.shape).astype(X.dtype)
        adopt(self, plain_copy(self, init=centres, n_init=1, max_iter=1, batch_size=len(centres)).fit(centres))
        self.cluster_centers_, self.n_steps_ = centres, int(found[-1])
        self.n_iter_ = int(np.ceil(self.n_steps_ * min(self.batch_size, total) / total))
        self.labels_ = self.predict(X)
        own = np.array([rows.weights @ rows.nearest(np.asarray(centres, np.float64))[1]])
        self.inertia_ = float(federation.sum({"inertia": own})["inertia"][0])
        return self


@dataclass(frozen=True)
class _Limits:
    """When the steps end.

    Attributes:
        steps: Most steps.
        tolerance: Squared shift of the centres that ends them.
        patience: Steps without a smaller smoothed distance that end them.
        share: Weight of a step's distance in the smoothed one.
    """

    steps: int
    tolerance: float
    patience: int
    share: float


def _share(batch: int, rows: int) -> float:
    return min(1.0, 2.0 * batch / (rows + 1))


def _steps(federation: Federation, rows: Points, start: Array, batch: int, limits: _Limits, seeds: Any) -> Array:
    """Return the centres, flat, the last smoothed distance and the number of steps."""
    clusters = len(start)

    def answer(point: Array) -> Mapping[str, Array]:
        drawn = seeds.randint(0, len(rows.weights), batch)
        part = Points(rows.x[drawn], rows.weights[drawn])
        labels, distance = part.nearest(point[:-2].reshape(start.shape))
        return part.sums(labels, clusters) | {"inertia": np.array([part.weights @ distance])}

    def drive(ask: Ask) -> Array:
        centres, seen = start, np.zeros(clusters)
        smooth = best = np.inf
        worse = step = 0
        for _ in range(limits.steps):
            step += 1
            totals = ask(np.append(centres.ravel(), [0.0, 0.0]))
            drawn, seen = totals["weight"], seen + totals["weight"]
            moved = centres + (totals["sum"] - drawn[:, None] * centres) / np.maximum(seen, 1e-300)[:, None]
            shift, centres = float(((moved - centres) ** 2).sum()), moved
            distance = float(totals["inertia"][0] / drawn.sum())
            smooth = distance if step <= 2 else (1 - limits.share) * smooth + limits.share * distance
            worse, best = (0, smooth) if smooth < best else (worse + 1, best)
            if step > 1 and (shift <= limits.tolerance or worse >= limits.patience):
                break
        return np.append(centres.ravel(), [smooth, step])

    return lead(federation, np.zeros(start.size + 2), answer, drive)
