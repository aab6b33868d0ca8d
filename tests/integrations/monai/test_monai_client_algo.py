"""Existing client algorithms, driven by our rounds."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import monai_bundles
import monai_models as m
import numpy as np
import pytest
import torch
from monai.fl.client import ClientAlgo, MonaiAlgo, MonaiAlgoStats
from monai.fl.utils.constants import ExtraItems, FlStatistics, WeightType
from monai.fl.utils.exchange_object import ExchangeObject

from fl_adapters.monai import run_client_algo
from fl_runtime.errors import ConfigError


class Adding(ClientAlgo):
    """A client algorithm that adds its step to every weight, and sends weights or differences."""

    def __init__(self, step: float, *, differences: bool = False, gives: Any = None) -> None:
        self.step, self.differences, self.gives = step, differences, gives
        self.calls: list[str] = []
        self.weights = {"w": torch.ones(3), "own": torch.zeros(2), "n": torch.tensor(4)}

    def initialize(self, extra: Any = None) -> None:
        self.calls.append(f"initialize {extra[ExtraItems.CLIENT_NAME]}")

    def train(self, data: ExchangeObject, extra: Any = None) -> None:
        assert data.weight_type == WeightType.WEIGHTS
        if self.step < 0:
            raise RuntimeError("cannot train")
        self.calls.append("train")
        self.got = {name: tensor.clone() for name, tensor in data.weights.items()}
        self.weights = {**self.weights, **data.weights}
        self.weights = {name: tensor + int(self.step) for name, tensor in self.weights.items()}

    def get_weights(self, extra: Any = None) -> ExchangeObject:
        if self.gives is not None:
            return self.gives
        if not self.differences or "train" not in self.calls:
            return ExchangeObject(weights=dict(self.weights), weight_type=WeightType.WEIGHTS)
        given = {name: self.weights[name] - self.got[name] for name in self.got}
        statistics = {FlStatistics.NUM_EXECUTED_ITERATIONS: 5}
        return ExchangeObject(weights=given, weight_type=WeightType.WEIGHT_DIFF, statistics=statistics)

    def evaluate(self, data: ExchangeObject, extra: Any = None) -> ExchangeObject:
        return ExchangeObject(metrics={"val_mean": data.weights["w"].mean()})

    def finalize(self, extra: Any = None) -> None:
        self.calls.append("finalize")

    def abort(self, extra: Any = None) -> None:
        self.calls.append("abort")


@pytest.mark.parametrize("differences", [True, False])
def test_weights_and_differences(federation, differences) -> None:
    run = federation(sites=2, rounds=2)
    algos = [Adding(1, differences=differences), Adding(4, differences=differences)]

    def site(place: Any) -> Any:
        return run_client_algo(algos[place.index], kit=place.kit, num_examples=[1, 2][place.index], keep_local=["own"])

    first, second = run.run(site).values()
    mean = 1 + 2 * (1 + 2 * 4) / 3
    assert first.weight_type == WeightType.WEIGHTS and set(first.weights) == {"w", "n"}
    for final in (first, second):
        assert final.weights["w"].tolist() == pytest.approx([mean] * 3)
    assert np.allclose(run.model()["w"], mean) and int(run.model()["n"]) == 12  # the larger one, twice
    assert algos[0].calls == ["initialize site-1", "train", "train", "finalize"]
    scores = [e.data["metrics"]["mean"] for e in run.events if e.kind == "report" and e.site == "site-1"]
    assert scores == pytest.approx([1 + (mean - 1) / 2, mean])
    steps = {e.data["local_steps"] for e in run.events if e.kind == "update"}
    assert steps == ({5} if differences else {0})


def test_singular_vectors_of_spectral_normalisation_stay(federation) -> None:
    run = federation(sites=1, rounds=1)

    def site(place: Any) -> None:
        algo = Adding(1)
        network = torch.nn.utils.parametrizations.spectral_norm(torch.nn.Linear(3, 2))
        algo.trainer, algo.weights = SimpleNamespace(network=network), dict(network.state_dict())
        run_client_algo(algo, kit=place.kit, num_examples=1, evaluate_global=False)

    run.run(site)
    assert sorted(run.model()) == ["bias", "parametrizations.weight.original"]


def test_alone_it_trains_once() -> None:
    for differences in (True, False):
        algo = Adding(1, differences=differences)
        final = run_client_algo(algo)
        assert final.weight_type == WeightType.WEIGHTS and final.weights["w"].tolist() == [2, 2, 2]
        assert algo.calls == ["initialize local", "train", "finalize"]
    with pytest.raises(ConfigError, match="required=True"):
        run_client_algo(algo, required=True)


def test_algorithm_that_fails_is_aborted_and_leaves(federation) -> None:
    run = federation(sites=2, rounds=2, min_sites=1)
    algos = [Adding(1), Adding(-1)]
    outcomes = run.outcomes(
        {p.name: lambda p: run_client_algo(algos[p.index], kit=p.kit, num_examples=1) for p in run.places}, check=False
    )
    assert outcomes["site-1"].error is None and "cannot train" in str(outcomes["site-2"].error)
    assert algos[1].calls == ["initialize site-2", "abort", "finalize"]
    assert len(run.result().rounds) == 2


@pytest.mark.parametrize(
    ("algo", "given", "problem"),
    [
        (Adding(1), {}, "num_examples="),
        (Adding(1, gives=ExchangeObject()), {"num_examples": 1}, "initial="),
        (Adding(1, gives=ExchangeObject()), {"num_examples": 1, "initial": {"w": torch.ones(1)}}, "gave no weights"),
    ],
)
def test_what_is_missing_is_named(federation, algo, given, problem) -> None:
    with pytest.raises(ConfigError, match=problem):
        run_client_algo(algo, kit=federation().places[0].kit, **given)


def test_evaluation_that_there_is_not(federation) -> None:
    class Blind(Adding):
        evaluate = ClientAlgo.evaluate

    run = federation()
    with pytest.raises(ConfigError, match="cannot evaluate"):
        run_client_algo(Blind(1), kit=run.places[0].kit, num_examples=1, evaluate_global=True)
    run = federation(rounds=1)
    run_client_algo(Blind(1), kit=run.places[0].kit, num_examples=1)
    assert [e for e in run.events if e.kind == "report"] == []


def test_names_that_differ_between_sites_are_refused(federation) -> None:
    run = federation(sites=2)

    def site(place: Any) -> Any:
        algo = Adding(1)
        algo.weights[place.name] = torch.zeros(1)
        return run_client_algo(algo, kit=place.kit, num_examples=1)

    outcomes = run.outcomes({place.name: site for place in run.places}, check=False)
    assert all("site-1" in str(outcome.error) for outcome in outcomes.values())


def bundle(folder: Path, **more: Any) -> str:
    """Write a bundle with an evaluation configuration beside its training."""
    made = monai_bundles.config(**more)
    made["train"]["dataset"] = made["train"]["trainer"]["train_data_loader"]["dataset"]
    made["validate"]["dataset"] = made["validate"]["evaluator"]["val_data_loader"]["dataset"]
    root = monai_bundles.write(folder, made)
    Path(root, "configs", "evaluate.json").write_text('{"run": "$@validate#evaluator.run()"}')
    return root


@pytest.mark.parametrize("differences", [True, False])
def test_monais_own_algorithm(federation, tmp_path, differences) -> None:
    run = federation(sites=2, rounds=2)
    root = bundle(tmp_path / "bundle")
    algos = [MonaiAlgo(root, local_epochs=1, send_weight_diff=differences) for _ in range(2)]
    finals = list(run.run(lambda place: run_client_algo(algos[place.index], kit=place.kit)).values())
    assert len(run.result().rounds) == 2
    updates = [e.data for e in run.events if e.kind == "update"]
    assert {(data["num_examples"], data["local_steps"]) for data in updates} == {(6, 3)}
    scores = [e.data["metrics"] for e in run.events if e.kind == "report"]
    assert len(scores) == 4 and all("mean_dice" in score for score in scores)
    for algo, final in zip(algos, finals, strict=True):
        assert m.same(m.weights(algo.trainer.network), run.model())
        assert m.same({n: t.numpy() for n, t in final.weights.items()}, run.model())


def test_statistics_of_the_data_go_once_and_only_if_asked_for(federation, tmp_path) -> None:
    files = monai_bundles.nifti(tmp_path / "volumes")
    root = bundle(tmp_path / "bundle", files=files, dataset_dir=str(tmp_path / "volumes"))
    asked = {FlStatistics.HIST_BINS: [10], FlStatistics.HIST_RANGE: [[0, 1]]}
    run = federation(rounds=2)
    run_client_algo(
        MonaiAlgo(root, local_epochs=1, config_evaluate_filename=None),
        kit=run.places[0].kit,
        stats=MonaiAlgoStats(root),
        stats_extra=asked,
    )
    told = [e.data["metrics"] for e in run.events if e.kind == "update"]
    assert told[0]["stats/train/data_count"] == 4 and told[0]["stats/train/fail_count"] == 0
    assert any(name.startswith("stats/train/data_stats/image_stats") for name in told[0])
    assert not any(name.startswith("stats/") for name in told[1])


def test_the_models_of_other_sites(federation) -> None:
    """A site's own model is what it has sent: its step on top of the mean of the round before."""
    run = federation(sites=2, rounds=2, cross_site=True)
    steps = [1, 4]
    finals = run.run(
        lambda place: run_client_algo(Adding(steps[place.index]), kit=place.kit, num_examples=1, keep_local=["own"])
    )
    run.result()
    before, mean = 1 + 2.5, 1 + 2 * 2.5
    wanted = {"global": mean, "site-1": before + 1, "site-2": before + 4}
    (event,) = [e for e in run.events if e.kind == "cross_site"]
    for model, row in event.data["matrix"].items():
        assert {site: metrics["mean"] for site, metrics in row.items()} == pytest.approx(
            dict.fromkeys(("site-1", "site-2"), wanted[model])
        )
    assert all(final.weights["w"].tolist() == pytest.approx([mean] * 3) for final in finals.values())
