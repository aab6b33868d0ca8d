"""Trees grown from summed histograms equal those that XGBoost's `hist` grows on all rows, in the same bins."""

from __future__ import annotations

import json
from typing import Any

import levelwise_rows as d
import numpy as np
import pandas as pd
import pytest
import xgboost
from sklearn.datasets import load_breast_cancer
from threaded_federation import ThreadedFederation, run_sites

from fl_adapters.xgboost.call import installed_version
from fl_adapters.xgboost.engine import reference_rows
from fl_adapters.xgboost.levelwise.bins import Bins, agree_on_bins
from fl_adapters.xgboost.levelwise.grower import Grower, Tree
from fl_adapters.xgboost.levelwise.objectives import Objective, Units
from fl_adapters.xgboost.levelwise.splits import Regularisation

SITES = len(d.SIZES)
DEPTH = 5
NEWER: dict[str, Any] = {"gain_from_weights": installed_version() >= (3, 4)}

PARAMS: dict[str, dict[str, float]] = {
    "defaults": {},
    "no penalty": {"reg_lambda": 0.0, "min_child_weight": 0.0},
    "lasso": {"reg_alpha": 1.5, "eta": 1.0},
    "gamma": {"min_split_loss": 3.0, "eta": 0.1},
    "heavy children": {"min_child_weight": 20.0, "reg_lambda": 5.0},
    "one leaf": {"min_split_loss": 1e9},
}
CASES = [(chosen, "binary:logistic") for chosen in PARAMS] + [
    ("defaults", "reg:squarederror"),
    ("lasso", "reg:squarederror"),
    ("defaults", "multi:softprob"),
]


def columns_at(x: Any) -> list[tuple[Any, Any]]:
    return [(np.flatnonzero(~np.isnan(column)), column[~np.isnan(column)]) for column in x.T]


def agreed(federation: ThreadedFederation, x: Any = d.X, max_bin: int = 32, min_rows: int = 5) -> Bins:
    mine = x[d.rows(federation.site.index)]
    return agree_on_bins(federation, [values for _, values in columns_at(mine)], max_bin, min_rows)


@pytest.fixture(scope="module")
def bins() -> Bins:
    found = run_sites(SITES, agreed)
    for other in found[1:]:
        assert all(np.array_equal(*pair) for pair in zip(found[0].cuts, other.cuts, strict=True))
    return found[0]


def boost(
    federation: ThreadedFederation, bins: Bins, name: str, params: dict[str, float], rounds: int
) -> tuple[list[Tree], list[Any]]:
    """The trees, and this site's quantised gradients."""
    mine, outputs = d.rows(federation.site.index), 3 if name.startswith("multi") else 1
    x, labels = d.X[mine], d.LABELS[name]
    objective = Objective(name, labels[mine].astype(float), d.WEIGHTS[mine].astype(float), outputs)
    units = Units(float(np.abs(labels).max() * 3), 3.0, grows=name.startswith("reg"))
    grower = Grower(bins, bins.place(columns_at(x), len(x)), Regularisation(**params, **NEWER), DEPTH)
    margins = np.zeros((outputs, len(x)), np.float32)
    grown, gradients = [], []
    for _ in range(rounds):
        quantised = units.quantised(objective.gradients(margins))
        trees, values = grower.grow(quantised, units.scales, lambda own: federation.sum({"h": own})["h"])
        gradients.append(quantised * units.scales)
        margins += values
        units.move(max(max(map(abs, tree.leaves())) for tree in trees))
        grown += trees
    return grown, gradients


def hist(bins: Bins, gradients: list[Any], params: dict[str, float]) -> list[dict[str, Any]]:
    """The trees that XGBoost grows on all rows, in these bins, from the same gradients."""
    rounds = iter(gradients)
    cuts = {
        "cuts": np.concatenate(bins.cuts),
        "cut_ends": np.cumsum([len(c) for c in bins.cuts]),
        "levels": np.zeros(len(bins.cuts), np.int64),
    }
    rows = reference_rows(cuts)
    reference = xgboost.QuantileDMatrix(rows, max_bin=len(rows))
    outputs = gradients[0].shape[0]
    data = xgboost.QuantileDMatrix(d.X, label=np.zeros(len(d.X)), ref=reference, max_bin=len(rows))
    booster = xgboost.train(
        {
            **{"max_depth": DEPTH, "tree_method": "hist", "max_bin": len(rows), "nthread": 1, "base_score": 0.0},
            **({"num_class": outputs, "objective": "multi:softprob"} if outputs > 1 else {}),
            **params,
        },
        data,
        len(gradients),
        obj=lambda *_: tuple(np.squeeze(part) for part in np.moveaxis(next(rounds), -1, 0).transpose(0, 2, 1)),
    )
    return tree_documents(booster)


def tree_documents(booster: xgboost.Booster) -> list[dict[str, Any]]:
    model = json.loads(booster.save_raw("json"))["learner"]["gradient_booster"]["model"]
    return list(model["trees"])


def assert_same_tree(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    for name in ("left_children", "right_children", "parents", "split_indices", "default_left"):
        assert list(ours[name]) == list(theirs[name]), name
    for name in ("base_weights", "loss_changes", "sum_hessian"):
        np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-6, atol=1e-7, err_msg=name)
    mine, others = (np.clip(np.asarray(t["split_conditions"], np.float32), -1e6, 1e6) for t in (ours, theirs))
    inner = np.asarray(ours["left_children"]) >= 0
    whole = np.isin(np.abs(mine), 1e6)  # splits present from missing values: XGBoost's bound is another
    np.testing.assert_array_equal(mine[inner & ~whole], others[inner & ~whole])
    np.testing.assert_array_equal(mine[~inner], others[~inner])


@pytest.mark.parametrize(("chosen", "objective"), CASES)
def test_trees_equal_those_of_hist_on_all_rows(bins: Bins, chosen: str, objective: str) -> None:
    found = run_sites(SITES, lambda federation: boost(federation, bins, objective, PARAMS[chosen], 3))
    trees = [[tree.document(0, d.X.shape[1]) for tree in grown] for grown, _ in found]
    assert repr(trees) == repr([trees[0]] * SITES)
    gradients = [np.concatenate(parts, axis=1) for parts in zip(*(told for _, told in found), strict=True)]
    oracle = hist(bins, gradients, PARAMS[chosen])
    assert len(trees[0]) == len(oracle) and (chosen == "one leaf") == (len(oracle[0]["parents"]) == 1)
    for ours, theirs in zip(trees[0], oracle, strict=True):
        assert_same_tree(ours, theirs)


@pytest.mark.parametrize("name", ["breast_cancer", "adult"])
def test_trees_on_real_data_equal_those_of_hist_on_all_rows(
    name: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each column of text is its codes, in the order of the alphabet."""
    if name == "adult":
        table = pd.read_csv(request.getfixturevalue("shared_data") / "adult" / "adult_train.csv.gz")
        y = table.pop("income").str.contains(">50K").to_numpy(int)
        x = np.column_stack([v if v.dtype.kind in "if" else v.astype("category").cat.codes for _, v in table.items()])
    else:
        x, y = load_breast_cancer(return_X_y=True)
    x = x.astype(np.float32)
    monkeypatch.setattr(d, "X", x)
    monkeypatch.setattr(d, "LABELS", {"binary:logistic": y})
    monkeypatch.setattr(d, "WEIGHTS", np.ones(len(y), np.float32))
    monkeypatch.setattr(d, "CUTS", (np.array([0, 0.5, 0.52, 0.8, 0.9, 1]) * len(y)).astype(int))
    bins = run_sites(SITES, lambda federation: agreed(federation, x))[0]
    found = run_sites(SITES, lambda federation: boost(federation, bins, "binary:logistic", {}, 3))
    trees = [[tree.document(0, x.shape[1]) for tree in grown] for grown, _ in found]
    assert repr(trees) == repr([trees[0]] * SITES)
    gradients = [np.concatenate(parts, axis=1) for parts in zip(*(told for _, told in found), strict=True)]
    oracle = hist(bins, gradients, {})
    assert len(oracle) == 3 and all(len(tree["parents"]) > 15 for tree in oracle)
    for ours, theirs in zip(trees[0], oracle, strict=True):
        assert_same_tree(ours, theirs)


def test_bins_hold_about_as_many_rows_each_and_keep_whole_numbers_apart(bins: Bins) -> None:
    for feature in (0, 1):
        values = d.X[:, feature][~np.isnan(d.X[:, feature])]
        held = np.histogram(values, [-np.inf, *bins.cuts[feature], np.inf])[0]
        assert len(held) == 32 and held.max() < 2 * len(values) / 32
    for feature, levels in ((3, [0, 1]), (5, [2.5]), (6, [1])):
        assert np.searchsorted(bins.cuts[feature], levels, side="right").tolist() == list(range(len(levels)))
    ages = run_sites(SITES, lambda f: agreed(f, max_bin=128))[0].cuts[2]
    assert np.unique(np.searchsorted(ages, np.arange(17, 90), side="right")).size == 73


def test_a_rare_value_is_not_looked_at_closely() -> None:
    x = np.round(d.X[:, :1] * 2)
    x[7] = 3.14159e7
    cuts = run_sites(SITES, lambda f: agreed(f, x))[0].cuts[0]
    assert cuts[-1] == np.float32(2.0**24 * 1.75)  # the first eight and four bits
