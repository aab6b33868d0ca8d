"""Classifiers and components over five uneven sites equal scikit-learn's on all rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import sklearn.svm
from scipy import sparse
from sklearn.datasets import load_breast_cancer, load_digits, load_iris
from sklearn.decomposition import TruncatedSVD
from sklearn.preprocessing import StandardScaler
from sklearn.utils.fixes import parse_version
from uneven_sites import assert_same_attributes, fitted

import fl_adapters.sklearn as ours
from fl_adapters.sklearn.linear import least_squares

IRIS, KIND = load_iris(return_X_y=True)
CANCER, BENIGN = load_breast_cancer(return_X_y=True)
CANCER = StandardScaler().fit_transform(CANCER)
DIGITS, DIGIT = load_digits(return_X_y=True)
NAMES = np.array(["setosa", "versicolor", "virginica"])[KIND]
RNG = np.random.default_rng(1)
SIGNS = parse_version(sklearn.__version__) >= parse_version("1.5")

CLASSIFIERS = [
    ours.GaussianNB(),
    ours.GaussianNB(priors=[0.5, 0.25, 0.25]),
    ours.MultinomialNB(),
    ours.MultinomialNB(alpha=0.1, fit_prior=False),
    ours.LinearDiscriminantAnalysis(),
    ours.LinearDiscriminantAnalysis(n_components=1, priors=[0.2, 0.5, 0.3]),
    ours.LinearDiscriminantAnalysis(solver="lsqr", shrinkage=0.2),
    ours.LinearDiscriminantAnalysis(solver="eigen", priors=[0.2, 0.5, 0.3]),
    ours.NearestCentroid(),
    ours.NearestCentroid(metric="manhattan", shrink_threshold=0.2),
]


def absolute(estimator: Any) -> Any:
    """Components and scalings without their signs."""
    for name in ("components_", "scalings_"):
        if hasattr(estimator, name):
            setattr(estimator, name, np.abs(getattr(estimator, name)))
    return estimator


@pytest.mark.parametrize("estimator", CLASSIFIERS, ids=repr)
def test_classifiers(estimator: Any) -> None:
    plain = ours.as_sklearn(estimator).fit(IRIS, NAMES)
    sites = fitted(estimator, IRIS, NAMES)
    np.testing.assert_array_equal(sites[0].predict(IRIS), plain.predict(IRIS))
    for site in sites:
        assert_same_attributes(absolute(site), absolute(ours.as_sklearn(plain)), rtol=1e-6, atol=1e-9)


def test_two_classes_and_transform() -> None:
    plain = ours.as_sklearn(ours.LinearDiscriminantAnalysis()).fit(CANCER, BENIGN)
    site = fitted(ours.LinearDiscriminantAnalysis(), CANCER, BENIGN)[2]
    np.testing.assert_allclose(site.decision_function(CANCER), plain.decision_function(CANCER), rtol=1e-6)
    np.testing.assert_allclose(np.abs(site.transform(CANCER)), np.abs(plain.transform(CANCER)), rtol=1e-6)


@pytest.mark.parametrize("model", [ours.GaussianNB, ours.MultinomialNB])
def test_weights_of_rows(model: Any) -> None:
    weights = RNG.random(len(IRIS))
    plain = ours.as_sklearn(model()).fit(IRIS, KIND, sample_weight=weights)
    assert_same_attributes(fitted(model(), IRIS, KIND, sample_weight=weights)[1], plain)


def test_counts_in_a_sparse_matrix() -> None:
    counts = sparse.csr_matrix(DIGITS.astype(int))
    plain = ours.as_sklearn(ours.MultinomialNB()).fit(counts, DIGIT)
    assert_same_attributes(fitted(ours.MultinomialNB(), counts, DIGIT)[4], plain)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"C": 0.01, "class_weight": "balanced"},
        {"fit_intercept": False},
        {"penalty": "l1", "dual": False, "C": 0.05},
    ],
    ids=str,
)
def test_support_vectors(arguments: dict[str, Any]) -> None:
    oracle = {"tol": 1e-10, "max_iter": 1_000_000, "random_state": 0} | arguments
    plain = sklearn.svm.LinearSVC(**{"dual": False, **oracle}).fit(CANCER, BENIGN)
    for site in fitted(ours.LinearSVC(**arguments), CANCER, BENIGN):
        np.testing.assert_allclose(site.coef_, plain.coef_, atol=1e-6)
        np.testing.assert_allclose(site.intercept_, plain.intercept_, atol=1e-6)


def test_support_vectors_of_three_classes() -> None:
    plain = sklearn.svm.LinearSVC(tol=1e-10, max_iter=1_000_000, dual=False).fit(IRIS, NAMES)
    site = fitted(ours.LinearSVC(), IRIS, NAMES)[0]
    np.testing.assert_allclose(site.coef_, plain.coef_, atol=1e-6)
    np.testing.assert_array_equal(site.predict(IRIS), plain.predict(IRIS))


@pytest.mark.parametrize("components", [None, 3, 0.9, "mle"])
def test_principal_components(components: Any) -> None:
    estimator = ours.PCA(components, svd_solver="full")
    plain = ours.as_sklearn(estimator).fit(CANCER)
    for site in fitted(estimator, CANCER):
        if not SIGNS:
            absolute(site), absolute(plain)
        assert_same_attributes(site, plain, rtol=1e-7, atol=1e-9)


def test_transform_of_components_in_a_pipeline() -> None:
    estimator = ours.PCA(5, svd_solver="full")
    plain = ours.as_sklearn(estimator).fit(CANCER)
    site = fitted(estimator, CANCER, method="fit_transform")[0]
    np.testing.assert_allclose(np.abs(site.transform(CANCER)), np.abs(plain.transform(CANCER)), atol=1e-7)
    assert site.transformed.shape[1] == 5


@pytest.mark.parametrize("kind", ["dense", "sparse", "iterated"])
def test_singular_vectors(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind == "iterated":
        monkeypatch.setattr(least_squares, "MOST_FEATURES", 10)
    rows = DIGITS if kind == "dense" else sparse.csr_matrix(DIGITS)
    plain = absolute(TruncatedSVD(4, algorithm="arpack").fit(rows))
    site = absolute(fitted(ours.TruncatedSVD(4), rows)[1])
    for name in ("components_", "singular_values_", "explained_variance_", "explained_variance_ratio_"):
        np.testing.assert_allclose(getattr(site, name), getattr(plain, name), rtol=1e-6, atol=1e-8)
