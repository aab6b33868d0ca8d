"""The scikit-learn estimators: in a federation `fit` equals `train`, and the rest is XGBoost's own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import xgboost
import xgboost_data as d

pytest.importorskip("sklearn")

from fl_adapters import ConfigError, HandshakeError
from fl_adapters.testing import LocalFederation
from fl_adapters.xgboost import FederatedXGBClassifier, FederatedXGBRanker, FederatedXGBRegressor, train

OPTIONS: dict[str, Any] = {"max_depth": 3, "learning_rate": 0.5, "n_jobs": 1, "tree_method": "hist", "max_bin": 32}


def fitted(make: Any, label: Any, **columns: Any) -> dict[str, Any]:
    def site(place: Any) -> Any:
        mine = d.rows(place.index)
        given = {name: value[mine] for name, value in columns.items()}
        return make(place).fit(d.X[mine], label[mine], **given)

    with LocalFederation(sites=d.SITES) as federation:
        return federation.run(site, timeout_s=60)


def test_regressor_is_train() -> None:
    models = fitted(
        lambda place: FederatedXGBRegressor(n_estimators=3, federated={"kit": place.kit}, **OPTIONS),
        d.REAL,
        sample_weight=d.WEIGHTS,
    )
    params = {**OPTIONS, "objective": "reg:squarederror"}
    params["nthread"] = params.pop("n_jobs")
    with LocalFederation(sites=d.SITES) as federation:
        boosters = federation.run(
            lambda place: train(params, d.matrix(place.index, d.REAL, weight=d.WEIGHTS), 3, kit=place.kit)
        )
    expected = boosters["site-1"].predict(d.matrix(None))
    for model in models.values():
        np.testing.assert_array_equal(model.predict(d.X), expected)


def test_binary_classifier_with_early_stopping() -> None:
    def make(place: Any) -> Any:
        model = FederatedXGBClassifier(
            n_estimators=20, early_stopping_rounds=3, eval_metric="logloss", federated={"kit": place.kit}, **OPTIONS
        )
        fit = model.fit
        mine = d.rows(place.index)
        model.fit = lambda x, y: fit(x, y, eval_set=[(d.X[mine][::-1].copy(), y)])
        return model

    models = fitted(make, d.BINARY)
    first = models["site-1"]
    assert first.best_iteration + 4 == len(first.evals_result_["validation_0"]["logloss"])
    assert set(first.predict(d.X)) <= {0, 1} and first.predict_proba(d.X).shape == (len(d.X), 2)
    assert first.feature_importances_.shape == (d.COLUMNS,)
    assert [model.best_iteration for model in models.values()] == [first.best_iteration] * 3


def test_classifier_of_classes_that_one_site_lacks() -> None:
    label = d.CLASSES.copy()
    label[d.rows(2)] = np.minimum(label[d.rows(2)], 1)
    named = lambda place: FederatedXGBClassifier(n_estimators=2, classes=3, federated={"kit": place.kit}, **OPTIONS)  # noqa: E731
    models = fitted(named, label)
    assert models["site-3"].predict_proba(d.X).shape == (len(d.X), 3)
    assert (models["site-1"].predict(d.X) == label).mean() > 0.6
    unnamed = lambda place: FederatedXGBClassifier(n_estimators=2, federated={"kit": place.kit}, **OPTIONS)  # noqa: E731
    with pytest.raises(HandshakeError, match="num_class") as refused:
        fitted(unnamed, label)
    assert "pass classes= at every site" in refused.value.fix


def test_ranker() -> None:
    models = fitted(
        lambda place: FederatedXGBRanker(n_estimators=3, federated={"kit": place.kit, "mode": "cyclic"}, **OPTIONS),
        d.RELEVANCE,
        qid=d.QUERIES,
    )
    score = models["site-1"].predict(d.X)
    assert np.corrcoef(score, d.RELEVANCE)[0, 1] > 0.3
    assert models["site-2"].get_booster().num_boosted_rounds() == 3


def test_custom_objective_of_scikit_learn() -> None:
    def squares(truth: Any, found: Any) -> Any:
        return found - truth, np.ones_like(truth)

    models = fitted(
        lambda place: FederatedXGBRegressor(
            objective=squares, n_estimators=3, base_score=0.0, federated={"kit": place.kit}, **OPTIONS
        ),
        d.REAL,
    )
    assert np.corrcoef(models["site-1"].predict(d.X), d.REAL)[0, 1] > 0.6


def test_alone_it_is_the_estimator_itself() -> None:
    ours = FederatedXGBClassifier(n_estimators=3, **OPTIONS).fit(d.X, d.BINARY)
    plain = xgboost.XGBClassifier(n_estimators=3, **OPTIONS).fit(d.X, d.BINARY)
    np.testing.assert_array_equal(ours.predict_proba(d.X), plain.predict_proba(d.X))
    weighted = FederatedXGBClassifier(n_estimators=3, **OPTIONS).fit(d.X, d.BINARY, d.WEIGHTS)  # by position
    assert not np.array_equal(weighted.predict_proba(d.X), plain.predict_proba(d.X))
    assert ours.get_params()["n_estimators"] == 3 and "federated" in ours.get_params()
    from sklearn.base import clone

    assert clone(ours).get_params()["max_depth"] == 3


def test_feature_weights_choose_the_columns() -> None:
    """A column of weight 0 is never drawn, alone and in a federation."""
    options = OPTIONS | {"n_estimators": 6, "colsample_bynode": 0.4, "feature_weights": np.array([0, 1, 1, 1, 0.0])}
    alone = FederatedXGBRegressor(**options).fit(d.X, d.REAL)
    plain = xgboost.XGBRegressor(**options).fit(d.X, d.REAL)
    np.testing.assert_array_equal(alone.predict(d.X), plain.predict(d.X))
    models = fitted(lambda place: FederatedXGBRegressor(federated={"kit": place.kit}, **options), d.REAL)
    for model in (alone, *models.values()):
        used = set(model.get_booster().get_score())
        assert used and not used & {"f0", "f4"}


@pytest.mark.parametrize(
    ("label", "federated", "match"),
    [
        (d.BINARY - 1, {}, "labels run from -1"),
        (d.BINARY, {"modes": "cyclic"}, "'modes'"),
        (np.where(d.BINARY, "yes", "no"), {}, "not numbers but 'no', 'yes'(.|\n)*'no': 0, 'yes': 1"),
        (np.where(d.BINARY, "yes", None), {}, "not numbers but 'None', 'yes'"),
        (np.where(d.BINARY, 1.0, np.nan), {}, "labels run from nan"),
    ],
)
def test_what_cannot_work_is_refused(label: Any, federated: Any, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        FederatedXGBClassifier(federated=federated).fit(d.X, label)
