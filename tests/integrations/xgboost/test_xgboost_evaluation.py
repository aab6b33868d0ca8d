"""Evaluation of the global model on all sites' data together, early stopping for all, and the history."""

from __future__ import annotations

import csv
from typing import Any

import numpy as np
import pytest
import xgboost
import xgboost_data as d
from sklearn.metrics import roc_auc_score

from fl_adapters import ConfigError, FederationError
from fl_adapters.testing import LocalFederation
from fl_adapters.xgboost import train
from fl_adapters.xgboost.call import installed_version
from fl_runtime.server.records.history import History

OPPOSITE = np.where(np.arange(len(d.X)) % 3 == 0, 1 - d.BINARY, d.BINARY)  # a third of the labels is wrong


def run(params: dict[str, Any], rounds: int, label: Any = d.BINARY, **options: Any) -> tuple[Any, ...]:
    """Train a federation whose sites evaluate on shifted data of their own; return boosters, logs and result."""
    logs: dict[str, Any] = {name: {} for name in d.SITES}
    columns = options.pop("columns", {})
    with LocalFederation(sites=d.SITES) as federation:

        def site(place: Any) -> xgboost.Booster:
            data = d.matrix(place.index, label, **columns)
            held_out = d.matrix(place.index, options.pop("held_out", label), d.X[::-1].copy(), **columns)
            return train(
                d.BASE | params,
                data,
                rounds,
                evals=[(data, "mine"), (held_out, "other")],
                evals_result=logs[place.name],
                verbose_eval=False,
                kit=place.kit,
                **options,
            )

        boosters = federation.run(site, timeout_s=40)
        result = federation.result()
    assert all(log == logs["site-1"] for log in logs.values())
    return boosters, logs["site-1"], result


@pytest.mark.parametrize(
    ("params", "label", "columns"),
    [
        ({"objective": "binary:logistic", "eval_metric": ["logloss", "error", "auc", "aucpr"]}, d.BINARY, {}),
        ({"objective": "reg:squarederror", "eval_metric": ["rmse", "mae"]}, d.REAL, {"weight": d.WEIGHTS}),
        ({"objective": "multi:softprob", "num_class": 3, "eval_metric": ["mlogloss", "merror"]}, d.CLASSES, {}),
        ({"objective": "rank:ndcg", "eval_metric": ["ndcg@5", "ndcg"]}, d.RELEVANCE, {"qid": d.QUERIES}),
        ({"objective": "binary:logistic", "eval_metric": ["auc", "error@0.3"]}, d.BINARY, {"weight": d.WEIGHTS}),
    ],
)
def test_metrics_are_those_of_all_rows_together(params: Any, label: Any, columns: Any) -> None:
    boosters, log, result = run(params, 4, label, columns=columns)
    if params["objective"] == "rank:ndcg":
        params = params | {"lambdarank_pair_method": "topk"}
    whole = xgboost.Booster(d.BASE | params, model_file=boosters["site-1"].save_raw("ubj"))
    text = whole.eval_set([(d.matrix(None, label, **columns), "mine")], 0)
    expected = {item.rpartition(":")[0]: float(item.rpartition(":")[2]) for item in text.split("\t")[1:]}
    for name, value in expected.items():
        metric = name.removeprefix("mine-")
        rough = metric in ("auc", "aucpr")
        assert log["mine"][metric][-1] == pytest.approx(value, abs=1e-3 if rough else 1e-6), name
        assert result.rounds[-1].metrics[name] == log["mine"][metric][-1]
    assert len(log["other"]) == len(expected)


@pytest.mark.parametrize("eta", [1e-5, 1e4])
def test_areas_are_right_for_small_and_large_margins(eta: float) -> None:
    """XGBoost's own number is computed from probabilities, which are equal in float32 where these margins are not."""
    params = {"objective": "binary:logistic", "eta": eta, "eval_metric": "auc"}
    boosters, log, _ = run(params, 4, d.BINARY)
    margins = boosters["site-1"].predict(d.matrix(None, d.BINARY), output_margin=True)
    assert log["mine"]["auc"][-1] == pytest.approx(roc_auc_score(d.BINARY, margins), abs=1e-3)


def test_a_site_with_one_class_has_no_auc_and_counts_in_that_of_all() -> None:
    label = d.BINARY.copy()
    label[d.rows(2)] = 1
    params = {"objective": "binary:logistic", "eval_metric": "auc"}
    if installed_version() < (3, 2):
        with pytest.raises(FederationError, match="cannot estimate a base score"):
            run(params, 2, label)
        params["base_score"] = 0.5
    _, log, _ = run(params, 2, label)
    assert 0.5 < log["mine"]["auc"][-1] <= 1.0


def test_each_metric_among_pairs_of_parameters_is_evaluated() -> None:
    """A list of pairs may name eval_metric several times, as XGBoost's own demo evals_result.py does."""
    pairs = [("objective", "binary:logistic"), ("eval_metric", "logloss"), ("eval_metric", "error"), ("nthread", 1)]
    alone: dict[str, Any] = {}
    log: dict[str, Any] = {}
    data = d.matrix(0, d.BINARY)
    xgboost.train(pairs, data, 2, evals=[(data, "mine")], evals_result=alone, verbose_eval=False)
    with LocalFederation(sites=1) as federation:
        kit = federation.places[0].kit
        train(pairs, data, 2, evals=[(data, "mine")], evals_result=log, verbose_eval=False, kit=kit)
    assert list(log["mine"]) == ["logloss", "error"]
    for name, values in alone["mine"].items():
        assert log["mine"][name] == pytest.approx(values, abs=1e-6)


def test_early_stopping_is_that_of_the_score_of_all_sites() -> None:
    params = {"objective": "binary:logistic", "eta": 1.0, "eval_metric": ["auc", "logloss"]}
    boosters, log, result = run(params, 40, OPPOSITE, early_stopping_rounds=3)
    losses = log["other"]["logloss"]
    best = int(np.argmin(losses))
    assert len(losses) == best + 4 < 40 and len(result.rounds) == best + 4
    for booster in boosters.values():
        assert booster.num_boosted_rounds() == best + 4
        assert booster.best_iteration == best and booster.best_score == pytest.approx(losses[best])
    assert result.best_round == best + 1


def test_early_stopping_callback_of_xgboost_keeps_the_best() -> None:
    params = {"objective": "binary:logistic", "eta": 1.0, "eval_metric": ["auc", "logloss"]}
    stopping = xgboost.callback.EarlyStopping(rounds=2, metric_name="auc", data_name="other", save_best=True)
    boosters, log, _ = run(params, 40, OPPOSITE, callbacks=[stopping], mode="cyclic")
    best = int(np.argmax(log["other"]["auc"]))
    assert len(log["other"]["auc"]) == best + 3 < 40
    assert boosters["site-2"].num_boosted_rounds() == best + 1
    assert boosters["site-2"].best_iteration == best  # which XGBoost itself keeps in the shortened model
    assert boosters["site-2"].best_score == pytest.approx(max(log["other"]["auc"]), abs=1e-6)


def test_early_stopping_that_watches_nothing_is_refused() -> None:
    for options, match in (
        ({"early_stopping_rounds": 3}, "needs evals"),
        ({"callbacks": [xgboost.callback.EarlyStopping(rounds=3, metric_name="auc")]}, "needs evals"),
    ):
        with LocalFederation(sites=1) as federation, pytest.raises(ConfigError, match=match):
            train(d.BASE, d.matrix(0), 3, kit=federation.places[0].kit, **options)


def test_history_has_a_row_per_round_and_site(tmp_path: Any) -> None:
    history = History(tmp_path)
    with LocalFederation(sites=2) as federation:
        federation.run(
            lambda place: train(
                d.BASE | {"objective": "binary:logistic", "eval_metric": "auc"},
                d.matrix(place.index),
                3,
                evals=[(d.matrix(place.index), "mine")],
                verbose_eval=False,
                kit=place.kit,
            )
        )
    for event in federation.events:
        history(event)
    history.close()
    with open(tmp_path / "history.csv", newline="") as file:
        rows = {(row["round"], row["site"]): row for row in csv.DictReader(file)}
    for number in "123":
        for site in ("site-1", "site-2"):
            assert rows[number, site]["status"] == "used" and 0 < float(rows[number, site]["mine-auc"]) <= 1
            assert int(rows[number, site]["local_steps"]) == 1
        sites = [float(rows[number, s]["mine-auc"]) for s in ("site-1", "site-2")]
        assert float(rows[number, "global"]["mine-auc"]) != pytest.approx(np.average(sites, weights=[160, 70]))


def test_verbose_output_is_of_all_sites(capsys: pytest.CaptureFixture[str]) -> None:
    logs: dict[str, Any] = {}
    with LocalFederation(sites=1) as federation:
        data = d.matrix(0)
        train(d.BASE, data, 2, evals=[(data, "mine")], evals_result=logs, kit=federation.places[0].kit)
    assert f"[1]\tmine-rmse:{logs['mine']['rmse'][1]:.5f}" in capsys.readouterr().out
