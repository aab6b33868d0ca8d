"""Clusters and mixtures over five uneven sites equal scikit-learn's on all rows, from the same start."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import sklearn.cluster
import sklearn.mixture
from scipy import sparse
from sklearn.datasets import load_digits, load_iris
from sklearn.metrics import adjusted_rand_score
from uneven_sites import fitted, parts

import fl_adapters.sklearn as ours
from fl_adapters import ConfigError

IRIS, KIND = load_iris(return_X_y=True)
DIGITS, DIGIT = load_digits(return_X_y=True)


@pytest.mark.parametrize("kind", ["dense", "sparse", "float32"])
def test_lloyd_from_given_centres(kind: str) -> None:
    start = DIGITS[:10].astype(np.float32 if kind == "float32" else float)
    rows = {"dense": DIGITS, "sparse": sparse.csr_matrix(DIGITS), "float32": DIGITS.astype(np.float32)}[kind]
    # in float32, scikit-learn's own centres depend on how its threads share the rows
    exact = sklearn.cluster.KMeans(10, init=DIGITS[:10], n_init=1, algorithm="lloyd").fit(DIGITS)
    plain = sklearn.cluster.KMeans(10, init=start, n_init=1, algorithm="lloyd").fit(rows)
    for number, site in enumerate(fitted(ours.KMeans(10, init=start, n_init=1), rows)):
        np.testing.assert_allclose(site.cluster_centers_, exact.cluster_centers_, rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(site.inertia_, plain.inertia_, rtol=1e-6)
        assert site.n_iter_ == plain.n_iter_ and site.cluster_centers_.dtype == plain.cluster_centers_.dtype
        np.testing.assert_array_equal(site.labels_, plain.labels_[parts(len(DIGITS))[number]])
        np.testing.assert_array_equal(site.predict(rows), plain.labels_)


def test_weights_of_rows() -> None:
    weights = np.random.default_rng(0).random(len(IRIS))
    start = IRIS[[0, 60, 120]]
    plain = sklearn.cluster.KMeans(3, init=start, n_init=1, tol=0).fit(IRIS, sample_weight=weights)
    site = fitted(ours.KMeans(3, init=start, n_init=1, tol=0), IRIS, sample_weight=weights)[2]
    np.testing.assert_allclose(site.cluster_centers_, plain.cluster_centers_)


@pytest.mark.parametrize("model", [ours.KMeans, ours.MiniBatchKMeans])
def test_first_centres_of_the_sites_own(model: Any) -> None:
    plain = ours.as_sklearn(model(10, n_init=3, random_state=0)).fit(DIGITS)
    site = fitted(model(10, n_init=3, random_state=0), DIGITS)[0]
    assert site.inertia_ < 1.05 * plain.inertia_
    assert adjusted_rand_score(site.predict(DIGITS), DIGIT) > 0.5
    again = fitted(model(10, n_init=3, random_state=0), DIGITS)
    assert {one.cluster_centers_.tobytes() for one in again} == {site.cluster_centers_.tobytes()}


def test_more_clusters_than_the_sites_can_start_from() -> None:
    with pytest.raises(ConfigError, match="too few rows for 60 clusters"):
        fitted(ours.KMeans(60), IRIS)
    with pytest.raises(ConfigError, match="init='random' would send rows of a site"):
        fitted(ours.KMeans(3, init="random"), IRIS)


def precisions(kind: str) -> Any:
    return {
        "full": np.stack([np.eye(4) * n for n in (1.0, 2.0, 3.0)]),
        "tied": np.eye(4) * 2,
        "diag": np.ones((3, 4)) * 1.5,
        "spherical": np.array([1.0, 2.0, 3.0]),
    }[kind]


@pytest.mark.parametrize("kind", ["full", "tied", "diag", "spherical"])
def test_mixtures_from_a_given_start(kind: str) -> None:
    start = {"weights_init": [0.2, 0.5, 0.3], "means_init": IRIS[[0, 60, 120]], "precisions_init": precisions(kind)}
    plain = sklearn.mixture.GaussianMixture(3, covariance_type=kind, tol=1e-6, max_iter=500, **start).fit(IRIS)
    for site in fitted(ours.GaussianMixture(3, covariance_type=kind, tol=1e-6, max_iter=500, **start), IRIS):
        for name in ("weights_", "means_", "covariances_", "precisions_", "precisions_cholesky_", "lower_bound_"):
            np.testing.assert_allclose(getattr(site, name), getattr(plain, name), rtol=1e-6, atol=1e-8, err_msg=name)
        assert site.n_iter_ == plain.n_iter_ and site.converged_
        np.testing.assert_array_equal(site.predict(IRIS), plain.predict(IRIS))


@pytest.mark.parametrize("start", ["kmeans", "random"])
def test_mixtures_that_find_their_start(start: str) -> None:
    mixture = ours.GaussianMixture(3, n_init=3, random_state=0, init_params=start, max_iter=500)
    site = fitted(mixture, IRIS, method="fit_predict")[4]
    assert site.lower_bound_ > sklearn.mixture.GaussianMixture(3, random_state=0).fit(IRIS).lower_bound_ - 0.1
    np.testing.assert_array_equal(site.transformed, site.predict(IRIS[parts(len(IRIS))[4]]))
