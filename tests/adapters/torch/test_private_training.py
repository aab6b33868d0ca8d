"""Training under differential privacy: running statistics beside noise, in plain PyTorch loops."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fl_adapters.testing import LocalFederation, Place
from fl_adapters.torch import FederatedLoop

pytest.importorskip("dp_accounting")

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
