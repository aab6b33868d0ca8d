"""Linear models over five uneven sites equal scikit-learn's on all rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import sklearn.linear_model as central
from scipy import sparse
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits
from sklearn.preprocessing import StandardScaler
from uneven_sites import fitted

import fl_adapters.sklearn as ours
from fl_adapters.sklearn.linear import newton

RNG = np.random.default_rng(5)
DIABETES, SUGAR = load_diabetes(return_X_y=True)
CANCER, BENIGN = load_breast_cancer(return_X_y=True)
CANCER = StandardScaler().fit_transform(CANCER)
DIGITS, DIGIT = load_digits(return_X_y=True)
WEIGHTS = RNG.random(len(DIABETES)) + 0.1


def assert_coefficients(sites: list[Any], plain: Any, *, atol: float = 1e-6) -> None:
    for site in sites:
        np.testing.assert_allclose(site.coef_, plain.coef_, atol=atol, rtol=1e-6)
        np.testing.assert_allclose(site.intercept_, plain.intercept_, atol=atol, rtol=1e-6)
        assert np.shape(site.coef_) == np.shape(plain.coef_)
        assert np.shape(site.intercept_) == np.shape(plain.intercept_)
    assert len({np.asarray(site.coef_).tobytes() + np.asarray(site.intercept_).tobytes() for site in sites}) == 1


@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["plain", "weighted"])
@pytest.mark.parametrize("model", [ours.LinearRegression, ours.Ridge])
def test_least_squares(model: Any, weights: Any, intercept: bool) -> None:
    estimator = model(fit_intercept=intercept)
    plain = ours.as_sklearn(estimator).fit(DIABETES, SUGAR, sample_weight=weights)
    columns = {} if weights is None else {"sample_weight": weights}
    assert_coefficients(fitted(estimator, DIABETES, SUGAR, **columns), plain)


def test_columns_that_depend_on_each_other_get_the_solution_of_smallest_norm() -> None:
    X = np.hstack([DIABETES, DIABETES[:, :2] @ [[1.0], [2.0]], np.ones((len(DIABETES), 1)), 1e6 * DIABETES[:, 2:3]])
    plain = central.LinearRegression().fit(X, SUGAR)
    sites = fitted(ours.LinearRegression(), X, SUGAR)
    assert_coefficients(sites, plain)
    assert sites[0].rank_ == plain.rank_
    np.testing.assert_allclose(sites[0].singular_[: plain.rank_], plain.singular_[: plain.rank_])


def test_ill_conditioned_columns() -> None:
    base = RNG.normal(size=(400, 1))
    X = np.hstack([base + 1e-4 * RNG.normal(size=(400, 6)), 1e5 + RNG.normal(size=(400, 1))])
    y = X @ np.arange(1.0, 8.0) + RNG.normal(size=400)
    plain = central.LinearRegression().fit(X, y)
    assert_coefficients(fitted(ours.LinearRegression(), X, y), plain, atol=1e-5)


def test_several_targets_and_alphas() -> None:
    y = np.stack([SUGAR, SUGAR**2 / 100], axis=1)
    assert_coefficients(fitted(ours.LinearRegression(), DIABETES, y), central.LinearRegression().fit(DIABETES, y))
    alphas = np.array([0.1, 3.0])
    plain = central.Ridge(alpha=alphas).fit(DIABETES, y)
    assert_coefficients(fitted(ours.Ridge(alpha=alphas), DIABETES, y), plain)


def test_sparse_rows() -> None:
    X = sparse.random(400, 30, 0.2, format="csr", random_state=0)
    y = X @ np.arange(30.0) + RNG.normal(size=400)
    dense = X.toarray()
    assert_coefficients(fitted(ours.Ridge(), X, y), central.Ridge().fit(dense, y))
    labels = (y > y.mean()).astype(int)
    plain = central.LogisticRegression(tol=1e-10, max_iter=10_000).fit(dense, labels)
    assert_coefficients(fitted(ours.LogisticRegression(), X, labels), plain)


LOGISTIC = {
    "plain": {},
    "no penalty": {"C": 1e3},
    "no intercept": {"fit_intercept": False, "C": 0.1},
    "balanced": {"class_weight": "balanced"},
    "weights of classes": {"class_weight": {0: 3.0, 1: 0.5}},
}


@pytest.mark.parametrize("arguments", LOGISTIC.values(), ids=LOGISTIC)
def test_binary_logistic_regression(arguments: dict[str, Any]) -> None:
    plain = central.LogisticRegression(solver="newton-cholesky", tol=1e-12, max_iter=1000, **arguments)
    sites = fitted(ours.LogisticRegression(**arguments), CANCER, BENIGN)
    assert_coefficients(sites, plain.fit(CANCER, BENIGN))
    np.testing.assert_allclose(sites[0].predict_proba(CANCER), plain.predict_proba(CANCER), atol=1e-7)


@pytest.mark.parametrize("ratio", [1.0, 0.3])
def test_lasso_and_elastic_net(ratio: float) -> None:
    """Zeros where scikit-learn has zeros: from 1.8 on by l1_ratio alone, before by penalty."""
    X, y = CANCER[:300], BENIGN[:300]
    arguments: dict[str, Any] = {"solver": "saga", "l1_ratio": ratio, "C": 0.1}
    if central.LogisticRegression().penalty != "deprecated":
        arguments["penalty"] = "elasticnet"
    plain = central.LogisticRegression(tol=1e-9, max_iter=100_000, **arguments).fit(X, y)
    sites = fitted(ours.LogisticRegression(**arguments), X, y)
    assert_coefficients(sites, plain)
    np.testing.assert_array_equal(sites[0].coef_ == 0, plain.coef_ == 0)
    assert (sites[0].coef_ == 0).any()


@pytest.mark.parametrize("names", [False, True], ids=["numbers", "texts"])
def test_multinomial_logistic_regression(names: bool) -> None:
    X, y = DIGITS[:600] / 16, DIGIT[:600]
    y = np.array(["class " + str(digit) for digit in y]) if names else y
    plain = central.LogisticRegression(solver="newton-cg", tol=1e-10, max_iter=10_000).fit(X, y)
    sites = fitted(ours.LogisticRegression(), X, y)
    assert_coefficients(sites, plain)
    np.testing.assert_array_equal(sites[3].classes_, plain.classes_)
    np.testing.assert_array_equal(sites[3].predict(X), plain.predict(X))


def test_a_class_that_one_site_alone_has(monkeypatch: pytest.MonkeyPatch) -> None:
    order = np.argsort(BENIGN, kind="stable")  # the first sites have only malignant ones
    monkeypatch.setattr("uneven_sites.parts", lambda rows: np.array_split(np.arange(rows), 5))
    X, y = CANCER[order], BENIGN[order]
    plain = central.LogisticRegression(tol=1e-12, max_iter=1000, solver="newton-cholesky").fit(X, y)
    assert_coefficients(fitted(ours.LogisticRegression(), X, y), plain)


@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_many_parameters_are_fitted_without_a_hessian(ratio: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(newton, "MOST_PARAMETERS", 10)
    with_hessian = LOGISTIC["plain"] | {"l1_ratio": ratio, "C": 0.1, "solver": "saga"}
    sites = fitted(ours.LogisticRegression(**with_hessian), CANCER, BENIGN)
    monkeypatch.setattr(newton, "MOST_PARAMETERS", 2000)
    assert_coefficients(sites, fitted(ours.LogisticRegression(**with_hessian), CANCER, BENIGN)[0], atol=1e-5)


@pytest.mark.parametrize("alpha", [1.0, 0.0])
def test_poisson_regression(alpha: float) -> None:
    y = RNG.poisson(np.exp(1 + 3 * DIABETES[:, 2] + 5 * DIABETES[:, 8]))
    plain = central.PoissonRegressor(alpha=alpha, solver="newton-cholesky", tol=1e-12, max_iter=1000).fit(DIABETES, y)
    assert_coefficients(fitted(ours.PoissonRegressor(alpha=alpha), DIABETES, y), plain)


def test_single_precision_stays_single() -> None:
    X = CANCER.astype(np.float32)
    plain = central.LogisticRegression(tol=1e-8, max_iter=1000).fit(CANCER, BENIGN)
    site = fitted(ours.LogisticRegression(), X, BENIGN)[0]
    assert site.coef_.dtype == np.float32
    np.testing.assert_allclose(site.coef_, plain.coef_, rtol=1e-3)
