"""Bagging and cyclic modes: global models against margins added by hand, for every kind of model."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import xgboost
import xgboost_data as d

from fl_adapters.testing import LocalFederation
from fl_adapters.xgboost import FederatedCallback, train
from fl_runtime.aggregation.trees.document import TreeModel
from fl_runtime.errors import ConfigError


def federated(mode: str, kind: str, rounds: int, **options: Any) -> tuple[list[bytearray], dict[str, xgboost.Booster]]:
    """Train the sites; return the global models from the first on, and the sites' boosters."""
    params, columns, obj = d.parts(kind)
    keepers = {name: d.Keeper() for name in d.SITES}
    with LocalFederation(sites=d.SITES) as federation:

        def site(place: Any) -> xgboost.Booster:
            data = d.matrix(place.index, **columns)
            return train(
                params, data, rounds, obj=obj, mode=mode, kit=place.kit, callbacks=[keepers[place.name]], **options
            )

        boosters = federation.run(site, timeout_s=40)
        federation.result()
    models = {name: keeper.models for name, keeper in keepers.items()}
    assert all(kept == models["site-1"] for kept in models.values())
    return models["site-1"], boosters


def continued(kind: str, model: bytearray, index: int, iterations: range) -> Any:
    """Return the margins on all rows after one site has continued a model by itself."""
    params, columns, obj = d.parts(kind)
    data = d.matrix(index, **columns)
    booster = xgboost.Booster(params, [data], model_file=model)
    for iteration in iterations:
        booster.update(data, iteration, fobj=obj)
    return d.margins(booster, d.matrix(None, **columns))


def margins_of(kind: str, model: bytearray) -> Any:
    params, columns, _ = d.parts(kind)
    return d.margins(xgboost.Booster(params, model_file=model), d.matrix(None, **columns))


def base_score(model: bytearray) -> Any:
    booster = xgboost.Booster(model_file=model)
    text = json.loads(booster.save_config())["learner"]["learner_model_param"]["base_score"]
    return np.array([float(part) for part in text.strip("[]").split(",")])


@pytest.mark.parametrize("kind", d.KINDS)
def test_bagging_steps_by_the_weighted_mean_of_the_sites(kind: str) -> None:
    models, boosters = federated("bagging", kind, 4, every=2)
    assert len(models) == 3
    sizes = [np.sum(d.parts(kind)[1].get("weight", np.ones(len(d.X)))[d.rows(index)]) for index in range(len(d.SIZES))]
    shares = np.array(sizes) / sum(sizes)
    for number in (1, 2):
        turn = range(2 * number - 2, 2 * number)
        alone = [continued(kind, models[number - 1], index, turn) for index in range(len(d.SIZES))]
        expected = sum(share * margin for share, margin in zip(shares, alone, strict=True))
        np.testing.assert_allclose(margins_of(kind, models[number]), expected, rtol=1e-5, atol=2e-6)
    booster = boosters["site-3"]
    trees = len(booster.get_dump())
    params, columns, _ = d.parts(kind)
    per_round = np.size(columns.get("label", d.BINARY)[0]) * params.get("num_class", 1)
    assert trees == 4 * 3 * per_round * params.get("num_parallel_tree", 1)
    assert booster.num_boosted_rounds() == 4
    assert {bytes(b.save_raw("ubj")) for b in boosters.values()} == {bytes(booster.save_raw("ubj"))}


@pytest.mark.parametrize("kind", ["binary", "forests of classes", "dart", "categories"])
def test_cyclic_goes_on_where_the_site_before_has_stopped(kind: str) -> None:
    models, boosters = federated("cyclic", kind, 4)
    assert len(models) == 5
    for number in range(1, 5):
        expected = continued(kind, models[number - 1], (number - 1) % 3, range(number - 1, number))
        np.testing.assert_allclose(margins_of(kind, models[number]), expected, rtol=1e-6, atol=1e-6)
    assert boosters["site-1"].num_boosted_rounds() == 4


@pytest.mark.parametrize(
    ("params", "label", "weight"),
    [
        ({"objective": "binary:logistic"}, d.BINARY, None),
        ({"objective": "reg:squarederror"}, d.REAL, d.WEIGHTS),
        ({"objective": "count:poisson"}, np.exp(d.REAL / 3), d.WEIGHTS),
        ({"objective": "reg:squarederror"}, np.stack([d.REAL, d.REAL**2], 1), d.WEIGHTS),
        ({"objective": "multi:softprob", "num_class": 3}, d.CLASSES, None),
        ({"objective": "multi:softmax", "num_class": 3}, d.CLASSES, d.WEIGHTS),
    ],
)
@pytest.mark.skipif(xgboost.__version__ < "3.1", reason="before, one Newton step for objectives that are no mean")
def test_base_score_is_that_of_all_rows(params: Any, label: Any, weight: Any, capfd: Any) -> None:
    """Sites hold different labels: sorted by label, the first site has few classes and the last one few others."""
    order = np.argsort(label if np.ndim(label) == 1 else label[:, 0], kind="stable")

    def matrix(rows: Any) -> xgboost.DMatrix:
        return xgboost.DMatrix(d.X[rows], label[rows], weight=None if weight is None else weight[rows])

    with LocalFederation(sites=d.SITES) as federation:
        found = federation.run(
            lambda place: train(d.BASE | params, matrix(order[d.rows(place.index)]), 1, kit=place.kit)
        )["site-2"]
    central = xgboost.train(d.BASE | params, matrix(order), 1)
    ours, theirs = (base_score(booster.save_raw("ubj")) for booster in (found, central))
    np.testing.assert_allclose(ours, theirs, rtol=2e-6, atol=1e-6)
    assert "base score" not in capfd.readouterr().err


def test_a_base_score_that_is_no_mean_is_told(capfd: Any) -> None:
    params = d.BASE | {"objective": "reg:absoluteerror"}
    with LocalFederation(sites=2) as federation:
        federation.run(lambda place: train(params, d.matrix(place.index, d.REAL), 1, kit=place.kit))
    assert capfd.readouterr().err.count("the base score of reg:absoluteerror over all sites is the mean") == 2


class Meddler(xgboost.callback.TrainingCallback):
    """A callback that grows another tree, or returns a part of the model."""

    def __init__(self, data: xgboost.DMatrix, when: str) -> None:
        self._data, self._when = data, when

    def after_iteration(self, model: xgboost.Booster, epoch: int, evals_log: Any) -> bool:
        if self._when == "last round" and epoch == 2:
            model.update(self._data, 3)
        return False

    def after_training(self, model: xgboost.Booster) -> xgboost.Booster:
        return model[:1] if self._when == "end" else model


@pytest.mark.parametrize("when", ["last round", "end"])
@pytest.mark.parametrize("plain", [False, True])
def test_other_callbacks_do_not_change_the_result(plain: bool, when: str, capfd: Any) -> None:
    params = d.BASE | {"objective": "binary:logistic"}

    def site(place: Any) -> xgboost.Booster:
        data = d.matrix(place.index)
        callbacks: list[Any] = [Meddler(data, when)] if place.index == 0 else []
        if plain:
            return xgboost.train(params, data, 3, callbacks=[FederatedCallback(kit=place.kit), *callbacks])
        return train(params, data, 3, callbacks=callbacks, kit=place.kit)

    with LocalFederation(sites=2) as federation:
        first, second = federation.run(site).values()
        federation.result()
        expected = xgboost.Booster(params, model_file=federation.server.export(federation.folder / "final", "final"))
    for booster in (first, second):
        assert booster.num_boosted_rounds() == 3
        np.testing.assert_array_equal(booster.predict(d.matrix(None)), expected.predict(d.matrix(None)))
    assert capfd.readouterr().err.count("a callback changed the model after the last exchange") == 1


def test_a_base_score_of_ones_own_stays() -> None:
    params = d.BASE | {"objective": "binary:logistic", "base_score": 0.25}
    with LocalFederation(sites=2) as federation:
        boosters = federation.run(lambda place: train(params, d.matrix(place.index), 1, kit=place.kit))
    assert base_score(boosters["site-1"].save_raw("ubj")) == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("options", "filters", "shares"),
    [
        ({}, (), [1, 3]),
        ({"num_examples": 10}, (), [1, 1]),
        ({}, ({"name": "Examples", "equal": True},), [1, 1]),
    ],
)
def test_row_weights_count(options: Any, filters: Any, shares: Any) -> None:
    """Two sites of equal size, one with three times the weight: leaves without regularisation show the shares."""
    params = {"objective": "reg:squarederror", "base_score": 0.0, "reg_lambda": 0.0, "eta": 1.0, "max_depth": 1}

    def site(place: Any) -> xgboost.Booster:
        data = xgboost.DMatrix(np.arange(8.0)[:, None], np.full(8, place.index), weight=np.full(8, (1, 3)[place.index]))
        return train(params, data, 1, kit=place.kit, **options)

    with LocalFederation(sites=2, filters=filters) as federation:
        booster = federation.run(site)["site-1"]
    np.testing.assert_allclose(booster.inplace_predict(np.zeros((1, 1))), shares[1] / sum(shares), rtol=1e-6)


def test_filters_of_what_travels_beside_trees() -> None:
    """Sites have equal weights and send rounded scores only; the histograms behind a common AUC are withheld."""
    params = d.BASE | {"objective": "binary:logistic", "base_score": 0.5, "eval_metric": ["error", "auc", "logloss"]}
    logs: dict[str, dict[str, Any]] = {"site-1": {}, "site-2": {}}
    filters = (
        {"name": "Examples", "equal": True},
        {"name": "AllowMetrics", "names": ["mine-error", "mine-auc"]},
        {"name": "RoundMetrics", "decimals": 2},
    )
    with LocalFederation(sites=2, filters=filters, best_metric="mine-auc", best_mode="max") as federation:
        boosters = federation.run(
            lambda place: train(
                params, d.matrix(place.index), 2, evals=[(d.matrix(place.index), "mine")],
                evals_result=logs[place.name], verbose_eval=False, kit=place.kit,
            )
        )  # fmt: skip
        result = federation.result()
    alone = [xgboost.Booster(params, model_file=boosters["site-1"].save_raw("ubj")) for _ in range(2)]
    scores = [booster.eval(d.matrix(index), "mine") for index, booster in enumerate(alone)]
    found = [dict(part.split(":") for part in score.split()[1:]) for score in scores]
    for name in ("mine-error", "mine-auc"):
        expected = np.mean([round(float(of_site[name]), 2) for of_site in found])
        assert result.rounds[-1].metrics[name] == pytest.approx(expected)
        assert logs["site-2"]["mine"][name.removeprefix("mine-")][-1] == pytest.approx(expected)
    assert "mine-logloss" not in result.rounds[-1].metrics
    reports = [event.data for event in federation.events if event.kind == "report"]
    assert len(reports) == 4 and all(report["num_examples"] == 1 for report in reports)
    assert [e.data["num_examples"] for e in federation.events if e.kind == "update"] == [1] * len(d.SITES[:2]) * 3


@pytest.mark.parametrize("name", ["GaussianDP", "ExcludeVars", "Quantize", "PercentilePrivacy"])
def test_filters_of_weights_are_refused(name: str) -> None:
    arguments = {"ExcludeVars": {"names": ["*"]}, "GaussianDP": {"noise_multiplier": 1.0}}
    filters = ({"name": name, **arguments.get(name, {})},)
    with (
        LocalFederation(sites=2, filters=filters) as federation,
        pytest.raises(ConfigError, match=f"{name} works on weights"),
    ):
        federation.run(lambda place: train(d.BASE, d.matrix(place.index, d.REAL), 1, kit=place.kit))


def test_a_random_forest() -> None:
    """One round of parallel trees gives the mean of the sites' forests, by share."""
    params = d.BASE | {"objective": "reg:squarederror", "num_parallel_tree": 20, "eta": 1.0, "base_score": 0.0}
    params |= {"subsample": 0.8, "colsample_bynode": 0.8, "seed_per_iteration": True}
    with LocalFederation(sites=d.SITES) as federation:
        boosters = federation.run(lambda place: train(params, d.matrix(place.index, d.REAL), 1, kit=place.kit))
    alone = [d.margins(xgboost.train(params, d.matrix(i, d.REAL), 1), d.matrix(None)) for i in range(3)]
    expected = np.average(alone, axis=0, weights=d.SIZES)
    np.testing.assert_allclose(d.margins(boosters["site-2"], d.matrix(None)), expected, rtol=1e-5, atol=1e-5)
    assert len(boosters["site-2"].get_dump()) == 60 and boosters["site-2"].num_boosted_rounds() == 1


def test_results_can_be_sliced_and_gone_on_from() -> None:
    params = d.BASE | {"objective": "multi:softprob", "num_class": 3}
    first, _ = federated("bagging", "multiclass", 3)
    whole = xgboost.Booster(params, model_file=first[-1])
    np.testing.assert_array_equal(d.margins(whole[:2], d.matrix(None)), margins_of("multiclass", first[2]))
    ranged = whole.predict(d.matrix(None), output_margin=True, iteration_range=(0, 2))
    np.testing.assert_array_equal(np.asarray(ranged, np.float64), margins_of("multiclass", first[2]))
    _, more = federated("bagging", "multiclass", 2, xgb_model=first[-1])
    assert more["site-1"].num_boosted_rounds() == 5
    np.testing.assert_array_equal(d.margins(more["site-1"][:3], d.matrix(None)), margins_of("multiclass", first[-1]))


def as_before_3_3(model: bytearray) -> bytearray:
    """Return the document of a dart model as XGBoost 2 to 3.2 wrote it."""
    document = json.loads(xgboost.Booster(model_file=model).save_raw("json"))
    booster = document["learner"]["gradient_booster"]
    inner = booster.get("gbtree", booster)["model"]
    weights = inner.pop("weight_drop", None) or booster["weight_drop"]
    document["learner"]["gradient_booster"] = {
        "name": "dart",
        "gbtree": {"model": inner, "name": "gbtree"},
        "weight_drop": weights,
    }
    document["version"] = [2, 1, 1]
    if xgboost.__version__ >= "3.1":
        inner.pop("cats")
        param = document["learner"]["learner_model_param"]
        param["base_score"] = param["base_score"].strip("[]")
    return bytearray(json.dumps(document).encode())


@pytest.mark.parametrize("mode", ["bagging", "cyclic"])
def test_dart_goes_on_from_a_model_of_an_older_xgboost(mode: str) -> None:
    first, _ = federated(mode, "dart", 3)
    weights = TreeModel.from_document(first[-1]).weight_drop
    assert weights is not None and min(weights) < 1
    old = as_before_3_3(first[-1])
    assert TreeModel.from_document(old).weight_drop == pytest.approx(weights)
    from_new, _ = federated(mode, "dart", 2, xgb_model=first[-1])
    from_old, _ = federated(mode, "dart", 2, xgb_model=old)
    np.testing.assert_allclose(margins_of("dart", from_old[0]), margins_of("dart", first[-1]), rtol=1e-6)
    np.testing.assert_allclose(margins_of("dart", from_old[-1]), margins_of("dart", from_new[-1]), rtol=1e-6)


def test_num_examples_weighs_a_site() -> None:
    params = d.BASE | {"objective": "reg:squarederror", "base_score": 0.0}
    with LocalFederation(sites=2) as federation:
        boosters = federation.run(
            lambda place: train(
                params, d.matrix(place.index, d.REAL), 1, kit=place.kit, num_examples=1 + 2 * place.index
            )
        )
    alone = [d.margins(xgboost.train(params, d.matrix(i, d.REAL), 1), d.matrix(None)) for i in range(2)]
    expected = 0.25 * alone[0] + 0.75 * alone[1]
    np.testing.assert_allclose(d.margins(boosters["site-1"], d.matrix(None)), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", ["bagging", "cyclic"])
def test_masked_models_tell_no_counts(mode: str) -> None:
    plain, _ = federated(mode, "binary", 2)
    hidden, _ = federated(mode, "binary", 2, mask_statistics=True)
    np.testing.assert_array_equal(margins_of("binary", hidden[-1]), margins_of("binary", plain[-1]))
    trees = json.loads(xgboost.Booster(model_file=hidden[-1]).save_raw("json"))["learner"]["gradient_booster"]["model"]
    for tree in trees["trees"]:
        assert not any(tree["sum_hessian"]) and not any(tree["loss_changes"])
        inner = np.array(tree["left_children"]) != -1
        assert inner.any() and not np.array(tree["base_weights"])[inner].any()


def test_a_plain_train_with_the_callback_gives_the_same_trees() -> None:
    params = d.BASE | {"objective": "binary:logistic", "subsample": 0.7}
    with LocalFederation(sites=d.SITES, rounds=3, every=2) as federation:
        ours = federation.run(lambda place: train(params, d.matrix(place.index), 6, kit=place.kit))
    with LocalFederation(sites=d.SITES, rounds=3, every=2) as federation:
        plain = federation.run(
            lambda place: xgboost.train(
                params,
                d.matrix(place.index),
                9,
                evals=[(d.matrix(place.index), "mine")],
                verbose_eval=False,
                callbacks=[FederatedCallback(kit=place.kit)],
            )
        )
        result = federation.result()
    for name in d.SITES:
        np.testing.assert_array_equal(d.margins(ours[name], d.matrix(None)), d.margins(plain[name], d.matrix(None)))
    assert "mine-logloss" in result.rounds[-1].metrics


def test_the_callback_in_cyclic_mode_takes_back_what_is_not_its_turn() -> None:
    params = d.BASE | {"objective": "binary:logistic"}
    with LocalFederation(sites=2, rounds=4) as federation:
        ours = federation.run(lambda place: train(params, d.matrix(place.index), 4, kit=place.kit, mode="cyclic"))
    with LocalFederation(sites=2, rounds=4) as federation:
        plain = federation.run(
            lambda place: xgboost.train(
                params, d.matrix(place.index), 4, callbacks=[FederatedCallback(kit=place.kit, mode="cyclic")]
            )
        )
    assert plain["site-2"].num_boosted_rounds() == 4
    np.testing.assert_array_equal(d.margins(ours["site-1"], d.matrix(None)), d.margins(plain["site-2"], d.matrix(None)))
