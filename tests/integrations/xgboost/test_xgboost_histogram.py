"""Histogram mode: the same trees as XGBoost's own collective, and as training on all rows in one place."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xgboost
import xgboost_data as d
import xgboost_plain_rabit

import fl_adapters
from fl_adapters.testing import LocalFederation
from fl_adapters.xgboost import engine, train
from fl_adapters.xgboost.data import rows_of, summary
from fl_adapters.xgboost.engine import reference_rows
from fl_runtime.aggregation.metrics.quantiles import merged

pytest.importorskip("cryptography")
if sys.platform != "linux":
    pytest.skip("loopback addresses beside 127.0.0.1 are Linux's", allow_module_level=True)

ROUNDS = 4
MIN_ROWS = 3
NOT_CENTRAL = (
    "forests of classes",
    "dart",
    "dart of classes",
    "dropout without dart",
)  # sampling: each site draws for itself
NOT_CENTRAL += ("absolute error",)  # XGBoost takes the mean of the workers' medians for a leaf
KINDS = [kind for kind in d.KINDS if kind != "exact"]


def federated(kind: str, rounds: int = ROUNDS, **options: Any) -> tuple[bytearray, dict[str, xgboost.Booster]]:
    """Train the sites; return the initial model and their boosters."""
    params, columns, obj = d.parts(kind)
    keeper = d.Keeper()
    callbacks = {"site-1": [keeper]}
    with LocalFederation(sites=d.SITES, sockets=True) as federation:
        boosters = federation.run(
            lambda place: train(
                params,
                d.matrix(place.index, **columns),
                rounds,
                obj=obj,
                mode="histogram",
                kit=place.kit,
                callbacks=callbacks.get(place.name),
                quantile_rows=MIN_ROWS,
                collective_timeout_s=30,
                **options,
            ),
            timeout_s=60,
        )
        federation.result()
    return keeper.models[0], boosters


def reference(kind: str) -> Any:
    """Return the rows from which all sites make the same bins."""
    params, columns, _ = d.parts(kind)
    matrices = [d.matrix(index, **columns) for index in range(len(d.SIZES))]
    told = [summary(rows_of(m), m.feature_types, params["max_bin"], MIN_ROWS, 0.0) for m in matrices]
    return reference_rows(merged(told))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, ...]]:
    """Kind of model -> (initial model, the sites' boosters, model of plain rabit)."""
    folder = tmp_path_factory.mktemp("rabit")
    found = {}
    for number, kind in enumerate(KINDS):
        found[kind] = federated(kind)
        np.savez(folder / f"{number}.npz", reference=reference(kind), model=np.frombuffer(found[kind][0], np.uint8))
    path = [str(Path(fl_adapters.__file__).parents[1]), str(Path(d.__file__).parent), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, xgboost_plain_rabit.__file__, folder, str(ROUNDS), *KINDS]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return {kind: (*found[kind], (folder / f"{n}.ubj").read_bytes()) for n, kind in enumerate(KINDS)}


def trees(model: bytes | bytearray) -> list[Any]:
    booster = xgboost.Booster(model_file=bytearray(model))
    learner = json.loads(booster.save_raw("json"))["learner"]["gradient_booster"]
    model = learner.get("gbtree", learner)["model"]
    return [model.get("weight_drop", learner.get("weight_drop")), model["trees"]]


@pytest.mark.parametrize("kind", KINDS)
def test_trees_are_those_of_plain_rabit(trained: Any, kind: str) -> None:
    _, boosters, plain = trained[kind]
    raw = {name: bytes(booster.save_raw("ubj")) for name, booster in boosters.items()}
    assert len(set(raw.values())) == 1
    assert trees(raw["site-1"]) == trees(plain)
    assert boosters["site-1"].num_boosted_rounds() == ROUNDS


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in NOT_CENTRAL])
def test_trees_are_those_of_all_rows_in_one_place(trained: Any, kind: str) -> None:
    initial, boosters, _ = trained[kind]
    central = xgboost_plain_rabit.grow(None, kind, reference(kind), initial, ROUNDS)
    ours, theirs = trees(boosters["site-2"].save_raw("ubj"))[1], trees(central.save_raw("ubj"))[1]
    for name in ("split_indices", "left_children", "default_left", "categories"):
        assert [tree[name] for tree in ours] == [tree[name] for tree in theirs]
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one["split_conditions"], other["split_conditions"], rtol=2e-5, atol=2e-6)


def test_workers_that_share_a_network_meet_in_it(trained: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without network namespaces, sites on one machine cannot listen on each other's ports."""
    monkeypatch.setattr(engine, "ISOLATED", False)
    _, boosters = federated("binary")
    assert boosters["site-1"].save_raw("ubj") == trained["binary"][1]["site-1"].save_raw("ubj")


def test_two_threads_grow_the_same_splits() -> None:
    params = d.BASE | {"objective": "binary:logistic", "nthread": 2}
    with LocalFederation(sites=2) as federation:
        boosters = federation.run(
            lambda place: train(params, d.matrix(place.index), 2, mode="histogram", kit=place.kit), timeout_s=60
        )
    assert boosters["site-1"].save_raw("ubj") == boosters["site-2"].save_raw("ubj")


RARE = np.random.default_rng(2).random((len(d.X), 2)) < 0.09


@pytest.mark.parametrize("kind", ["indicators", "present or missing", "small numbers", "both signs"])
def test_features_that_few_rows_of_each_site_have_are_split_on(kind: str) -> None:
    """Each site has fewer than `quantile_rows` rows of every feature; all sites together have enough."""
    draw = np.random.default_rng(4)
    values = {
        "indicators": np.where(RARE, 1.0, 0.0),
        "present or missing": np.where(RARE, 4e4, np.nan),
        "small numbers": np.where(RARE, draw.integers(1, 4, RARE.shape), 0.0),
        "both signs": np.where(RARE, draw.choice([-2.0, 3.0], RARE.shape), np.nan),
    }[kind]
    assert 12 < RARE[:, 0].sum() < 40 and RARE[:12].sum(0).max() < 10
    order = np.arange(len(d.X)) % 6  # six sites, fewer than ten rare rows each
    label = np.nan_to_num(values) @ np.array([1.0, -2.0]) / np.nanmax(np.abs(values))
    params = d.BASE | {
        "objective": "reg:squarederror",
        "base_score": 0.0,
        "eta": 1.0,
        "reg_lambda": 0.0,
        "max_bin": 256,
    }
    params["max_depth"] = 6

    def site(place: Any) -> xgboost.Booster:
        mine = order == place.index
        assert RARE[mine].sum(0).max() < 10
        return train(params, xgboost.DMatrix(values[mine], label[mine]), 4, mode="histogram", kit=place.kit)

    with LocalFederation(sites=6) as federation:
        booster = federation.run(site, timeout_s=60)["site-1"]
    everything = xgboost.DMatrix(values, label)
    central = xgboost.train(params, everything, 4)
    np.testing.assert_allclose(booster.predict(everything), central.predict(everything), atol=1e-5)
    np.testing.assert_allclose(booster.predict(everything), label, atol=1e-5)


def test_values_beyond_the_bins_are_predicted_as_they_were_trained() -> None:
    """Few rows lie far above the highest cut: a split of present from missing values must take them along."""
    x = np.where(np.arange(len(d.X)) % 3 == 0, np.nan, d.X[:, 0]).astype(np.float32)
    x[1::60] = 1e6
    label = np.isfinite(x).astype(float)
    params = d.BASE | {"objective": "reg:squarederror", "base_score": 0.0, "eta": 1.0, "reg_lambda": 0.0}

    def site(place: Any) -> xgboost.Booster:
        mine = d.rows(place.index)
        return train(params, xgboost.DMatrix(x[mine, None], label[mine]), 1, mode="histogram", kit=place.kit)

    with LocalFederation(sites=d.SITES) as federation:
        booster = federation.run(site, timeout_s=60)["site-1"]
    np.testing.assert_allclose(booster.predict(xgboost.DMatrix(x[:, None])), label, atol=1e-6)


@pytest.mark.skipif(xgboost.__version__ < "3.1", reason="before, the base score of classes is no function of means")
@pytest.mark.parametrize("classes", [2, 3])
def test_without_a_base_score_the_model_is_that_of_plain_xgboost(classes: int) -> None:
    """Whole numbers as features give the sites the bins of XGBoost; the sites' classes are distributed unevenly."""
    x, label = np.round(d.X * 2), np.minimum(d.CLASSES, classes - 1)
    order = np.argsort(label, kind="stable")
    multi = {"objective": "multi:softprob", "num_class": classes}
    params = d.BASE | ({"objective": "binary:logistic"} if classes == 2 else multi)

    def site(place: Any) -> xgboost.Booster:
        mine = order[d.rows(place.index)]
        data = xgboost.DMatrix(x[mine], label[mine])
        return train(params, data, ROUNDS, mode="histogram", kit=place.kit, quantile_rows=1)

    with LocalFederation(sites=d.SITES) as federation:
        booster = federation.run(site, timeout_s=60)["site-3"]
    everything = xgboost.DMatrix(x, label)
    central = xgboost.train(params, everything, ROUNDS)
    np.testing.assert_allclose(booster.predict(everything), central.predict(everything), atol=2e-5)


def test_quantiles_by_an_array() -> None:
    params = d.BASE | {"objective": "reg:quantileerror", "quantile_alpha": np.array([0.1, 0.9])}
    with LocalFederation(sites=2) as federation:
        boosters = federation.run(
            lambda place: train(params, d.matrix(place.index, d.REAL), 8, mode="histogram", kit=place.kit), timeout_s=60
        )
    low, high = boosters["site-1"].predict(d.matrix(None)).T
    assert (low < high).mean() > 0.9


def test_bins_are_close_to_those_of_xgboost() -> None:
    params = d.parts("binary")[0]
    own = xgboost.QuantileDMatrix(d.X, max_bin=params["max_bin"])
    agreed = xgboost.QuantileDMatrix(reference("binary"), max_bin=len(reference("binary")))
    shared = xgboost.QuantileDMatrix(d.X, max_bin=len(reference("binary")), ref=agreed)
    for feature in range(d.COLUMNS):
        ranks = []
        for matrix in (own, shared):
            starts, cuts = matrix.get_quantile_cut()
            inner = cuts[int(starts[feature]) + 1 : int(starts[feature + 1]) - 1]
            ranks.append((d.X[:, feature, None] < inner).mean(axis=0))
        count = min(map(len, ranks))
        assert count > 0.8 * params["max_bin"]
        assert np.abs(ranks[0][:count] - ranks[1][:count]).max() < 0.1


def test_a_summary_is_bounded_and_tells_no_value_of_few_rows() -> None:
    draw = np.random.default_rng(5)
    x = np.stack([draw.normal(size=20_000), draw.integers(0, 3, 20_000), np.where(np.arange(20_000) < 7, 1e6, 0)], 1)
    told = summary(rows_of(xgboost.DMatrix(x.astype(np.float32))), None, 16, 10, 0.0)
    assert [len(points) for points in told.points] == [pytest.approx(64, abs=2), 3, 1]
    assert not set(told.points[0].tolist()) & set(x[:, 0].astype(np.float32).tolist())
    assert told.points[2].tolist() == [0.0]  # the seven are counted, and not told
    assert [weights.sum() for weights in told.weights] == [20_000] * 3
    assert told.rest[2].tolist() == [0, 7]
    noisy = summary(rows_of(xgboost.DMatrix(x.astype(np.float32))), None, 16, 10, 0.5)
    assert not np.array_equal(noisy.points[0], told.points[0]) and np.all(np.diff(noisy.points[0]) > 0)
