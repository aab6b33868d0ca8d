"""Cross-validation and grid search over five uneven sites equal scikit-learn's with the same folds of all rows."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
from sklearn import linear_model, model_selection
from sklearn.datasets import load_breast_cancer
from sklearn.metrics import accuracy_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threaded_federation import run_sites
from uneven_sites import parts

import fl_adapters.sklearn as ours
from fl_adapters import ConfigError

X, Y = load_breast_cancer(return_X_y=True)
SHARES = parts(len(Y))
FOLD = np.zeros(len(Y), int)
for rows in SHARES:
    FOLD[rows] = np.arange(len(rows)) % 3


def federated(work: Any) -> list[Any]:
    """Run `work(rows, splitter)` at each site."""

    def site(federation: Any) -> Any:
        mine = SHARES[federation.site.index]
        with ours.over(federation):
            return work(mine, model_selection.PredefinedSplit(FOLD[mine]))

    return run_sites(len(SHARES), site)


def pipeline(c: float = 1.0) -> Any:
    return make_pipeline(ours.StandardScaler(), ours.LogisticRegression(C=c, max_iter=1000))


def central(c: float = 1.0) -> Any:
    return make_pipeline(StandardScaler(), linear_model.LogisticRegression(C=c, max_iter=10_000, tol=1e-10))


@pytest.mark.parametrize("scoring", [None, "accuracy"])
def test_scores_of_folds(scoring: Any) -> None:
    splitter = model_selection.PredefinedSplit(FOLD)
    expected = model_selection.cross_val_score(central(), X, Y, cv=splitter, scoring=scoring)
    for scores in federated(
        lambda rows, cv: ours.cross_val_score(pipeline(), X[rows], Y[rows], cv=cv, scoring=scoring)
    ):
        np.testing.assert_allclose(scores, expected)


@pytest.mark.parametrize("scoring", ["accuracy", ["accuracy", "neg_brier_score"]], ids=str)
def test_a_search_chooses_the_same_everywhere(scoring: Any) -> None:
    grid = {"logisticregression__C": [1e-4, 0.01, 1.0]}
    refit = "accuracy" if isinstance(scoring, list) else True
    plain = model_selection.GridSearchCV(
        central(), grid, cv=model_selection.PredefinedSplit(FOLD), scoring=scoring, refit=refit
    ).fit(X, Y)

    def search(rows: Any, cv: Any) -> Any:
        return ours.GridSearchCV(pipeline(), grid, cv=cv, scoring=scoring, refit=refit).fit(X[rows], Y[rows])

    for found in federated(search):
        assert found.best_params_ == plain.best_params_
        for name in plain.cv_results_:
            if "test" in name:
                np.testing.assert_allclose(found.cv_results_[name], plain.cv_results_[name], atol=1e-7)
        np.testing.assert_allclose(found.predict_proba(X), plain.predict_proba(X), atol=1e-6)
        assert found.score(X, Y) == accuracy_score(Y, plain.predict(X))
        again = pickle.dumps(ours.as_sklearn(found))
        assert b"fl_adapters" not in again and type(pickle.loads(again)) is model_selection.GridSearchCV
        assert found.scoring == scoring and np.isnan(found.error_score)


def test_what_cannot_be_searched_together() -> None:
    with pytest.raises(ConfigError, match="n_jobs=2 would fit in another order at each site"):
        federated(lambda rows, cv: ours.GridSearchCV(pipeline(), {}, n_jobs=2).fit(X[rows], Y[rows]))


def test_alone_it_is_scikit_learns_own() -> None:
    found = ours.cross_val_score(pipeline(), X, Y, cv=3)
    np.testing.assert_allclose(found, model_selection.cross_val_score(central(), X, Y, cv=3))
