"""Cross-validation and grid search with XGBoost: each fit of a script is a federated training of its own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import xgboost
import xgboost_data as d
from sklearn.model_selection import GridSearchCV, KFold, cross_val_score

from fl_adapters.testing import LocalFederation, Place
from fl_adapters.xgboost import FederatedXGBClassifier, train

ROUNDS, FOLDS, SITES = 3, 3, 2
PARAMS: dict[str, Any] = {"objective": "binary:logistic", "max_depth": 2, "eta": 0.5, "nthread": 1, "base_score": 0.5}


def folds(index: int) -> list[tuple[Any, Any]]:
    """The rows of each fold at a site: for training, and for testing."""
    rows = np.arange(d.CUTS[index], d.CUTS[index + 1])
    return [(rows[kept], rows[tested]) for kept, tested in KFold(FOLDS).split(rows)]


def by_hand(matrices: list[xgboost.DMatrix], params: dict[str, Any]) -> Any:
    """Bagging without a federation: in each round every site grows a tree on the sum of all trees so far.

    Returns a function from a matrix to margins. The trees of a round count by their site's share of the rows.
    """
    shares = np.array([matrix.num_row() for matrix in matrices], float) / sum(m.num_row() for m in matrices)
    rounds: list[list[xgboost.Booster]] = []

    def margin(data: xgboost.DMatrix) -> np.ndarray:
        total = np.zeros(data.num_row())
        for trees in rounds:
            for share, tree in zip(shares, trees, strict=True):
                total += share * tree.predict(data, output_margin=True)
        return total

    for _ in range(ROUNDS):
        trees = []
        for matrix in matrices:
            matrix.set_base_margin(margin(matrix))
            trees.append(xgboost.train(params, matrix, 1))
            matrix.set_base_margin(np.zeros(0))
        rounds.append(trees)
    return margin


def test_k_folds_equal_plain_loops() -> None:
    def site(place: Place) -> list[Any]:
        return [
            train(PARAMS, xgboost.DMatrix(d.X[kept], d.BINARY[kept]), ROUNDS, kit=place.kit)
            for kept, _ in folds(place.index)
        ]

    with LocalFederation(sites=SITES) as federation:
        boosters = federation.run(site)
    for number in range(FOLDS):
        kept = [folds(index)[number][0] for index in range(SITES)]
        matrices = [xgboost.DMatrix(d.X[rows], d.BINARY[rows]) for rows in kept]
        expected = by_hand(matrices, PARAMS)
        for trained in boosters.values():
            for index in range(SITES):
                tested = xgboost.DMatrix(d.X[folds(index)[number][1]])
                got = trained[number].predict(tested, output_margin=True)
                np.testing.assert_allclose(got, expected(tested), atol=2e-5)


@pytest.mark.parametrize("refit", [False, True])
def test_grid_search_over_a_federated_estimator(refit: bool) -> None:
    """As sklearn runs it with n_jobs=1: every candidate and fold is a training, and so is the last fit on all rows."""
    grid = {"max_depth": [1, 2]}
    same = {"n_estimators": ROUNDS, "learning_rate": 0.5, "n_jobs": 1, "base_score": 0.5}

    def site(place: Place) -> Any:
        estimator = FederatedXGBClassifier(federated={"kit": place.kit}, **same)
        rows = d.rows(0)  # the same rows at both sites: the search must then choose the same candidate at both
        options = {"cv": KFold(FOLDS), "scoring": "neg_log_loss", "refit": refit, "error_score": "raise"}
        return GridSearchCV(estimator, grid, **options).fit(d.X[rows], d.BINARY[rows])

    with LocalFederation(sites=SITES) as federation:
        searches = federation.run(site)
        federation.result()
        assert federation.server.training_count == 2 * FOLDS + refit
    rows = d.rows(0)
    alone = GridSearchCV(xgboost.XGBClassifier(**same), grid, cv=KFold(FOLDS), scoring="neg_log_loss", refit=refit)
    alone.fit(d.X[rows], d.BINARY[rows])  # sites with equal rows learn what one of them learns alone
    for search in searches.values():
        scores, expected = (s.cv_results_["mean_test_score"] for s in (search, alone))
        np.testing.assert_allclose(scores, expected, rtol=1e-4)
        if refit:
            proba, wanted = (s.predict_proba(d.X) for s in (search, alone))
            np.testing.assert_allclose(proba, wanted, atol=1e-5)


def test_cross_val_score_meets_fold_by_fold() -> None:
    def site(place: Place) -> Any:
        rows = d.rows(place.index)
        options = {"n_estimators": ROUNDS, "max_depth": 2, "n_jobs": 1}
        estimator = FederatedXGBClassifier(federated={"kit": place.kit}, **options)
        return cross_val_score(estimator, d.X[rows], d.BINARY[rows], cv=KFold(FOLDS))

    with LocalFederation(sites=SITES) as federation:
        scores = federation.run(site)
        federation.result()
        assert federation.server.training_count == FOLDS
    assert all(len(values) == FOLDS and np.mean(values) > 0.6 for values in scores.values())
