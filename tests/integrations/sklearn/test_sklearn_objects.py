"""Estimators of fl_adapters.sklearn behave as scikit-learn's own: in pipelines, copies, pickles and errors."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pandas as pd
import pytest
import sklearn.linear_model
import sklearn.preprocessing
from sklearn.base import clone
from sklearn.compose import ColumnTransformer
from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import Pipeline, make_pipeline
from threaded_federation import ThreadedFederation, run_sites
from uneven_sites import fitted

import fl_adapters.sklearn as ours
from fl_adapters import ConfigError, HandshakeError

X, Y = load_breast_cancer(return_X_y=True)
RNG = np.random.default_rng(0)
PEOPLE = pd.DataFrame(
    {
        "age": np.where(RNG.random(500) < 0.1, np.nan, RNG.integers(18, 90, 500)),
        "job": RNG.choice(["clerk", "nurse", "pilot"], 500, p=[0.6, 0.39, 0.01]),
        "hours": RNG.integers(0, 60, 500),
    }
)
RICH = (PEOPLE["hours"] + 20 * (PEOPLE["job"] == "pilot") + RNG.normal(0, 10, 500) > 35).to_numpy()
NAMES = [name for name in ours.__all__ if isinstance(getattr(ours, name), type) and name != "GridSearchCV"]
ESTIMATORS = [getattr(ours, name) for name in NAMES]


def pipeline(kind: Any) -> Pipeline:
    """Impute, scale, encode and classify with the classes of a module."""
    numbers = make_pipeline(kind.SimpleImputer(strategy="median"), kind.StandardScaler())
    columns = ColumnTransformer(
        [("numbers", numbers, ["age", "hours"]), ("texts", kind.OneHotEncoder(min_frequency=10), ["job"])]
    )
    return Pipeline([("columns", columns), ("model", kind.LogisticRegression(tol=1e-10, max_iter=1000))])


class Central:
    """The classes of scikit-learn by the names of ours."""

    def __getattr__(self, name: str) -> Any:
        return ours.as_sklearn(getattr(ours, name)()).__class__


def test_a_pipeline_equals_one_of_all_rows() -> None:
    plain = pipeline(Central()).fit(PEOPLE, RICH)
    for site in fitted(pipeline(ours), PEOPLE, RICH):
        np.testing.assert_allclose(site.predict_proba(PEOPLE), plain.predict_proba(PEOPLE), atol=1e-7)
        assert list(site[:-1].get_feature_names_out()) == list(plain[:-1].get_feature_names_out())


def test_a_pickle_needs_nothing_of_ours() -> None:
    """A ColumnTransformer keeps unfitted ones, too: as_sklearn() replaces these."""
    simple = fitted(make_pipeline(ours.StandardScaler(), ours.LogisticRegression()), X, Y)[0]
    columns = fitted(pipeline(ours), PEOPLE, RICH)[0]
    for site, saved, rows in ((simple, simple, X), (columns, ours.as_sklearn(columns), PEOPLE)):
        text = pickle.dumps(saved)
        assert b"fl_adapters" not in text and b"integrations" not in text
        again = pickle.loads(text)
        assert type(again[-1]) is sklearn.linear_model.LogisticRegression
        np.testing.assert_array_equal(again.predict_proba(rows), site.predict_proba(rows))


def test_an_unfitted_one_stays_ours_in_other_processes() -> None:
    again = pickle.loads(pickle.dumps(ours.Ridge(alpha=3.0)))
    assert type(again) is ours.Ridge and again.alpha == 3.0


@pytest.mark.parametrize("kind", ESTIMATORS, ids=lambda kind: kind.__name__)
def test_arguments_are_those_of_scikit_learn(kind: Any) -> None:
    estimator = kind()
    plain = ours.as_sklearn(estimator)
    assert type(plain).__module__.startswith("sklearn.") and type(plain).__name__ == kind.__name__
    assert estimator.get_params() == plain.get_params()
    assert repr(estimator) == repr(plain)
    assert type(clone(estimator)) is kind


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, clone], ids=["copy", "deepcopy", "clone"])
def test_a_copy_of_a_fitted_one_stays_ours(again: Any) -> None:
    site = fitted(ours.StandardScaler(), X)[0]
    twin = again(site)
    assert type(twin) is ours.StandardScaler
    assert again is clone or np.array_equal(twin.mean_, site.mean_)


@pytest.mark.parametrize("estimator", [ours.StandardScaler(), ours.LogisticRegression(C=0.1, max_iter=5000)], ids=repr)
def test_alone_it_is_scikit_learns_own(estimator: Any) -> None:
    scaled = X / X.max(axis=0)
    alone, plain = clone(estimator).fit(scaled, Y), ours.as_sklearn(estimator).fit(scaled, Y)
    own = {name: value for name, value in vars(plain).items() if name.endswith("_")}
    for name, value in own.items():
        np.testing.assert_array_equal(getattr(alone, name), value)


def test_a_search_alone() -> None:
    scaled = X / X.max(axis=0)
    search = GridSearchCV(ours.LogisticRegression(max_iter=5000), {"C": [0.1, 1.0]}, cv=2).fit(scaled, Y)
    assert type(search.best_estimator_) is ours.LogisticRegression
    assert type(ours.as_sklearn(search).best_estimator_) is sklearn.linear_model.LogisticRegression


def disagreeing(makers: list[Any], tables: list[Any]) -> None:
    def site(federation: ThreadedFederation) -> Any:
        with ours.over(federation):
            return makers[federation.site.index]().fit(tables[federation.site.index])

    run_sites(len(makers), site)


def test_sites_that_fit_something_else_are_named() -> None:
    frame = pd.DataFrame(X[:, :2], columns=["radius", "texture"])
    scaler, other = ours.StandardScaler, ours.MinMaxScaler
    with pytest.raises(HandshakeError, match="agree on estimator: .*Scaler here, .*Scaler at another site"):
        disagreeing([scaler, other], [frame, frame])
    with pytest.raises(HandshakeError, match=r"agree on features\[0\]: '(radius|texture)' here"):
        disagreeing([scaler, scaler], [frame, frame[["texture", "radius"]]])
    with pytest.raises(HandshakeError, match="agree on number of features"):
        disagreeing([scaler, scaler], [X, X[:, 1:]])
    with pytest.raises(HandshakeError, match="agree on argument with_std: (True|False) here, (True|False) at another"):
        disagreeing([scaler, lambda: scaler(with_std=False)], [X, X])


@pytest.mark.parametrize(
    ("estimator", "message"),
    [
        (ours.LinearRegression(positive=True), "positive=True is not solved from sums"),
        (ours.LogisticRegression(solver="liblinear"), "solver='liblinear' penalises the intercept"),
        (ours.SimpleImputer(strategy=np.mean), "would need the rows of all sites"),
    ],
)
def test_arguments_that_cannot_be_federated_are_refused(estimator: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        fitted(estimator, X, Y)


def test_partial_fit_is_refused_in_a_federation_alone() -> None:
    ours.StandardScaler().partial_fit(X)
    with pytest.raises(ConfigError, match="partial_fit does not know when the other sites call it"):
        fitted(ours.StandardScaler(), X, method="partial_fit")


def test_arguments_of_a_wrong_type_raise_scikit_learns_error() -> None:
    with pytest.raises(ValueError, match="The 'C' parameter"):
        fitted(ours.LogisticRegression(C="much"), X, Y)


def test_weights_are_routed_in_a_pipeline() -> None:
    weights = RNG.random(len(Y))
    plain = make_pipeline(sklearn.preprocessing.StandardScaler(), sklearn.linear_model.Ridge())
    plain.fit(X, Y, ridge__sample_weight=weights)
    mixed = make_pipeline(ours.StandardScaler(), ours.Ridge())
    site = fitted(mixed, X, Y, ridge__sample_weight=weights)[3]
    np.testing.assert_allclose(site.predict(X), plain.predict(X), atol=1e-9)
