"""Training under differential privacy in plain PyTorch loops: running statistics beside noise, and DP-SGD."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, TensorDataset, WeightedRandomSampler

from fl_adapters import DPSGD, ConfigError, PrivacyBudgetError
from fl_adapters.environments.report.privacy import PrivacyCosts
from fl_adapters.participant.kit import read_kit
from fl_adapters.participant.options import Every
from fl_adapters.testing import LocalFederation, Place
from fl_adapters.torch import FederatedLoop
from fl_adapters.torch.local_work.dp_sgd import Batches, PrivateTraining
from fl_runtime.filters.base import FilterHost
from fl_runtime.filters.calibration import Participation
from fl_runtime.filters.ledger import BudgetLimit, Ledger, Mechanism, PrivacyBudget

dp_accounting = pytest.importorskip("dp_accounting")

ROUNDS = 4


def network(norm: str = "batch") -> nn.Module:
    torch.manual_seed(0)
    layer = nn.BatchNorm1d(32) if norm == "batch" else nn.GroupNorm(4, 32)
    return nn.Sequential(nn.Linear(8, 32), layer, nn.ReLU(), nn.Linear(32, 2))


def data(index: int, rows: int = 64) -> Any:
    generator = torch.Generator().manual_seed(index)
    x = torch.randn(rows, 8, generator=generator) * 5 + index  # so that statistics are far from their first values
    y = (x[:, 0] > index).long()
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=16)


def train(place: Place, norm: str = "batch") -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """Return the model after the run, and its state when the last round's training had ended."""
    model = network(norm)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    before: dict[str, torch.Tensor] = {}
    for round in FederatedLoop(model, optimizer, kit=place.kit).rounds(data(place.index)):
        for x, y in round:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return model, before


@pytest.mark.parametrize("at", ["site_out", "server_in"])
def test_running_statistics_stay_at_their_site_and_every_output_is_finite(
    at: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    dp = {"name": "GaussianDP", "epsilon": 8, "clip": 0.5, "at": at}
    with LocalFederation(sites=2, rounds=ROUNDS, filters=(dp,), folder=tmp_path) as federation:
        trained = federation.run(train)
        final = federation.model()
    first = network().state_dict()
    statistics = [name for name in first if name.endswith(("running_mean", "running_var"))]
    assert len(statistics) == 2
    for index, (model, before) in enumerate(trained.values()):
        state = model.state_dict()
        for name in statistics:
            torch.testing.assert_close(state[name], before[name], rtol=0, atol=0)  # its own, of its last training
            np.testing.assert_array_equal(final[name], first[name].numpy())  # nothing of it has left
        assert state["1.running_var"].min() > 0
        for name in state.keys() - set(statistics):
            np.testing.assert_array_equal(state[name].numpy(), final[name])
        model.eval()
        assert torch.isfinite(model(next(iter(data(index)))[0])).all()
    assert "2 running statistics (1.running_mean, 1.running_var) stay at this site" in capfd.readouterr().err
    with_filters = [event.data["filters"] for event in federation.events if event.kind == "update"]
    assert all(ran[0]["name"] == "ExcludeVars" and "*.running_var" in ran[0]["names"] for ran in with_filters)


def test_layers_without_statistics_travel_whole(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    dp = {"name": "GaussianDP", "epsilon": 8, "clip": 0.5}
    with LocalFederation(sites=2, rounds=1, filters=(dp,), folder=tmp_path) as federation:
        trained = federation.run(lambda place: train(place, "group")[0].state_dict())
        final = federation.model()
    assert "stay at this site" not in capfd.readouterr().err
    for state in trained.values():
        for name, tensor in state.items():
            np.testing.assert_array_equal(tensor.numpy(), final[name])


# -- DP-SGD --------------------------------------------------------------------------------------------------


def needs_opacus() -> Any:
    return pytest.importorskip("opacus", reason="DP-SGD needs opacus: pip install fl-adapters[dp]")


CLASSIFIER = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 2))


def classifier() -> nn.Module:
    """Return the same untrained model in every thread."""
    return copy.deepcopy(CLASSIFIER)


def rows(index: int, count: int = 64) -> TensorDataset:
    generator = torch.Generator().manual_seed(index)
    x = torch.randn(count, 8, generator=generator)
    return TensorDataset(x, (x[:, 0] + 0.1 * index > 0).long())


def steps(model: nn.Module, batches: Any, optimizer: torch.optim.Optimizer) -> None:
    for x, y in batches:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


def trained(place: Place, dp_sgd: DPSGD | None, loader: Any = None, model: nn.Module | None = None) -> nn.Module:
    model = model or classifier()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    loop = FederatedLoop(model, optimizer, kit=place.kit, dp_sgd=dp_sgd)
    for round in loop.rounds(loader or DataLoader(rows(place.index), batch_size=16)):
        steps(model, round, optimizer)
    return model


def exact(noise: float, count: int, sampling: float = 1.0, delta: float = 1e-5) -> float:
    """Epsilon by dp-accounting of `count` releases for one record, present or absent."""
    event: Any = dp_accounting.GaussianDpEvent(noise)
    if sampling < 1:
        event = dp_accounting.PoissonSampledDpEvent(sampling, event)
    accountant = dp_accounting.pld.PLDAccountant()
    accountant.compose(event, count)
    return float(accountant.get_epsilon(delta))


def test_without_noise_and_with_a_wide_clip_it_is_plain_sgd() -> None:
    needs_opacus()
    results = []
    for dp_sgd in (None, DPSGD(max_grad_norm=1e6, noise_multiplier=1e-12)):
        with LocalFederation(sites=2, rounds=2) as federation:
            federation.run(lambda place, dp_sgd=dp_sgd: trained(place, dp_sgd))
            results.append(federation.model())
    for name in results[0]:
        np.testing.assert_allclose(results[1][name], results[0][name], rtol=1e-4, atol=1e-5)


def test_each_records_gradient_is_clipped() -> None:
    """One step, compared with gradients that are computed and clipped record by record."""
    needs_opacus()
    clip, data = 0.05, rows(0, 16)
    plain = classifier()
    total = [torch.zeros_like(p) for p in plain.parameters()]
    for x, y in data:
        gradients = torch.autograd.grad(nn.functional.cross_entropy(plain(x[None]), y[None]), list(plain.parameters()))
        norm = torch.sqrt(sum((g**2).sum() for g in gradients))
        assert norm > clip
        total = [t + g * (clip / norm) for t, g in zip(total, gradients, strict=True)]
    expected = [p - 0.1 * t / 16 for p, t in zip(plain.parameters(), total, strict=True)]

    with LocalFederation(sites=1, rounds=1) as federation:
        loader = DataLoader(data, batch_size=16)
        dp_sgd = DPSGD(max_grad_norm=clip, noise_multiplier=1e-9)
        (model,) = federation.run(lambda place: trained(place, dp_sgd, loader)).values()
    for found, wanted in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
    assert not any(hasattr(p, "grad_sample") for p in model.parameters()), "the model is as it was"


def test_the_noise_of_10000_draws_has_the_stated_size_and_is_not_that_of_torchs_seed() -> None:
    needs_opacus()
    draws = []
    for _ in range(2):
        model = nn.Linear(100, 100, bias=False)
        nn.init.zeros_(model.weight)

        def site(place: Place, model: nn.Module = model) -> None:
            optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
            dp_sgd = DPSGD(max_grad_norm=0.5, noise_multiplier=3.0)
            loader = DataLoader(TensorDataset(torch.zeros(8, 100)), batch_size=8)
            for round in FederatedLoop(model, optimizer, kit=place.kit, dp_sgd=dp_sgd).rounds(loader):
                for (x,) in round:
                    torch.manual_seed(7)
                    optimizer.zero_grad()
                    model(x).pow(2).mean().backward()  # gradients of zero: what is left is noise
                    optimizer.step()

        with LocalFederation(sites=1, rounds=1) as federation:
            federation.run(site)
        draws.append(model.weight.detach().numpy().reshape(-1).astype(np.float64))
    sigma = 3.0 * 0.5 / 8
    for noise in draws:
        assert noise.size == 10_000
        assert abs(noise.mean()) < 5 * sigma / 100
        assert noise.std() == pytest.approx(sigma, rel=5 / (2 * 10_000) ** 0.5)
        assert (np.abs(noise) < sigma).mean() == pytest.approx(0.6827, abs=0.025)
    assert abs(np.corrcoef(*draws)[0, 1]) < 0.05


@pytest.mark.parametrize("poisson", [False, True], ids=["shuffled", "poisson"])
def test_epsilon_is_that_of_dp_accounting_and_is_in_ledger_and_history(poisson: bool, tmp_path: Path) -> None:
    needs_opacus()
    from opacus.data_loader import DPDataLoader

    def site(place: Place) -> None:
        loader = DataLoader(rows(place.index), batch_size=16, shuffle=True)
        trained(
            place, DPSGD(epsilon=6, max_grad_norm=0.5), DPDataLoader.from_data_loader(loader) if poisson else loader
        )

    with LocalFederation(sites=2, rounds=3, folder=tmp_path) as federation:
        federation.run(site)
        rounds = federation.server.result().rounds
        entries = Ledger(Path(read_kit(federation.places[0].kit).folder)).entries()
        told = PrivacyCosts()
        for event in federation.events:
            if event.kind == "registered":
                told.registered(event.site, event.data["info"])
            elif event.kind == "update":
                told.update(event.round, event.site, event.data["metrics"], [])
    assert [(e.round, e.filter, e.mechanism.unit) for e in entries] == [(n, "DPSGD", "record") for n in (1, 2, 3)]
    release = entries[0].mechanism
    assert (release.sampling, release.count) == ((0.25, 4) if poisson else (1.0, 1))
    for done, result in enumerate(rounds, 1):
        expected = exact(release.noise, release.count * done, release.sampling)
        assert result.metrics["dp_sgd_epsilon"] == pytest.approx(expected, rel=0.01)
        for cost in told.found:  # what the report shows of each site
            assert cost.epsilon[done] == pytest.approx(expected, rel=0.01)
    assert sorted((cost.mechanism, cost.owner, cost.delta) for cost in told.found) == [
        ("DP-SGD", "site-1", 1e-5),
        ("DP-SGD", "site-2", 1e-5),
    ]
    assert result.metrics["dp_sgd_epsilon"] == pytest.approx(6, rel=0.01)


def test_the_budget_counts_over_restarts_and_is_refused_before_training(tmp_path: Path) -> None:
    needs_opacus()
    with LocalFederation(sites=1, rounds=2, folder=tmp_path) as federation:
        kit = read_kit(federation.places[0].kit)
        spent = Mechanism("gaussian", 1.0, unit="record", count=3)
        Ledger(Path(kit.folder)).spend("test", 1, "DPSGD", [spent], [])
        Ledger(Path(kit.folder)).spend("test", 1, "GaussianDP", [Mechanism("gaussian", 0.01)], [])  # of another unit
        with pytest.raises(PrivacyBudgetError, match="a single record of a site's data"):
            federation.run(lambda place: trained(place, DPSGD(epsilon=4)))
    assert exact(1.0, 3) > 4


def test_a_budget_of_the_site_counts_the_records_of_all_jobs(tmp_path: Path) -> None:
    needs_opacus()
    limit = BudgetLimit(PrivacyBudget(5.0, 1e-5), "site-1", all_jobs=True)
    host = FilterHost("site-1", "second", tmp_path, budget=limit, participation=Participation.every_round(2))
    model = classifier()
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1)]
    batches = Batches.of(DataLoader(rows(0), batch_size=16))
    settings = DPSGD(epsilon=4)
    training = PrivateTraining(settings, model, optimizers, batches, Every(epochs=1), host)
    training.begin(1)
    training.close()
    earlier = Mechanism("gaussian", 1.5, unit="record", count=2)
    Ledger(tmp_path).spend("first", 1, "DPSGD", [earlier], [])
    again = PrivateTraining(settings, model, optimizers, batches, Every(epochs=1), host)
    with pytest.raises(PrivacyBudgetError, match="for all jobs; so far .* a single record"):
        again.begin(1)


def weighted(data: TensorDataset) -> DataLoader[Any]:
    return DataLoader(data, batch_size=16, sampler=WeightedRandomSampler(torch.ones(64), 64))


@pytest.mark.parametrize(
    ("case", "text"),
    [
        ("batch norm", r"cannot train this model with DP-SGD because of 1.*GroupNorm"),
        ("weighted sampler", r"cannot tell how often a record is drawn.*WeightedRandomSampler"),
        ("weighted batch sampler", r"cannot tell how often a record is drawn.*WeightedRandomSampler"),
        ("steps", "needs rounds of whole epochs, but every is 2 steps"),
        ("accumulation", "a step after every batch"),
        ("unused parameter", "the parameter 4.weight is trained, but the loss gives it no gradients"),
        ("restart", "exact_restart, which DP-SGD does not support"),
        ("no budget", "neither a budget nor noise"),
    ],
)
def test_what_dp_sgd_cannot_do_is_refused_in_words(case: str, text: str) -> None:
    needs_opacus()

    def site(place: Place) -> None:
        model = network() if case == "batch norm" else classifier()
        if case == "unused parameter":
            model.add_module("4", nn.Linear(3, 3))
            model.forward = lambda x: model[3](model[2](model[1](model[0](x))))  # type: ignore[method-assign]
        dp_sgd = DPSGD(epsilon=None if case == "no budget" else 8)
        loader = weighted(rows(0)) if case == "weighted sampler" else DataLoader(rows(0), batch_size=16)
        if case == "weighted batch sampler":
            loader = DataLoader(rows(0), batch_sampler=BatchSampler(weighted(rows(0)).sampler, 16, False))
        if case != "accumulation":
            trained(place, dp_sgd, loader, model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for round in FederatedLoop(model, optimizer, kit=place.kit, dp_sgd=dp_sgd).rounds(loader):
            for number, (x, y) in enumerate(round):
                nn.functional.cross_entropy(model(x), y).backward()
                if number % 2:
                    optimizer.step()
                    optimizer.zero_grad()

    settings: dict[str, Any] = {"every": 2} if case == "steps" else {"exact_restart": case == "restart"}
    with LocalFederation(sites=1, rounds=1, **settings) as federation:
        with pytest.raises(ConfigError) as caught:
            federation.run(site)
    assert re.search(text, str(caught.value), re.DOTALL)


def test_outside_a_federation_it_says_that_no_noise_is_added(
    capfd: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.delenv("FL_ADAPTERS_KIT", raising=False)
    model = classifier()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loop = FederatedLoop(model, optimizer, dp_sgd=DPSGD(epsilon=8))
    for round in loop.rounds(DataLoader(rows(0), batch_size=16)):
        steps(model, round, optimizer)
    assert "outside a federation dp_sgd has no effect" in capfd.readouterr().err
