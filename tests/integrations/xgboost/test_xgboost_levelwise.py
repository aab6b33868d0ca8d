"""Mode "levelwise" end to end, at five uneven sites: the same model everywhere, close to training on all rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import levelwise_rows as d
import numpy as np
import pandas as pd
import pytest
import xgboost
from sklearn.metrics import log_loss, roc_auc_score

import fl_adapters
from fl_adapters import ConfigError, HandshakeError, StateMismatchError
from fl_adapters.testing import LocalFederation
from fl_adapters.xgboost import FederatedXGBClassifier, train

ROUNDS = 6
PARAMS: dict[str, Any] = {"max_depth": 4, "eta": 0.4, "nthread": 1, "tree_method": "hist", "max_bin": 64}
BINARY = {**PARAMS, "objective": "binary:logistic", "eval_metric": ["auc", "logloss"]}
FIT, TEST = slice(None, None, 2), slice(1, None, 2)


def federated(
    params: dict[str, Any], *, early_stopping: bool = False
) -> tuple[dict[str, xgboost.Booster], dict[str, Any]]:
    """Train the sites on half of their rows, and score the other half; return the boosters and the logs."""
    logs: dict[str, Any] = {}
    objective = params["objective"]
    with LocalFederation(sites=len(d.SIZES)) as federation:

        def site(place: Any) -> xgboost.Booster:
            return train(
                params,
                d.matrix(place.index, objective, FIT),
                ROUNDS,
                evals=[(d.matrix(place.index, objective, TEST), "valid")],
                evals_result=logs.setdefault(place.name, {}),
                verbose_eval=False,
                mode="levelwise",
                kit=place.kit,
                quantile_rows=3,
                callbacks=[xgboost.callback.EarlyStopping(rounds=2, save_best=True)] if early_stopping else None,
            )

        boosters = federation.run(site)
        federation.result()
    return boosters, logs


def together(objective: str, part: slice) -> xgboost.DMatrix:
    """The same rows of all sites in one place."""
    parts = [np.arange(len(d.X))[d.rows(index)][part] for index in range(len(d.SIZES))]
    chosen = np.concatenate(parts)
    return xgboost.DMatrix(d.X[chosen], d.LABELS[objective][chosen], weight=d.WEIGHTS[chosen])


def test_binary_classification_is_as_good_as_in_one_place() -> None:
    boosters, logs = federated(BINARY)
    models = {bytes(booster.save_raw("ubj")) for booster in boosters.values()}
    assert len(models) == 1 and len({repr(log) for log in logs.values()}) == 1
    booster, fit, test = boosters["site-1"], together("binary:logistic", FIT), together("binary:logistic", TEST)
    assert booster.num_boosted_rounds() == ROUNDS
    scores, labels, weights = booster.predict(test), test.get_label(), test.get_weight()
    log = logs["site-2"]["valid"]
    assert log["logloss"][-1] == pytest.approx(log_loss(labels, scores, sample_weight=weights), abs=1e-6)
    area = roc_auc_score(labels, scores, sample_weight=weights)
    assert log["auc"][-1] == pytest.approx(area, abs=1e-3)
    central = xgboost.train(BINARY, fit, ROUNDS)
    central_area = roc_auc_score(labels, central.predict(test), sample_weight=weights)
    assert area == pytest.approx(central_area, abs=0.01) and area > 0.8


@pytest.mark.parametrize("objective", ["reg:squarederror", "multi:softprob"])
def test_trees_in_the_bins_of_the_sites_predict_what_xgboost_learns(objective: str) -> None:
    params = {**PARAMS, "objective": objective} | ({"num_class": 3} if objective.startswith("multi") else {})
    boosters, logs = federated(params)
    booster, fit, test = boosters["site-3"], together(objective, FIT), together(objective, TEST)
    central = xgboost.train(params, fit, ROUNDS)
    metric, values = next(iter(logs["site-1"]["valid"].items()))
    pooled = float(booster.eval(test).rpartition(":")[2])
    assert values[-1] == pytest.approx(pooled, rel=1e-5)
    assert values[-1] == pytest.approx(float(central.eval(test).rpartition(":")[2]), rel=0.1), metric


def test_sites_stop_early_together_and_keep_the_best_round() -> None:
    boosters, logs = federated({**BINARY, "eta": 2.0}, early_stopping=True)
    log = logs["site-1"]["valid"]["logloss"]
    assert len({bytes(booster.save_raw("ubj")) for booster in boosters.values()}) == 1
    assert len(log) < ROUNDS and boosters["site-5"].num_boosted_rounds() == int(np.argmin(log)) + 1


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The kit of a site whose federation nobody joins."""
    with LocalFederation(sites=1, folder=tmp_path_factory.mktemp("refused")) as federation:
        yield federation.places[0].kit


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"objective": "rank:ndcg"}, "rank:ndcg"),
        ({"objective": "reg:absoluteerror"}, "reg:absoluteerror"),
        ({"booster": "dart"}, "booster='dart'"),
        ({"grow_policy": "lossguide"}, "grow_policy='lossguide'"),
        ({"subsample": 0.5}, "subsample='0.5'"),
        ({"colsample_bytree": 0.5}, "colsample_bytree='0.5'"),
        ({"monotone_constraints": "(1,0,0,0,0,0,0)"}, "monotone_constraints='(1,0,0,0,0,0,0)'"),
        ({"max_delta_step": 1}, "max_delta_step='1'"),
    ],
)
def test_what_the_trees_cannot_honour_is_refused_by_name(kit: str, changes: dict[str, Any], named: str) -> None:
    data = d.matrix(0, "binary:logistic")
    with pytest.raises(ConfigError) as caught:
        train({**BINARY, **changes}, data, 2, mode="levelwise", kit=kit)
    assert named in str(caught.value) and "levelwise" in str(caught.value)


@pytest.mark.parametrize("argument", [{"quantile_noise": 0.5}, {"collective_timeout_s": 30}])
def test_arguments_of_the_histogram_mode_are_refused(kit: str, argument: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(argument))}={next(iter(argument.values()))} has no effect"):
        train(BINARY, d.matrix(0, "binary:logistic"), 2, mode="levelwise", kit=kit, **argument)


def test_training_goes_on_from_a_model_and_from_margins() -> None:
    """Both ways to start from two trees give the trees that four rounds in one go have."""
    params = {**PARAMS, "objective": "binary:logistic", "max_depth": 3, "max_bin": 16, "base_score": 0.4}

    def trees(booster: xgboost.Booster) -> list[str]:
        return booster.get_dump(with_stats=True)

    def site(place: Any) -> tuple[list[str], list[str], list[str]]:
        data = d.matrix(2 * place.index, "binary:logistic")
        with_margin = d.matrix(2 * place.index, "binary:logistic")
        settings: Any = {"mode": "levelwise", "kit": place.kit}
        first = train(params, data, 2, **settings)
        with_margin.set_base_margin(first.predict(data, output_margin=True))
        more = train(params, data, 2, xgb_model=first, **settings)
        return trees(more), trees(train(params, with_margin, 2, **settings)), trees(train(params, data, 4, **settings))

    with LocalFederation(sites=2) as federation:
        found = federation.run(site)
    for continued, from_margins, at_once in found.values():
        assert continued == at_once and from_margins == at_once[2:]


def test_categories_are_refused(kit: str) -> None:
    frame = pd.DataFrame({"colour": pd.Categorical(["red", "blue"] * 20)})
    data = xgboost.DMatrix(frame, [0, 1] * 20, enable_categorical=True)
    with pytest.raises(ConfigError, match="categorical"):
        train(BINARY, data, 2, mode="levelwise", kit=kit)


def test_parameters_that_differ_are_refused_before_the_first_sum() -> None:
    def site(place: Any) -> xgboost.Booster:
        params = {**BINARY, "max_depth": 3 + place.index}
        return train(params, d.matrix(place.index, "binary:logistic"), 2, mode="levelwise", kit=place.kit)

    with LocalFederation(sites=2) as federation, pytest.raises(HandshakeError, match="max_depth"):
        federation.run(site)


def test_a_schedule_that_differs_is_noticed_at_the_end() -> None:
    def site(place: Any) -> xgboost.Booster:
        rate = xgboost.callback.LearningRateScheduler([0.2 + 0.1 * place.index, 0.3])
        data = d.matrix(2 * place.index, "binary:logistic")
        return train(BINARY, data, 2, mode="levelwise", kit=place.kit, callbacks=[rate])

    with LocalFederation(sites=2) as federation, pytest.raises(StateMismatchError, match="different trees"):
        federation.run(site)


def test_masked_sums_grow_the_same_trees_and_metrics_are_in_the_history() -> None:
    logs: dict[str, Any] = {}

    def site(place: Any) -> bytes:
        params = {**PARAMS, "objective": "binary:logistic", "max_depth": 3, "max_bin": 16}
        data = d.matrix(place.index, "binary:logistic")
        settings: Any = {"evals": [(data, "fit")], "evals_result": logs.setdefault(place.name, {})}
        return bytes(train(params, data, 2, mode="levelwise", kit=place.kit, **settings).save_raw("ubj"))

    models = []
    for secure_sum in (False, True):
        with LocalFederation(sites=3, secure_sum=secure_sum) as federation:
            models += federation.run(site).values()
            rounds = [item.metrics for item in federation.result().rounds if item.metrics]
        shown = [(item["boosting_round"], item["fit-logloss"]) for item in rounds]
        assert shown == [(1, logs["site-1"]["fit"]["logloss"][0]), (2, logs["site-1"]["fit"]["logloss"][1])]
    assert len(models) == 6 and len(set(models)) == 1


def test_masked_sums_refuse_metrics_that_differ() -> None:
    def site(place: Any) -> None:
        with fl_adapters.sums(kit=place.kit) as federation:
            federation.report({"loss": 0.5 + place.index})
            federation.sum({"n": 1})

    with LocalFederation(sites=2, secure_sum=True) as federation, pytest.raises(StateMismatchError, match="loss=1.5"):
        federation.run(site)


def test_an_estimator_grows_the_same_trees() -> None:
    def site(place: Any) -> Any:
        mine = d.rows(place.index)
        federated = {"mode": "levelwise", "kit": place.kit}
        model = FederatedXGBClassifier(classes=2, n_estimators=2, max_depth=2, n_jobs=1, federated=federated)
        return model.fit(d.X[mine], d.LABELS["binary:logistic"][mine]).predict_proba(d.X)

    with LocalFederation(sites=len(d.SIZES)) as federation:
        chances = federation.run(site)
    assert np.ptp([chances[name] for name in chances], axis=0).max() == 0


def test_without_a_kit_it_is_plain_xgboost() -> None:
    params = {**BINARY, "subsample": 0.5, "seed": 3}
    data = d.matrix(0, "binary:logistic")
    assert train(params, data, 3, mode="levelwise").save_raw() == xgboost.train(params, data, 3).save_raw()
