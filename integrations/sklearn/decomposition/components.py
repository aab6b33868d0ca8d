"""PCA and TruncatedSVD over all sites, from summed products of the columns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy import linalg, sparse
from sklearn import decomposition

from ..federated import Federated, opened, refuse
from ..federation import Array, Federation
from ..leading import Ask, from_leader, lead
from ..linear import least_squares
from ..moments import moments
from ..preprocessing.scaling import dense
from ..trainer import likely_dimension, validated

_EXTRA = 10  # vectors that the iteration has beside those that are wanted
_ITERATIONS = 300
_SETTLED = 1e-13


class PCA(Federated, decomposition.PCA):
    """`sklearn.decomposition.PCA` fitted over all sites: the components of all rows together.

    They are exact whatever `svd_solver` says, with the signs of scikit-learn 1.5 and later.
    """

    def fit(self, X: Any, y: Any = None) -> Any:
        with opened(self, X) as federation:
            return super().fit(X, y) if federation is None else self._fit_on(federation, X)

    def fit_transform(self, X: Any, y: Any = None) -> Any:
        with opened(self, X) as federation:
            if federation is None:
                return super().fit_transform(X, y)
            self._fit_on(federation, X)
        return self.transform(X)

    def _fit_on(self, federation: Federation, X: Any) -> Any:
        dense(self, X)
        X = validated(self, X, dtype=[np.float64, np.float32])
        least_squares.check_width(self, X.shape[1])
        rows = least_squares.Rows(federation, X, np.zeros(len(X)), None, centred=True)
        count, width = int(rows.count), X.shape[1]
        most = min(count, width)
        wanted = most if self.n_components is None else self.n_components
        if wanted != "mle" and not 0 <= wanted <= most:
            refuse(self, "n_components", f"is not between 0 and {most}, the rows or columns of all sites", "give fewer")
        values, vectors = linalg.eigh(rows.products().gram / (count - 1))
        found = from_leader(federation, {"values": values[::-1][:most], "vectors": vectors.T[::-1][:most]})
        variance, vectors = np.maximum(found["values"], 0.0), same_signs(found["vectors"])
        share = variance / variance.sum()
        if wanted == "mle":
            wanted = likely_dimension(variance, count)
        elif 0 < wanted < 1:
            wanted = int(np.searchsorted(np.cumsum(share), wanted, side="right")) + 1
        kept = X.dtype.type
        self.mean_ = rows.feature_mean.astype(kept)
        self.components_ = vectors[:wanted].astype(kept)
        self.explained_variance_ = variance[:wanted].astype(kept)
        self.explained_variance_ratio_ = share[:wanted].astype(kept)
        self.singular_values_ = np.sqrt(variance[:wanted] * (count - 1)).astype(kept)
        self.noise_variance_ = kept(variance[wanted:].mean()) if wanted < most else 0.0
        self.n_samples_, self.n_components_ = count, wanted
        return self


class TruncatedSVD(Federated, decomposition.TruncatedSVD):
    """`sklearn.decomposition.TruncatedSVD` fitted over all sites: the singular vectors of all rows together.

    They are exact whatever `algorithm` says, with the signs of scikit-learn 1.5 and later. For more than 4,096 columns
    they are found by iteration, and the sites add products of the columns with a few vectors.
    """

    def fit(self, X: Any, y: Any = None) -> Any:
        with opened(self, X) as federation:
            return super().fit(X, y) if federation is None else self._fit_on(federation, X)

    def fit_transform(self, X: Any, y: Any = None) -> Any:
        with opened(self, X) as federation:
            if federation is None:
                return super().fit_transform(X, y)
            self._fit_on(federation, X)
        return self.transform(X)

    def _fit_on(self, federation: Federation, X: Any) -> Any:
        X = validated(self, X, accept_sparse=["csr", "csc"], ensure_min_features=2)
        width, wanted = X.shape[1], self.n_components
        if wanted > width:
            refuse(self, "n_components", f"is more than the {width} columns", "give fewer")
        own = X if sparse.issparse(X) else np.asarray(X, np.float64)
        of_columns = moments(federation, own)
        if width > least_squares.MOST_FEATURES:
            squares, vectors = _iterated(federation, own, wanted)
        else:
            gram: Any = own.T @ own
            total = federation.sum({"gram": np.asarray(gram.todense() if sparse.issparse(gram) else gram)})["gram"]
            values, directions = linalg.eigh(total)
            found = from_leader(federation, {"values": values[::-1], "vectors": directions.T[::-1]})
            squares, vectors = np.maximum(found["values"][:wanted], 0.0), found["vectors"][:wanted]
        vectors = same_signs(vectors)
        rows = of_columns.count.max()
        self.components_, self.singular_values_ = vectors, np.sqrt(squares)
        self.explained_variance_ = squares / rows - (vectors @ of_columns.mean) ** 2
        self.explained_variance_ratio_ = self.explained_variance_ / of_columns.variance.sum()
        return self


def same_signs(vectors: Array) -> Array:
    """Make the largest entry of each row positive, as scikit-learn does."""
    largest = np.argmax(np.abs(vectors), axis=1)
    return vectors * np.sign(vectors[np.arange(len(vectors)), largest])[:, None]


def _iterated(federation: Federation, X: Any, wanted: int) -> tuple[Array, Array]:
    """Squares of the largest singular values, and their vectors, by subspace iteration."""
    width, size = X.shape[1], min(wanted + _EXTRA, X.shape[1])

    def answer(point: Array) -> Mapping[str, Array]:
        return {"image": np.asarray(X.T @ (X @ point[:width]))}

    def drive(ask: Ask) -> Array:
        basis = np.linalg.qr(np.random.default_rng(0).normal(size=(width, size)))[0]
        before = np.zeros(size)
        for _ in range(_ITERATIONS):
            image = ask(np.vstack([basis, before]))["image"]
            values, turn = linalg.eigh(basis.T @ image)
            basis, values = basis @ turn[:, ::-1], values[::-1]
            if np.abs(values - before)[:wanted].max() <= _SETTLED * values[0]:
                break
            before = values
            basis = np.linalg.qr(image @ turn[:, ::-1])[0]
        return np.vstack([basis, values])

    found = lead(federation, np.zeros((width + 1, size)), answer, drive)
    return np.maximum(found[-1, :wanted], 0.0), found[:-1, :wanted].T
