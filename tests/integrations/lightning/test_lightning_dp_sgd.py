"""DP-SGD beneath a Lightning Trainer: one more argument of the callback, the ledger counts records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning_models as m
import numpy as np
import pytest
from torch import nn

from fl_adapters import DPSGD, ConfigError
from fl_adapters.lightning import FederatedCallback
from fl_adapters.participant.kit import read_kit
from fl_adapters.testing import LocalFederation, Place
from fl_runtime.filters.ledger import Ledger, epsilon

pytest.importorskip("opacus", reason="DP-SGD needs opacus: pip install fl-adapters[dp]")


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.GroupNorm(2, 8), nn.ReLU(), nn.Linear(8, 2))


def trained(dp_sgd: DPSGD | None, name: str, net: nn.Module | None = None, **options: Any) -> Any:
    """Return (final global weights, rounds, ledger entries) of one site's two rounds."""
    pl = m.package(name)

    def site(place: Place) -> None:
        import torch

        torch.manual_seed(0)
        module = m.module(pl, net=net or network(), kind="sgd")
        m.trainer(FederatedCallback(kit=place.kit, dp_sgd=dp_sgd), pl=pl, **options).fit(module, m.loader())

    with LocalFederation(sites=1, rounds=2, states=m.STATES) as federation:
        federation.run(site)
        entries = Ledger(Path(read_kit(federation.places[0].kit).folder)).entries()
        return federation.model(), federation.server.result().rounds, entries


@pytest.mark.parametrize("name", m.PACKAGES)
def test_without_noise_and_with_a_wide_clip_the_trainer_learns_as_without(name: str) -> None:
    plain, _, none = trained(None, name)
    private, _, entries = trained(DPSGD(max_grad_norm=1e6, noise_multiplier=1e-12), name)
    assert none == [] and len(entries) == 2
    for tensor, values in plain.items():
        np.testing.assert_allclose(private[tensor], values, rtol=1e-3, atol=1e-5)


def test_the_budget_is_used_up_by_the_last_round_and_shown_in_the_history() -> None:
    _, rounds, entries = trained(DPSGD(epsilon=8), m.PACKAGES[0])
    assert [(e.round, e.filter, e.mechanism.unit, e.mechanism.count) for e in entries] == [
        (1, "DPSGD", "record", 1),
        (2, "DPSGD", "record", 1),
    ]
    assert epsilon([e.mechanism for e in entries], 1e-5) == pytest.approx(8, rel=1e-3)
    assert rounds[-1].metrics["dp_sgd_epsilon"] == pytest.approx(8, rel=1e-3)


def test_what_opacus_cannot_train_is_refused_in_words() -> None:
    with pytest.raises(ConfigError, match="because of net.1"):
        trained(DPSGD(epsilon=8), m.PACKAGES[0], m.network())
    with pytest.raises(ConfigError, match="a step after every batch"):
        trained(DPSGD(epsilon=8), m.PACKAGES[0], accumulate_grad_batches=2)
