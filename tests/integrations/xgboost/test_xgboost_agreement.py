"""What the sites must have in common is compared before round 1, and a difference is named."""

from __future__ import annotations

import json
import threading
from typing import Any

import numpy as np
import pandas as pd
import pytest
import xgboost
import xgboost_data as d

import fl_adapters.xgboost.call
from fl_adapters import ConfigError, HandshakeError
from fl_adapters.testing import LocalFederation
from fl_adapters.xgboost import FederatedCallback, FederatedXGBClassifier, train

NAMES = ["age", "dose", "size", "rate", "site"]


def differing(first: dict[str, Any], second: dict[str, Any], **federation: Any) -> HandshakeError:
    """Train both sites with these arguments, and return their error; `data` are arguments of the matrix."""

    def site(place: Any) -> xgboost.Booster:
        given = dict((first, second)[place.index])
        data = d.matrix(place.index, **given.pop("data", {}))
        params = d.BASE | given.pop("params", {})
        return train(params, data, given.pop("rounds", 2), kit=place.kit, **given)

    with LocalFederation(sites=2, **federation) as run:
        outcomes = run.outcomes({place.name: site for place in run.places}, check=False, timeout_s=60)
        assert not run.server.result().rounds
    errors = [outcome.error for outcome in outcomes.values()]
    assert all(isinstance(error, HandshakeError) for error in errors), errors
    assert str(errors[0]) == str(errors[1])
    return errors[0]  # type: ignore[return-value]


@pytest.mark.parametrize("mode", ["bagging", "cyclic", "histogram"])
@pytest.mark.parametrize(
    ("first", "second", "difference"),
    [
        (
            {"data": {"feature_names": NAMES}},
            {"data": {"feature_names": [*NAMES[:4], "hours"]}},
            "features: 4: 'site' != 'hours'",
        ),
        (
            {"data": {"feature_names": NAMES, "feature_types": ["float"] * 5}},
            {"data": {"feature_names": NAMES, "feature_types": ["int", *["float"] * 4]}},
            "features: 0: 'age (float)' != 'age (int)'",
        ),
        ({}, {"data": {"x": d.X[:, :4]}}, "number of features: 5 != 4"),
        (
            {"params": {"objective": "multi:softprob", "num_class": 3}, "data": {"label": d.CLASSES}},
            {"params": {"objective": "multi:softprob", "num_class": 4}, "data": {"label": d.CLASSES}},
            "num_class: 3 != 4",
        ),
        ({}, {"data": {"label": np.stack([d.REAL, d.REAL], 1)}}, "num_target: 1 != 2"),
        ({}, {"params": {"objective": "binary:logistic"}}, "objective: reg:squarederror != binary:logistic"),
        ({"params": {"max_bin": 64}}, {}, "max_bin: 64 != 32"),
        ({"params": {"base_score": 0.5}}, {}, "base_score: 0.5 != agreed before round 1"),
        ({"params": {"num_parallel_tree": 2}}, {}, "num_parallel_tree: 2 != 1"),
        ({"params": {"quantile_alpha": np.array([0.5])}}, {}, "quantile_alpha: [0.5] != missing"),
        (
            {"data": {"feature_weights": [0, 1, 1, 1, 1]}},
            {"data": {"feature_weights": [2] * 5}},
            "feature weights: 0: ",
        ),
        ({"data": {"feature_weights": [0, 1, 1, 1, 1]}}, {}, "feature weights: 5 entries != 1 entries"),
        ({"rounds": 3}, {}, "different numbers of rounds: site-1: 3, site-2: 2"),
    ],
)
def test_sites_that_differ_are_refused(mode: str, first: Any, second: Any, difference: str) -> None:
    if mode == "histogram":
        pytest.importorskip("cryptography")
    assert difference in str(differing({"mode": mode} | first, {"mode": mode} | second))


def test_parameters_of_trees_that_are_grown_together_are_compared() -> None:
    pytest.importorskip("cryptography")
    first, second = ({"mode": "histogram", "params": {"max_depth": depth, "reg_alpha": 0.0}} for depth in (3, 4))
    assert "parameter max_depth: 3 != 4" in str(differing(first, second))


def test_different_modes_are_refused() -> None:
    assert "tree-bagging != tree-cyclic" in str(differing({"mode": "bagging"}, {"mode": "cyclic"}))


def test_different_versions_of_xgboost_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their models differ: one version may silently misread what the other writes."""
    versions = {"site-1": (3, 2), "site-2": (3, 4)}
    monkeypatch.setattr(
        fl_adapters.xgboost.call, "installed_version", lambda: versions[threading.current_thread().name]
    )
    assert "xgboost: 3.2 != 3.4" in str(differing({}, {}))


def test_different_models_to_go_on_from_are_refused() -> None:
    one, other = (
        xgboost.train(d.BASE | {"max_depth": 1, "base_score": 0.5, "eta": eta}, d.matrix(0), 2).save_raw("ubj")
        for eta in (0.5, 0.25)
    )
    assert "xgb_model: " in str(differing({"xgb_model": one}, {"xgb_model": other}))


def test_a_model_of_a_later_xgboost_is_refused() -> None:
    document = json.loads(xgboost.train(d.BASE, d.matrix(0), 1).save_raw("json"))
    document["version"] = [99, 1, 0]
    with LocalFederation(sites=1) as federation, pytest.raises(ConfigError, match="XGBoost 99.1"):
        train(d.BASE, d.matrix(0), 1, xgb_model=bytearray(json.dumps(document).encode()), kit=federation.places[0].kit)


@pytest.mark.skipif(xgboost.__version__ < "3.1", reason="XGBoost before 3.1 does not know the categories")
def test_different_categories_are_refused() -> None:
    def frame(names: list[str]) -> dict[str, Any]:
        codes = np.arange(len(d.X)) % 2
        return {"x": pd.DataFrame({"kind": pd.Categorical.from_codes(codes, names)}), "enable_categorical": True}

    error = differing({"data": frame(["a", "b"])}, {"data": frame(["b", "a"])})
    assert "categories: 0: 'kind 0 = a' != 'kind 0 = b', 1: 'kind 1 = b' != 'kind 1 = a'" in str(error)
    assert "agree=False" in error.fix


def test_two_swapped_columns_of_many_are_named() -> None:
    names = [f"gene {i}" for i in range(3_000)]
    x = np.zeros((len(d.X), len(names)), np.float32)
    swapped = [*names[:2_000], names[2_001], names[2_000], *names[2_002:]]
    error = differing(*({"data": {"x": x, "feature_names": n}} for n in (names, swapped)))
    assert "features: 3000 entries each; 2000: 'gene 2000' != 'gene 2001'" in str(error)


@pytest.mark.parametrize("mode", ["bagging", "histogram"])
def test_other_names_may_be_meant(mode: Any) -> None:
    if mode == "histogram":
        pytest.importorskip("cryptography")

    def site(place: Any) -> list[str] | None:
        names = NAMES if place.index else NAMES[::-1]
        data = d.matrix(place.index, feature_names=names)
        return train(d.BASE, data, 2, kit=place.kit, mode=mode, agree=bool(place.index)).feature_names

    with LocalFederation(sites=2) as run:
        assert run.run(site) == {"site-1": NAMES[::-1], "site-2": NAMES}


def test_encoded_labels_are_compared_if_the_script_tells_them() -> None:
    def site(place: Any) -> None:
        classes = np.array(["benign", "malignant"])[:: 1 if place.index else -1]
        model = FederatedXGBClassifier(n_estimators=2, federated={"kit": place.kit, "agree": {"classes": classes}})
        model.fit(d.X, d.CLASSES > 0)

    with LocalFederation(sites=2) as run:
        outcomes = run.outcomes({place.name: site for place in run.places}, check=False)
    assert all("classes: 0: 'malignant' != 'benign'" in str(outcome.error) for outcome in outcomes.values())


@pytest.mark.parametrize("own", [False, True])
def test_sites_that_grow_the_same_trees_are_asked_for_their_data(own: bool) -> None:
    def site(place: Any) -> None:
        train(d.BASE, d.matrix(place.index if own else 0), 2, kit=place.kit)

    with LocalFederation(sites=2) as run:
        run.run(site)
        run.result()
        hints = [event.data["text"] for event in run.events if event.kind == "warning"]
    assert len(hints) == (0 if own else 1)


@pytest.mark.parametrize("strategy", ["fedavg", "tree-cyclic"])
def test_a_strategy_of_the_job_that_does_not_fit_is_refused(strategy: str) -> None:
    error = differing({}, {}, strategy=strategy)
    wanted = "weights" if strategy == "fedavg" else "tree-cyclic"
    assert "capability" in str(error) and wanted in str(error)


@pytest.mark.parametrize(
    ("params", "options", "match"),
    [
        ({"booster": "gblinear"}, {}, "no trees"),
        ({"process_type": "update"}, {}, "changes existing trees"),
        ({"multi_strategy": "multi_output_tree"}, {}, "vector per leaf"),
        ({"multi_strategy": "multi_output_tree"}, {"mode": "histogram"}, "vector per leaf"),
        ({}, {"mode": "boosting"}, "mode='boosting'"),
        ({}, {"keep_local": ["a*"]}, "keep_local"),
        ({}, {"optimizer_state": "average"}, "optimizer_state"),
    ],
)
def test_what_cannot_work_is_refused(params: Any, options: Any, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        train(d.BASE | params, d.matrix(0), 2, **options)


def test_without_a_kit_it_is_xgboost(capsys: pytest.CaptureFixture[str]) -> None:
    params = d.BASE | {"objective": "binary:logistic"}
    expected = xgboost.train(params, d.matrix(0), 3).save_raw("ubj")
    assert train(params, d.matrix(0), 3).save_raw("ubj") == expected
    booster = xgboost.train(params, d.matrix(0), 3, callbacks=[FederatedCallback()])
    assert booster.save_raw("ubj") == expected


def test_a_plain_train_that_is_too_short_is_refused() -> None:
    with LocalFederation(sites=1, rounds=4, every=2) as federation:
        callback = FederatedCallback(kit=federation.places[0].kit)
        with pytest.raises(ConfigError, match="num_boost_round=8"):
            xgboost.train(d.BASE, d.matrix(0), 7, callbacks=[callback])


def test_a_plain_train_with_early_stopping_is_refused() -> None:
    with LocalFederation(sites=1) as federation:
        callback, data = FederatedCallback(kit=federation.places[0].kit), d.matrix(0)
        with pytest.raises(ConfigError, match="fl_adapters.xgboost.train"):
            xgboost.train(
                d.BASE, data, 7, evals=[(data, "a")], early_stopping_rounds=2, callbacks=[callback], verbose_eval=False
            )


@pytest.mark.parametrize("mode", ["bagging", "cyclic", None])
def test_unbiased_ranking_is_refused_where_models_are_replaced(mode: Any) -> None:
    params, columns = d.BASE | {"objective": "rank:ndcg", "lambdarank_unbiased": True}, {"qid": d.QUERIES}
    data = d.matrix(0, d.RELEVANCE, **columns)
    assert train(params, data, 3).num_boosted_rounds() == 3  # alone it is XGBoost's own
    with LocalFederation(sites=1) as federation:
        kit = federation.places[0].kit
        options = {"callbacks": [FederatedCallback(kit=kit)]} if mode is None else {"mode": mode, "kit": kit}
        with pytest.raises(ConfigError, match="lambdarank_unbiased"):
            (xgboost.train if mode is None else train)(params, data, 3, **options)


def test_arguments_by_position_are_those_of_xgboost() -> None:
    data, log = d.matrix(0), {}
    params = d.BASE | {"objective": "binary:logistic"}
    train(params, data, 2, [(data, "mine")], None, None, None, log, False)
    with LocalFederation(sites=1) as federation:
        ours: dict[str, Any] = {}
        train(params, data, 2, [(data, "mine")], None, None, None, ours, False, kit=federation.places[0].kit)
    assert ours["mine"]["logloss"] == pytest.approx(log["mine"]["logloss"], rel=1e-6)


@pytest.mark.parametrize("names", [NAMES, None])
def test_columns_without_names_are_told_once(names: Any, capfd: pytest.CaptureFixture[str]) -> None:
    with LocalFederation(sites=1) as federation:
        train(d.BASE, d.matrix(0, feature_names=names), 3, kit=federation.places[0].kit)
    assert capfd.readouterr().err.count("the 5 columns of the data have no names") == (names is None)
